"""Key-value cache of rows that a language model reads in parts.

Shapes: B rows, t further positions, K positions in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LanguageCache:
    """Keys and values of B rows in slots; no real position attends to slots of padding.

    Attributes:
        layers: transformers' cache. length: slots in use, at least the positions of the longest row.
    """

    def __init__(self) -> None:
        from transformers import DynamicCache

        self.layers: Any = DynamicCache()
        self.length = 0
        self._valid: Tensor | None = None  # [B, slots]; None: all real, and all rows equally long
        self._next: Tensor | None = None  # [B] positions, where they differ

    def advance(self, rows: int, more: int, valid: Tensor | None, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Return mask bool [B, 1, t, K] (or None: causal) and positions [B, t] for t further positions."""
        slot = torch.arange(self.length + more, device=device)
        query = slot[self.length :, None]
        past, self.length = self.length, self.length + more
        if valid is None and self._valid is None:
            return (slot <= query)[None, None] if past and more > 1 else None, query.T
        if self._valid is None:
            self._valid = torch.ones(rows, past, dtype=torch.bool, device=device)
            self._next = torch.full((rows,), past, device=device)
        assert self._next is not None
        if valid is None:
            valid = torch.ones(rows, more, dtype=torch.bool, device=device)
        positions = (self._next[:, None] + valid.cumsum(1) - 1).clamp_min(0)
        self._next = self._next + valid.sum(1)
        self._valid = torch.cat([self._valid, valid], dim=1)
        # padding attends to itself: a position without any key would give NaN, which spreads
        mask = (self._valid[:, None] & (slot <= query)) | (slot == query)
        return mask[:, None], positions

    def longest(self, more: int, valid: Tensor | None) -> int:
        """Return the length of the longest row after `more` further positions, of which `valid` [B, more] are real."""
        if self._next is None:  # no row has padding so far
            return self.length + more
        return int((self._next + (more if valid is None else valid.sum(1))).max())

    def cut(self, length: int) -> None:
        """Discard all except the first `length` positions; only for rows without padding."""
        assert self._valid is None, "rows with padding have no common length"
        if length < self.length:
            self.layers.crop(length - self.length)  # negative: number of positions to remove
            self.length = length
