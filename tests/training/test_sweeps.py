"""Every job of a sweep appears in its table, and failed and missing jobs are marked."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from configs import composed
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keygrip.artifacts import locked, write_json
from keygrip.config import compose, config_folder
from keygrip.training import sweeps
from keygrip.training.results import read_result, record_refusal, write_result
from keygrip.training.run_folder import PLAN
from keygrip.training.signals import Interrupted
from keygrip.training.sweep_jobs import refuse_several_devices
from keygrip.training.sweeps import collect, finish_sweep, markdown, run_job, table

TOY = [
    "--config-dir",
    str(Path(__file__).parents[1] / "support" / "conf"),
    *("-m", "model=toy", "data=toy", "strategy=cpu", "logger=none", "max_steps=3", "val_every_n_steps=2"),
    "hydra.sweep.dir=sweep",
]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_serial_sweep_goes_on_after_a_failed_job_and_says_so(cli: Callable[..., Any]) -> None:
    outcome = cli(*TOY, "optimizer.lr=0.01,-1,0.1")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.splitlines()[-1].startswith("keygrip: 1 of 3 jobs of the sweep did not finish: 1 (failed); see")
    rows = rows_of(Path("sweep"))
    assert [(row["job"], row["status"], row["optimizer.lr"]) for row in rows] == [
        ("0", "finished", "0.01"),
        ("1", "failed", "-1"),
        ("2", "finished", "0.1"),
    ]
    assert "model" not in rows[0]  # the same for all jobs: not a column
    results = [json.loads(Path(f"sweep/{job}/result.json").read_text()) for job in range(3)]
    for job in (0, 2):
        assert float(rows[job]["val/loss"]) == pytest.approx(results[job]["metrics"]["val/loss"], rel=1e-4)
    assert rows[1]["val/loss"] == ""
    assert "optimizer.lr=-1: must be above 0" in rows[1]["error"]
    assert rows[1]["error"] in Path("sweep/summary.md").read_text()
    record = json.loads(Path("sweep/summary.json").read_text())
    assert [job["metrics"].get("val/loss") for job in record["jobs"]] == [
        results[0]["metrics"]["val/loss"],
        None,
        results[2]["metrics"]["val/loss"],
    ]
    assert record["machine"]["cores"]
    assert "hydra.sweep.dir" not in record["command"]
    assert record["command"].startswith("python -m keygrip.train -m ")
    assert f"--config-dir {TOY[1]}" in record["command"]  # without it there is no model=toy
    assert "optimizer.lr=0.01,-1,0.1" in record["command"]
    board = EventAccumulator("sweep/tensorboard/job_2")
    board.Reload()
    assert board.Scalars("val/loss")[0].value == pytest.approx(results[2]["metrics"]["val/loss"])
    assert any("hparams" in tag for tag in board.summary_metadata)


def test_a_sweep_resumes_what_did_not_finish(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = (*TOY, "optimizer.lr=0.01,0.1", "max_steps=6", "callbacks.checkpoint.every_n_steps=2")
    assert cli(*jobs).code == 0
    first = Path("sweep/0/result.json").stat().st_mtime_ns
    # The second job is reset to the state in which a kill would have left it.
    result = json.loads(Path("sweep/1/result.json").read_text())
    write_result(Path("sweep/1"), {**result, "status": "running", "metrics": {}})
    assert [row["status"] for row in collect(Path("sweep"))] == ["finished", "killed"]
    going_on = Path("sweep/1/result.json").read_text()
    with locked(Path("sweep/1/.lock")):  # the job is going on in another process
        assert [row["status"] for row in collect(Path("sweep"))] == ["finished", "running"]
        outcome = cli(*jobs, "resume=true")
    assert outcome.code == 1
    assert "sweep/1 belongs to a run that is still going on" in outcome.err
    assert Path("sweep/1/result.json").read_text() == going_on
    assert not Path("sweep/1/refused.json").exists()
    assert cli(*jobs, "resume=true").code == 0
    assert Path("sweep/0/result.json").stat().st_mtime_ns == first
    assert [row["status"] for row in rows_of(Path("sweep"))] == ["finished", "finished"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # queued again, with the same command
    assert cli(*jobs).code == 0
    assert Path("sweep/0/result.json").stat().st_mtime_ns == first


@pytest.mark.parametrize(
    ("jobs", "folders", "refused", "errors"),
    [
        ((["seed=0"], ["seed=0"]), ("0", "1"), ("0",), ["refused in 0", "own error in 1"]),
        ((["seed=0"], ["seed=0"]), ("0", "1"), ("1",), ["own error in 0", "refused in 1"]),
        ((["x=1"], ["x=2"]), ("a/0", "b/0"), ("a/0", "b/0"), ["refused in a/0", "refused in b/0"]),
        ((["x=1"], ["x=2"]), ("x=1", "x=2"), ("x=1",), ["refused in x=1", "own error in x=2"]),
    ],
)
def test_a_refusal_is_that_of_its_own_folder(
    jobs: tuple[list[str], ...], folders: tuple[str, ...], refused: tuple[str, ...], errors: list[str], tmp_path: Path
) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    for name, overrides in zip(folders, jobs, strict=True):
        write_result(tmp_path / name, {"status": "failed", "overrides": overrides, "error": f"own error in {name}"})
        if name in refused:
            record_refusal(tmp_path / name, f"refused in {name}", overrides)
    assert [row["error"] for row in collect(tmp_path)] == errors


def test_the_table_says_why_jobs_of_a_sweep_that_goes_on_were_refused(cli: Callable[..., Any]) -> None:
    jobs = (*TOY, "seed=1,2", "max_steps=4")
    assert cli(*jobs).code == 0
    before = [Path(f"sweep/{number}/result.json").read_bytes() for number in range(2)]
    assert cli(*jobs, "optimizer.lr=0.3", "resume=true").code == 1
    rows = rows_of(Path("sweep"))
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert all("was made with other settings" in row["error"] for row in rows)
    assert [Path(f"sweep/{number}/result.json").read_bytes() for number in range(2)] == before
    assert cli(*jobs, "resume=true").code == 0
    assert [row["status"] for row in rows_of(Path("sweep"))] == ["finished", "finished"]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Replace the processes that the process launcher starts: none runs, each writes one line and ends with success."""
    from hydra_plugins.keygrip_launcher import processes

    started: list[SimpleNamespace] = []

    def start(command: list[str], *, env: dict[str, str], stdout: Any, **kwargs: Any) -> SimpleNamespace:
        stdout.write(b"a line\n")
        folder = next(each for each in command if each.startswith("hydra.run.dir=")).partition("=")[2].strip('"')
        started.append(SimpleNamespace(command=command, env=env, folder=Path(folder), returncode=0, poll=lambda: 0))
        return started[-1]

    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=start, STDOUT=None))
    return started


