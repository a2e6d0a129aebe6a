"""Resuming: choose the checkpoint from which a run continues, and check that settings that affect results agree."""

from __future__ import annotations

import inspect
import logging
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hydra.utils import get_class, get_object
from omegaconf import DictConfig

from keygrip.config import leaves_of
from keygrip.launch import is_first_process, restarted_by_scheduler
from keygrip.override_values import as_typed
from keygrip.training import run_folder
from keygrip.training.checkpoints import HEADER, read_checkpoint
from keygrip.training.strategies import named_precision

log = logging.getLogger(__name__)

LENGTH = ("max_steps", "max_epochs", "max_minutes")  # may also differ when a run is resumed
# Settings that may differ between two runs of one kind, because they do not affect the weights after a step.
MAY_DIFFER = (
    *("val_every_n_steps", "limit_val_batches", "data.val_questions", "log_every_n_steps"),
    *("debug", "resume", "run_dir", "logger"),
    # the batch is divided over the processes: their number and kind do not change the result
    *("strategy.devices", "strategy.num_nodes", "strategy.kind", "strategy.accelerator"),
    "strategy.reshard_after_forward",
    "compile",
    # data that are generated do not depend on the number of processes
    *(f"data.{maker}.processes" for maker in ("record", "make.options", "sources.*.make.options")),
    *("data.num_workers", "data.prefetch_batches", "data.cache_gb", "data.cache_dir", "data.memory_gb"),
    # location and size of a feature cache: cached features equal computed ones
    *(f"{place}.cache.{name}" for place in ("geometry", "model.network.geometry") for name in ("folder", "limit_gb")),
    # limits at which a run stops or warns
    *("data.max_skipped_share", "data.max_broken_share", "data.max_off_screen_share"),
    # the same values except for rounding, from other kernels or other batches
    *("model.loss_kernel", "model.vision_cache_gb"),
    # what is only logged
    *("model.monitor_every_n_steps", "model.monitor_from_step"),
    *("model.log_images_every_n_steps", "model.shown"),
    # other changes of the data are detected by hashes
    *("data.verify", "data.allow_changed"),
)
# Locations of data. Data modules that declare it compare the data by hashes when training resumes, unless
# data.verify=false.
PLACES = ("data.root", "data.sources.*.root")
MUST_AGREE = ("callbacks.ema",)  # all other callbacks only monitor and save


def checkpoint_to_resume(cfg: DictConfig, folder: Path) -> Path | None:
    """Return the checkpoint from which a run resumes; None for a new run.

    A job that began from a checkpoint file, has saved, and is restarted by the scheduler with the same command resumes
    its own latest checkpoint, not that file.

    Raises:
        RunFolderError: the folder contains a run, and resuming was not requested. FileNotFoundError: there is nothing
            to resume.
    """
    latest = folder / run_folder.CHECKPOINT
    resume = run_folder.resume_setting(cfg.resume)
    if isinstance(resume, str) and not Path(resume).is_dir():
        if restarted_by_scheduler() and _was_saved_by_this_job(latest, resume):
            log.warning("started again by the scheduler: resuming %s", latest)
            return latest
        if not Path(resume).is_file():
            raise FileNotFoundError(
                f"nothing to resume: {resume} does not exist, and {latest} was not saved by an earlier start of this "
                "job: give resume=<run folder>"
            )
        return Path(resume)
    if resume:
        return latest
    if not latest.is_file():
        if run_folder.kept_by_step(latest.parent):
            raise run_folder.RunFolderError(
                f"{folder} holds checkpoints of an earlier run, but not its latest: {run_folder.resume_kept(folder)}, "
                f"give another run_dir, or remove {latest.parent}"
            )
        return None
    if restarted_by_scheduler():
        log.warning("started again by the scheduler: resuming %s", latest)
        return latest
    raise run_folder.RunFolderError(
        f"{folder} already holds a run: continue it with {as_typed('resume', folder)}, or give another run_dir"
    )


def _was_saved_by_this_job(checkpoint: Path, resume: str) -> bool:
    """Return whether an earlier start of this job, with the same setting ``resume``, wrote a checkpoint."""
    job = run_folder.resuming_job(resume)
    if not job or not checkpoint.is_file():
        return False
    return bool(read_checkpoint(checkpoint, mapped=True)[HEADER].get(run_folder.RESUMED_BY) == job)


