"""A wall-clock limit that shapes the learning rate, so that a run which it ends is not cut off in the middle."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from keygrip.training.accumulation import completes_step
from keygrip.training.optimizers import Schedule


class TimeLimit(Timer):
    """Lightning's timer, which ends a run with an optimiser step, never in the middle of accumulating gradients for
    one; tells the schedules which share of the time has passed. All processes are told that of the first.

    The time that a run took before it was resumed counts.

    Args:
        minutes: of training, validation and saving.
    """

    def __init__(self, minutes: float) -> None:
        super().__init__(timedelta(minutes=minutes))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        remaining = self.time_remaining()
        assert remaining is not None  # it has a duration
        elapsed = self.time_elapsed()
        share = float(trainer.strategy.broadcast(elapsed / max(elapsed + remaining, 1e-9)))
        for config in trainer.lr_scheduler_configs:
            for schedule in getattr(config.scheduler, "lr_lambdas", ()):
                if isinstance(schedule, Schedule):
                    schedule.time_share = min(1.0, share)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if completes_step(trainer):
            super().on_train_batch_end(trainer, *args, **kwargs)
