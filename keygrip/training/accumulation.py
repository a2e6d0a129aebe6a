"""Optimiser steps over several batches (`accumulate_grad_batches`): which batch ends one, and gradients as of one."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Trainer
from torch import Tensor, nn

from keygrip.training.distributed import global_sum


def completes_step(trainer: Trainer) -> bool:
    """Whether the training batch that runs or just ended completes an optimiser step."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


class WindowMean:
    """The mean over the terms of all batches whose gradients are accumulated for a step.

    Lightning divides each batch's own mean by `accumulate_grad_batches`: a token in a batch of few would count for more
    than one in a batch of many, and the step at the end of an epoch, to which fewer batches are left, would be a
    fraction of one. Each mean is weighted by its batch's terms, relative to the first batch of the window, or by one,
    and the gradients are divided by the sum of the weights before the step.
    """

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.weights = 0.0
        self._weight: float | None = None  # of the batch at hand

    def weighted(self, mean: Tensor, count: Tensor) -> Tensor:
        """What a training step returns in place of its batch's mean over `count` terms (in this process)."""
        everywhere = global_sum(count.float()).clamp(min=1.0)
        self.first = everywhere if self.first is None else self.first
        weight = everywhere / self.first
        self._weight = float(weight)
        return mean * weight

    def add_batch(self) -> None:
        """Called after each backward pass."""
        self.weights += 1.0 if self._weight is None else self._weight
        self._weight = None

    def finish(self, parameters: Iterable[nn.Parameter], accumulated: int) -> None:
        """Makes the gradients those of the mean over all terms; before they are measured and clipped.

        Args:
            accumulated: by how many batches Lightning has divided, at the end of an epoch too, where fewer are left.
        """
        if self.weights != accumulated:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(accumulated / self.weights)
        self.first, self.weights = None, 0.0
