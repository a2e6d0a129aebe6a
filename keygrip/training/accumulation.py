"""Exact mean gradients of optimizer steps over several batches (`accumulate_grad_batches`)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from keygrip.training.distributed import global_sum


class WindowMean:
    """The mean over the terms of all batches whose gradients are accumulated for a step.

    Lightning divides each batch's own mean by `accumulate_grad_batches`. A token in a batch with few tokens would then
    have a higher weight than a token in a batch with many, and the last step of an epoch, with fewer batches, would be
    too small. Here each mean is weighted by the number of terms in its batch, relative to the first batch of the
    window, or by one, and the gradients are divided by the sum of the weights before the step.
    """

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.weights = 0.0
        self._weight: float | None = None  # of the current batch

    def weighted(self, mean: Tensor, count: Tensor) -> Tensor:
        """Return the value that a training step must return instead of its batch's mean over `count` local terms. A
        batch without terms has weight 0."""
        everywhere = global_sum(count.float())
        self.first = everywhere.clamp(min=1.0) if self.first is None else self.first
        weight = everywhere / self.first
        self._weight = float(weight)
        return mean * weight

    def add_batch(self) -> None:
        """Register a batch; call this after each backward pass."""
        self.weights += 1.0 if self._weight is None else self._weight
        self._weight = None

    def finish(self, parameters: Iterable[nn.Parameter], accumulated: int) -> None:
        """Rescale the gradients to those of the mean over all terms, before they are measured and clipped.

        Args:
            accumulated: number by which Lightning has divided, also at the end of an epoch with fewer batches.
        """
        if self.weights not in (0, accumulated):  # 0: no batch of the window has a term, and all gradients are 0
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(accumulated / self.weights)
        self.first, self.weights = None, 0.0
