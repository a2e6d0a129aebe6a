"""Coupling of arms: each arm's query receives the other arms' queries, and its steps attend to the other arms' steps.

Both additions are initialised to zero, so at first every arm plans independently, as without them. They are built after
all other modules, whose initial weights they do not change.

Shape legend: B batch, T steps, D width of a step (the query's parts together), W width of the trunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from keygrip.models.nn.attention import Attention


class CoupledArms(nn.Module):
    """Exchange information between arms: their states before the trunk, their plans after it.

    Args:
        arms: names, two or more. trunk: W. d_model: D. heads: of the attention to the other arms' steps; must divide D.
    """

    def __init__(self, arms: Sequence[str], trunk: int, d_model: int, heads: int = 4) -> None:
        super().__init__()
        self.heard = nn.ModuleDict({arm: nn.Linear(trunk, trunk) for arm in arms})
        for layer in self.heard.values():
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.norm = nn.LayerNorm(d_model)
        self.read = nn.ModuleDict({arm: Attention(d_model, heads, zero_output=True) for arm in arms})

    def queries(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add to every arm's query ``[B, W]`` a projection of the mean of the other arms' queries.

        A query contains the arm's state.
        """
        return {
            arm: query + self.heard[arm](torch.stack([own[other] for other in own if other != arm]).mean(0))
            for arm, query in own.items()
        }

    def steps(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return every arm's steps ``[B, T, D]`` after cross-attention to all steps of the other arms."""
        normed = {arm: self.norm(steps) for arm, steps in own.items()}
        attended = {}
        for arm, steps in own.items():
            other_steps = torch.cat([normed[other] for other in own if other != arm], dim=1)
            attention = self.read[arm]
            assert isinstance(attention, Attention)
            attended[arm] = steps + attention(normed[arm], attention.keys_values(other_steps))
        return attended
