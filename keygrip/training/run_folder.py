"""Where a run writes: ``runs/<model>_<data>/<stamp>``, one folder for all its processes, and which one to resume."""

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
from typing import TypeGuard

from omegaconf import OmegaConf

from keygrip.artifacts import is_locked, locked, read_record
from keygrip.launch import in_a_shell_of_slurm, is_first_process
from keygrip.training.results import RESULT

RUNS = Path("runs")
CHECKPOINT = Path("checkpoints") / "last.ckpt"
LOCK = ".lock"
HYDRA = ".hydra"  # the settings as Hydra writes them, before a command begins
PLAN = "sweep.json"  # of a sweep: its command and its jobs


class RunFolderError(ValueError):
    """The run folder is another run's, which the refusal must leave as it is."""


def register_resolvers() -> None:
    """Registers the resolvers that ``conf/train.yaml`` uses: ``run_folder``, ``sweep_folder``."""
    OmegaConf.register_new_resolver("run_folder", choose, replace=True)
    OmegaConf.register_new_resolver("sweep_folder", choose_for_sweep, replace=True)


def choose(
    run_dir: str | None,
    resume: bool | str | None,
    model: str,
    data: str,
    start: int = 0,
    overrides: Sequence[str] | None = None,
) -> str:
    """The folder of this run.

    Args:
        run_dir: fixed by the user, or None.
        resume: False, True (newest run of this model and data that has a checkpoint), or a run folder or checkpoint
            file.
        model, data: names of the chosen configs.
        start: which of the trainings that this process starts, from 1; 0: a command, which is one.
        overrides: of this training; None: the command line's.

    Raises:
        FileNotFoundError: nothing to resume.
        RunFolderError: another process trains into it. ValueError: the processes of this run could not agree on one,
            ``run_dir`` is not the folder that ``resume`` names, or one of the two is an empty text.
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
        folder = given_path("run_dir", run_dir)
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
    """The path that a setting gives.

    Raises:
        ValueError: an empty text, which pathlib takes for the present folder; a symbolic link to what is not there.
    """
    if not str(path):
        raise ValueError(
            f"{setting} is an empty text, often a shell's variable that is not set: give a path, or {setting}=. for "
            "the present folder"
        )
    _refuse_dangling(Path(path), f"{setting}={path}")
    return Path(path)


def _refuse_dangling(path: Path, what: str) -> None:
    """Raises ValueError: a path, or a folder above it, is a symbolic link to what is not there."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise ValueError(
                f"{what}: {place} is a symbolic link to {place.readlink()}, which is not there: make that folder (is "
                "its disk mounted?), or give another"
            )


