"""Token routing: in training, some tokens pass by the middle blocks (Krause et al., "TREAD", 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keygrip.training.parts import model_part


@model_part
@dataclass(frozen=True)
class TokenRouting:
    """A share of the latent tokens, drawn anew for every sample, skips blocks ``start`` to ``stop`` and comes back
    behind them as it was. The loss is on all tokens; sampling routes nothing.

    Args:
        share: of the tokens that pass by, in (0, 1).
        start, stop: numbers of the first block passed by and of the first one after; negative ones count from the end.
    """

    share: float = 0.5
    start: int = 2
    stop: int = -2

    def check(self, depth: int) -> None:
        """Raises ValueError where a network of this depth has no such blocks."""
        if not 0 < self.share < 1:
            raise ValueError(
                f"model.network.routing.share={self.share}: must lie between 0 and 1; null switches it off."
            )
        start, stop = self.span(depth)
        if not 0 < start < stop < depth:
            raise ValueError(
                f"model.network.routing: blocks {self.start} to {self.stop} of {depth} are not in the middle: at least "
                "one block must come before and one after."
            )

    def span(self, depth: int) -> tuple[int, int]:
        """``start`` and ``stop`` counted from the front."""
        return self.start % depth, self.stop % depth

    def choose(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        """Indices ``[B, K]`` of the tokens that go through, in order, from torch's global generator."""
        through = max(1, round(tokens * (1 - self.share)))
        return torch.rand(batch, tokens, device=device).topk(through, dim=1).indices.sort(dim=1).values

    @staticmethod
    def take(whole: Tensor, index: Tensor) -> Tensor:
        """Tokens ``[B, K, D]`` of ``[B, N, D]``."""
        return whole.flatten(0, 1)[_places(whole, index)]

    @staticmethod
    def put_back(whole: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
        """``whole`` ``[B, N, D]`` with the tokens ``[B, K, D]`` in their places."""
        flat = whole.to(tokens.dtype).flatten(0, 1)
        return flat.index_copy(0, _places(whole, index).flatten(), tokens.flatten(0, 1)).view(whole.shape)


def _places(whole: Tensor, index: Tensor) -> Tensor:
    """``[B, K]``, of tokens among all of ``whole`` ``[B, N, D]``: moved whole, since `gather` and `scatter` are sorted
    number by number in deterministic mode on a GPU."""
    return torch.arange(len(whole), device=index.device)[:, None] * whole.shape[1] + index
