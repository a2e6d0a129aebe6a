"""Objects for self-supervised pretraining: connected regions of one colour, found without labels.

A pixel is sampled, rare colours as often as common ones, and mean shift (Comaniciu and Meer 2002,
doi:10.1109/34.1000236) moves a window to the centre of the surrounding pixels of the same colour. The crop taken there
is centred on the object wherever the object lies in the patch grid, so that a mark on the object is at the same place
in every crop.

Legend: M frames, K objects sampled per frame, S pixels of a frame's side, h x w cells, W cells of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 20  # pixels of a crop
CELL = 2  # pixels of a cell in which colours are compared
REACH = 6  # cells of a window to each side of its centre: an object of up to 26 pixels
SHIFTS = 6
HUE, LIGHT = 0.06, 0.3  # differences in colour direction (unit vectors) and brightness that halve the similarity
CANDIDATES = 256  # cells sampled uniformly per frame; objects are sampled from them by the rarity of their colour


@dataclass(frozen=True)
class Objects:
    """Objects of frames.

    Attributes:
        centre: [M, K, 2] (x, y) in pixels, the first pixel's centre is 0. colour: [M, K, 3] mean of its pixels, 0 to 1.
        drawn: [M, K, 2] the sampled pixel (x, y) from which each object was found.
    """

    centre: Tensor
    colour: Tensor
    drawn: Tensor


def colour_features(images: Tensor) -> Tensor:
    """Convert colours 0 to 1 [M, 3, h, w] to features [M, h * w, 4]: direction and brightness, scaled so that a squared
    distance of 1 halves the similarity. An object's faces in light and in shadow have the same direction."""
    colours = images.flatten(2).transpose(1, 2)
    direction = colours / (colours.norm(dim=-1, keepdim=True) + 0.05)
    return torch.cat([direction / HUE, colours.mean(-1, keepdim=True) / LIGHT], dim=-1)


def colour_similarity(one: Tensor, other: Tensor) -> Tensor:
    """Return the similarity of features [..., a, 4] and [..., b, 4], in 0 to 1: [..., a, b]."""
    return torch.exp2(-(one[..., :, None, :] - other[..., None, :, :]).square().sum(-1))


def draw_objects(images: Tensor, count: int, random: torch.Generator) -> Objects:
    """Sample `count` objects per frame from images [M, 3, S, S] in 0 to 1; an object may be sampled more than once."""
    cells = F.avg_pool2d(images, CELL)
    width, features = cells.shape[-1], colour_features(cells)
    sampled_cells = _sample_cells(features, count, random)
    start = torch.stack([sampled_cells % width, sampled_cells // width], dim=-1).float()
    centre, colour = _mean_shift(cells, features, start, _gather_cells(features, sampled_cells))
    middle = (CELL - 1) / 2  # centre of a cell, in pixels
    return Objects(CELL * centre + middle, colour, CELL * start + middle)


def _sample_cells(features: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Sample indices of cells [M, K] from features [M, h * w, 4], in proportion to the rarity of their colour among
    `CANDIDATES` cells."""
    frames, cells = features.shape[:2]
    candidates = torch.randint(cells, (frames, max(count, CANDIDATES)), generator=random).to(features.device)
    candidate_features = _gather_cells(features, candidates)
    # at least 1 / CANDIDATES: each cell is similar to itself
    commonness = colour_similarity(candidate_features, candidate_features).mean(-1)
    noise = torch.rand(commonness.shape, generator=random).to(commonness).clamp(1e-6, 1 - 1e-6)
    keys = -commonness.log() - (-noise.log()).log()  # Gumbel: the K largest are a sample without replacement
    return candidates.gather(1, keys.topk(count, dim=1).indices)


def _mean_shift(cells: Tensor, features: Tensor, centre: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Return where windows converge, (x, y) in cells [M, K, 2], and the mean colour of the pixels found [M, K, 3].

    Args:
        cells: [M, 3, h, w]. features: [M, h * w, 4], of the cells. centre: [M, K, 2], where windows start.
        query: [M, K, 4], features to search for.
    """
    height, width = cells.shape[-2:]
    colours, colour = cells.flatten(2).transpose(1, 2), cells.new_empty(0)
    steps = torch.arange(-REACH, REACH + 1, device=cells.device)
    down, right = (each.flatten() for each in torch.meshgrid(steps, steps, indexing="ij"))
    for _ in range(SHIFTS):
        middle = centre.round().long()
        x, y = middle[..., :1] + right, middle[..., 1:] + down  # [M, K, W]
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        index = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).flatten(1)
        window_features = _gather_cells(features, index).unflatten(1, x.shape[1:])  # [M, K, W, 4]
        weight = colour_similarity(query[:, :, None], window_features)[:, :, 0] * inside
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-6)
        colour = (weight[..., None] * _gather_cells(colours, index).unflatten(1, x.shape[1:])).sum(2)
        query = (weight[..., None] * window_features).sum(2)
        centre = torch.stack([(weight * x).sum(-1), (weight * y).sum(-1)], dim=-1)
    return centre, colour


def _gather_cells(values: Tensor, index: Tensor) -> Tensor:
    """Values [M, N, E] at index [M, n]: [M, n, E]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def crops_of(images: Tensor, centre: Tensor, side: int = SIDE) -> Tensor:
    """Cut squares of `side` pixels from images [M, C, S, S] around centres [M, K, 2] (x, y): [M, K, C, side, side];
    beyond an image's edge its border is repeated."""
    steps = torch.arange(side, device=images.device) - (side - 1) / 2
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)  # [side, side, 2] (x, y)
    grid = ((centre[:, :, None, None] + offsets) * 2 + 1) / images.shape[-1] - 1
    crops = F.grid_sample(images, grid.flatten(1, 2), padding_mode="border", align_corners=False)
    return crops.unflatten(2, (-1, side)).transpose(1, 2)
