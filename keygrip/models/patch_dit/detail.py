"""Last layer across tokens: convolutions over the transformer's output in pixel order.

A linear layer outputs each token's square of pixels separately, so edges break where two squares meet. This head reads
the noisy image and the transformer's output (the draft) for all squares together, and adds a correction.

Legend: B samples, C h w a latent, p the transformer's patch size, D its width, N = h w / p^2 tokens; the latent
was packed from an image of c channels, H = h * cell by W = w * cell.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from keygrip.models.nn.adaln import AdaLNModulation
from keygrip.training.parts import model_part

GROUPS = 4


class ModulatedBlock(nn.Module):
    """Two convolutions after group norms that the condition shifts and scales, with a residual connection."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.modulation = AdaLNModulation(condition, width, parts=4)
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, width, affine=False) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, E, H', W'], condition [B, D] -> the shape of x."""
        parts = [part[..., None, None] for part in self.modulation(condition)]
        inner = x
        for index, (norm, convolution) in enumerate(zip(self.norms, self.convolutions, strict=True)):
            shift, scale = parts[2 * index], parts[2 * index + 1]
            inner = convolution(functional.silu(norm(inner) * (1 + scale) + shift))
        return x + inner


@model_part
class DetailHead(nn.Module):
    """Corrects the latent that the transformer outputs; the correction is initially zero.

    Args:
        latent_channels: C. token_width: D. patch_size: p.
        cell: side in pixels of the square that `PixelPacking` packed into a latent cell (its `edge`); 1: latents of an
            autoencoder, whose cells are used as pixels.
        width: E, of the convolutions, a multiple of 4. blocks: of two convolutions each.
        stride: a convolution's cell, in pixels: 2 doubles the receptive field at a quarter of the cost.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        latent_channels: int,
        token_width: int,
        patch_size: int,
        cell: int = 1,
        width: int = 64,
        blocks: int = 2,
        stride: int = 2,
    ) -> None:
        super().__init__()
        if cell < 1 or latent_channels % cell**2:
            raise ValueError(
                f"model.network.detail.cell={cell}: {latent_channels} latent channels are no such cells; give "
                "encoders.autoencoder.edge of packed pixels, 1 for latents of an autoencoder"
            )
        if stride < 1 or patch_size * cell % stride:
            raise ValueError(
                f"model.network.detail.stride={stride} must divide a token's side, {patch_size * cell} pixels"
            )
        if width < GROUPS or width % GROUPS or blocks < 1:
            raise ValueError(
                f"model.network.detail: width={width} must be a multiple of {GROUPS}, and blocks={blocks} at least 1"
            )
        self.patch_size, self.cell, self.stride = patch_size, cell, stride
        channels = latent_channels // cell**2 * stride**2
        self.image_in = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.token_in = nn.Linear(token_width, width)
        self.blocks = nn.ModuleList(ModulatedBlock(width, token_width) for _ in range(blocks))
        self.norm = nn.GroupNorm(GROUPS, width)
        self.image_out = nn.Conv2d(width, channels, 3, padding=1)
        for parameter in self.image_out.parameters():
            nn.init.zeros_(parameter)

    def check(self, edge: int) -> None:
        """Raise ValueError if latents are not packed in such cells. edge: of their `PixelPacking`; 1: other latents."""
        if self.cell not in (1, edge):
            raise ValueError(f"model.network.detail.cell={self.cell}: these encoders give latents of cells of {edge}")

    def forward(self, noisy: Tensor, draft: Tensor, tokens: Tensor, condition: Tensor) -> Tensor:
        """The corrected draft [B, C, h, w].

        Args:
            noisy: x_s [B, C, h, w]. draft: of the transformer, the same shape. tokens: its last tokens, [B, N, D], in
                row order. condition: [B, D].
        """
        x = self.image_in(torch.cat([self._unpacked(noisy), self._unpacked(draft)], dim=1))
        rows = draft.shape[2] // self.patch_size
        token_map = self.token_in(tokens).transpose(1, 2).unflatten(2, (rows, -1))
        x = x + functional.interpolate(token_map, x.shape[-2:], mode="nearest")
        for block in self.blocks:
            x = block(x, condition)
        correction = self.image_out(functional.silu(self.norm(x)))
        return draft + self._packed(correction)

    def _unpacked(self, latent: Tensor) -> Tensor:
        return functional.pixel_unshuffle(functional.pixel_shuffle(latent, self.cell), self.stride)

    def _packed(self, image: Tensor) -> Tensor:
        return functional.pixel_unshuffle(functional.pixel_shuffle(image, self.stride), self.cell)
