"""A wall-clock limit that shapes the learning rate, so that a run which it ends is not cut off in the middle."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Timer

from keygrip.training.optimizers import Schedule


class ScheduleByTime(Callback):
    """Tells the schedules which share of `max_minutes` has passed; all processes are told that of the first.

    The time that a run took before it was resumed counts, as Lightning counts it.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        timer = next(each for each in trainer.callbacks if isinstance(each, Timer))  # type: ignore[attr-defined]
        remaining = timer.time_remaining()
        assert remaining is not None  # Lightning makes the timer from max_time
        elapsed = timer.time_elapsed()
        share = float(trainer.strategy.broadcast(elapsed / max(elapsed + remaining, 1e-9)))
        for config in trainer.lr_scheduler_configs:
            for schedule in getattr(config.scheduler, "lr_lambdas", ()):
                if isinstance(schedule, Schedule):
                    schedule.time_share = min(1.0, share)
