"""Arms that plan together: each one's query sees the others' queries, and its steps attend to the others' steps.

Both additions start at zero and are built after everything else: at first, and without them, every arm plans by itself.

Shape legend: B batch, T steps, D width of a step (the query's parts together), W width of the trunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from keygrip.models.nn.attention import Attention


class CoupledArms(nn.Module):
    """Exchange between arms: of their states before the trunk, of their plans after it.

    Args:
        arms: names, two or more. trunk: W. d_model: D. heads: of the attention to the others' steps; divides D.
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
        """Every arm's query ``[B, W]``, with the mean of the others' added. A query holds the arm's state."""
        return {
            arm: query + self.heard[arm](torch.stack([own[other] for other in own if other != arm]).mean(0))
            for arm, query in own.items()
        }

    def steps(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every arm's steps ``[B, T, D]`` after cross-attention to all steps of the others."""
        normed = {arm: self.norm(steps) for arm, steps in own.items()}
        found = {}
        for arm, steps in own.items():
            others = torch.cat([normed[other] for other in own if other != arm], dim=1)
            attention = self.read[arm]
            assert isinstance(attention, Attention)
            found[arm] = steps + attention(normed[arm], attention.keys_values(others))
        return found
