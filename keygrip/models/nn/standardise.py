"""Standardisation by running statistics over the training batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from keygrip.training.distributed import global_sum

SMALLEST = 1e-3  # smallest standard deviation: nearly constant values are not amplified


class RunningStandardisation(nn.Module):
    """Subtract from each value of a sample its mean over the training samples, and divide by the standard deviation.

    Unlike in batch normalisation, the statistics cover many batches in training too, and no gradient flows through
    them. All processes share them.

    Args:
        shape: shape of a sample. memory: number of batches over which the running averages extend.
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
        """Standardise ``[B, *shape]`` float32."""
        if self.training:
            self._update(x.detach())
        spread = (self.square - self.mean.square()).clamp(min=SMALLEST**2).sqrt()
        return (x - self.mean) / spread

    @torch.no_grad()
    def _update(self, x: Tensor) -> None:
        count = global_sum(torch.tensor(float(len(x)), device=x.device))
        mean, square = (global_sum(values.sum(dim=0)) / count for values in (x, x.square()))
        self.batches += 1
        share = (1 / self.batches).clamp(min=1 / self.memory)  # the first batches have equal weights
        # new tensors: the backward pass of an earlier batch may still need the old ones
        self.mean, self.square = torch.lerp(self.mean, mean, share), torch.lerp(self.square, square, share)
