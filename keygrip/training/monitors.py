"""Checks during training: non-finite losses, gradient norms, metrics outside their healthy range."""

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

from keygrip.training.lightning_loops import batches_begun
from keygrip.training.sharding import local

log = logging.getLogger(__name__)

GRAD_NORM = "train/grad_norm"  # metric of the norm of all gradients


class StopOnNonFinite(Callback):
    """Stop the run if the loss is NaN or infinite, and report the parameters that are no longer finite.

    Args:
        every_n_steps: batches between checks; each check waits for the device. The losses of all batches are checked.
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
            detail = f" (no longer finite: {', '.join(broken[:3])}; {len(broken)} in all)" if broken else ""
            raise ValueError(
                f"the loss became NaN or infinite in the {self.every_n_steps} batches before step {trainer.global_step}"
                f"{detail}: lower optimizer.lr or optimizer.clip_norm, or use strategy.precision=32-true"
            )


def non_finite_parameters(module: nn.Module) -> list[str]:
    """Return the names of the parameters with NaN or infinite values; if sharded, in the shard of this process."""
    return [name for name, p in module.named_parameters() if not torch.isfinite(local(p.detach())).all()]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the total norm of the gradients of some parameters; 0 if there are none. For sharded parameters it is the
    norm over all processes, each of which must call this function."""
    gradients = [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class GradientNorm(Callback):
    """Log ``train/grad_norm``: the norm of all gradients before clipping.

    Args:
        every_n_steps: optimizer steps between values, whatever the interval of other scalars.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        if every_n_steps < 1:
            raise ValueError(f"callbacks.grad_norm.every_n_steps={every_n_steps}: must be at least 1")
        self.every_n_steps = every_n_steps

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if (trainer.global_step + 1) % self.every_n_steps:
            return
        norm = gradient_norm(pl_module.parameters())
        pl_module.log(GRAD_NORM, norm, logger=False)  # for the run's results
        # directly: Lightning writes at multiples of log_every_n_steps only, and there also repeats older values
        figures = {GRAD_NORM: float(norm)}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)


class RandomnessByStep(Callback):
    """Seed torch's generators before every batch from (seed, batch, rank), so that a resumed run has the same random
    numbers as an uninterrupted one, and every validation has the same. The state is restored after a validation:
    otherwise a loader that shuffles with these generators would start each epoch in the same state and order.

    Args:
        seed: seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._before: tuple[Tensor, list[Tensor]] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._seed(batches_begun(trainer) - 1, trainer)

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
        self._seed(-1 - batch_idx, trainer)  # negative, so different from training

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
    """Warn once for each value that leaves its healthy range, and again only after it has returned.

    Args:
        ranges: by the metric's name, for `health/` metrics without this prefix.
        from_step: no warnings before this step, because a new network has learned nothing yet.
    """

    def __init__(self, ranges: Mapping[str, Range], from_step: int = 0) -> None:
        self.ranges, self.from_step = dict(ranges), from_step
        self.ill: set[str] = set()

    def check(self, figures: Mapping[str, float], step: int) -> list[str]:
        """Log and return warnings for values that have left their range at this step."""
        messages: list[str] = []
        if step < self.from_step:
            return messages
        for name, value in figures.items():
            healthy = self.ranges.get(name)
            if healthy is None:
                continue
            if healthy.low <= value <= healthy.high:
                self.ill.discard(name)
            elif name not in self.ill:
                self.ill.add(name)
                display_name = name if "/" in name else f"health/{name}"
                line = (
                    f"step {step}: {display_name} is {value:.3g}, "
                    f"healthy is {_format_range(healthy)}: {healthy.meaning}"
                )
                log.warning("%s", line)
                messages.append(line)
        return messages


def _format_range(bounds: Range) -> str:
    if math.isinf(bounds.high):
        return f"above {bounds.low:g}"
    return f"{bounds.low:g} to {bounds.high:g}" if bounds.low else f"below {bounds.high:g}"
