"""Pretraining stages: training runs that another one starts from, trained first where they are missing.

A configuration names a stage in place of a run folder; `keygrip.train` completes it before it builds the model, so that
models get a path and start no process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keygrip.artifacts import locked
from keygrip.training.idle_settings import unread
from keygrip.training.run_folder import CHECKPOINT
from keygrip.training.sweeps import FINISHED, read_result

log = logging.getLogger(__name__)

# Sections of a run's configuration that are built; the others are what these take their settings from.
BUILT = ("model", "data", "callbacks")


@dataclass(frozen=True)
class PretrainingStage:
    """A finished run of `keygrip.train`, trained first where it is missing.

    Args:
        overrides: of `keygrip.train`, which say the run.
        name: beginning of its folder's name, which ends in a hash of the overrides.
        folder: where it goes.
    """

    overrides: Sequence[str]
    name: str
    folder: str = "runs"

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        digest = hashlib.sha256(json.dumps(list(self.overrides)).encode()).hexdigest()
        return Path(self.folder) / f"{self.name}-{digest[:8]}"

    def complete(self) -> Path:
        """Trains where there is no finished run, and says so; its folder. An interrupted run is continued.

        Raises:
            RuntimeError: training failed; what went wrong stands above.
            ValueError: it is missing, and this is one of several processes.
        """
        run = self.run_dir
        if self._finished(run):  # not locked: it may lie where nothing can be written
            log.info("%s: %s", self.name, run)
            return run
        with locked(run.parent / f".{run.name}.lock"):
            if self._finished(run):
                log.info("%s: %s", self.name, run)
                return run
            command = [sys.executable, "-m", "keygrip.train", *self.overrides, f"run_dir={run}"]
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError(
                    f"{run} is missing, and it is trained by one process: run `{' '.join(command[1:])}` first"
                )
            if (run / CHECKPOINT).is_file():
                command.append("resume=true")
            log.info("%s: %s is not there, training it: keygrip.train %s", self.name, run, " ".join(self.overrides))
            done = subprocess.run(command, check=False)
            if done.returncode or not self._finished(run):
                raise RuntimeError(f"training {self.name} failed: keygrip.train {' '.join(self.overrides)}")
        return run

    @staticmethod
    def _finished(run: Path) -> bool:
        return read_result(run).get("status") == FINISHED and (run / CHECKPOINT).is_file()


def _completed(node: Any, made: dict[Path, str], read: bool) -> Any:
    """One section of :func:`complete_stages`; ``made`` collects the folders of completed stages.

    Args:
        read: whether a stage here is trained; where not, it is named if it is complete, and None otherwise.
    """
    if isinstance(node, dict):
        if str(node.get("_target_", "")) == f"{PretrainingStage.__module__}.{PretrainingStage.__qualname__}":
            stage = PretrainingStage(**{key: value for key, value in node.items() if key != "_target_"})
            if read and stage.run_dir not in made:
                made[stage.run_dir] = str(stage.complete())
            return made.get(stage.run_dir)
        idle = unread(node)
        return {key: _completed(child, made, read and key not in idle) for key, child in node.items()}
    if isinstance(node, list):
        return [_completed(child, made, read) for child in node]
    return node


def complete_stages(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration with the run folder of each stage in its place; what is missing is trained first.

    A stage that nothing reads (`keygrip.training.idle_settings`) becomes None and is not trained: hours would go to an
    encoder that the network leaves out.

    Args:
        config: of a run, plain dictionaries, lists and scalars.

    Raises:
        RuntimeError, ValueError: as :meth:`PretrainingStage.complete`.
    """
    made: dict[Path, str] = {}
    built = {name: _completed(config[name], made, True) for name in BUILT if name in config}
    return {name: built[name] if name in built else _completed(child, made, False) for name, child in config.items()}
