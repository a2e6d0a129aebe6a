"""A running average of the weights (EMA), used for validation, evaluation and serving."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

AVERAGE = "average"


class AveragedWeights(Callback):
    """Exponential moving average of the trainable parameters, in float32.

    ``average += (1 - d) * (weights - average)`` after every optimiser step, with ``d = min(decay, (1 + n) / (10 +
    n))`` at the n-th, so that the random start is forgotten quickly. Validation runs with the average. The
    checkpoint carries it beside the weights themselves (key ``average``), so resuming is exact;
    ``keygrip.training.checkpoints.load_module`` prefers it.

    Args:
        decay: in [0, 1); a memory of about ``1 / (1 - decay)`` steps.
        every_n_steps: update interval in optimiser steps.
    """

    def __init__(self, decay: float = 0.998, every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.average.decay={decay}: must lie in [0, 1)")
        if every_n_steps < 1:
            raise ValueError(f"callbacks.average.every_n_steps={every_n_steps}: must be at least 1")
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.updates = 0
        self._average: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] | None = None  # the weights themselves while the average is in their place
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = _trainable(pl_module)
        if not self._average:
            self._average = {name: p.detach().float().clone() for name, p in parameters.items()}
        elif self._average.keys() != parameters.keys():
            changed = sorted(self._average.keys() ^ parameters.keys())
            raise ValueError(
                f"the checkpoint's averaged weights do not fit this model's trainable ones: {', '.join(changed[:5])}"
            )
        self._average = {name: self._average[name].to(p.device) for name, p in parameters.items()}
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == self._last_step or step % self.every_n_steps:
            return
        self._last_step = step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        own = [p.detach().float() for p in _trainable(pl_module).values()]
        torch._foreach_lerp_(list(self._average.values()), own, 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_out(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._take_out(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._own is not None:
            for name, value in self._own.items():
                checkpoint["state_dict"][name] = value
        checkpoint[AVERAGE] = {"updates": self.updates, "decay": self.decay, "parameters": dict(self._average)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(AVERAGE)
        if saved is None:
            raise ValueError(
                "the checkpoint has no averaged weights: it was made with callbacks.average=null; resume with it too"
            )
        self.updates = saved["updates"]
        self._average = {name: value.clone() for name, value in saved["parameters"].items()}

    @torch.no_grad()
    def _put_in(self, module: LightningModule) -> None:
        if not self._average or self._own is not None:
            return  # the sanity check before the first step
        parameters = _trainable(module)
        self._own = {name: p.detach().clone() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.copy_(self._average[name])

    @torch.no_grad()
    def _take_out(self, module: LightningModule) -> None:
        if self._own is None:
            return
        for name, parameter in _trainable(module).items():
            parameter.copy_(self._own[name])
        self._own = None


def _trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
