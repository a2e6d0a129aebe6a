"""A wall-clock limit that also sets the learning-rate schedule, so that a run ends with a small learning rate."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from keygrip.training.lightning_loops import completes_step
from keygrip.training.optimizers import ScheduledRates


class TimeLimit(Timer):
    """Lightning's timer, which ends a run after a complete optimizer step, never while gradients are accumulated. It
    passes the elapsed share of the time to the schedules; all processes use that of the first process.

    The time before a resume is included.

    Args:
        minutes: limit for training, validation and saving together.
    """

    def __init__(self, minutes: float) -> None:
        super().__init__(timedelta(minutes=minutes))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        remaining = self.time_remaining()
        # for a resumed run: FSDP restores the elapsed time after Lightning's own check
        if trainer.global_step and trainer.strategy.broadcast(remaining is not None and remaining <= 0):
            trainer.should_stop = True
        for rates in self._update_schedules(trainer):
            rates.apply()  # for a resumed run, whose time continues

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._update_schedules(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if completes_step(trainer):
            super().on_train_batch_end(trainer, *args, **kwargs)

    def _update_schedules(self, trainer: Trainer) -> list[ScheduledRates]:
        """Pass the elapsed share of the time to the schedules of a run, and return the schedules."""
        elapsed, remaining = self.time_elapsed(), self.time_remaining()
        assert remaining is not None  # it has a duration
        share = min(1.0, float(trainer.strategy.broadcast(elapsed / max(elapsed + remaining, 1e-9))))
        schedules = [
            each.scheduler for each in trainer.lr_scheduler_configs if isinstance(each.scheduler, ScheduledRates)
        ]
        for rates in schedules:
            rates.take_time_share(share)
        return schedules
