"""Token routing: in training, some tokens skip the middle blocks (Krause et al., "TREAD", 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keygrip.training.parts import model_part


@model_part
@dataclass(frozen=True)
class TokenRouting:
    """A share of the latent tokens, chosen at random for every sample, skips blocks ``start`` to ``stop`` - 1 and
    is inserted unchanged after them. The loss is on all tokens; in sampling no token is skipped.

    Args:
        share: of the tokens that skip blocks, in (0, 1).
        start, stop: numbers of the first skipped block and of the first block after; negative ones count from the end.
    """

    share: float = 0.5
    start: int = 2
    stop: int = -2

    def check(self, depth: int) -> None:
        """Raise ValueError if a network of this depth has no such blocks."""
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
        """Indices ``[B, K]`` of the tokens that do not skip, in order, sampled with torch's global generator."""
        through = max(1, round(tokens * (1 - self.share)))
        return torch.rand(batch, tokens, device=device).topk(through, dim=1).indices.sort(dim=1).values

    @staticmethod
    def take(whole: Tensor, index: Tensor) -> Tensor:
        """Select tokens ``[B, K, D]`` from ``[B, N, D]``."""
        return whole.flatten(0, 1)[_flat_indices(whole, index)]

    @staticmethod
    def put_back(whole: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
        """Put the tokens ``[B, K, D]`` back in their places in ``whole`` ``[B, N, D]``."""
        flat = whole.to(tokens.dtype).flatten(0, 1)
        return flat.index_copy(0, _flat_indices(whole, index).flatten(), tokens.flatten(0, 1)).view(whole.shape)


def _flat_indices(whole: Tensor, index: Tensor) -> Tensor:
    """Indices ``[B, K]`` of tokens in the flattened ``whole`` ``[B, N, D]``. Tokens are moved as rows, since `gather`
    and `scatter` sort single values in deterministic mode on a GPU."""
    return torch.arange(len(whole), device=index.device)[:, None] * whole.shape[1] + index
