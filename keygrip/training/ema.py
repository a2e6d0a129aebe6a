"""Exponential moving average (EMA) of the weights, used for validation, evaluation and serving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from keygrip.training.sharding import is_sharded, local, local_like, reshard

EMA_STATE = "ema"


class EMA(Callback):
    """Exponential moving average of the trainable parameters, in float32.

    ``ema += (1 - d) * (weights - ema)`` after every optimizer step, with ``d = min(decay, (1 + n) / (10 +
    n))`` at the n-th, so that the influence of the random initial weights decreases quickly. Validation uses the EMA.
    The checkpoint contains the EMA (key ``ema``) in addition to the weights, so resuming is exact;
    ``keygrip.training.checkpoints.load_module`` loads the EMA by default.

    Args:
        decay: in [0, 1); averages over about ``1 / (1 - decay)`` steps.
        every_n_steps: update interval in optimizer steps.
    """

    def __init__(self, decay: float = 0.998, every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay={decay}: must lie in [0, 1)")
        if every_n_steps < 1:
            raise ValueError(f"callbacks.ema.every_n_steps={every_n_steps}: must be at least 1")
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.updates = 0
        self._ema: dict[str, Tensor] = {}  # if the parameters are sharded, the shards of this process
        self._loaded: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] | None = None  # the original weights while the EMA replaces them
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded:
            self._use_loaded_average(pl_module)
        else:
            self._ema = {
                name: local(p.detach()).float().clone() for name, p in _trainable_parameters(pl_module).items()
            }
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == self._last_step or step % self.every_n_steps:
            return
        self._last_step = step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [local(p.detach()).float() for p in _trainable_parameters(pl_module).values()]
        torch._foreach_lerp_(list(self._ema.values()), weights, 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded:  # no step was left to train
            self._use_loaded_average(pl_module)
        self._swap_in_average(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.take_out(pl_module)

    @contextmanager
    def applied(self, module: LightningModule) -> Iterator[None]:
        """Replace the module's weights by the EMA during the block."""
        self._swap_in_average(module)
        try:
            yield
        finally:
            self.take_out(module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.take_out(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert self._own is None, "saved during validation, when the weights are not the run's own"
        whole = self._gather_average(trainer, pl_module) if is_sharded(pl_module) else dict(self._ema)
        checkpoint[EMA_STATE] = {"updates": self.updates, "decay": self.decay, "parameters": whole}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(EMA_STATE)
        if saved is None:
            raise ValueError(
                "the checkpoint has no EMA weights, it was made with callbacks.ema=null: resume with that too"
            )
        self.updates = saved["updates"]
        self._loaded = saved["parameters"]

    def _use_loaded_average(self, module: LightningModule) -> None:
        parameters = _trainable_parameters(module)
        if self._loaded.keys() != parameters.keys():
            changed = sorted(self._loaded.keys() ^ parameters.keys())
            raise ValueError(
                f"the checkpoint's EMA weights do not fit this model's trainable ones: {', '.join(changed[:5])}"
            )
        self._ema = {name: local_like(self._loaded[name], p) for name, p in parameters.items()}
        self._loaded = {}

    def _gather_average(self, trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
        """Return the complete EMA on the first process; the others take part in gathering it."""
        self._swap_in_average(module)
        state = trainer.strategy.lightning_module_state_dict()
        self.take_out(module)
        return {name: state[name] for name in self._ema if name in state}

    @torch.no_grad()
    def _swap_in_average(self, module: LightningModule) -> None:
        if not self._ema or self._own is not None:
            return  # the sanity check before the first step
        parameters = _trainable_parameters(module)
        self._own = {name: local(p.detach()).clone() for name, p in parameters.items()}
        for name, parameter in parameters.items():
            local(parameter).copy_(self._ema[name])

    @torch.no_grad()
    def take_out(self, module: LightningModule) -> None:
        """Restore the original weights if the EMA replaces them: after a validation, or when it is interrupted."""
        if self._own is None:
            return
        for name, parameter in _trainable_parameters(module).items():
            local(parameter).copy_(self._own[name])
        self._own = None


def _trainable_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    reshard(module)
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
