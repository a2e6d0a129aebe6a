"""Buffers that keep their numbers where a module is brought into another type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Self

from torch import Tensor, nn


class KeptBuffers(nn.Module, ABC):
    """A module of which `to`, `half` and other casts leave some buffers as they are; these move with it."""

    @abstractmethod
    def kept(self) -> Mapping[str, Tensor]:
        """The buffers by name."""

    @abstractmethod
    def put_back(self, kept: Mapping[str, Tensor]) -> None:
        """Gives the module the buffers that it had, on the device where it lies now."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self.kept()
        super()._apply(fn, recurse)
        self.put_back(kept)
        return self
