"""keygrip's own autoencoder: convolutions that are trained on the images themselves (`model=image_autoencoder`).

    images [B, 3, H, W] -> mean and log variance [B, C, H / stride, W / stride] -> images

Legend: B images, H W their size, C h w channels and size of a latent. Pixels are in -1..1 inside. Residual blocks, and
a Gaussian posterior, as in Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from keygrip.models.patch_dit.dino_view import weights_digest
from keygrip.models.patch_dit.init_source import read_source
from keygrip.training.parts import model_part

WIDEST = 4  # largest multiple of the width, from the second halving on
LOG_VARIANCE = (-20.0, 4.0)


class ResidualBlock(nn.Module):
    """Two convolutions after group norms, with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(2))
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W] -> the same shape."""
        inner = x
        for norm, layer in zip(self.norms, self.layers, strict=True):
            inner = layer(functional.silu(norm(inner)))
        return x + inner


@model_part
class ConvAutoencoder(nn.Module):
    """Encoder and decoder.

    Args:
        channels: C of a latent. stride: H / h, a power of two. width: of the first layer, a multiple of 4; doubled with
            every halving, up to four times as much. blocks: residual blocks at each resolution.
        packing: side in pixels of the squares that the first layer reads as one cell, a power of two below `stride`,
            which includes it; 1: single pixels.

    Raises:
        ValueError: sizes out of range.
    """

    def __init__(self, channels: int = 16, stride: int = 4, width: int = 32, blocks: int = 1, packing: int = 1) -> None:
        super().__init__()
        if stride < 2 or stride != 2 ** (stride.bit_length() - 1):
            raise ValueError(f"an autoencoder's stride is a power of two from 2 on, not {stride}")
        if not 1 <= packing < stride or packing != 2 ** (packing.bit_length() - 1):
            raise ValueError(f"an autoencoder's packing={packing} is a power of two below its stride={stride}")
        halvings = (stride // packing).bit_length() - 1
        if width % 4 or min(channels, width, blocks) < 1:
            raise ValueError(f"an autoencoder's width={width} must divide by 4, channels and blocks be at least 1")
        self.channels, self.stride = channels, stride
        widths = [width * min(2**level, WIDEST) for level in range(halvings + 1)]
        down: list[nn.Module] = [nn.PixelUnshuffle(packing)] if packing > 1 else []
        down += [nn.Conv2d(3 * packing**2, width, 3, padding=1)]
        for narrow, wide in pairwise(widths):
            down += [ResidualBlock(narrow) for _ in range(blocks)]
            down += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1)]
        down += [ResidualBlock(widths[-1]) for _ in range(blocks)]
        self.encoder = nn.Sequential(*down, *_last(widths[-1], 2 * channels))
        up: list[nn.Module] = [nn.Conv2d(channels, widths[-1], 3, padding=1)]
        up += [ResidualBlock(widths[-1]) for _ in range(blocks)]
        for wide, narrow in pairwise(widths[::-1]):
            # Nearest-neighbour upsampling and a convolution: transposed convolutions cause a chequered pattern.
            up += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(wide, narrow, 3, padding=1)]
            up += [ResidualBlock(narrow) for _ in range(blocks)]
        up += _last(width, 3 * packing**2)
        self.decoder = nn.Sequential(*up, *([nn.PixelShuffle(packing)] if packing > 1 else []))

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, C, h, w] of images [B, 3, H, W] in -1..1."""
        mean, log_variance = self.encoder(pixels).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], about -1..1, of latents [B, C, h, w]."""
        found: Tensor = self.decoder(latents)
        return found

    def forward(self, pixels: Tensor) -> Tensor:
        """Reconstruct images, [B, 3, H, W]."""
        return self.decode(self.posterior(pixels)[0])


def _last(width: int, channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)]


@model_part(from_checkpoint={"init_from": None})
class TrainedAutoencoder:
    """The autoencoder of a run of `model=image_autoencoder`, frozen. It is small, so its weights are stored in the
    checkpoints of the models that use it. Latents are the posterior's means.

    Args:
        init_from: the run, its checkpoint or a file of weights. channels, stride, width, blocks, packing: as in
            the run's network.

    Raises:
        ValueError: `init_from` is not a run, or sizes are out of range.
    """

    exact = False  # lossy: decoded images differ from the encoded ones

    def __init__(
        self,
        init_from: str | None = None,
        channels: int = 16,
        stride: int = 4,
        width: int = 32,
        blocks: int = 1,
        packing: int = 1,
    ) -> None:
        if not isinstance(init_from, str | None):  # a pretraining stage, which keygrip.train would have run
            raise ValueError(
                "encoders.autoencoder.init_from is no run: train one on such images with `keygrip train "
                "experiment=image_autoencoder` and name its folder"
            )
        self.init_from, self.channels, self.stride = init_from, channels, stride
        self._network = ConvAutoencoder(channels, stride, width, blocks, packing).eval().requires_grad_(False)
        self._ready = False

    @property
    def network(self) -> ConvAutoencoder:
        """The network with its weights, which are read on first use.

        Raises:
            FileNotFoundError, ValueError: there is no such run, or its network has another size.
        """
        if not self._ready:
            if self.init_from is None:
                raise ValueError(
                    "encoders.autoencoder has no weights: name its run with encoders.autoencoder.init_from"
                )
            self._load(read_source(self.init_from).weights, f"encoders.autoencoder.init_from={self.init_from}")
        return self._network

    def _load(self, weights: dict[str, Tensor], source: str) -> None:
        expected = self._network.state_dict()
        loaded = {name.removeprefix("network."): value for name, value in weights.items()}
        unfit = [name for name in expected if name not in loaded or loaded[name].shape != expected[name].shape]
        if unfit:
            raise ValueError(
                f"{source} does not hold an autoencoder of channels={self.channels} and stride={self.stride} with this "
                f"width, blocks and packing: {unfit[0]} is missing or of another shape"
            )
        self._network.load_state_dict({name: loaded[name] for name in expected})
        self._ready = True

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, C, h, w]."""
        return self.network.posterior(images.float() / 127.5 - 1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """float32 [B, C, h, w] -> float32 [B, 3, H, W] in 0..1."""
        return (self.network.decode(latents) + 1) / 2

    def to(self, device: torch.device | str) -> Self:
        self._network.to(device)
        return self

    def state(self) -> dict[str, Tensor]:
        """The weights, to be stored with a model."""
        return {name: value.cpu().clone() for name, value in self.network.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load stored weights, independent of their original source. Raise ValueError for another network's weights."""
        self._load(state, "the stored autoencoder")

    def settings(self) -> dict[str, Any]:
        """The part of `description` that is known without its weights."""
        return {"kind": "trained", "stride": self.stride}

    def description(self) -> dict[str, Any]:
        """Plain values that distinguish it from other autoencoders."""
        return {**self.settings(), "weights": weights_digest(self.network)}
