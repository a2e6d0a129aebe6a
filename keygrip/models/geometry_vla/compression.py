"""Compress the tokens of a geometry model to the few tokens that each block of the action head reads.

Averaging all tokens into one would lose the 3D layout; a few dozen tokens keep it and cost the head little.

Shape legend: B batch, G geometry tokens, Dg their width, K compressed tokens, H width of the action head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keygrip.models.nn.attention import Attention

CompressionType = Literal["pool", "per_layer", "qformer"]
TYPES: tuple[CompressionType, ...] = ("pool", "per_layer", "qformer")


class GeometryCompressor(nn.Module, ABC):
    """Base class of the three kinds: K tokens for each of the action head's blocks.

    Args:
        geom_dim: Dg. width: H. blocks: number of blocks that read geometry. tokens: K.
    """

    def __init__(self, geom_dim: int, width: int, blocks: int, tokens: int) -> None:
        super().__init__()
        if tokens < 1 or blocks < 1:
            raise ValueError(f"A compressor gives at least one token to at least one block, got {tokens} and {blocks}.")
        self.geom_dim, self.width, self.blocks, self.tokens = geom_dim, width, blocks, tokens

    def forward(self, geometry: Tensor) -> list[Tensor]:
        """``blocks`` tensors ``[B, K, H]`` from geometry tokens ``[B, G, Dg]``.

        Raises:
            ValueError: tokens of another width, or fewer than K of them.
        """
        if geometry.ndim != 3 or geometry.shape[2] != self.geom_dim:
            raise ValueError(f"Geometry tokens must be [B, G, {self.geom_dim}], got {list(geometry.shape)}.")
        if geometry.shape[1] < self.tokens:
            raise ValueError(
                f"{geometry.shape[1]} geometry tokens cannot be compressed to {self.tokens}: set "
                f"model.network.geom_dit_tokens to {geometry.shape[1]} or less, or give the geometry model larger "
                "images."
            )
        return self._compress(geometry)

    @abstractmethod
    def _compress(self, geometry: Tensor) -> list[Tensor]: ...


class PoolCompressor(GeometryCompressor):
    """One linear layer and means over consecutive tokens: the same K tokens at every block."""

    def __init__(self, geom_dim: int, width: int, blocks: int, tokens: int) -> None:
        super().__init__(geom_dim, width, blocks, tokens)
        self.projection = nn.Linear(geom_dim, width)

    def _compress(self, geometry: Tensor) -> list[Tensor]:
        # A mean's weights add up to 1, so pooling before the linear layer equals pooling after it, for K / G the work.
        return [self.projection(pooled(geometry, self.tokens))] * self.blocks


class PerLayerCompressor(GeometryCompressor):
    """A linear layer for each block after the same pooling: the tokens differ by block."""

    def __init__(self, geom_dim: int, width: int, blocks: int, tokens: int) -> None:
        super().__init__(geom_dim, width, blocks, tokens)
        self.projections = nn.ModuleList(nn.Linear(geom_dim, width) for _ in range(blocks))

    def _compress(self, geometry: Tensor) -> list[Tensor]:
        few = pooled(geometry, self.tokens)
        return [projection(few) for projection in self.projections]


class QFormerCompressor(GeometryCompressor):
    """Learned queries that attend to all projected tokens (after Li et al., "BLIP-2", 2023, with one attention layer):
    the same K tokens at every block; which tokens they come from depends on the input.

    Args (in addition to those of `GeometryCompressor`):
        heads: of the attention.
    """

    def __init__(self, geom_dim: int, width: int, blocks: int, tokens: int, heads: int = 8) -> None:
        super().__init__(geom_dim, width, blocks, tokens)
        if heads < 1 or width % heads:
            raise ValueError(f"model.network.geom_qformer_heads={heads} must divide the head's width, {width}.")
        self.projection = nn.Linear(geom_dim, width)
        # Queries of unit size: much smaller queries would all attend to everything equally, and stay equal.
        self.queries = nn.Parameter(torch.randn(tokens, width))
        self.attention = Attention(width, heads, qk_norm=False)

    def _compress(self, geometry: Tensor) -> list[Tensor]:
        context = self.attention.keys_values(self.projection(geometry))
        return [self.attention(self.queries.expand(len(geometry), -1, -1), context)] * self.blocks


def pooled(tokens: Tensor, count: int) -> Tensor:
    """Means over ``count`` runs of consecutive tokens, ``[B, G, D]`` to ``[B, count, D]``.

    If ``count`` does not divide G, neighbouring runs share a token, so no token is left out.
    """
    if tokens.shape[1] % count == 0:
        return tokens.unflatten(1, (count, -1)).mean(dim=2)
    return F.adaptive_avg_pool1d(tokens.transpose(1, 2), count).transpose(1, 2)


def build_geom_compressor(
    type: str, geom_dim: int, width: int, blocks: int, tokens: int = 16, heads: int = 8
) -> GeometryCompressor:
    """Build the compressor of a kind.

    Args:
        type: ``pool``, ``per_layer`` or ``qformer``. geom_dim: width of a geometry token. width: of the action head.
        blocks: number of action head blocks that read geometry. tokens: K. heads: of the qformer.

    Raises:
        ValueError: an unknown kind, or invalid sizes.
    """
    if type not in TYPES:
        raise ValueError(f"model.network.geom_compression_type is one of {', '.join(TYPES)}, not {type!r}.")
    if type == "pool":
        return PoolCompressor(geom_dim, width, blocks, tokens)
    if type == "per_layer":
        return PerLayerCompressor(geom_dim, width, blocks, tokens)
    return QFormerCompressor(geom_dim, width, blocks, tokens, heads)
