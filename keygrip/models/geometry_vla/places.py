"""Embedding of the places of image tokens: number of the view, row and column.

Shape legend: B samples, V views, L tokens, P tokens along a side of an image, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from keygrip.models.nn.sinusoids import continuous_features

MOST_VIEWS = 16  # largest number of views


class PlaceEmbedding(nn.Module):
    """Embed places ``[B, L, 3]`` (see `keygrip.models.language.qwen_vl.Semantics`) as ``[B, L, H]``: zeros for words,
    and initially zeros for all tokens."""

    def __init__(self, width: int, features: int = 32) -> None:
        super().__init__()
        self.features = features
        self.lift = nn.Linear(3 * features, width)
        nn.init.zeros_(self.lift.weight)
        nn.init.zeros_(self.lift.bias)

    def forward(self, places: Tensor) -> Tensor:
        scaled = places / places.new_tensor([MOST_VIEWS, 1.0, 1.0])
        lifted = self.lift(continuous_features(scaled, self.features).flatten(-2))
        return lifted * (places[..., :1] > 0)


def grid_places(views: int, side: int, device: torch.device) -> Tensor:
    """Places ``[V P P, 3]`` of tokens on a square grid in each view: number of the view from 1, row and column as
    fractions of the image."""
    shares = (torch.arange(side, device=device) + 0.5) / side
    view_numbers = torch.arange(views, device=device) + 1.0
    return torch.stack(torch.meshgrid(view_numbers, shares, shares, indexing="ij"), dim=-1).flatten(0, 2)
