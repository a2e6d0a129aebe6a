"""Measure the time of each phase of a training step inside a real training run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from keygrip.artifacts import write_json
from keygrip.benchmarks.training import PHASES


class PhaseTimes(Callback):
    """Record the time between the phases of every step and write the sum of each phase to a JSON file when training
    ends.

    ``data_wait``: from the end of a step to the start of the next: waiting for the loader and moving the batch.
    ``forward``: network, loss and metrics. ``backward``. ``optimizer``: clipping, step, EMA and the work of other
    callbacks after a step. On a GPU, events on its stream mark the times, so that nothing needs to synchronise.

    It must be the last in the list of callbacks. Validation during training would count as ``data_wait``: switch it
    off.

    Args:
        path: the file, with ``seconds`` by phase, ``steps`` and ``samples``. skip_steps: steps at the start that are
            not counted, while workers start and kernels are selected.
    """

    def __init__(self, path: str, skip_steps: int) -> None:
        if skip_steps < 1:
            raise ValueError(f"skip_steps={skip_steps}: the first step has no end of a step before it, so at least 1")
        self.path, self.skip_steps = Path(path), skip_steps
        self._steps: list[tuple[list[float | torch.cuda.Event], int]] = []  # marks and samples of each step
        self._marks: list[float | torch.cuda.Event] = []
        self._on_gpu = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._on_gpu = pl_module.device.type == "cuda"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._marks = [self._now()]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self._marks.append(self._now())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._marks.append(self._now())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if len(self._marks) != 3:
            raise ValueError("phases are measured of one backward pass per step: accumulate_grad_batches=1")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._marks.append(self._now())
        self._steps.append((self._marks, len(batch)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        counted = self._steps[self.skip_steps :]
        ends = [marks[-1] for marks, _ in self._steps[self.skip_steps - 1 : -1]]
        seconds = dict.fromkeys(PHASES, 0.0)
        for end_before, (marks, _) in zip(ends, counted, strict=True):
            for phase, spent in zip(PHASES, self._differences([end_before, *marks]), strict=True):
                seconds[phase] += spent
        content = {"seconds": seconds, "steps": len(counted), "samples": sum(samples for _, samples in counted)}
        write_json(self.path, content)

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _differences(marks: Sequence[Any]) -> list[float]:
        return [
            after - before if isinstance(before, float) else before.elapsed_time(after) / 1e3
            for before, after in pairwise(marks)
        ]
