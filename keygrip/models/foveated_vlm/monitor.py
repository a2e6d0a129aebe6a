"""Health metrics of the foveation, each with its healthy range and one warning outside of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from keygrip.training.monitors import Range, RangeChecks

RANGES = {
    "attention_entropy": Range(
        0.0,
        0.95,
        "the queries attend nearly uniformly: raise model.network.query_std, keep deep_query=true",
    ),
    "static_query_std": Range(
        0.5, 2.0, "the learned query has left the scale at which attention is neither uniform nor a single point"
    ),
    "query_effect": Range(
        0.5,
        math.inf,
        "embeddings are nearly the same under different queries (mean absolute difference; the queries do nothing)",
    ),
    "val/fine_over_coarse": Range(
        0.0, 0.99, "chosen queries do not lower the loss: do any questions in the data need them?"
    ),
    "grad_norm_clipped": Range(1e-6, math.inf, "the gradients are zero"),
    "visual_over_text_std": Range(
        0.2, 5.0, "visual tokens are not on the scale of the token embeddings: see model.network.visual_scale"
    ),
}


class Health(RangeChecks):
    """The checks of `RANGES`; see `RangeChecks`."""

    def __init__(self, ranges: Mapping[str, Range] = RANGES, from_step: int = 0) -> None:
        super().__init__(ranges, from_step)


def relative_entropy(attention: Tensor) -> Tensor:
    """Entropy of attention [..., N] over log N, a mean over rows that hold any: 1 is uniform, 0 a single token."""
    mass = attention.sum(-1) > 0.5
    entropy = -(attention * attention.clamp_min(1e-12).log()).sum(-1) / math.log(attention.shape[-1])
    return (entropy * mass).sum() / mass.sum().clamp_min(1)


def attention_on_target(patches: Tensor, pixel: tuple[float, float], area: float, image_size: int) -> float:
    """Attention on a thing relative to uniform attention.

    Args:
        patches: [h, w] attention on the patches, any scale. pixel: (x, y) of the thing's centre, corner convention.
        area: pixels of the thing that are seen; a square of that area stands for it.

    Returns:
        the share of the attention on patches that the square touches by a quarter or more (at least the one under its
        centre), over the share of these patches among all.
    """
    height, width = patches.shape
    side = math.sqrt(max(area, 1.0))
    cover = []
    for centre, count in ((pixel[1], height), (pixel[0], width)):
        cell = image_size / count
        edges = torch.arange(count) * cell
        overlap = (
            torch.minimum(edges + cell, torch.tensor(centre + side / 2)) - edges.clamp_min(centre - side / 2)
        ).clamp_min(0)
        cover.append(overlap / cell)
    touched = cover[0][:, None] * cover[1][None] >= 0.25
    row, column = (min(int(c / image_size * n), n - 1) for c, n in ((pixel[1], height), (pixel[0], width)))
    touched[row, column] = True
    share = float(patches[touched.to(patches.device)].sum() / patches.sum().clamp_min(1e-12))
    return share / (float(touched.sum()) / touched.numel())
