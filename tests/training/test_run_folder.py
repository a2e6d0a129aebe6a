from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import keygrip
from keygrip.artifacts import write_json
from keygrip.config import SettingError, check_overrides, compose
from keygrip.evaluate import evaluation_output
from keygrip.launch import started_together
from keygrip.training import run_folder
from keygrip.training.results import read_result, write_result
from keygrip.training.resuming import checkpoint_to_resume
from keygrip.training.sweeps import collect


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("TORCHELASTIC_") or name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)
    run_folder.run_name.cache_clear()
    run_folder._claimed.cache_clear()
    yield
    run_folder.run_name.cache_clear()
    run_folder._claimed.cache_clear()


def checkpoint_in(folder: str, age_s: float = 0.0) -> Path:
    file = Path(folder) / run_folder.CHECKPOINT
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (file.stat().st_mtime - age_s,) * 2)
    return file


def test_a_new_run_gets_a_stamped_folder_that_stays_the_same() -> None:
    first = run_folder.choose_folder(None, False, "volume_query", "yam")
    assert Path(first).parent == Path("runs/volume_query_yam")
    assert run_folder.choose_folder(None, False, "volume_query", "yam") == first


DAMAGED = ["[" * 100_000, '{"started_at": 1' + "0" * 400 + "}", '{"started_at": NaN}', "[1]", "{", ""]


@pytest.mark.parametrize("content", DAMAGED, ids=["nested", "large", "nan", "list", "cut off", "empty"])
def test_a_damaged_record_of_another_run_keeps_no_run_from_resuming(content: str) -> None:
    for name in ("a", "b"):
        checkpoint_in(f"runs/m_d/{name}")
    Path("runs/m_d/a/result.json").write_text(json.dumps({"started_at": 5}))
    Path("runs/m_d/b/result.json").write_text(content)
    assert run_folder.choose_folder(None, True, "m", "d") == "runs/m_d/a"
    assert read_result(Path("runs/m_d/b")).keys() <= {"started_at"}
    for name in ("a", "b"):
        Path(f"runs/sweeps/m/{name}").mkdir(parents=True)
        write_json(Path(f"runs/sweeps/m/{name}/sweep.json"), {"started": 5})
    Path("runs/sweeps/m/b/sweep.json").write_text(content)
    assert run_folder.choose_for_sweep(True, "m") == "runs/sweeps/m/a"


def test_resuming_takes_the_newest_checkpoint_of_this_model_and_data() -> None:
    for name, started, age_s in (("b", 100.0, 0.0), ("a", 200.0, 50.0)):  # file times are the other way round
        checkpoint_in(f"runs/m_d/{name}", age_s=age_s)
        Path(f"runs/m_d/{name}/result.json").write_text(json.dumps({"started_at": started}))
    checkpoint_in("runs/m_other/z")
    Path("runs/m_d/c").mkdir()  # newer, but it never saved
    assert run_folder.choose_folder(None, True, "m", "d") == "runs/m_d/a"


def test_resuming_a_path() -> None:
    file = checkpoint_in("elsewhere/run")
    for path in ("elsewhere/run", str(file)):
        assert run_folder.choose_folder(None, path, "m", "d") == "elsewhere/run"
        assert checkpoint_to_resume(OmegaConf.create({"resume": path}), Path("elsewhere/run")) == file


def test_a_resumed_run_stays_in_its_folder() -> None:
    checkpoint_in("elsewhere/run")
    assert run_folder.choose_folder("elsewhere/../elsewhere/run", "elsewhere/run", "m", "d") == "elsewhere/run"
    with pytest.raises(ValueError, match="run_dir=another is another folder: leave out run_dir"):
        run_folder.choose_folder("another", "elsewhere/run", "m", "d")


