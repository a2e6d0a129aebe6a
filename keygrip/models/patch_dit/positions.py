"""Positions in an image: one coordinate frame for the cells of a latent and the patches of the reference image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROTARY_BASE = 100.0  # ratio of the fastest to the slowest rotation; images have tens of cells, not thousands of words
CELL_BASE = 10000.0  # the same for whole-number cells, as in Vaswani et al., "Attention Is All You Need" (2017)


def grid_positions(grid: tuple[int, int], aspect: float, device: torch.device | str | None = None) -> Tensor:
    """Centres (y, x) of the cells of a grid over an image, row after row, ``[rows * columns, 2]`` float32.

    The frame is that of the image: its centre is the origin and its area is 1, so the sides are 1 / sqrt(aspect) high
    and sqrt(aspect) wide. A point of the image has the same coordinates in every grid over the image, however fine, and
    a square grid over a wide image has wide cells.

    Args:
        grid: (rows, columns). aspect: width over height of the image.
    """
    rows, columns = grid
    y = ((torch.arange(rows, device=device, dtype=torch.float32) + 0.5) / rows - 0.5) / math.sqrt(aspect)
    x = ((torch.arange(columns, device=device, dtype=torch.float32) + 0.5) / columns - 0.5) * math.sqrt(aspect)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)


def position_features(positions: Tensor, width: int, cells: int) -> Tensor:
    """Sines and cosines of y and x, ``[N, width]`` float32.

    Args:
        positions: ``[N, 2]``, from `grid_positions`.
        width: a multiple of 4: a quarter each for sine and cosine of y and of x.
        cells: along a side of the finest grid in which neighbours must differ in sign: the shortest period is two of
            its cells. The longest period is four sides, so its sine is monotonic over the whole image.
    """
    if width % 4:
        raise ValueError(f"Positions in two dimensions need a width that divides by 4, got {width}.")
    rates = math.pi * torch.logspace(math.log10(0.5), math.log10(cells), width // 4, device=positions.device)
    angles = positions[:, :, None] * rates  # [N, 2, width / 4]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def cell_features(grid: tuple[int, int], width: int, device: torch.device | str | None = None) -> Tensor:
    """Sines and cosines of the row and the column of each cell of a grid, counted from 0, ``[rows * columns, width]``
    float32: a quarter each for sine and cosine of the row and of the column.

    A place in the image has other features in a finer grid and in another bucket. Networks that were trained with them
    need them, such as that of model=patch_dit_source. The fixed tables of DiT and PixArt have the column's half first.

    Args:
        grid: (rows, columns). width: a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"Positions in two dimensions need a width that divides by 4, got {width}.")
    count = width // 4
    cells = torch.meshgrid(*(torch.arange(size, device=device, dtype=torch.float32) for size in grid), indexing="ij")
    rates = CELL_BASE ** (-torch.arange(count, device=device, dtype=torch.float32) / count)
    angles = torch.stack(cells, dim=-1).flatten(0, 1)[:, :, None] * rates  # [N, 2, width / 4]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def rotary_angles(positions: Tensor, head: int, cells: int) -> Tensor:
    """Angles of rotary positions in two dimensions, ``[N, head / 2]`` float32 radians: half of them of y, half of x.

    Args:
        positions: ``[N, 2]``, from `grid_positions`.
        head: width of an attention head, a multiple of 4.
        cells: along a side of the finest grid: the fastest angle changes by one radian per cell, the slowest by nearly
            a hundredth of that (`ROTARY_BASE`), so the slowest sine is monotonic over the whole image.

    Raises:
        ValueError: a width that does not divide by 4.
    """
    if head % 4:
        raise ValueError(f"Rotary positions in two dimensions need heads whose width divides by 4, got {head}.")
    count = head // 4
    rates = cells * ROTARY_BASE ** (-torch.arange(count, device=positions.device, dtype=torch.float32) / count)
    return (positions[:, :, None] * rates).flatten(1)
