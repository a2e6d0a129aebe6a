"""Sinusoidal features: a table of evenly spaced positions, and features of continuous values such as timesteps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoidal_features(count: int, dim: int) -> Tensor:
    """Return the fixed sine and cosine table of ``count`` evenly spaced positions.

    Periods are spaced geometrically from 2 positions (the shortest that can be sampled) to ``4 * count`` (a quarter
    turn over the whole range, hence monotonic), so that an inner product with the table can be a sharp peak at one
    position as well as a broad trend.

    Returns:
        ``[count, dim]`` float32: ``dim / 2`` sines, then ``dim / 2`` cosines.

    Raises:
        ValueError: ``dim`` is odd or not positive, or ``count`` is not positive.
    """
    if dim < 2 or dim % 2 or count < 1:
        raise ValueError(
            f"A sinusoidal table needs an even width of at least 2 and a position, got dim={dim}, count={count}."
        )
    periods = torch.logspace(math.log10(2.0), math.log10(4.0 * count), dim // 2, dtype=torch.float64)
    angles = 2 * math.pi * torch.arange(count, dtype=torch.float64)[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def continuous_features(values: Tensor, dim: int, longest: float = 10.0, endpoint: bool = True) -> Tensor:
    """Return cosines and sines of continuous values in [0, 1]: timesteps of flow matching, or coordinates.

    Periods are spaced geometrically from ``2 pi / 1000`` (so that a thousandth has an effect) to ``2 pi longest``, as
    in Ho et al., "Denoising Diffusion Probabilistic Models" (2020), with their 1000 steps for the unit interval.

    Args:
        values: ``[...]``. dim: even width. longest: longest period, in units of 2 pi.
        endpoint: the longest period is the last one; False: it would come after the last one, as in Peebles and Xie,
            "Scalable Diffusion Models with Transformers" (2023).

    Returns:
        ``[..., dim]`` float32.

    Raises:
        ValueError: ``dim`` is odd or less than 4.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"Features of continuous values need an even width of at least 4, got dim={dim}.")
    count, last = dim // 2, -math.log10(longest)
    rates = torch.logspace(3.0, last, count if endpoint else count + 1, dtype=torch.float32, device=values.device)
    rates = rates[:count]
    angles = values.float()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Map timesteps ``[...]`` in [0, 1] to a condition ``[..., d_cond]``: sinusoids and an MLP of two layers.

    Args:
        d_cond: width of the condition. features: number of sinusoids. hidden: width of the MLP; None is ``d_cond``.
        endpoint: see `continuous_features`.
    """

    def __init__(self, d_cond: int, features: int = 256, hidden: int | None = None, endpoint: bool = True) -> None:
        super().__init__()
        self.features, self.endpoint = features, endpoint
        hidden = hidden or d_cond
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, d_cond))

    def forward(self, level: Tensor) -> Tensor:
        return self.mlp(continuous_features(level, self.features, endpoint=self.endpoint))
