"""A training run that another one builds on, made by the program itself where it is missing."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from keygrip.training.run_folder import CHECKPOINT

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MadeRun:
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
        run.parent.mkdir(parents=True, exist_ok=True)
        with (run.parent / f".{run.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
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

    def module(self) -> LightningModule:
        """The trained module of the run, made first where it is missing."""
        from keygrip.training.checkpoints import load_module

        return load_module(self.complete())

    @staticmethod
    def _finished(run: Path) -> bool:
        from keygrip.training.sweeps import FINISHED, read_result

        return read_result(run).get("status") == FINISHED and (run / CHECKPOINT).is_file()
