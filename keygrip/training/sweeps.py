"""Sweeps (`-m`): record every job, also failed ones, and write a table of overrides and headline metrics at the end."""

from __future__ import annotations

import contextlib
import csv
import logging
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from keygrip.artifacts import atomic_write, read_record, without_passwords, write_json, write_text
from keygrip.config_errors import one_line, root_cause
from keygrip.launch import is_first_process, restarted_by_scheduler
from keygrip.override_values import as_typed, quoted
from keygrip.training.results import (
    DRY_RUN,
    FAILED,
    FINISHED,
    INTERRUPTED,
    REFUSED,
    RESULT,
    RUNNING,
    belongs_to_another_start,
    read_result,
    record_failure,
    record_refusal,
    write_result,
)
from keygrip.training.run_folder import (
    CHECKPOINT,
    PLAN,
    RunFolderError,
    given_folder,
    is_held,
    newest_sweep,
    remove_if_empty,
    resume_setting,
    whole_sweep,
)
from keygrip.training.signals import Interrupted, SweepInterrupted, SweepRefused
from keygrip.training.sweep_jobs import refuse_several_devices, refuse_several_processes

log = logging.getLogger(__name__)

SHOWN = 6  # metrics in the printed table; summary.csv has them all
MULTIRUN = "multirun.yaml"  # written by Hydra
LOSSES = "loss_against_compute.png"

_open_sweeps: dict[Path, bool] = {}  # true: the folder was created for the sweep
_failures: list[str] = []


def run_job(
    run: Callable[[DictConfig], Any], cfg: DictConfig, describe: Callable[[Exception, Sequence[str]], str], debug: bool
) -> Any:
    """Run one job of a sweep. Its errors are written to its folder, and the sweep continues.

    In a resumed sweep, finished jobs are not run again, and interrupted jobs are resumed.

    Args:
        describe: returns one line about an error, from the error and the job's overrides. debug: also print the trace.
    """
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    overrides = list(hydra_cfg.overrides.task)
    started = time.perf_counter()
    finished, resume = earlier_run(cfg, folder, overrides)
    if finished:
        log.info("job %s finished before: not run again", hydra_cfg.job.num)
        return read_result(folder).get("metrics")
    if "resume" in cfg:
        cfg.resume = resume
    if is_first_process():
        forget_result(cfg, folder)
    try:
        if any(override.startswith("run_dir=") for override in overrides):
            raise ValueError("a sweep has a folder of each job: give hydra.sweep.dir=<folder> in place of run_dir")
        refuse_several_devices(cfg, hydra_cfg.launcher.get("_target_", ""))
        figures = run(cfg)
    except Interrupted as stop:
        record_failure(folder, INTERRUPTED, str(stop), overrides, stop)
        raise SweepInterrupted(str(stop), stop.signal_number) from stop
    except KeyboardInterrupt as stop:
        record_failure(folder, INTERRUPTED, "stopped by SIGINT", overrides, stop)
        raise
    except Exception as error:
        line = describe(error, overrides)
        if not isinstance(root_cause(error), RunFolderError):  # else the folder is another run's
            if belongs_to_another_start(folder):
                record_refusal(folder, line, overrides)
            else:
                record_failure(folder, FAILED, line, overrides, error)
        if debug:
            sys.stderr.write("".join(traceback.format_exception(error)))
        log.error("job %s (%s) failed: %s", hydra_cfg.job.num, " ".join(overrides), line)
        return None
    if is_first_process():  # the other processes of a job return while the first one still evaluates
        record_finished(folder, overrides, figures, time.perf_counter() - started)
    return figures