def test_an_empty_text_is_not_the_present_folder() -> None:
    for run_dir, resume in [("", False), ("", True), (None, "")]:
        with pytest.raises(
            ValueError, match=r"is an empty text, often a shell's variable that is not set: give a path"
        ):
            run_folder.choose_folder(run_dir, resume, "m", "d")
    with pytest.raises(ValueError, match=r"run_dir is an empty text, .* or run_dir=\. for the present folder"):
        evaluation_output("run/checkpoints/last.ckpt", "")
    assert run_folder.choose_folder(".", False, "m", "d") == "."


def test_a_file_in_place_of_a_folder_is_named_with_its_setting() -> None:
    Path("p.txt").write_text("")
    for choose in (
        lambda folder: run_folder.choose_folder(folder, False, "m", "d"),
        lambda folder: evaluation_output("run/checkpoints/last.ckpt", folder),
    ):
        with pytest.raises(ValueError, match=r"^run_dir=p\.txt is a file: give a folder$"):
            choose("p.txt")
        with pytest.raises(ValueError, match=r"^run_dir=p\.txt/a/b: \S+/p\.txt is a file: give a folder$"):
            choose("p.txt/a/b")


def test_a_link_to_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    Path("runs").symlink_to(tmp_path / "disk")
    with pytest.raises(ValueError, match=r"run_dir=runs/a: runs is a symbolic link to \S+/disk, which is not there"):
        run_folder.choose_folder("runs/a", False, "m", "d")
    with pytest.raises(ValueError, match=r"a new folder in runs/m_d: runs is a symbolic link to \S+/disk"):
        run_folder.new_folder(Path("runs/m_d"), "job")  # it used to look for a free name for ever
    (tmp_path / "disk").mkdir()
    assert run_folder.choose_folder("runs/a", False, "m", "d") == "runs/a"


def test_hydras_own_name_for_the_run_folder_is_refused() -> None:
    with pytest.raises(SettingError, match=r"given by run_dir, not by hydra\.run\.dir"):
        compose("train", ["hydra.run.dir=there"])
    with pytest.raises(SettingError, match="both name the run folder: give run_dir alone"):
        check_overrides("train", ["run_dir=here", "hydra.run.dir=there"])
    check_overrides("train", ["hydra.run.dir=there"])  # a job of a sweep


def test_nothing_to_resume_is_an_error() -> None:
    Path("empty").mkdir()
    for run_dir, resume in ((None, True), ("here", True), (None, "nowhere"), (None, "empty")):
        with pytest.raises(FileNotFoundError, match="nothing to resume"):
            run_folder.choose_folder(run_dir, resume, "m", "d")


def test_processes_of_torchrun_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    folders = []
    for wait in (0.0, 1.1):  # each process chooses at another time, and has the same parent
        time.sleep(wait)
        run_folder.run_name.cache_clear()
        children = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(children[1], run_folder.choose_folder(None, False, "m", "d").encode())
            os._exit(0)
        os.waitpid(pid, 0)
        folders.append(os.read(children[0], 1000).decode())
    assert folders[0] == folders[1]


def test_several_nodes_need_a_common_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="give run_dir="):
        run_folder.choose_folder(None, False, "m", "d")
    assert run_folder.choose_folder("given", False, "m", "d") == "given"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night7")
    assert run_folder.choose_folder(None, False, "m", "d") == "runs/m_d/job-night7"


def test_trainings_of_one_program_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(start: int) -> str:
        return run_folder.choose_folder(None, False, "m", "d", start)

    first, second = chosen(1), chosen(2)
    assert first != second
    assert (chosen(1), chosen(2)) == (first, second)
    # a process that Lightning starts with the same script gets the same folders
    run_folder._claimed.cache_clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert (chosen(1), chosen(2)) == (first, second)
    assert len(list(Path("runs/m_d").iterdir())) == 2
    run_folder._claimed.cache_clear()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night7")
    run_folder.run_name.cache_clear()
    assert (chosen(1), chosen(2)) == ("runs/m_d/job-night7", "runs/m_d/job-night7-2")


