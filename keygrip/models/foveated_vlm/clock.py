"""Embeddings of frame numbers or seconds for visual tokens and queries, for videos of any length.

Legend: C language width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from keygrip.models.language.decoder import LanguageModel


class FrameClock(nn.Module):
    """Embeddings [C] of any frame number or second: a learned map of sinusoids."""

    def __init__(self, language: LanguageModel, waves: int = 32) -> None:
        super().__init__()
        self.waves = waves
        self.linear = nn.Linear(2 * waves, language.width, bias=False)
        nn.init.normal_(self.linear.weight, std=language.embedding_scale() * waves**-0.5)

    def forward(self, first: int, count: int) -> Tensor:
        """Return the embeddings [count, C] of `count` frames from number `first` on."""
        return self.at(torch.arange(first, first + count, device=self.linear.weight.device, dtype=torch.float32))

    def at(self, times: Tensor) -> Tensor:
        """Times [...] -> [..., C]. Periods go from 4 frames (or seconds) to 4096."""
        weight = self.linear.weight
        periods = 4.0 * 1024.0 ** (torch.arange(self.waves, device=weight.device) / max(self.waves - 1, 1))
        angle = 2 * torch.pi * times[..., None] / periods
        return self.linear(torch.cat([angle.sin(), angle.cos()], dim=-1).to(weight.dtype))