def check_resumed(checkpoint: Path, resolved: dict[str, Any]) -> int:
    """Return the step of the checkpoint to resume, after checking that it was written with these settings.

    Args:
        resolved: the current configuration.

    Raises:
        ValueError: settings that affect the result differ; the message lists them.
    """
    content = read_checkpoint(checkpoint, mapped=True)
    stored = content[HEADER]["config"]
    if different := differing_settings(stored, resolved):
        raise ValueError(
            f"{checkpoint} was made with other settings: {different}; use the same ones, or start a new run without "
            "resume in another run_dir"
        )
    changed = [name for name in LENGTH if stored.get(name) != resolved.get(name)]
    if changed and (resolved.get("optimizer") or {}).get("schedule") == "cosine" and is_first_process():
        changes = ", ".join(f"{name} ({stored.get(name)} then, {resolved.get(name)} now)" for name in changed)
        log.info("from here the learning rate follows the cosine of a run of the new length: %s", changes)
    return int(content["global_step"])


def differing_settings(before: dict[str, Any], now: dict[str, Any], finished: bool = False) -> str:
    """Describe the settings that affect the result and differ between two resolved configurations.

    Args:
        finished: whether the run is finished and not resumed: its length and the location of its data must also agree.

    Returns:
        Four settings with their values, and the number of further ones; empty if none differs.
    """
    before, now = ({".".join(path): value for path, value in leaves_of(each, ())} for each in (before, now))
    for settings in (before, now):
        if "strategy.precision" in settings:
            accelerator, precision = settings.get("strategy.accelerator"), settings["strategy.precision"]
            settings["strategy.precision"] = named_precision(accelerator, precision)
    may_differ = (
        MAY_DIFFER
        if finished
        else (*LENGTH, *MAY_DIFFER, *_places_that_may_differ(before, now), *_stages_that_may_differ(before, now))
    )
    different = sorted(
        key
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key) and not _matches_any(key, may_differ)
        if key in before or not _is_default(key, now)
        if not key.startswith("callbacks") or _matches_any(key, MUST_AGREE)
    )
    description = ", ".join(f"{key} ({before.get(key)} then, {now.get(key)} now)" for key in different[:4])
    return description + (f" and {len(different) - 4} more" if len(different) > 4 else "")


def _is_default(key: str, settings: dict[str, Any]) -> bool:
    """Return whether a setting has its default value, as runs from before the setting existed had."""
    parent, _, name = key.rpartition(".")
    target = settings.get(f"{parent}._target_")
    if target is None:
        return False
    parameter = inspect.signature(get_object(target)).parameters.get(name)
    return parameter is not None and parameter.default == settings[key]


def _places_that_may_differ(previous: dict[str, Any], current: dict[str, Any]) -> tuple[str, ...]:
    if False in (previous.get("data.verify"), current.get("data.verify")) and not current.get("data.allow_changed"):
        return ()  # for demonstrations of robots only poses are compared then, not images
    target = current.get("data._target_")
    if not (target and getattr(get_class(target), "compares_contents", False)):
        return ()
    given = [key.removesuffix("root") for key, value in current.items() if value and _matches_any(key, PLACES)]
    # data that the run has generated are read from the place to which they were moved: how they are made has no effect
    return (*PLACES, "data.record.folder", *(f"{part}{maker}" for part in given for maker in ("record", "make")))


def _stages_that_may_differ(previous: dict[str, Any], current: dict[str, Any]) -> tuple[str, ...]:
    """Return the setting of a curriculum if its stages, counted in batches by an earlier version, are as long as the
    current ones in optimizer steps. The order of samples is checked separately, by its fingerprint."""
    per_step = current.get("accumulate_grad_batches") or 1
    then, stages = previous.get("data.curriculum"), current.get("data.curriculum")
    if per_step == 1 or not (isinstance(then, list) and isinstance(stages, list)):
        return ()
    lasting = [each | ({"steps": each["steps"] * per_step} if each.get("steps") else {}) for each in stages]
    return ("data.curriculum",) if lasting == then else ()


def _matches_any(key: str, parts: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, part) or key.startswith(f"{part}.") for part in parts)