def test_a_second_training_of_processes_that_lightning_started_needs_a_given_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: these processes made a second folder, and their errors killed the first process."""

    def chosen(start: int, run_dir: str | None = None) -> str:
        return run_folder.choose_folder(run_dir, False, "m", "d", start)

    first = chosen(1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"give each training its own run_dir=FOLDER, or start the script with torch"):
        chosen(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stop:
        chosen(2)
    assert stop.value.code == 0  # else Lightning would kill the first process
    assert chosen(2, "given") == "given"
    assert [str(folder) for folder in Path("runs/m_d").iterdir()] == [first]
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert Path(chosen(2)).is_dir()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night7")
    run_folder.run_name.cache_clear()
    assert chosen(3) == "runs/m_d/job-night7-3"


def in_slurm(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Callable[..., str]:
    """Return a function that gives the folder of a new process, with these arguments, in a job of SLURM."""
    for name, value in ({"NTASKS": "1", "JOB_ID": "42", "JOB_NAME": "train", "PROCID": "0"} | variables).items():
        monkeypatch.setenv(f"SLURM_{name}", value)

    def started(*arguments: str, **given: Any) -> str:
        run_folder.run_name.cache_clear()
        run_folder._claimed.cache_clear()
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        return run_folder.choose_folder(None, False, "m", "d", **given)

    return started


def test_slurm_tasks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {in_slurm(monkeypatch, NTASKS="8", PROCID=rank, STEP_ID="0")("seed=1") for rank in ("0", "3")}
    assert len(folders) == 1
    assert folders.pop().startswith("runs/m_d/job-42-")


@pytest.mark.parametrize("tasks", ["1", "2"])
def test_a_slurm_job_finds_its_folders_when_it_is_queued_again(tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of its batch script may begin in any order, and the job may be queued any number of times."""
    commands = (["seed=1"], ["seed=2"])
    before = [in_slurm(monkeypatch, NTASKS=tasks, STEP_ID=str(step))(*commands[step]) for step in (0, 1)]
    assert before[0] != before[1]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = [in_slurm(monkeypatch, NTASKS=tasks, STEP_ID=str(1 - step))(*commands[step]) for step in (0, 1)]
    assert again == before


