"""Choose the folder of a run, ``runs/<model>_<data>/<stamp>``, shared by all its processes, or the one to resume."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

from omegaconf import OmegaConf

from keygrip.artifacts import is_locked, locked, read_record, refuse_file
from keygrip.launch import is_first_process, is_slurm_shell, parent_start_time, restarted_by_scheduler, scheduler_job
from keygrip.override_values import as_typed
from keygrip.training.results import RESULT

RUNS = Path("runs")
CHECKPOINT = Path("checkpoints") / "last.ckpt"
LOCK = ".lock"
HYDRA = ".hydra"  # the settings as Hydra writes them, before a command begins
PLAN = "sweep.json"  # command and jobs of a sweep
RESUMED_BY = "resumed_by"  # in result.json and in checkpoints: see `resuming_job`


class RunFolderError(ValueError):
    """The run folder belongs to another run and must stay unchanged."""


def register_resolvers() -> None:
    """Register the resolvers that ``conf/train.yaml`` uses, ``run_folder`` and ``sweep_folder``, and that of
    ``conf/bench.yaml``, ``log_folder``."""
    OmegaConf.register_new_resolver("run_folder", choose_folder, replace=True)
    OmegaConf.register_new_resolver("sweep_folder", choose_for_sweep, replace=True)
    OmegaConf.register_new_resolver("log_folder", log_folder, replace=True)


def choose_folder(
    run_dir: str | None,
    resume: bool | str | None,
    model: str,
    data: str,
    start: int = 0,
    overrides: Sequence[str] | None = None,
) -> str:
    """Return the folder of this run.

    Args:
        run_dir: given by the user, or None.
        resume: False, True (newest run of this model and data that has a checkpoint; for a job that the scheduler has
            restarted, the run that it resumed before), or a run folder or checkpoint file.
        model, data: names of the chosen configs.
        start: index, from 1, of this training among those started by this process; 0: a command, which has only one.
        overrides: overrides of this training; None: those of the command line.

    Raises:
        FileNotFoundError: nothing to resume.
        RunFolderError: another process is training in the folder. ValueError: the processes of this run cannot agree on
            a folder, ``run_dir`` is a file or not the folder that ``resume`` names, or one of the two is an empty
            string.
    """
    group = RUNS / f"{model}_{data}"
    resume = resume_setting(resume)
    if isinstance(resume, str):
        folder = _folder_of(given_path("resume", resume))
        if run_dir is not None and Path(run_dir).resolve() != folder.resolve():
            raise ValueError(
                f"resume={resume} goes on in {folder}, and run_dir={run_dir} is another folder: leave out run_dir"
            )
    elif run_dir is not None:
        folder = given_folder("run_dir", run_dir)
        if resume and not (folder / CHECKPOINT).is_file():
            remedy = resume_kept(folder) or "leave out resume=true"
            raise FileNotFoundError(f"nothing to resume: {folder / CHECKPOINT} does not exist; {remedy}")
    elif resume:
        folder = newest(group)
    else:
        return str(_claimed(group, start, None if overrides is None else tuple(overrides)))
    refuse_held(folder)
    return str(folder)


def given_path(setting: str, path: str | Path) -> Path:
    """Return the path of a setting.

    Raises:
        ValueError: an empty string, which pathlib reads as the current folder, or a dangling symbolic link.
    """
    if not str(path):
        raise ValueError(
            f"{setting} is an empty text, often a shell's variable that is not set: give a path, or {setting}=. for "
            "the present folder"
        )
    _refuse_dangling(Path(path), f"{setting}={path}")
    return Path(path)


def given_folder(setting: str, path: str | Path) -> Path:
    """Return the path of a setting that names a folder to write to. Raise ValueError as `given_path` does, and for a
    file."""
    folder = given_path(setting, path)
    refuse_file(folder, setting)
    return folder


def log_folder(run_dir: str | None) -> str:
    """Return the folder of a command that always has one. Raise ValueError as `given_folder` does, and for None."""
    if run_dir is None:
        raise ValueError("run_dir=null: the log needs a folder: leave run_dir out, or give a folder")
    return str(given_folder("run_dir", run_dir))


def _refuse_dangling(path: Path, description: str) -> None:
    """Raise ValueError if a path, or a folder above it, is a dangling symbolic link."""
    for parent in (path, *path.parents):
        if parent.is_symlink() and not parent.exists():
            raise ValueError(
                f"{description}: {parent} is a symbolic link to {parent.readlink()}, which is not there: make that "
                "folder (is its disk mounted?), or give another"
            )


def kept_by_step(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of a folder that are named by their step, in the order of steps."""
    found = (file for file in folder.glob("step-*.ckpt") if file.stem[5:].isdecimal())
    return {int(file.stem[5:]): file for file in sorted(found, key=lambda file: int(file.stem[5:]))}


