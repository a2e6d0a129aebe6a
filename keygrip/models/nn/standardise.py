"""Standardisation by running statistics over the training batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from keygrip.training.distributed import global_sum

SMALLEST = 1e-3  # a number that hardly changes is not blown up


class RunningStandardisation(nn.Module):
    """Every number of a sample less its mean over the samples seen in training, over their spread.

    Unlike in batch normalisation the statistics are those of many batches in training too, and no gradient goes through
    them. Several processes have common ones.

    Args:
        shape: of a sample. memory: batches that the statistics remember.
    """

    mean: Tensor
    square: Tensor
    batches: Tensor

    def __init__(self, *shape: int, memory: float = 100.0) -> None:
        super().__init__()
        self.memory = memory
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("square", torch.ones(shape))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, *shape]`` float32, from the same."""
        if self.training:
            self._update(x.detach())
        spread = (self.square - self.mean.square()).clamp(min=SMALLEST**2).sqrt()
        return (x - self.mean) / spread

    @torch.no_grad()
    def _update(self, x: Tensor) -> None:
        count = global_sum(torch.tensor(float(len(x)), device=x.device))
        mean, square = (global_sum(values.sum(dim=0)) / count for values in (x, x.square()))
        self.batches += 1
        share = (1 / self.batches).clamp(min=1 / self.memory)  # the first batches count alike
        # new tensors: the backward pass of an earlier batch may still need the old ones
        self.mean, self.square = torch.lerp(self.mean, mean, share), torch.lerp(self.square, square, share)