@pytest.mark.parametrize("by_slurm", [True, False])
def test_a_job_that_is_restarted_resumes_the_run_that_it_resumed_before(
    by_slurm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job has trained a newer run in the meantime."""
    restart = "SLURM_RESTART_COUNT" if by_slurm else "TORCHELASTIC_RESTART_COUNT"
    variable = "SLURM_JOB_ID" if by_slurm else "TORCHELASTIC_RUN_ID"

    def set_job(number: int) -> None:
        """Starts by torchrun with one id differ in torchrun's process."""
        monkeypatch.setenv(variable, str(number) if by_slurm else "none")
        monkeypatch.setattr("keygrip.launch.parent_start_time", lambda: f"2026-11-30_10-00-{number}")

    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    set_job(42)
    for name, started in (("a", 100.0), ("b", 200.0)):
        checkpoint_in(f"runs/m_d/{name}")
        write_result(Path(f"runs/m_d/{name}"), {"started_at": started})
    monkeypatch.setenv(restart, "1")
    assert run_folder.choose_folder(None, True, "m", "d") == "runs/m_d/b"  # it ended before it resumed anything
    job = run_folder.resuming_job("true")
    write_result(Path("runs/m_d/a"), {"started_at": 100.0, run_folder.RESUMED_BY: job})
    assert run_folder.choose_folder(None, True, "m", "d") == "runs/m_d/a"
    set_job(43)
    assert run_folder.choose_folder(None, True, "m", "d") == "runs/m_d/b"
    set_job(42)
    monkeypatch.setenv(restart, "0")
    assert run_folder.choose_folder(None, True, "m", "d") == "runs/m_d/b"
    monkeypatch.delenv(variable)
    assert run_folder.resuming_job("true") == run_folder.resuming_job(False) == ""


@pytest.mark.parametrize("run_id", ["none", "job1"])
def test_a_run_id_of_torchrun_is_no_job(run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later commands may have the same one. On several machines there is no process in common."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    job = run_folder.resuming_job("true")
    assert job == run_folder.resuming_job(True)
    monkeypatch.setattr("keygrip.launch.parent_start_time", lambda: "2026-11-30_10-00-00")
    assert run_folder.resuming_job("true") not in ("", job)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert run_folder.resuming_job("true") == ""
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert run_folder.resuming_job("true") == "job 42 with resume=True"


def test_a_checkpoint_that_is_gone_is_missed_unless_the_job_itself_replaced_it(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, gone = Path("runs/m_d/a"), "runs/m_d/a/checkpoints/step-00001000.ckpt"
    saved_by = {run_folder.RESUMED_BY: ""}
    monkeypatch.setattr("keygrip.training.resuming.read_checkpoint", lambda *_, **__: {"keygrip": saved_by})
    latest = checkpoint_in(str(folder))
    in_slurm(monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"step-00001000\.ckpt does not exist"):
        run_folder.choose_folder(None, gone, "m", "d")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert Path(run_folder.choose_folder(None, gone, "m", "d")) == folder
    settings = OmegaConf.create({"resume": gone})
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt was not saved by an earlier start of this job"):
        checkpoint_to_resume(settings, folder)
    saved_by[run_folder.RESUMED_BY] = run_folder.resuming_job(gone)
    assert checkpoint_to_resume(settings, folder) == latest


def test_a_second_start_of_the_same_settings_in_a_slurm_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the job were queued again, it could not distinguish their folders."""
    started = in_slurm(monkeypatch)
    folder = Path(started("seed=1"))
    checkpoint_in(str(folder))
    with pytest.raises(run_folder.RunFolderError, match="already holds a run: continue it with resume="):
        checkpoint_to_resume(OmegaConf.create({"resume": False}), Path(started("seed=1")))


def test_programs_side_by_side_in_a_slurm_job_have_the_folders_of_their_trainings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = in_slurm(monkeypatch)
    first, second = (started(start=1, overrides=[f"seed={seed}"]) for seed in (1, 2))
    assert first != second
    assert started(start=1, overrides=["seed=2"]) == second


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_a_shell_in_a_slurm_job_is_no_part_of_its_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun -n4 --pty bash`: a command there runs alone, and a second one gets a folder of its own."""
    started = in_slurm(monkeypatch, JOB_NAME=name, NTASKS="4", STEP_NUM_TASKS="4")
    assert started_together() == 1
    first, second = started("seed=1"), started("seed=1")
    assert first != second
    assert "job-42" not in first
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    assert started_together() == 4


def test_sweep_folder_resumes_the_newest_as_a_whole() -> None:
    assert Path(run_folder.choose_for_sweep(False, "m", "d")).parent == Path("runs/sweeps/m_d")
    with pytest.raises(FileNotFoundError, match="no sweep in"):
        run_folder.choose_for_sweep(True, "m", "d")
    for name, started, modified in (("old", 100.0, 2e9), ("new", 200.0, 1e9)):  # file times are the other way round
        plan = Path("runs/sweeps/m_d") / name / "sweep.json"
        plan.parent.mkdir(parents=True)
        plan.write_text(json.dumps({"jobs": [], "started": started}))
        os.utime(plan, (modified, modified))
    assert run_folder.choose_for_sweep(True, "m", "d") == "runs/sweeps/m_d/new"
    with pytest.raises(ValueError, match="resumes as a whole"):
        run_folder.choose_for_sweep("runs/x", "m", "d")


def test_two_starts_in_one_second_get_two_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_folder.run_name
    monkeypatch.setattr(run_folder, "run_name", lambda start, overrides: "2026-01-01_00-00-00")
    first = run_folder.choose_folder(None, False, "m", "d")
    run_folder._claimed.cache_clear()  # another process
    second = run_folder.choose_folder(None, False, "m", "d")
    monkeypatch.setattr(run_folder, "run_name", real)
    assert [Path(path).name for path in (first, second)] == ["2026-01-01_00-00-00", "2026-01-01_00-00-00-2"]


def test_a_new_folder_is_nobody_elses() -> None:
    found = [run_folder.new_folder(Path("samples"), "2026-01-01_00-00-00") for _ in range(3)]
    assert [folder.name.removeprefix("2026-01-01_00-00-00") for folder in found] == ["", "-2", "-3"]


def test_a_folder_is_held_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run").mkdir()
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom keygrip.training.run_folder import lock_folder\n"
        "with lock_folder(Path('run')):\n    print('held', flush=True); sys.stdin.read()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(run_folder.__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes) as other:  # type: ignore[call-overload]
        other.stdout.readline()
        with (
            pytest.raises(ValueError, match="belongs to a run that is still going on"),
            run_folder.lock_folder(Path("run")),
        ):
            pass
        for resume in (False, "run"):
            Path("run/checkpoints").mkdir(exist_ok=True)
            Path("run/checkpoints/last.ckpt").touch()
            with pytest.raises(run_folder.RunFolderError, match="still going on"):  # before Hydra writes into it
                run_folder.choose_folder("run", resume, "m", "d")
        monkeypatch.setenv("LOCAL_RANK", "1")
        with run_folder.lock_folder(Path("run")):  # a helper of the same run
            pass
        assert run_folder.choose_folder("run", False, "m", "d") == "run"
        other.stdin.close()
    monkeypatch.delenv("LOCAL_RANK")
    with run_folder.lock_folder(Path("run")):
        assert run_folder.choose_folder("run", False, "m", "d") == "run"  # asked again by the run itself


def test_a_training_that_another_programs_hydra_command_starts_has_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`keygrip.train(...)` is called inside another program's `@hydra.main`."""
    theirs = OmegaConf.create({"runtime": {"output_dir": "outputs"}, "job": {"name": "app"}, "overrides": {"task": []}})
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: theirs)
    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr("keygrip.training.fit.fit", lambda cfg, *given: started.append(given) or {})
    keygrip.train(["run_dir=mine", "seed=3"])
    assert started == [(Path("mine").absolute(), "train", ["run_dir=mine", "seed=3"])]


def test_a_run_folder_that_cannot_be_locked_is_said_and_trained_into(
    toy_overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert keygrip.train(toy_overrides("run", "max_steps=1"))["status"] == "finished"
    assert "run cannot be locked (Function not implemented)" in caplog.text
    caplog.clear()
    assert (run_folder.is_held(Path("run")), run_folder.is_held(Path("none"))) == (None, False)
    run_folder.refuse_held(Path("run"))
    write_json("sweep.json", {"jobs": [["seed=1"]]})
    write_result(Path("run"), {"status": "running", "overrides": ["seed=1"]})
    assert [row["status"] for row in collect(Path())] == ["running"]  # another process may train into it
    assert not caplog.text


def test_a_folder_that_holds_anything_but_the_settings_stays() -> None:
    """Somebody may have written into it."""
    folders = [Path(run_folder.choose_folder(None, False, "m", "d", start=number)) for number in (1, 2, 3)]
    for folder in folders:
        (folder / ".hydra").mkdir()
        (folder / ".hydra/config.yaml").write_text("seed: 0")
        (folder / run_folder.LOCK).touch()
    (folders[0] / "notes.txt").write_text("mine")
    run_folder.begin(folders[1])
    assert [run_folder.has_not_begun(folder) for folder in folders] == [True, False, True]
    run_folder.remove_unbegun()
    assert sorted(Path("runs/m_d").iterdir()) == folders[:2]
    assert (folders[0] / ".hydra/config.yaml").is_file()


def test_the_python_call_that_is_refused_leaves_no_folder() -> None:
    other = Path(run_folder.choose_folder(None, False, "m", "d"))  # of another run
    with pytest.raises(ValueError, match=r"max_steps=-3: must be at least 1"):
        keygrip.train(["max_steps=-3"])
    assert list(Path("runs").iterdir()) == [other.parent]
    assert other.is_dir()
