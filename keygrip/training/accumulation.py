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

    Lightning averages the batches' own means: a token in a batch of few would count for more than one in a batch of
    many. Each mean is weighted by its batch's terms, relative to the first batch of the window, and the gradients are
    divided by the sum of the weights before the step.
    """

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.weights = 0.0

    def weighted(self, mean: Tensor, count: Tensor) -> Tensor:
        """What a training step returns in place of its batch's mean over `count` terms (in this process)."""
        everywhere = global_sum(count.float()).clamp(min=1.0)
        self.first = everywhere if self.first is None else self.first
        weight = everywhere / self.first
        self.weights += float(weight)
        return mean * weight

    def finish(self, parameters: Iterable[nn.Parameter], accumulated: int) -> None:
        """Makes the gradients those of the mean over all terms; before they are clipped.

        Args:
            accumulated: by how many batches Lightning has divided, at the end of an epoch too, where fewer are left.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients and self.weights:
            for gradient in gradients:
                gradient.mul_(accumulated / self.weights)
        self.first, self.weights = None, 0.0
