"""Validate after a given number of optimizer steps, regardless of the number of batches per step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from keygrip.training.compatibility import log_no_validation
from keygrip.training.lightning_loops import completes_step, plan_validation


class ValidateBySteps(Callback):
    """Validate after every ``every_n_steps`` optimizer steps.

    Lightning counts batches, and the last step of an epoch has fewer batches if the number of batches in an epoch is
    not a multiple of `accumulate_grad_batches`.

    Args:
        monitor: metric of the best checkpoint, which a run without validation does not have; None: no best checkpoint
            is requested.
    """

    def __init__(self, every_n_steps: int, monitor: str | None = None) -> None:
        self.every_n_steps, self.monitor = every_n_steps, monitor

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        reported = 0 < trainer.max_steps < self.every_n_steps  # `no_validation` has reported it, from the settings
        if steps < self.every_n_steps and not reported and trainer.enable_validation:
            reason = f"val_every_n_steps={self.every_n_steps} is above the {steps} steps of this run"
            log_no_validation(reason, self.monitor)
        self._plan(trainer, due=trainer.global_step > 0)  # Lightning would skip that of a resumed step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._plan(trainer, due=completes_step(trainer))

    def _plan(self, trainer: Trainer, due: bool) -> None:
        if trainer.accumulate_grad_batches > 1:
            plan_validation(trainer, now=due and trainer.global_step % self.every_n_steps == 0)
