"""Pretraining stages: training runs whose weights another run starts from, trained first if they are missing.

A configuration names a stage instead of a run folder. `keygrip.train` completes the stage before it builds the model,
so that models get a path and start no process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from keygrip.artifacts import make_once
from keygrip.config import compose
from keygrip.launch import started_together
from keygrip.training.checkpoints import HEADER, read_checkpoint
from keygrip.training.idle_settings import BUILT, unread
from keygrip.training.results import FINISHED, read_result
from keygrip.training.resuming import differing_settings
from keygrip.training.run_folder import CHECKPOINT

log = logging.getLogger(__name__)

Place = tuple[str, ...]
SAVING_S = 600.0  # time limit for a stopped stage to finish its step and save


@dataclass(frozen=True)
class PretrainingStage:
    """A finished run of `keygrip.train`, trained first if it is missing.

    Args:
        overrides: overrides of `keygrip.train` that define the run. A null from the configuration appears as "None".
        name: prefix of its folder's name, which ends in a hash of the overrides.
        folder: parent folder of its folder.
        if_different: further overrides, added to the others where they change a value of the run, so that a run with
            the values of its recipe keeps its folder.
    """

    overrides: Sequence[str]
    name: str
    folder: str = "runs"
    if_different: Sequence[str] = ()

    def __post_init__(self) -> None:
        changing = [each for each in self.if_different if _changes_value(tuple(self.overrides), each)]
        overrides = [*self.overrides, *changing]
        named = [f"{each.removesuffix('=None')}=null" if each.endswith("=None") else each for each in overrides]
        object.__setattr__(self, "overrides", named)

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        digest = hashlib.sha256(json.dumps(list(self.overrides)).encode()).hexdigest()
        return Path(self.folder) / f"{self.name}-{digest[:8]}"

    @property
    def is_finished(self) -> bool:
        """Whether the finished run exists."""
        return self._is_finished(self.run_dir)

    def complete(self) -> Path:
        """Train the run if it is not finished, and return its folder. An interrupted run is resumed.

        Raises:
            RuntimeError: training failed; its output contains the error.
            ValueError: the run is missing, and this is one of several processes; or it was trained with settings that
                differ from those of its overrides now.
        """
        if not make_once(self.run_dir, self._is_finished, self._train, together_without=True):
            self._refuse_other_settings()
        return self.run_dir

    def _train(self, run: Path) -> None:
        if started_together() > 1:
            raise ValueError(f"{run} is missing, and it is trained by one process: run `{self._command()}` first")
        command = [sys.executable, "-m", "keygrip.train", *self.overrides, f"run_dir={run}"]
        if (run / CHECKPOINT).is_file():
            command.append("resume=true")
        log.info("%s: %s is not there, training it: keygrip.train %s", self.name, run, " ".join(self.overrides))
        if _run(command) or not self._is_finished(run):
            raise RuntimeError(f"training {self.name} failed: keygrip.train {' '.join(self.overrides)}")

    def require(self) -> None:
        """Raise ValueError if there is no finished run, or if its settings are different."""
        if self.is_finished:
            self._refuse_other_settings()
        else:
            raise ValueError(
                f"dry_run=true: {self.run_dir} is missing, which this run begins with, and a dry run trains nothing: "
                f"run `{self._command()}` first, or name other weights (null: random ones, of an encoder)"
            )

    def _command(self) -> str:
        return shlex.join(["python", "-m", "keygrip.train", *self.overrides, f"run_dir={self.run_dir}"])

    def _refuse_other_settings(self) -> None:
        """Reject a finished run whose settings differ from those of the overrides now: configs may have changed."""
        run = self.run_dir
        current = cast(dict[str, Any], OmegaConf.to_container(compose("train", self.overrides), resolve=True))
        stored = read_checkpoint(run / CHECKPOINT, mapped=True)[HEADER]["config"]
        if different := differing_settings(stored, with_run_folders(current), finished=True):
            raise ValueError(
                f"{run} was trained with other settings than `{' '.join(self.overrides)}` stands for now: {different}; "
                f"move it away to train {self.name} anew, or name {run} itself as the weights to start from"
            )
        log.info("%s: %s", self.name, run)

    @staticmethod
    def _is_finished(run: Path) -> bool:
        return read_result(run).get("status") == FINISHED and (run / CHECKPOINT).is_file()


@cache  # a run's configuration names its stage several times, and composing takes a third of a second
def _changes_value(overrides: tuple[str, ...], another: str) -> bool:
    """Return whether a further override gives its setting another value than the run of `overrides` has."""
    key, _, value = another.partition("=")
    return str(OmegaConf.select(compose("train", overrides), key)) != value


def _run(command: Sequence[str]) -> int:
    """Run a training in a separate process and return its exit code. If this process is stopped, the training saves."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except BaseException as stop:
        if not isinstance(stop, KeyboardInterrupt):  # Ctrl-C reaches both; a second signal would kill it
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SAVING_S)
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def complete_stages(
    config: Mapping[str, Any], train: bool = True, begin: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """As :func:`with_run_folders`, but first train the missing stages that the run uses.

    Args:
        train: false for dry runs, for which a missing stage is an error. begin: called before a stage is trained.

    Raises:
        RuntimeError, ValueError: as :meth:`PretrainingStage.complete` or :meth:`PretrainingStage.require`.
    """
    stages: dict[Path, PretrainingStage] = {}
    resolved = with_run_folders(config, stages)
    for stage in stages.values():
        if not train:
            stage.require()
            continue
        if not stage.is_finished:
            begin()
        stage.complete()
    return resolved


def with_run_folders(config: Mapping[str, Any], wanted: dict[Path, PretrainingStage] | None = None) -> dict[str, Any]:
    """Return a run's resolved configuration with each stage replaced by its run folder, trained or not.

    Args:
        config: plain dictionaries, lists and scalars.
        wanted: collects the stages that the run uses. Stages that have no effect because of other settings
            (`keygrip.training.idle_settings`) are not collected: training an unused encoder would take hours.
    """
    stages: dict[Path, PretrainingStage] = {} if wanted is None else wanted
    return {
        name: _insert_run_folders(node, stages, () if name in BUILT else None, set()) for name, node in config.items()
    }


def _insert_run_folders(
    node: Any, stages: dict[Path, PretrainingStage], section_path: Place | None, idle: set[Place]
) -> Any:
    """Process one node for :func:`with_run_folders`.

    Args:
        section_path: path in the section; None: this part is not built. idle: paths in the section that are not used.
    """
    if isinstance(node, dict):
        if str(node.get("_target_", "")) == f"{PretrainingStage.__module__}.{PretrainingStage.__qualname__}":
            stage = PretrainingStage(**{key: value for key, value in node.items() if key != "_target_"})
            if section_path is not None and not any(section_path[: len(other)] == other for other in idle):
                stages[stage.run_dir] = stage
            return str(stage.run_dir)
        if section_path is None:
            return {key: _insert_run_folders(child, stages, None, idle) for key, child in node.items()}
        idle = idle | {section_path + path for path in unread(node)}
        return {key: _insert_run_folders(child, stages, (*section_path, key), idle) for key, child in node.items()}
    if isinstance(node, list):
        return [_insert_run_folders(child, stages, section_path, idle) for child in node]
    return node
