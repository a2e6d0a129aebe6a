"""Sinusoidal features of positions and times."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoidal_features(count: int, dim: int) -> Tensor:
    """The fixed sine and cosine table of ``count`` evenly spaced positions.

    Periods are spaced geometrically from 2 positions (the shortest that sampling can show) to ``4 * count`` (a quarter
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
