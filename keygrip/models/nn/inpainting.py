"""Inpainting: guidance of a flow-matching sampler towards a partly known sample.

Source: Black et al., "Real-Time Execution of Action Chunking Flow Policies" (arXiv:2506.07339): pseudo-inverse guidance
with a soft mask. Levels here run from 1 (noise) to 0 (data), velocity = noise - data (see `flow_matching`); the paper's
time is 1 - level and its velocity the negative.

Shape legend: B samples, T steps, D values per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def soft_mask(steps: int, fixed: int, known: int, device: torch.device | str | None = None) -> Tensor:
    """Weights ``[T]`` of the known steps: 1 for the `fixed` first, falling to 0 at the `known`-th and beyond.

    Args:
        steps: T. fixed: steps that will have been executed when the sample arrives. known: steps of the sample that is
            being executed.
    """
    index = torch.arange(steps, dtype=torch.float32, device=device)
    share = ((known - index) / (known - fixed + 1)).clamp(0, 1)
    falling = share * torch.expm1(share) / (math.e - 1)
    return torch.where(index < min(fixed, known), torch.ones_like(share), falling)


def guided_velocity(
    velocity_at: Callable[[Tensor, float], Tensor],
    known: Tensor,
    weight: Tensor,
    strongest: float = 5.0,
) -> Callable[[Tensor, float], Tensor]:
    """Return a velocity function whose samples agree with `known` as strongly as `weight` sets.

    Args:
        velocity_at: v(x, s) of the model, differentiable in x.
        known: ``[B, T, D]``. weight: ``[T]``, see `soft_mask`.
        strongest: upper bound of the guidance, which would grow without limit near noise (the paper's beta).
    """

    def guided(x: Tensor, level: float) -> Tensor:
        with torch.enable_grad():
            start = x.detach().requires_grad_(True)
            velocity = velocity_at(start, level)
            clean = start - level * velocity
            error = ((known - clean) * weight[:, None]).detach()
            (gradient,) = torch.autograd.grad(clean, start, error)
        scale = strongest
        if 0 < level < 1:
            scale = min(strongest, (level**2 + (1 - level) ** 2) / (level * (1 - level)))
        return velocity.detach() - scale * gradient

    return guided
