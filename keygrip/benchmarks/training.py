"""Samples per second of a real training run, and the time of its phases."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import DictConfig

from keygrip.benchmarks.demos import repeated_demos
from keygrip.config import compose

PHASES = ("data_wait", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Training:
    """``python -m keygrip.train`` as a user starts it, on frames that were not decoded before.

    Args:
        overrides: of ``keygrip.train``. demos, quick_demos: number of demos to record.
        steps, quick_steps: measured steps. skip_steps: steps before those.
    """

    in_other_processes: ClassVar = True  # what is set in this process has no effect there
    overrides: Sequence[str]
    demos: int
    quick_demos: int
    steps: int
    quick_steps: int
    skip_steps: int

    def run(self, quick: bool) -> dict[str, float]:
        """Measure ``samples_per_s`` in batches of ``batch_size``, and the fractions of waiting for data, forward,
        backward and optimizer, which add up to 1.

        Raises:
            ChildProcessError: The training run failed; its output is on standard error.
        """
        config = compose("train", self.overrides)
        steps = self.skip_steps + (self.quick_steps if quick else self.steps)
        with tempfile.TemporaryDirectory(prefix="keygrip-bench-") as name:
            folder = Path(name)
            demos = self.quick_demos if quick else self.demos
            root = repeated_demos(config, folder, demos, samples=(steps + 1) * config.data.batch_size)
            measured = self._train(config, folder, root, steps)
        total = sum(measured["seconds"].values())
        figures = {f"{phase}_share": round(measured["seconds"][phase] / total, 4) for phase in PHASES}
        return {
            "batch_size": config.data.batch_size,
            "data_wait_share": figures.pop("data_wait_share"),
            "samples_per_s": round(measured["samples"] / total, 2),
            **figures,
            "step_ms": round(1e3 * total / measured["steps"], 2),
            "steps": measured["steps"],
        }

    def _train(self, config: DictConfig, folder: Path, root: Path, steps: int) -> dict[str, Any]:
        phases = folder / "phases.json"
        # A separate process, so that the measured run is the one that users start, without anything of this process.
        command = [
            *(sys.executable, "-m", "keygrip.train", *self.overrides),
            f"data.root={root}",
            "data.max_demos=null",
            "data.val_fraction=0",
            f"max_steps={steps}",
            f"run_dir={folder / 'run'}",
            "+callbacks.phases._target_=keygrip.benchmarks.phases.PhaseTimes",
            f"+callbacks.phases.path={phases}",
            f"+callbacks.phases.skip_steps={self.skip_steps}",
        ]
        ended = subprocess.run(command, stdout=sys.stderr.fileno(), check=False)
        if ended.returncode != 0 or not phases.is_file():
            raise ChildProcessError(
                f"the training run to be measured ended with exit code {ended.returncode}; see its output above"
            )
        measured: dict[str, Any] = json.loads(phases.read_text())
        return measured