def run_process_job(run: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Run one job that ``hydra/launcher=processes`` started as a command of its own, and record its figures. Its errors
    are those of the command."""
    hydra_cfg = HydraConfig.get()
    started = time.perf_counter()
    figures = run(cfg)
    if is_first_process():  # the launcher knows only the exit code
        folder, overrides = Path(hydra_cfg.runtime.output_dir), list(hydra_cfg.overrides.task)
        record_finished(folder, overrides, figures, time.perf_counter() - started)
    return figures


def earlier_run(cfg: DictConfig, folder: Path, overrides: Sequence[str]) -> tuple[bool, bool]:
    """Look for the earlier run of a job, if the sweep is resumed by ``resume=true`` or restarted by the scheduler.

    Returns:
        Whether the job finished, and whether it has a checkpoint to resume; both are False for a new sweep.
    """
    if "resume" not in cfg or not (resume_setting(cfg.resume) or restarted_by_scheduler()):
        return False, False
    earlier = read_result(folder)
    finished = earlier.get("status") == FINISHED and _same_overrides(earlier.get("overrides", []), overrides)
    return finished, (folder / CHECKPOINT).is_file()


def forget_result(cfg: DictConfig, folder: Path) -> None:
    """Remove the result of a job from before a restart by the scheduler, for a command that cannot resume. Otherwise it
    would count as the result of the new start."""
    if "resume" not in cfg and restarted_by_scheduler():
        (folder / RESULT).unlink(missing_ok=True)


def record_finished(folder: Path, overrides: Sequence[str], figures: Any, seconds: float) -> None:
    """Record that a job finished, with the numbers among its ``figures``, unless the job has recorded this itself."""
    if read_result(folder).get("status") not in (FINISHED, DRY_RUN):
        result = {"overrides": list(overrides), "metrics": numbers(figures), "wall_s": round(seconds, 1)}
        write_result(folder, {"status": FINISHED, **result})


def numbers(figures: Any) -> dict[str, float]:
    """Return the numbers in the result of a ``run``, by name."""
    if not isinstance(figures, dict):
        return {}
    return {str(name): value for name, value in figures.items() if isinstance(value, int | float)}


class SweepSummary(Callback):
    """Hydra callback that records the planned jobs at the start of a sweep and writes the table at the end.

    A folder with a sweep is rejected unless this sweep is resumed, because its plan and table would be lost. A folder
    without a sweep is rejected when resuming, because every job would start from the beginning.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            refuse_several_processes()
            folder = given_folder("hydra.sweep.dir", config.hydra.sweep.dir)
            jobs = planned_jobs(config)
            going_on = None
            if "resume" in config:
                job_resumes = (o.partition("=")[2] for job in jobs for o in job if o.startswith("resume="))
                resumed = [whole_sweep(resume) for resume in (config.resume, *job_resumes)]  # each may be refused
                going_on = any(resumed)
            _refuse_other_sweep(folder, going_on)
            _refuse_other_jobs(folder, jobs)
        except ValueError as error:
            raise SweepRefused(one_line(root_cause(error))) from error
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        # Jobs in other processes compose the config again and would otherwise use a folder with another time stamp.
        with read_write(config), open_dict(config):
            config.hydra.sweep.dir = str(folder)
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(str(folder))}")
        plan = {"command": _command(config), "jobs": jobs, "started": time.time()}
        write_json(folder / PLAN, plan)
        _open_sweeps[folder] = is_new

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        _finish_or_log_failure(Path(config.hydra.sweep.dir))


def _refuse_other_sweep(folder: Path, resume: bool | None) -> None:
    """Raise ValueError if the folder has a sweep that is not resumed, or has no sweep to resume.

    Args:
        resume: whether to resume; None: the command has no such setting.
    """
    planned = (folder / PLAN).is_file()
    if resume and not planned:
        newest = newest_sweep(folder.parent)
        given = newest and f"the newest beside it is {as_typed('hydra.sweep.dir', newest)}"
        raise ValueError(f"nothing to resume: {folder} holds no sweep; {given or 'leave out resume=true'}")
    if planned and not resume and not restarted_by_scheduler():
        hint = "" if resume is None else "continue it with its command and resume=true, or "
        raise ValueError(f"{folder} already holds a sweep: {hint}give another hydra.sweep.dir")