def test_a_sweep_of_processes_resumes_what_did_not_finish(
    cli: Callable[..., Any], processes: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = (*TOY, "hydra/launcher=processes", "optimizer.lr=0.01,0.1,1")
    assert cli(*jobs).code == 0
    assert [[each for each in job.command if each.startswith("resume=")] for job in processes] == [[], [], []]
    first = Path("sweep/0/result.json").stat().st_mtime_ns
    result = json.loads(Path("sweep/1/result.json").read_text())
    for resuming in (["resume=true"], []):
        processes.clear()
        Path("sweep/1/result.json").write_text(json.dumps(result | {"status": "interrupted"}))
        Path("sweep/1/checkpoints").mkdir(exist_ok=True)
        Path("sweep/1/checkpoints/last.ckpt").touch()
        Path("sweep/2/result.json").unlink()
        if not resuming:
            monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert cli(*jobs, *resuming).code == 0
        assert [str(job.folder) for job in processes] == ["sweep/1", "sweep/2"]
        last = [[each.lower() for each in job.command if each.startswith("resume=")][-1:] for job in processes]
        assert last == [["resume=true"], ["resume=false"] if resuming else []]
    assert Path("sweep/0/result.json").stat().st_mtime_ns == first
    assert Path("sweep/1/output.log").read_text() == "a line\n" * 3
    assert [row["status"] for row in rows_of(Path("sweep"))] == ["finished"] * 3


def test_processes_share_out_the_gpus_that_the_command_sees(
    cli: Callable[..., Any], processes: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("hydra/launcher=processes", "hydra.launcher.jobs_at_once=2", "hydra.launcher.gpus_per_job=2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("keygrip.training.metadata.machine", dict)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,GPU-7")
    assert cli(*TOY, *given, "seed=1,2").code == 0
    assert [job.env["CUDA_VISIBLE_DEVICES"] for job in processes] == ["4,5", "6,GPU-7"]
    processes.clear()
    more = (*TOY, *given, "hydra.launcher.jobs_at_once=3", "hydra.sweep.dir=more")
    outcome = cli(*more, "seed=1,2,3")
    assert outcome.code == 1
    said = "and 4 GPUs are seen with CUDA_VISIBLE_DEVICES=4,5,6,GPU-7: lower jobs_at_once or gpus_per_job"
    assert outcome.err.splitlines()[-1] == f"keygrip: hydra.launcher: 3 jobs at once with gpus_per_job=2, {said}"
    assert processes == []
    assert not Path("more").exists()
    assert cli(*more, "seed=1,2").code == 0  # there are only two jobs
    assert [job.env["CUDA_VISIBLE_DEVICES"] for job in processes] == ["4,5", "6,GPU-7"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli(*more, "seed=1,2", "resume=true").code == 0  # both finished: none needs a GPU
    assert len(processes) == 2


@pytest.mark.parametrize("name", sorted(path.stem for path in (config_folder() / "sweep").glob("*.yaml")))
def test_a_named_sweep_finds_its_folder_again(name: str) -> None:
    text = (config_folder() / "sweep" / f"{name}.yaml").read_text()
    assert f"    dir: ${{sweep_folder:${{resume}},{name}}}\n" in text


def test_a_sweep_goes_on_in_a_folder_that_holds_one(cli: Callable[..., Any], processes: list[SimpleNamespace]) -> None:
    named = ("sweep=vla_comparison", "hydra/launcher=processes", "ablation=yam_depth/volume_query")
    outcome = cli(*named, "resume=true")
    assert outcome.code == 1
    assert "nothing to resume: no sweep in runs/sweeps/vla_comparison/; leave out" in outcome.err.splitlines()[-1]
    older = Path("runs/sweeps/vla_comparison/older")
    older.mkdir(parents=True)
    write_json(older / PLAN, {"jobs": [], "started": 1.0})
    for given, said in (
        (("resume=true", "hydra.sweep.dir=runs/sweeps/vla_comparison/oldre"), f"beside it is hydra.sweep.dir={older}"),
        (("resume=true", "hydra.sweep.dir=new"), "nothing to resume: new holds no sweep; leave out resume=true"),
        (("resume=runs/one", "hydra.sweep.dir=new"), "a sweep resumes as a whole: give resume=true"),
        (("resume=runs/one",), "a sweep resumes as a whole: give resume=true"),
        (("resume=runs/one,runs/two",), "a sweep resumes as a whole: give resume=true"),
    ):
        outcome = cli(*named, *given)
        assert (outcome.code, len(processes)) == (1, 0)
        assert said in outcome.err.splitlines()[-1]
        assert not Path("new").exists()
    assert cli(*named, "resume=true").code == 0
    assert [job.folder for job in processes] == [older / "0"]
    assert list(older.parent.iterdir()) == [older]


def test_a_helper_process_of_a_job_leaves_its_result_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra.core.hydra_config import HydraConfig

    hydra = {"runtime": {"output_dir": str(tmp_path)}, "overrides": {"task": ["seed=1"]}, "job": {"num": 0}}
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(hydra | {"launcher": {}}))
    cfg = OmegaConf.create({"resume": False})
    write_result(tmp_path, {"status": "running", "overrides": ["seed=1"], "metrics": {}})
    for process, status in (("1", "running"), ("0", "finished")):
        monkeypatch.setenv("SLURM_PROCID", process)
        run_job(lambda cfg: {"loss": 1.0}, cfg, lambda error, given: str(error), False)
        assert read_result(tmp_path)["status"] == status


def test_an_evaluation_in_the_folder_of_a_job_is_no_job(tmp_path: Path) -> None:
    for jobs in ([], [[]]):  # jobs unknown beforehand; one job without overrides
        write_json(tmp_path / PLAN, {"jobs": jobs})
        write_result(tmp_path / "0" / "closed_loop", {"conditions": {}})
        write_result(tmp_path / "0", {"status": "failed", "overrides": [], "metrics": {}})
        assert [row["status"] for row in collect(tmp_path)] == ["failed"]


@pytest.mark.parametrize("root", sorted(path.stem for path in config_folder().glob("*.yaml")))
def test_every_command_makes_a_table_of_its_sweeps(root: str) -> None:
    cfg = composed(root, ["step=record"] if root == "prepare" else [], with_hydra=True)
    assert cfg.hydra.callbacks.sweep_summary._target_.endswith(".SweepSummary")


def test_a_sweep_of_another_command_says_which_jobs_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from keygrip import command, prepare

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare", "-m", "step=validate", "root=none1,none2"])
    with pytest.raises(SystemExit) as stop:
        command.entry_point("prepare", prepare.print_report)
    assert stop.value.code == 1
    said = r"keygrip: 2 of 2 jobs of the sweep did not finish: 0 \(failed\), 1 \(failed\); see multirun/.*"
    assert re.fullmatch(said, capsys.readouterr().err.splitlines()[-1])


def test_a_sweep_of_other_jobs_is_not_continued(cli: Callable[..., Any]) -> None:
    """Job 0 would continue the run of the earlier job 0, and its result would be taken for the new values."""
    sweep = (*TOY, "-m", "hydra.sweep.dir=sweep")
    assert cli(*sweep, "max_steps=1,2").code == 0
    before = {path: path.read_bytes() for path in Path("sweep").rglob("*.json")}
    for other in ("max_steps=2,3", "max_steps=1", "seed=1,2"):
        outcome = cli(*sweep, other, "resume=true")
        assert outcome.code == 1
        assert "sweep holds a sweep of other jobs: continue it with its own values" in outcome.err
    assert {path: path.read_bytes() for path in Path("sweep").rglob("*.json")} == before
    assert cli(*sweep, "max_steps=1,2,3", "log_every_n_steps=5", "resume=true").code == 0
    assert [len(row["overrides"]) > 0 for row in collect(Path("sweep"))] == [True] * 3
    assert "resume" not in json.loads(Path("sweep/summary.json").read_text())["command"]


def test_a_sweep_is_not_written_over_another(cli: Callable[..., Any]) -> None:
    Path("sweep").mkdir()
    plan = json.dumps({"command": "that of days ago", "jobs": [["seed=1"]], "started": 1.0})
    Path("sweep", PLAN).write_text(plan)
    outcome = cli(*TOY, "optimizer.lr=0.01,0.1")
    assert outcome.code == 1
    said = "keygrip: sweep already holds a sweep: continue it with its command and resume=true, or give another "
    assert outcome.err.splitlines()[-1] == f"{said}hydra.sweep.dir"
    assert [path.name for path in Path("sweep").iterdir()] == [PLAN]
    assert Path("sweep", PLAN).read_text() == plan


@pytest.mark.parametrize("launcher", ["basic", "processes"])
def test_a_sweep_of_a_command_that_cannot_resume_counts_no_earlier_result(
    launcher: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: list[SimpleNamespace],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from keygrip import command, prepare

    given = ["-m", f"hydra/launcher={launcher}", "step=validate", "root=none1,none2", "hydra.sweep.dir=sweep"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare", *given])
    write_json(Path("sweep", PLAN), {"jobs": [["step=validate", "root=none1"], ["step=validate", "root=none2"]]})
    before = {"status": "finished", "overrides": ["step=validate", "root=none1"], "metrics": {"problems": 0}}
    write_result(Path("sweep/0"), before)
    with pytest.raises(SystemExit):
        command.entry_point("prepare", prepare.print_report)
    said = "keygrip: sweep already holds a sweep: give another hydra.sweep.dir"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert read_result(Path("sweep/0")) == before
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with contextlib.suppress(SystemExit):
        command.entry_point("prepare", prepare.print_report)
    outcome = "failed" if launcher == "basic" else "finished"  # where no process runs
    assert [(row["status"], row["metrics"]) for row in collect(Path("sweep"))] == [(outcome, {})] * 2


def test_the_report_of_a_dry_run_is_kept(
    cli: Callable[..., Any], processes: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra_plugins.keygrip_launcher.processes import ProcessLauncher

    report = {"status": "dry run", "dry_run": {"memory_gb": 3.5}, "metrics": {}}

    def ended(self: Any, job: Any) -> Any:
        write_result(job.folder, report | {"overrides": job.overrides})
        return former(self, job)

    former = ProcessLauncher._ended
    monkeypatch.setattr(ProcessLauncher, "_ended", ended)
    outcome = cli(*TOY, "hydra/launcher=processes", "dry_run=true", "seed=1,2")
    assert (outcome.code, len(processes)) == (0, 2)
    assert read_result(Path("sweep/1"))["dry_run"] == report["dry_run"]
    assert [row["status"] for row in rows_of(Path("sweep"))] == ["dry run"] * 2


def test_a_table_that_cannot_be_written_is_an_error(cli: Callable[..., Any], processes: list[SimpleNamespace]) -> None:
    Path("sweep/summary.csv").mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Callback ")
        outcome = cli(*TOY, "hydra/launcher=processes", "seed=1,2")
    assert (outcome.code, len(processes)) == (1, 2)
    said = r"keygrip: the summary of the sweep in sweep is not whole: Is a directory: .*"
    assert re.fullmatch(said, outcome.err.splitlines()[-1])
    Path("sweep/summary.csv").rmdir()
    assert cli(*TOY, "hydra/launcher=processes", "seed=1,2", "resume=true").code == 0


def test_a_table_that_a_signal_broke_off_is_made(
    cli: Callable[..., Any], processes: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect_once(folder: Path) -> Any:
        monkeypatch.setattr(sweeps, "collect", collect)
        raise Interrupted("stopped by SIGTERM")

    monkeypatch.setattr(sweeps, "collect", collect_once)
    outcome = cli(*TOY, "hydra/launcher=processes", "seed=1,2")
    assert (outcome.code, len(processes)) == (143, 2)
    assert [row["status"] for row in rows_of(Path("sweep"))] == ["finished"] * 2


def test_several_devices_in_one_process_are_refused(cli: Callable[..., Any]) -> None:
    outcome = cli(*TOY, "strategy=ddp_cpu", "optimizer.lr=0.01,0.1")
    assert outcome.code == 1
    assert "must be a process of its own: add hydra/launcher=processes" in rows_of(Path("sweep"))[0]["error"]


def test_several_devices_in_the_one_process_that_slurm_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning would start the others with submitit's command, which does not accept their settings."""
    for name in ("SLURM_JOB_NAME", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    cfg = compose("train", ["strategy=ddp_cpu"])
    with pytest.raises(ValueError, match=r"started one process for it: add hydra\.launcher\.tasks_per_node=2"):
        refuse_several_devices(cfg, "hydra_plugins.submitit_launcher.SlurmLauncher")
    with pytest.raises(ValueError, match=r"add hydra/launcher=processes \(or, on a cluster, hydra/launcher=slurm "):
        refuse_several_devices(cfg, "hydra_plugins.submitit_launcher.LocalLauncher")
    refuse_several_devices(compose("train", ["strategy=cpu"]), "hydra_plugins.submitit_launcher.SlurmLauncher")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    refuse_several_devices(cfg, "hydra_plugins.submitit_launcher.SlurmLauncher")


def test_a_run_folder_for_all_jobs_is_refused(cli: Callable[..., Any]) -> None:
    outcome = cli(*TOY, "run_dir=here", "optimizer.lr=0.01,0.1")
    assert outcome.code == 1
    assert "give hydra.sweep.dir=<folder> in place of run_dir" in rows_of(Path("sweep"))[0]["error"]
    assert not Path("here").exists()


def test_jobs_without_a_result_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / PLAN).write_text(json.dumps({"jobs": [["seed=1"], ["seed=2"], ["seed=3"]]}))
    finished = {"status": "finished", "overrides": ["seed=1"], "metrics": {"success": 0.5}, "wall_s": 3.0}
    write_result(tmp_path / "0", finished)
    write_result(tmp_path / "2", {"status": "running", "overrides": ["seed=3"], "metrics": {}})
    rows = finish_sweep(tmp_path)
    assert [row["status"] for row in rows] == ["finished", "missing", "killed"]
    assert "1 of 3 jobs finished" in capsys.readouterr().err
    from keygrip.training.sweeps import close_sweeps

    assert close_sweeps() == [f"2 of 3 jobs of the sweep did not finish: 1 (missing), 2 (killed); see {tmp_path}"]


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", '{"jobs": 3}', '{"jobs": [3]}', "[]"])
def test_a_damaged_plan_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / PLAN).write_text(content)
    with pytest.raises(ValueError, match=rf"{PLAN} is damaged"):
        collect(tmp_path)


def test_jobs_with_the_same_overrides_have_rows_of_their_own(tmp_path: Path) -> None:
    write_json(tmp_path / PLAN, {"jobs": [["seed=0"]] * 11})
    for number in (1, 2, 10):
        figures = {"status": "finished", "overrides": ["seed=0"], "metrics": {"loss": number}, "wall_s": 1.0}
        write_result(tmp_path / str(number), figures)
    losses = [row["metrics"].get("loss") for row in collect(tmp_path)]
    assert losses == [None, 1, 2, *[None] * 7, 10]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "optimizer.lr=interval(0.1,1)",
            r"^keygrip: \S+=interval\(0\.1,1\): a sweep runs listed values and does not search an interval: .*\(1,4\)$",
        ),
        ("optimizer=adamw,nothing", r"^keygrip: no option 'nothing' in group 'optimizer'"),
    ],
)
def test_a_sweep_that_is_refused_leaves_nothing(given: str, said: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    for folder in (TOY[-1:], []):
        outcome = cli(*TOY[:-1], *folder, given)
        assert outcome.code == 2
        assert re.search(said, outcome.err, re.MULTILINE), outcome.err
        assert list(tmp_path.iterdir()) == []


def test_a_sweep_that_is_refused_leaves_a_folder_that_was_there(cli: Callable[..., Any]) -> None:
    Path("sweep").mkdir()
    assert cli(*TOY, "optimizer=adamw,nothing").code == 2
    assert [path.name for path in Path().iterdir()] == ["sweep"]
    assert list(Path("sweep").iterdir()) == []


def test_a_metric_that_is_not_finite_is_seen_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / PLAN, {"jobs": [["seed=0"], ["seed=1"]]})
    for seed, loss in ((0, 0.5), (1, float("nan"))):
        result = {"status": "finished", "overrides": [f"seed={seed}"], "metrics": {"val/loss": loss}, "wall_s": 1.0}
        write_result(tmp_path / str(seed), result)
    assert "NaN" not in (tmp_path / "1" / "result.json").read_text()
    assert math.isnan(read_result(tmp_path / "1")["metrics"]["val/loss"])
    finish_sweep(tmp_path)
    assert [row["val/loss"] for row in rows_of(tmp_path)] == ["0.5", "nan"]


def test_a_table_shows_no_password_of_an_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [[f"data.root=https://me:secret@host/{name}"] for name in "ab"]
    write_json(tmp_path / PLAN, {"command": f"keygrip train -m {jobs[0][0]}", "jobs": jobs})
    write_result(tmp_path / "0", {"status": "finished", "overrides": jobs[0], "metrics": {"loss": 1.0}})
    error = "https://me:secret@host/b is gone"
    write_result(tmp_path / "1", {"status": "failed", "overrides": jobs[1], "metrics": {}, "error": error})
    finish_sweep(tmp_path)
    sweeps.close_sweeps()
    made = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in (PLAN, "result.json")]
    assert {"summary.csv", "summary.md", "summary.json"} < {path.name for path in made}
    for text in (*(path.read_text(errors="replace") for path in made), capsys.readouterr().err):
        assert "https://host/" in text
        assert "secret" not in text


def test_table_is_aligned_markdown() -> None:
    rows = [
        {
            "job": 0,
            "status": "finished",
            "overrides": {"a": "1", "b": "x"},
            "metrics": {"m": 0.123456789},
            "wall_s": 1.0,
            "error": "",
        },
        {
            "job": 1,
            "status": "failed",
            "overrides": {"a": "2", "b": "x"},
            "metrics": {},
            "wall_s": None,
            "error": "it | broke",
        },
    ]
    header, lines = table(rows)
    assert header == ["job", "status", "a", "m", "wall_s", "error"]
    assert lines[0] == [0, "finished", "1", 0.12346, 1.0, ""]
    rows[0]["metrics"] = {"val/a": 1.0, "val/b": 2.0, "closed_loop/success_rate": 0.5}
    assert table(rows, most=2)[0] == ["job", "status", "a", "closed_loop/success_rate", "val/a", "wall_s", "error"]
    drawn = markdown(header, lines).splitlines()
    assert len({len(line) for line in drawn}) == 1
    assert "it / broke" in drawn[3]


@pytest.mark.slow
def test_joblib_runs_jobs_side_by_side(command: Callable[..., Any], tmp_path: Path) -> None:
    done = command("keygrip.train", *TOY, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "optimizer.lr=0.01,-1")
    assert done.returncode == 1, done.stderr
    assert [row["status"] for row in rows_of(tmp_path / "sweep")] == ["finished", "failed"]


@pytest.mark.slow
def test_submitit_runs_jobs(command: Callable[..., Any], tmp_path: Path) -> None:
    done = command("keygrip.train", *TOY[:-1], "hydra/launcher=submitit_local", "optimizer.lr=0.01,-1")
    assert done.returncode == 1, done.stderr
    (folder,) = (tmp_path / "runs" / "sweeps" / "toy_toy").iterdir()
    assert [row["status"] for row in rows_of(folder)] == ["finished", "failed"]


def test_jobs_of_their_own_processes_have_the_settings_of_hydra_that_the_sweep_has() -> None:
    from hydra_plugins.keygrip_launcher.processes import _forwarded

    where = ["--config-dir", "mine", "hydra.searchpath=[file://theirs]", "-cn=train"]
    assert _forwarded(["-m", *where, "hydra/launcher=processes", "seed=0,1", "hydra.sweep.dir=sweep"]) == where
    own = ["hydra.verbose=true", "hydra/job_logging=none", "+hydra.job.env_set.NAME=value"]
    of_the_sweep = ["hydra.sweeper.max_batch_size=2", "hydra.launcher.jobs_at_once=2", "hydra.mode=MULTIRUN"]
    assert _forwarded([*own, *of_the_sweep, "hydra.run.dir=there"]) == own
