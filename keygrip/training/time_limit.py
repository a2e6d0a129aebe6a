"""A wall-clock limit that shapes the learning rate, so that a run which it ends is not cut off in the middle."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from keygrip.training.accumulation import completes_step
from keygrip.training.optimizers import ScheduledRates


class TimeLimit(Timer):
    """Lightning's timer, which ends a run with an optimiser step, never in the middle of accumulating gradients for
    one; tells the schedules which share of the time has passed. All processes are told that of the first.

    The time that a run took before it was resumed counts.

    Args:
        minutes: of training, validation and saving.
    """

    def __init__(self, minutes: float) -> None:
        super().__init__(timedelta(minutes=minutes))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for rates in self._tell(trainer):
            rates.apply()  # of a resumed run, whose time goes on

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._tell(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if completes_step(trainer):
            super().on_train_batch_end(trainer, *args, **kwargs)

    def _tell(self, trainer: Trainer) -> list[ScheduledRates]:
        """Tells the schedules of a run which share of the time has passed, and returns them."""
        elapsed, remaining = self.time_elapsed(), self.time_remaining()
        assert remaining is not None  # it has a duration
        share = min(1.0, float(trainer.strategy.broadcast(elapsed / max(elapsed + remaining, 1e-9))))
        found = [each.scheduler for each in trainer.lr_scheduler_configs if isinstance(each.scheduler, ScheduledRates)]
        for rates in found:
            rates.take_time_share(share)
        return found
