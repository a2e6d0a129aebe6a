"""Reading and writing maps at continuous positions: bilinear weights of bins and cells.

Corner convention: bin i spans [i, i + 1], a position of i + 0.5 is its centre.
Shape legend: ``*`` leading shape, H rows, W columns, C cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def two_hot(position: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the two bins ``[*, 2]`` around a position in bin units (bin i spans [i, i + 1]) and their linear weights.

    Beyond the outermost centres, the outermost bin has all the weight.
    """
    centred = (position - 0.5).clamp(0, count - 1)
    lower = centred.floor().clamp(max=max(count - 2, 0))
    weight = centred - lower
    bins = torch.stack([lower, (lower + 1).clamp(max=count - 1)], dim=-1).long()
    return bins, torch.stack([1 - weight, weight], dim=-1)


def bilinear_cells(grid_position: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The 4 cells ``[*, 4, 2]`` (row, column) around positions ``[*, 2]`` (x, y) in cells, and their weights
    ``[*, 4]``."""
    columns, column_weights = two_hot(grid_position[..., 0], shape[1])
    rows, row_weights = two_hot(grid_position[..., 1], shape[0])
    cells = torch.stack(
        [rows[..., :, None].expand(*rows.shape, 2), columns[..., None, :].expand(*columns.shape[:-1], 2, 2)], dim=-1
    )
    weights = (row_weights[..., :, None] * column_weights[..., None, :]).flatten(-2)
    return cells.flatten(-3, -2), weights


def gather_pixels(maps: Tensor, cells: Tensor) -> Tensor:
    """Values ``[*, C]`` of maps ``[*, H, W]`` at cells ``[*, C, 2]``."""
    return maps.flatten(-2).gather(-1, cells[..., 0] * maps.shape[-1] + cells[..., 1])


def sample_features(feature_map: Tensor, pixels: Tensor, image_size: int) -> Tensor:
    """Bilinear features ``[B, *, C]`` of the map ``[B, C, P, P]`` at pixels ``[B, *, 2]``; the border repeats
    outside."""
    # grid_sample with align_corners=False has the corner convention
    grid = (pixels / image_size * 2 - 1).nan_to_num(0.0)
    kind = torch.promote_types(feature_map.dtype, torch.float32)  # bf16 positions would be off by 1/20 cell
    flat = grid.flatten(1, -2)[:, :, None].to(kind)  # [B, N, 1, 2]
    sampled = F.grid_sample(feature_map.to(kind), flat, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[..., 0].transpose(1, 2).unflatten(1, pixels.shape[1:-1])