def _refuse_other_jobs(folder: Path, jobs: Sequence[Sequence[str]]) -> None:
    """Raise ValueError if the folder has a sweep whose jobs vary other settings or values than ``jobs``: job N would
    continue the run of an earlier job N. Further jobs at the end, and other settings of all jobs, are no difference."""
    earlier = _read_planned_overrides(folder) if jobs and (folder / PLAN).is_file() else []
    common = list(jobs[: len(earlier)])
    varied = _varied_settings(earlier) | _varied_settings(common)
    chosen = [[{each for each in job if _setting_of(each) in varied} for job in both] for both in (earlier, common)]
    if chosen[0] != chosen[1]:
        raise ValueError(
            f"{folder} holds a sweep of other jobs: continue it with its own values (new ones at the end), or give "
            "another hydra.sweep.dir"
        )


def _setting_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _varied_settings(jobs: Sequence[Sequence[str]]) -> set[str]:
    """Return the names of the settings that are not the same in all jobs."""
    together = [set(job) for job in jobs]
    common = set.intersection(*together) if together else set()
    return {_setting_of(each) for job in together for each in job - common}


def planned_jobs(config: DictConfig) -> list[list[str]]:
    """Return the overrides of every job that Hydra's basic sweeper will start, in its order.

    Empty if they are not known in advance (another sweeper, ``glob``); jobs without a result are then not detected.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    if not str(config.hydra.sweeper.get("_target_", "")).endswith("BasicSweeper"):
        return []
    overrides = [f"{name}={value}" for name, value in (config.hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides(overrides + list(config.hydra.overrides.task))
    try:
        return [list(job) for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None) for job in batch]
    except HydraException:  # Hydra reports it when the sweep begins
        return []
    except Exception as error:
        log.warning("the jobs of this sweep are not known beforehand (%s): a missing one will not be noticed", error)
        return []


def finish_sweep(folder: Path) -> list[dict[str, Any]]:
    """Write a sweep's summary, print the table, and return its rows.

    ``summary.csv`` and ``summary.md`` are the table; ``summary.json`` also has command, date and machine, for use as a
    record; TensorBoard gets hparams. ``loss_against_compute.png`` (also in TensorBoard) has a curve for each job that
    logged its loss, and one of its accuracy if it was logged. Passwords in URLs are removed from all files.
    """
    rows: list[dict[str, Any]] = without_passwords(collect(folder))  # all files may be shown to other people
    header, lines = table(rows)
    with atomic_write(folder / "summary.csv", "w") as file:
        csv.writer(file).writerows([header, *lines])
    text = markdown(*table(rows, most=SHOWN))
    write_text(folder / "summary.md", text + "\n")
    write_json(folder / "summary.json", _make_record(folder, rows))
    _write_hparams(folder, rows)
    bad = [row for row in rows if row["status"] not in (FINISHED, DRY_RUN)]
    sys.stderr.write(f"\n{text}\n\n{len(rows) - len(bad)} of {len(rows)} jobs finished: {folder / 'summary.csv'}\n")
    if bad:
        names = ", ".join(f"{row['job']} ({row['status']})" for row in bad)
        _failures.append(f"{len(bad)} of {len(rows)} jobs of the sweep did not finish: {names}; see {folder}")
    _open_sweeps.pop(folder, None)  # only now, since `close_sweeps` writes a table that a signal interrupted
    _draw_losses(folder, rows)
    return rows


def close_sweeps() -> list[str]:
    """Finish interrupted sweeps, and remove the files of sweeps in which no job began. Return one line for each sweep
    with unfinished jobs, and for each whose table or figure could not be written."""
    for folder, is_new in list(_open_sweeps.items()):
        with contextlib.suppress(OSError):
            if {path.name for path in folder.iterdir()} <= {PLAN, MULTIRUN}:  # no job began: the settings were invalid
                for path in folder.iterdir():
                    path.unlink()
                if is_new:
                    remove_if_empty(folder)
                del _open_sweeps[folder]
    for folder in list(_open_sweeps):
        _finish_or_log_failure(folder)
    lines = list(_failures)
    _failures.clear()
    return lines


def _finish_or_log_failure(folder: Path) -> None:
    with errors_at_sweep_end(f"the summary of the sweep in {folder} is not whole"):
        try:
            finish_sweep(folder)
        except Exception:
            _open_sweeps.pop(folder, None)
            raise


@contextlib.contextmanager
def errors_at_sweep_end(what: str) -> Iterator[None]:
    """Convert errors in a callback at the end of a sweep to a line of `close_sweeps` and exit code 1; Hydra would only
    log a warning."""
    try:
        yield
    except Exception as error:
        log.debug("%s", what, exc_info=True)
        _failures.append(f"{what}: {one_line(root_cause(error))}")


def _command(config: DictConfig) -> str:
    """Return the command that runs the sweep again, without its folder."""
    left_out = ("hydra.sweep.dir=", "hydra.mode=", "resume=")
    arguments = [each for each in sys.argv[1:] if each not in ("-m", "--multirun") and not each.startswith(left_out)]
    return shlex.join(["python", "-m", f"keygrip.{config.hydra.job.name}", "-m", *arguments])


def _make_record(folder: Path, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of a sweep, in the form stored under ``benchmarks/``."""
    from keygrip.training.metadata import git_revision, machine

    plan = read_record(folder / PLAN)
    return {
        "command": without_passwords(plan.get("command")),
        "date": time.strftime("%Y-%m-%d"),
        "git": git_revision(),
        "machine": machine(),
        "jobs": list(rows),
    }