def resume_setting(resume: bool | str | None) -> bool | str:
    """Convert the setting ``resume``, possibly a string: return whether to resume, or the path to resume from."""
    if isinstance(resume, str):
        return {"true": True, "false": False}.get(resume.lower(), resume)
    return bool(resume)


def resuming_job(resume: bool | str | None) -> str:
    """Return the scheduler's job of this start with its setting ``resume``, by which a restart of the job recognises
    what its earlier starts wrote; empty if no run is resumed, or without such a job (`scheduler_job`)."""
    resume, job = resume_setting(resume), scheduler_job()
    return f"job {job} with resume={resume}" if job and resume else ""


def choose_for_sweep(resume: bool | str | None, *names: str) -> str:
    """Return the folder of a sweep, in which its jobs have numbered folders; with ``resume=true`` the newest sweep.

    Args:
        names: name of the sweep, or names of its model and data.

    Raises:
        FileNotFoundError: no sweep to resume.
        ValueError: ``resume`` names a run; a sweep resumes as a whole.
    """
    group = RUNS / "sweeps" / "_".join(names)
    if not whole_sweep(resume):
        return str(_claimed(group))
    sweep = newest_sweep(group)
    if sweep is None:
        raise FileNotFoundError(f"nothing to resume: no sweep in {group}/; leave out resume=true")
    return str(sweep)


def whole_sweep(resume: bool | str | None) -> bool:
    """Return whether the setting ``resume`` resumes a sweep.

    Raises:
        ValueError: ``resume`` names a run; a sweep resumes as a whole.
    """
    resume = resume_setting(resume)
    if isinstance(resume, str):
        raise ValueError("a sweep resumes as a whole: give resume=true, and hydra.sweep.dir=<folder> for an older one")
    return resume


def newest_sweep(group: Path) -> Path | None:
    """Return the sweep in ``group`` with the latest recorded start; None if there is none."""
    found = [path.parent for path in group.glob(f"*/{PLAN}")]
    return max(found, key=lambda folder: (_read_start_time(folder / PLAN, "started"), folder.name), default=None)


@cache
def _claimed(group: Path, start: int = 0, overrides: tuple[str, ...] | None = None) -> Path:
    """Return a folder in ``group`` for this run: under a scheduler one with the job's name, which a restart finds
    again, else a new folder that no other process has; two starts in the same second get two folders."""
    name = run_name(start, overrides)
    if "TORCHELASTIC_RUN_ID" in os.environ or name.startswith("job-"):
        job_folder = group / (name if start < 2 else f"{name}-{start}")
        refuse_held(job_folder)
        return job_folder
    if start > 1 and _are_several_processes():
        # The first process reports it. With another exit code Lightning would kill that process, perhaps in the
        # evaluation after the earlier training.
        if not is_first_process():
            sys.exit(0)
        raise ValueError(
            "an earlier training of this script started further processes, which do not know a new run folder: give "
            "each training its own run_dir=FOLDER, or start the script with torchrun"
        )
    variable = f"KEYGRIP_RUN_FOLDER_{start}"  # passed to the processes that Lightning starts with the same script
    parent, _, claimed_folder = os.environ.get(variable, "").partition(":")
    if start and not is_first_process() and parent == str(os.getppid()):
        return Path(claimed_folder)
    folder = new_folder(group, name)
    _made.append(folder)
    if start:
        os.environ[variable] = f"{os.getpid()}:{folder}"
    return folder


