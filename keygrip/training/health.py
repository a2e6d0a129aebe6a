"""Checks while training: what has gone wrong is said at once, not found out after a night."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from keygrip.training.sharding import local


class StopOnNonFinite(Callback):
    """Stops the run where the loss is NaN or infinite, and names the parameters that are no longer finite.

    Args:
        every_n_steps: batches between checks; each waits for the device. The loss of every batch counts, none is
            missed.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.health.every_n_steps={every_n_steps}: must be at least 1")
        self.every_n_steps = every_n_steps
        self._sum: Tensor | None = None
        self._since = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            return
        self._sum = loss.detach().float() if self._sum is None else self._sum + loss.detach().float()
        self._since += 1
        if self._since < self.every_n_steps:
            return
        total, self._sum, self._since = self._sum, None, 0
        if not torch.isfinite(total):
            broken = [name for name, p in pl_module.named_parameters() if not torch.isfinite(local(p.detach())).all()]
            what = f" (no longer finite: {', '.join(broken[:3])}; {len(broken)} in all)" if broken else ""
            raise ValueError(
                f"the loss became NaN or infinite in the {self.every_n_steps} batches before step {trainer.global_step}"
                f"{what}: lower optimizer.lr or optimizer.clip_norm, or use strategy.precision=32-true"
            )


class RandomnessByStep(Callback):
    """Seeds torch's generators before every batch from (seed, batch, rank): a resumed run draws the numbers it would
    have drawn.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        index = trainer.fit_loop.epoch_loop.total_batch_idx
        mixed = (self.seed * 1_000_003 + index) * 65_537 + trainer.global_rank
        torch.manual_seed(mixed % (1 << 63))
