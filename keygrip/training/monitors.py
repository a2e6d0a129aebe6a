"""Checks during training: non-finite losses, gradient norms, metrics outside of their healthy range."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from keygrip.training.sharding import local

log = logging.getLogger(__name__)


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
            broken = non_finite_parameters(pl_module)
            what = f" (no longer finite: {', '.join(broken[:3])}; {len(broken)} in all)" if broken else ""
            raise ValueError(
                f"the loss became NaN or infinite in the {self.every_n_steps} batches before step {trainer.global_step}"
                f"{what}: lower optimizer.lr or optimizer.clip_norm, or use strategy.precision=32-true"
            )


def non_finite_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters with NaN or infinite values; where they are sharded, in this process's part."""
    return [name for name, p in module.named_parameters() if not torch.isfinite(local(p.detach())).all()]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of the gradients of some parameters together; 0 where there are none. Of sharded ones it is that over all
    processes, each of which must call it."""
    gradients = [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class GradientNorm(Callback):
    """Logs ``train/grad_norm``: the norm of all gradients before they are clipped.

    Args:
        every_n_steps: optimiser steps between values.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.grad_norm.every_n_steps={every_n_steps}: must be at least 1")
        self.every_n_steps = every_n_steps

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if (trainer.global_step + 1) % self.every_n_steps:  # at the steps at whose end Lightning writes
            return
        pl_module.log("train/grad_norm", gradient_norm(pl_module.parameters()))


class RandomnessByStep(Callback):
    """Seeds torch's generators before every batch from (seed, batch, rank): a resumed run draws the numbers it would
    have drawn, and every validation the same ones. After a validation they are as before it: a loader that shuffles by
    them would begin each epoch in the same state, and so in the same order.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._before: tuple[Tensor, list[Tensor]] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._seed(trainer.fit_loop.epoch_loop.total_batch_idx, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._before = torch.get_rng_state(), cuda

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._before is not None
        torch.set_rng_state(self._before[0])
        if self._before[1]:
            torch.cuda.set_rng_state_all(self._before[1])

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seed(-1 - batch_idx, trainer)  # none of training's

    def _seed(self, index: int, trainer: Trainer) -> None:
        mixed = (self.seed * 1_000_003 + index) * 65_537 + trainer.global_rank
        torch.manual_seed(mixed % (1 << 63))


@dataclass(frozen=True)
class Range:
    """The healthy range of a metric, and what leaving it means."""

    low: float
    high: float
    meaning: str


class RangeChecks:
    """Warns once for each figure that leaves its healthy range, again only after it has come back.

    Args:
        ranges: by the metric's name, of `health/` metrics without that.
        from_step: before it nothing is said: a new network has learned nothing yet.
    """

    def __init__(self, ranges: Mapping[str, Range], from_step: int = 0) -> None:
        self.ranges, self.from_step = dict(ranges), from_step
        self.ill: set[str] = set()

    def check(self, figures: Mapping[str, float], step: int) -> list[str]:
        """Warnings for figures that are outside of their range since this step; also logged."""
        said: list[str] = []
        if step < self.from_step:
            return said
        for name, value in figures.items():
            known = self.ranges.get(name)
            if known is None:
                continue
            if known.low <= value <= known.high:
                self.ill.discard(name)
            elif name not in self.ill:
                self.ill.add(name)
                shown = name if "/" in name else f"health/{name}"
                line = f"step {step}: {shown} is {value:.3g}, healthy is {_words(known)}: {known.meaning}"
                log.warning("%s", line)
                said.append(line)
        return said


def _words(known: Range) -> str:
    if math.isinf(known.high):
        return f"above {known.low:g}"
    return f"{known.low:g} to {known.high:g}" if known.low else f"below {known.high:g}"
