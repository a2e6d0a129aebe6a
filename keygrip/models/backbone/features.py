"""Outputs of the DINO backbone: typed features, and keys and values by block.

Shapes: B images, N patches on an h x w grid, R prefix tokens (CLS first, then registers), D width, H heads, E width
of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DinoFeatures:
    """Normed output of the encoder for a batch of images.

    Attributes:
        cls: the CLS token, [B, D].
        prefix: every token before the patches, [B, R, D]; `prefix[:, 0]` is `cls`, the rest are registers.
        patches: patch tokens in row-major order, [B, N, D] with N = h * w.
        grid: (h, w), the number of patch rows and columns.
    """

    cls: Tensor
    prefix: Tensor
    patches: Tensor
    grid: tuple[int, int]

    @property
    def registers(self) -> Tensor:
        """The register tokens, [B, R - 1, D]; empty for a model without registers."""
        return self.prefix[:, 1:]

    def grid_map(self) -> Tensor:
        """The patch tokens as an image, [B, D, h, w]."""
        height, width = self.grid
        return self.patches.transpose(1, 2).unflatten(2, (height, width))


@dataclass(frozen=True)
class BlockKV:
    """Keys and values of all tokens at one block, after the rotary embedding where the model has one.

    Attributes:
        key: [B, H, R + N, E].
        value: [B, H, R + N, E].
    """

    key: Tensor
    value: Tensor