def kept_by_step(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder that are named by their step, in the order of steps."""
    found = (file for file in folder.glob("step-*.ckpt") if file.stem[5:].isdecimal())
    return {int(file.stem[5:]): file for file in sorted(found, key=lambda file: int(file.stem[5:]))}


def resume_setting(resume: bool | str | None) -> bool | str:
    """The setting ``resume``, given as text or not: whether to resume, or the path of what is resumed."""
    if isinstance(resume, str):
        return {"true": True, "false": False}.get(resume.lower(), resume)
    return bool(resume)


def choose_for_sweep(resume: bool | str | None, *names: str) -> str:
    """The folder of a sweep, whose jobs are numbered folders inside; with ``resume=true`` the newest one.

    Args:
        names: of the sweep, or of the model and the data that it trains.

    Raises:
        FileNotFoundError: no sweep to resume.
        ValueError: ``resume`` names a run; a sweep resumes as a whole.
    """
    group = RUNS / "sweeps" / "_".join(names)
    if not whole_sweep(resume):
        return str(_claimed(group))
    found = newest_sweep(group)
    if found is None:
        raise FileNotFoundError(f"nothing to resume: no sweep in {group}/; leave out resume=true")
    return str(found)


def whole_sweep(resume: bool | str | None) -> bool:
    """Whether a sweep resumes, by the setting ``resume``.

    Raises:
        ValueError: it names a run; a sweep resumes as a whole.
    """
    resume = resume_setting(resume)
    if isinstance(resume, str):
        raise ValueError("a sweep resumes as a whole: give resume=true, and hydra.sweep.dir=<folder> for an older one")
    return resume


def newest_sweep(group: Path) -> Path | None:
    """The sweep in ``group`` that began last, as it recorded that itself; None where there is none."""
    found = [path.parent for path in group.glob(f"*/{PLAN}")]
    return max(found, key=lambda folder: (_recorded(folder / PLAN, "started"), folder.name), default=None)


@cache
def _claimed(group: Path, start: int = 0, overrides: tuple[str, ...] | None = None) -> Path:
    """A folder in ``group`` for this run: its scheduler's, which it finds again by its name, or a new one that no other
    process has; two starts in one second get two folders."""
    name = stamp(start, overrides)
    if "TORCHELASTIC_RUN_ID" in os.environ or name.startswith("job-"):
        named = group / (name if start < 2 else f"{name}-{start}")
        refuse_held(named)
        return named
    told = f"KEYGRIP_RUN_FOLDER_{start}"  # to the processes that Lightning starts with the same script
    parent, _, given = os.environ.get(told, "").partition(":")
    if start and not is_first_process() and parent == str(os.getppid()):
        return Path(given)
    folder = new_folder(group, name)
    _made.append(folder)
    if start:
        os.environ[told] = f"{os.getpid()}:{folder}"
    return folder


def new_folder(group: Path, name: str) -> Path:
    """A folder in ``group`` that this call has made: with a number behind its name where another process has that.

    Raises:
        ValueError: ``group`` lies below a symbolic link to what is not there.
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
    """Removes a folder of a run or sweep that did not begin, and the folders of `RUNS` above it that are empty then."""
    with contextlib.suppress(OSError):
        folder.rmdir()
        for above in folder.parents[: len(folder.parents) - 1]:
            if above != RUNS and RUNS not in above.parents:
                break
            above.rmdir()


def begin(folder: Path) -> None:
    """Says that a run's work begins: its folder stays, however the run ends."""
    _made[:] = [made for made in _made if made.resolve() != folder.resolve()]


def has_not_begun(folder: Path) -> bool:
    """Whether this process has made the folder, for a run whose work has not begun."""
    return folder.resolve() in {made.resolve() for made in _made}


def remove_unbegun(only: Path | None = None) -> None:
    """Removes the folders that this process has made for runs or sweeps which did not begin: they hold nothing but the
    settings as Hydra writes them, the log and the lock. One that holds anything else stays.

    Args:
        only: the one to remove; None: all.
    """
    for folder in [made for made in _made if only is None or made.resolve() == only.resolve()]:
        _made.remove(folder)
        logs = [each for each in logging.getLogger().handlers if _writes_into(each, folder)]
        known = {HYDRA, LOCK, *(Path(each.baseFilename).name for each in logs)}
        if not folder.is_dir() or not {path.name for path in folder.iterdir()} <= known:
            continue
        for each in logs:
            logging.getLogger().removeHandler(each)
            each.close()
            Path(each.baseFilename).unlink(missing_ok=True)
        shutil.rmtree(folder / HYDRA, ignore_errors=True)
        (folder / LOCK).unlink(missing_ok=True)
        remove_if_empty(folder)


def _writes_into(handler: logging.Handler, folder: Path) -> TypeGuard[logging.FileHandler]:
    return isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent.resolve() == folder.resolve()


_made: list[Path] = []  # by `_claimed` of this process, for runs that have not begun


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keeps a run folder for this process while the block runs; helper processes of the same run pass.

    Raises:
        RunFolderError: another process trains into it.
    """
    if not is_first_process():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / LOCK, wait=False, together_without=True))
        except BlockingIOError as error:
            raise RunFolderError(_still_going_on(folder)) from error
        _held.add(folder.resolve())
        stack.callback(_held.discard, folder.resolve())
        yield


_held: set[Path] = set()  # by this process


def refuse_held(folder: Path) -> None:
    """Refuses a folder into which another process trains, before Hydra writes its own files there.

    Raises:
        RunFolderError: it is held.
    """
    if folder.resolve() not in _held and is_first_process() and is_held(folder):
        raise RunFolderError(_still_going_on(folder))


def is_held(folder: Path) -> bool | None:
    """Whether some process trains into a folder at this moment; None: a disk without file locks cannot say."""
    return is_locked(folder / LOCK) if (folder / LOCK).is_file() else False


def _still_going_on(folder: Path) -> str:
    return f"{folder} belongs to a run that is still going on: wait until it ends, or give another run_dir"


def newest(group: Path) -> Path:
    """The newest run folder in ``group`` with a checkpoint: by the start time that the run recorded, then by its name.

    Raises:
        FileNotFoundError: there is none.
    """
    found = [path.parents[1] for path in group.glob(f"*/{CHECKPOINT}")]
    if not found:
        raise FileNotFoundError(
            f"nothing to resume: no run with a checkpoint in {group}/; leave out resume=true, or give "
            "resume=<run folder>"
        )
    return max(found, key=lambda folder: (_recorded(folder / RESULT, "started_at"), folder.name))


def _recorded(file: Path, key: str) -> float:
    """When a run or a sweep began, seconds since the epoch, as it recorded itself; 0 where it did not."""
    try:
        value = read_record(file).get(key)
    except (OSError, ValueError):
        return 0.0
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


@cache
def stamp(start: int = 0, overrides: tuple[str, ...] | None = None) -> str:
    """A name for this run that all its processes agree on: a time stamp, or the scheduler's job number, in SLURM with a
    digest of the overrides: a batch script may train several times. The number of a step would not do: it changes with
    the order in which steps that run side by side begin.

    Args:
        start, overrides: see `choose`; each start has a time stamp of its own.

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
        return _parents_start()
    if {"SLURM_JOB_ID", "SLURM_PROCID"} <= environment.keys() and not in_a_shell_of_slurm():
        return f"job-{environment['SLURM_JOB_ID']}-{_digest(sys.argv[1:] if overrides is None else overrides)}"
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def _digest(overrides: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:8]


def _parents_start() -> str:
    """All processes of one node have the same parent, which started once."""
    import psutil

    started = psutil.Process(os.getppid()).create_time()
    return datetime.fromtimestamp(started).strftime("%Y-%m-%d_%H-%M-%S")


def _folder_of(path: Path) -> Path:
    if path.is_file():
        return path.parent.parent if path.parent.name == CHECKPOINT.parent.name else path.parent
    if (path / CHECKPOINT).is_file():
        return path
    if path.is_dir():
        kept = resume_kept(path)
        raise FileNotFoundError(f"nothing to resume: {path} holds no {CHECKPOINT}{kept and '; '}{kept}")
    raise FileNotFoundError(f"nothing to resume: {path} does not exist")


def resume_kept(folder: Path) -> str:
    """How to go on from the newest checkpoint that is left of a run without `CHECKPOINT`; empty where none is left."""
    kept = list(kept_by_step((folder / CHECKPOINT).parent).values())
    return f"go on from the newest one that is left with resume={kept[-1]}" if kept else ""
