"""Buffers that keep their values when a module is converted to another type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Self

from torch import Tensor, nn


class KeptBuffers(nn.Module, ABC):
    """A module whose casts (`to`, `half`, ...) do not change the values of some buffers; they still change device."""

    @abstractmethod
    def kept(self) -> Mapping[str, Tensor]:
        """Return these buffers by name."""

    @abstractmethod
    def put_back(self, kept: Mapping[str, Tensor]) -> None:
        """Restore the module's previous buffers, on its present device."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self.kept()
        super()._apply(fn, recurse)
        self.put_back(kept)
        return self