def _are_several_processes() -> bool:
    """Return whether this process has already trained together with others. Lightning starts them only once, so they do
    not receive variables that this process sets later."""
    distributed = sys.modules.get("torch.distributed")  # importing torch takes seconds, and none has trained without it
    if distributed is None or not distributed.is_available():
        return False
    return bool(distributed.is_initialized() and distributed.get_world_size() > 1)


def new_folder(group: Path, name: str) -> Path:
    """Create a new folder in ``group``; if the name is taken, a number is appended.

    Raises:
        ValueError: ``group`` is below a dangling symbolic link.
    """
    _refuse_dangling(group, f"a new folder in {group}")
    for number in itertools.count(1):
        folder = group / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError


def remove_if_empty(folder: Path) -> None:
    """Remove the folder of a run or sweep that did not begin, and its parents inside `RUNS` that are then empty."""
    with contextlib.suppress(OSError):
        folder.rmdir()
        for above in folder.parents[: len(folder.parents) - 1]:
            if above != RUNS and RUNS not in above.parents:
                break
            above.rmdir()


def begin(folder: Path) -> None:
    """Mark the beginning of a run's work: from now on its folder is kept, however the run ends."""
    _made[:] = [made for made in _made if made.resolve() != folder.resolve()]


def has_not_begun(folder: Path) -> bool:
    """Return whether this process has created the folder for a run whose work has not begun."""
    return folder.resolve() in {made.resolve() for made in _made}


def remove_unbegun(only: Path | None = None) -> None:
    """Remove the folders that this process has created for runs or sweeps that did not begin. They contain only the
    settings written by Hydra, the log and the lock. A folder with other content is kept.

    Args:
        only: the folder to remove; None: all.
    """
    for folder in [made for made in _made if only is None or made.resolve() == only.resolve()]:
        _made.remove(folder)
        logs = [handler for handler in logging.getLogger().handlers if _writes_into(handler, folder)]
        expected_names = {HYDRA, LOCK, *(Path(handler.baseFilename).name for handler in logs)}
        if not folder.is_dir() or not {path.name for path in folder.iterdir()} <= expected_names:
            continue
        for handler in logs:
            logging.getLogger().removeHandler(handler)
            handler.close()
            Path(handler.baseFilename).unlink(missing_ok=True)
        shutil.rmtree(folder / HYDRA, ignore_errors=True)
        (folder / LOCK).unlink(missing_ok=True)
        remove_if_empty(folder)


def _writes_into(handler: logging.Handler, folder: Path) -> TypeGuard[logging.FileHandler]:
    return isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent.resolve() == folder.resolve()