def collect(folder: Path) -> list[dict[str, Any]]:
    """Return one row per job: ``job, status, overrides {name: value}, metrics, wall_s, error``.

    The status of a planned job without a result is ``missing``, that of a job whose process died ``killed``, that of a
    job whose latest start was refused ``failed``, although its folder keeps the result of an earlier start. A job is
    ``running`` if it still runs, as on a cluster, or if this cannot be determined, on a disk without file locks.
    """
    rows, refusals = [], _read_refusals(folder)
    for index, (overrides, job_folder) in enumerate(find_jobs(folder)):
        missing = {"status": "missing", "error": "no result was written"}
        result = missing if job_folder is None else read_result(job_folder)
        at = _refused_in(refusals, index, overrides, job_folder)
        if at is not None and result.get("status") != FINISHED:
            result = {"status": FAILED, "error": refusals.pop(at)[1]}
        status = result.get("status", "missing")
        if status == RUNNING and job_folder is not None and is_held(job_folder) is False:
            status = "killed"
        rows.append(
            {
                "job": index,
                "status": status,
                "overrides": dict(o.lstrip("+~").partition("=")[::2] for o in overrides),
                "metrics": result.get("metrics", {}),
                "wall_s": result.get("wall_s"),
                "error": "" if status == FINISHED else result.get("error", ""),
            }
        )
    return rows


def _read_refusals(folder: Path) -> dict[Path, tuple[list[str], str]]:
    """Return overrides and reason of each refused start of a job, by the job's folder."""
    found = {path.parent: read_record(path) for path in sorted(folder.glob(f"**/{REFUSED}"))}
    return {path: (content.get("overrides", []), str(content.get("error"))) for path, content in found.items()}


def _refused_in(
    refusals: dict[Path, tuple[list[str], str]], index: int, overrides: Sequence[str], job_folder: Path | None
) -> Path | None:
    """Return the folder in which a job was refused; None: it was not. The folder's number distinguishes jobs with equal
    overrides; a job without a result of its own was refused in the folder of another one."""
    folders = [path for path, (given, _) in refusals.items() if _same_overrides(given, overrides)]
    likely = [path for path in folders if path.name == str(index) or job_folder in (None, path)]
    return min(likely, key=lambda path: (path.name != str(index), path != job_folder), default=None)


def find_jobs(folder: Path) -> list[tuple[list[str], Path | None]]:
    """Return the overrides of each planned job and the folder with its result; without a plan, of each result."""
    jobs = _read_planned_overrides(folder)
    results = {path.parent: read_result(path.parent) for path in sorted(folder.glob(f"**/{RESULT}"))}
    # Results of evaluations, in the folder of their job, have no status.
    by_folder = {path: result.get("overrides", []) for path, result in results.items() if "status" in result}
    if not jobs:
        return [(overrides, path) for path, overrides in by_folder.items()]
    folders, folder_of_job = list(by_folder), dict[int, Path]()
    for by_name in (True, False):  # the folder's number distinguishes jobs with equal overrides (seed=0,0)
        for index, overrides in enumerate(jobs):
            for path in folders if index not in folder_of_job else ():
                if _same_overrides(by_folder[path], overrides) and (path.name == str(index) or not by_name):
                    folder_of_job[index] = path
                    folders.remove(path)
                    break
    return [(overrides, folder_of_job.get(index)) for index, overrides in enumerate(jobs)]


