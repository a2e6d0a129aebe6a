"""Resuming: which checkpoint a run continues from; settings that change what is computed must agree."""

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
from keygrip.training import run_folder
from keygrip.training.checkpoints import HEADER, read_checkpoint
from keygrip.training.strategies import named_precision

log = logging.getLogger(__name__)

LENGTH = ("max_steps", "max_epochs", "max_minutes")  # may differ too when a run is resumed
# Settings that may differ between two runs of one kind: they do not change which weights a step leads to.
MAY_DIFFER = (
    *("val_every_n_steps", "limit_val_batches", "log_every_n_steps"),
    *("debug", "resume", "run_dir", "logger"),
    # the batch is divided over the processes: their number and kind do not change what is computed
    *("strategy.devices", "strategy.num_nodes", "strategy.kind", "strategy.accelerator"),
    "strategy.reshard_after_forward",
    "compile",
    *("data.num_workers", "data.prefetch_batches", "data.cache_gb", "data.cache_dir", "model.log_images_every_n_steps"),
    "data.memory_gb",
    # where features are kept, and how many: those that are kept are those that would be computed
    *(f"{place}.cache.{name}" for place in ("geometry", "model.network.geometry") for name in ("folder", "limit_gb")),
    # from where on a run is stopped or warned
    *("data.max_skipped_share", "data.max_broken_share", "data.max_off_screen_share"),
    # the same numbers but for rounding, from other kernels or other batches
    *("model.loss_kernel", "model.vision_cache_gb"),
    "model.monitor_every_n_steps",
    # what else has changed in the data is compared by hashes
    *("data.verify", "data.allow_changed"),
)
# Where data lie: they are compared by hashes, by data modules that say so, where training goes on with them and
# data.verify=false does not leave the hashes out.
PLACES = ("data.root", "data.sources.*.root")
MUST_AGREE = ("callbacks.ema",)  # all other callbacks only watch and save


def checkpoint_to_resume(cfg: DictConfig, folder: Path) -> Path | None:
    """The checkpoint that a run goes on from; None: it starts anew.

    Raises:
        RunFolderError: the folder holds a run, and it is not to be resumed. FileNotFoundError: there is nothing to
            resume.
    """
    latest = folder / run_folder.CHECKPOINT
    resume = run_folder.resume_setting(cfg.resume)
    if isinstance(resume, str) and Path(resume).is_file():
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
        f"{folder} already holds a run: continue it with resume={folder}, or give another run_dir"
    )


def check_resumed(checkpoint: Path, resolved: dict[str, Any]) -> int:
    """The step of the checkpoint to resume, after checking that it was made with these settings.

    Args:
        resolved: the present configuration.

    Raises:
        ValueError: settings that change what is computed differ; they are named.
    """
    content = read_checkpoint(checkpoint, mapped=True)
    before = content[HEADER]["config"]
    if different := differing_settings(before, resolved):
        raise ValueError(
            f"{checkpoint} was made with other settings: {different}; use the same ones, or another run_dir"
        )
    changed = [name for name in LENGTH if before.get(name) != resolved.get(name)]
    if changed and (resolved.get("optimizer") or {}).get("schedule") == "cosine" and is_first_process():
        said = ", ".join(f"{name} ({before.get(name)} then, {resolved.get(name)} now)" for name in changed)
        log.info("from here the learning rate follows the cosine of a run of the new length: %s", said)
    return int(content["global_step"])


def differing_settings(before: dict[str, Any], now: dict[str, Any], finished: bool = False) -> str:
    """The settings that change what is computed and that differ between two resolved configurations, in words.

    Args:
        finished: the run is not resumed: how long it trains and where its data lie must agree as well.

    Returns:
        Four of them with their values, and how many more there are; empty where none differs.
    """
    before, now = ({".".join(path): value for path, value in leaves_of(each, ())} for each in (before, now))
    for settings in (before, now):
        if "strategy.precision" in settings:
            accelerator, precision = settings.get("strategy.accelerator"), settings["strategy.precision"]
            settings["strategy.precision"] = named_precision(accelerator, precision)
    may_differ = MAY_DIFFER if finished else (*LENGTH, *MAY_DIFFER, *_places(before, now), *_stages(before, now))
    different = sorted(
        key
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key) and not _within(key, may_differ)
        if key in before or not _is_default(key, now)
        if not key.startswith("callbacks") or _within(key, MUST_AGREE)
    )
    shown = ", ".join(f"{key} ({before.get(key)} then, {now.get(key)} now)" for key in different[:4])
    return shown + (f" and {len(different) - 4} more" if len(different) > 4 else "")


def _is_default(key: str, settings: dict[str, Any]) -> bool:
    """Whether a setting is as it would be if nothing said it: a run from before there was one had the same."""
    parent, _, name = key.rpartition(".")
    target = settings.get(f"{parent}._target_")
    if target is None:
        return False
    parameter = inspect.signature(get_object(target)).parameters.get(name)
    return parameter is not None and parameter.default == settings[key]


def _places(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
    if False in (before.get("data.verify"), now.get("data.verify")) and not now.get("data.allow_changed"):
        return ()  # of robots' demonstrations poses are compared then, and no images
    target = now.get("data._target_")
    return PLACES if target and getattr(get_class(target), "compares_contents", False) else ()


def _stages(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
    """The setting of a curriculum where its stages lasted as many batches as now optimizer steps have: those of an
    earlier version counted batches. That the order of samples is the same is checked by its fingerprint."""
    per_step = now.get("accumulate_grad_batches") or 1
    then, stages = before.get("data.curriculum"), now.get("data.curriculum")
    if per_step == 1 or not (isinstance(then, list) and isinstance(stages, list)):
        return ()
    lasting = [each | ({"steps": each["steps"] * per_step} if each.get("steps") else {}) for each in stages]
    return ("data.curriculum",) if lasting == then else ()


def _within(key: str, parts: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, part) or key.startswith(f"{part}.") for part in parts)