_made: list[Path] = []  # folders created by `_claimed` in this process, for runs that have not begun


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a run folder for this process during the block; helper processes of the same run need no lock.

    Raises:
        RunFolderError: another process is training in it.
    """
    if not is_first_process():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / LOCK, wait=False, together_without=True))
        except BlockingIOError as error:
            raise RunFolderError(_describe_running_run(folder)) from error
        _held.add(folder.resolve())
        stack.callback(_held.discard, folder.resolve())
        yield


_held: set[Path] = set()  # folders locked by this process


def refuse_held(folder: Path) -> None:
    """Reject a folder in which another process is training, before Hydra writes its files there.

    Raises:
        RunFolderError: the folder is locked.
    """
    if folder.resolve() not in _held and is_first_process() and is_held(folder):
        raise RunFolderError(_describe_running_run(folder))


def is_held(folder: Path) -> bool | None:
    """Return whether a process is training in a folder at this moment; None on a disk without file locks."""
    return is_locked(folder / LOCK) if (folder / LOCK).is_file() else False


def _describe_running_run(folder: Path) -> str:
    return f"{folder} belongs to a run that is still going on: wait until it ends, or give another run_dir"


def newest(group: Path) -> Path:
    """Return the newest run folder in ``group`` with a checkpoint: by the recorded start time, then by its name. If the
    scheduler has restarted this job, a run that the job resumed before has precedence over newer ones.

    Raises:
        FileNotFoundError: there is none.
    """
    run_folders = [path.parents[1] for path in group.glob(f"*/{CHECKPOINT}")]
    if not run_folders:
        raise FileNotFoundError(
            f"nothing to resume: no run with a checkpoint in {group}/; leave out resume=true, or give "
            "resume=<run folder>"
        )
    if restarted_by_scheduler():
        job = resuming_job(True)
        run_folders = [each for each in run_folders if _read_value(each / RESULT, RESUMED_BY) == job] or run_folders
    return max(run_folders, key=lambda folder: (_read_start_time(folder / RESULT, "started_at"), folder.name))


def _read_start_time(file: Path, key: str) -> float:
    """Return the recorded start of a run or a sweep in seconds since the epoch; 0 if it is not recorded."""
    value = _read_value(file, key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _read_value(file: Path, key: str) -> Any:
    """Return a value of a record; None if it is not there, or if the record cannot be read."""
    try:
        return read_record(file).get(key)
    except (OSError, ValueError):
        return None


@cache
def run_name(start: int = 0, overrides: tuple[str, ...] | None = None) -> str:
    """Return a name for this run that is the same in all its processes: a time stamp or the scheduler's job id. For
    SLURM it has a digest of the overrides, because a batch script may train several times. The id of the step is not
    suitable: it depends on the order in which simultaneous steps begin.

    Args:
        start, overrides: see `choose_folder`; each start has its own time stamp.

    Raises:
        ValueError: several nodes without a common name for the run.
    """
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        run_id = environment["TORCHELASTIC_RUN_ID"]
        if run_id != "none":
            return f"job-{run_id}"
        if int(environment.get("WORLD_SIZE", 1)) > int(environment.get("LOCAL_WORLD_SIZE", 1)):
            raise ValueError(
                "torchrun on several nodes without --rdzv-id: they cannot agree on a run folder; give run_dir=<folder>"
            )
        return parent_start_time()
    if {"SLURM_JOB_ID", "SLURM_PROCID"} <= environment.keys() and not is_slurm_shell():
        return f"job-{environment['SLURM_JOB_ID']}-{_digest(sys.argv[1:] if overrides is None else overrides)}"
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def _digest(overrides: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:8]


def _folder_of(path: Path) -> Path:
    folder = path.parent.parent if path.parent.name == CHECKPOINT.parent.name else path.parent
    # A job's own saves may have removed the file from which it began (`keep_by_step`): see `checkpoint_to_resume`.
    removed = path.suffix == CHECKPOINT.suffix and not path.exists() and (folder / CHECKPOINT).is_file()
    if path.is_file() or (removed and restarted_by_scheduler()):
        return folder
    if (path / CHECKPOINT).is_file():
        return path
    if path.is_dir():
        hint = resume_kept(path)
        raise FileNotFoundError(f"nothing to resume: {path} holds no {CHECKPOINT}{hint and '; '}{hint}")
    raise FileNotFoundError(f"nothing to resume: {path} does not exist")


def resume_kept(folder: Path) -> str:
    """Describe how to resume a run without `CHECKPOINT` from its newest other checkpoint; empty if there is none."""
    kept = list(kept_by_step((folder / CHECKPOINT).parent).values())
    return f"go on from the newest one that is left with {as_typed('resume', kept[-1])}" if kept else ""