def _read_planned_overrides(folder: Path) -> list[list[str]]:
    """Return the overrides of each job of a sweep's plan. Raises ValueError if the plan is damaged."""
    jobs = read_record(folder / PLAN).get("jobs")
    if not isinstance(jobs, list) or not all(
        isinstance(job, list) and all(isinstance(each, str) for each in job) for job in jobs
    ):
        raise ValueError(f"{folder / PLAN} is damaged (its jobs are no lists of overrides)")
    return jobs


def table(rows: Sequence[dict[str, Any]], most: int | None = None) -> tuple[list[str], list[list[Any]]]:
    """Return header and lines: job, status, the overrides that differ between jobs, metrics, seconds, error.

    ``most`` limits the number of metrics: success rates first, then headline metrics in the model's order.
    """
    varied = _varied_overrides(rows)
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    if most is not None:
        metrics = sorted(metrics, key=lambda name: not name.endswith("success_rate"))[:most]
    header = ["job", "status", *varied, *metrics, "wall_s", "error"]
    lines = [
        [row["job"], row["status"]]
        + [row["overrides"].get(name, "") for name in varied]
        + [_round_figure(row["metrics"].get(name, "")) for name in metrics]
        + ["" if row["wall_s"] is None else row["wall_s"], row["error"]]
        for row in rows
    ]
    return header, lines


def _varied_overrides(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the overrides that differ between jobs; all names if none differs."""
    names = list(dict.fromkeys(name for row in rows for name in row["overrides"]))
    return [name for name in names if len({row["overrides"].get(name) for row in rows}) > 1] or names


def markdown(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Return the table as aligned Markdown."""
    cells = [[str(cell).replace("|", "/") for cell in line] for line in [list(header), *lines]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    padded = (" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(f"| {line} |" for line in padded)


def _write_hparams(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    from torch.utils.tensorboard.summary import hparams
    from torch.utils.tensorboard.writer import SummaryWriter

    for row in rows:
        settings = {**row["overrides"], "status": row["status"]}
        figures = {name: float(value) for name, value in numbers(row["metrics"]).items()}
        with SummaryWriter(str(folder / "tensorboard" / f"job_{row['job']}")) as writer:
            for part in hparams(settings, dict.fromkeys(figures, 0.0)):
                writer.file_writer.add_summary(part)
            for name, value in figures.items():
                writer.add_scalar(name, value)


def _draw_losses(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    from keygrip.training.loss_curves import Job, draw, read_curves

    varied, jobs = _varied_overrides(rows), []
    for row, (_, job_folder) in zip(rows, find_jobs(folder), strict=True):
        curves = None if job_folder is None else read_curves(job_folder)
        if curves is not None:
            overrides = {name: row["overrides"].get(name, "") for name in varied}
            jobs.append(Job(overrides, curves, row["wall_s"]))
    figure = draw(jobs)
    if figure is None:
        return  # nothing was trained, or nothing logged
    from torch.utils.tensorboard.writer import SummaryWriter

    from keygrip.training.figures import figure_to_image

    with atomic_write(folder / LOSSES) as file:
        figure.savefig(file, format="png")
    with SummaryWriter(str(folder / "tensorboard" / "sweep")) as writer:
        writer.add_image("loss_against_compute", figure_to_image(figure), dataformats="HWC")
    log.info("losses against compute: %s", folder / LOSSES)


def _same_overrides(left: Sequence[str], right: Sequence[str]) -> bool:
    """Return whether two jobs have the same overrides; ``resume`` is ignored."""
    kept = [sorted(o for o in overrides if not o.startswith("resume=")) for overrides in (left, right)]
    return kept[0] == kept[1]


def _round_figure(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
