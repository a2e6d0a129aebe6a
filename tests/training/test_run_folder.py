from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from keygrip.training import run_folder


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)
    run_folder.stamp.cache_clear()
    yield
    run_folder.stamp.cache_clear()


def checkpoint_in(folder: str, age_s: float = 0.0) -> Path:
    file = Path(folder) / run_folder.CHECKPOINT
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (file.stat().st_mtime - age_s,) * 2)
    return file


def test_a_new_run_gets_a_stamped_folder_that_stays_the_same() -> None:
    first = run_folder.choose(None, False, "volume_query", "yam")
    assert Path(first).parent == Path("runs/volume_query_yam")
    assert run_folder.choose(None, False, "volume_query", "yam") == first


def test_resuming_takes_the_newest_checkpoint_of_this_model_and_data() -> None:
    checkpoint_in("runs/m_d/b", age_s=100)
    checkpoint_in("runs/m_d/a", age_s=50)
    checkpoint_in("runs/m_other/z")
    Path("runs/m_d/c").mkdir()  # newer, but it never saved
    assert run_folder.choose(None, True, "m", "d") == "runs/m_d/a"


def test_resuming_a_path() -> None:
    file = checkpoint_in("elsewhere/run")
    for path in ("elsewhere/run", str(file)):
        assert run_folder.choose(None, path, "m", "d") == "elsewhere/run"
        assert run_folder.checkpoint_to_resume(Path("elsewhere/run"), path) == file


def test_nothing_to_resume_is_an_error() -> None:
    Path("empty").mkdir()
    for run_dir, resume in ((None, True), ("here", True), (None, "nowhere"), (None, "empty")):
        with pytest.raises(FileNotFoundError, match="nothing to resume"):
            run_folder.choose(run_dir, resume, "m", "d")


def test_processes_of_torchrun_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    folders = []
    for _ in range(2):  # each process is asked at another moment, and has the same parent
        run_folder.stamp.cache_clear()
        children = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(children[1], run_folder.choose(None, False, "m", "d").encode())
            os._exit(0)
        os.waitpid(pid, 0)
        folders.append(os.read(children[0], 1000).decode())
        import time

        time.sleep(1.1)
    assert folders[0] == folders[1]


def test_several_nodes_need_a_common_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="give run_dir="):
        run_folder.choose(None, False, "m", "d")
    assert run_folder.choose("given", False, "m", "d") == "given"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "night7")
    assert run_folder.choose(None, False, "m", "d") == "runs/m_d/job-night7"


def test_slurm_tasks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_NTASKS", "8"), ("SLURM_JOB_ID", "42"), ("SLURM_PROCID", "3"), ("SLURM_STEP_ID", "0")):
        monkeypatch.setenv(name, value)
    assert run_folder.choose(None, False, "m", "d") == "runs/m_d/job-42.0"


def test_sweep_folder_resumes_the_newest_as_a_whole() -> None:
    assert Path(run_folder.choose_for_sweep(False, "m", "d")).parent == Path("runs/sweeps/m_d")
    with pytest.raises(FileNotFoundError, match="no sweep in"):
        run_folder.choose_for_sweep(True, "m", "d")
    for name in ("old", "new"):
        plan = Path("runs/sweeps/m_d") / name / "sweep.json"
        plan.parent.mkdir(parents=True)
        plan.touch()
        os.utime(plan, (1e9 if name == "old" else 2e9,) * 2)
    assert run_folder.choose_for_sweep(True, "m", "d") == "runs/sweeps/m_d/new"
    with pytest.raises(ValueError, match="resumes as a whole"):
        run_folder.choose_for_sweep("runs/x", "m", "d")
