"""Autoencoders of images: exact pixel packing, or the 16-channel autoencoder of FLUX.1.

Images are uint8 [B, 3, H, W] RGB in 0..255 on the way in and float32 [B, 3, H, W] in 0..1 on the way out.
Legend: B images, C h w channels and size of a latent.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from keygrip.models.patch_dit.pretrained import INSTALL, from_source, named_dtype, sample_of, subfolder_of
from keygrip.training.parts import model_part

log = logging.getLogger(__name__)


class Autoencoder(Protocol):
    """Encodes images as latents and decodes them. `stride` x `stride` pixels become a latent cell of `channels` values;
    `exact`: decoding restores every image exactly."""

    channels: int
    stride: int
    exact: bool

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, C, H / stride, W / stride]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """float32 [B, C, h, w] -> float32 [B, 3, h * stride, w * stride] in 0..1."""
        ...

    def to(self, device: torch.device | str) -> Self: ...

    def settings(self) -> dict[str, Any]:
        """The part of `description` that is known without loading weights."""
        ...

    def description(self) -> dict[str, Any]:
        """Plain values that distinguish this part from others."""
        ...


@model_part
class PixelPacking:
    """No autoencoder at all: each square of `edge` x `edge` pixels becomes one cell of 3 * edge^2 channels, exactly.

    Channel c * edge^2 + i * edge + j is pixel (i, j) of colour c, in -1..1.
    """

    exact = True

    def __init__(self, edge: int = 8) -> None:
        if edge < 1:
            raise ValueError(f"encoders.autoencoder.edge must be at least 1, not {edge}")
        self.stride, self.channels = edge, 3 * edge * edge

    def encode(self, images: Tensor) -> Tensor:
        return functional.pixel_unshuffle(images.float() / 127.5 - 1, self.stride)

    def decode(self, latents: Tensor) -> Tensor:
        return (functional.pixel_shuffle(latents, self.stride) + 1) / 2

    def to(self, device: torch.device | str) -> Self:
        return self

    def settings(self) -> dict[str, Any]:
        return {"kind": "pixel packing", "edge": self.stride}

    def description(self) -> dict[str, Any]:
        return self.settings()


@model_part(external=["source"])
class FluxAutoencoder:
    """diffusers' AutoencoderKL with 16 channels, as in FLUX.1. Latents are (mean - shift) * scale by its config.

    Args:
        source: a local folder with its config.json, or a name on the Hugging Face hub.
        subfolder: the autoencoder's folder within a larger model; unused if `source` is the autoencoder's own folder.
        dtype: of its weights. channels, stride: expected values.
    """

    exact = False

    def __init__(
        self,
        source: str,
        subfolder: str | None = "vae",
        dtype: str = "bfloat16",
        channels: int = 16,
        stride: int = 8,
    ) -> None:
        self.source, self.subfolder, self.dtype = source, subfolder, named_dtype(dtype)
        self.channels, self.stride = channels, stride
        self.device: torch.device | str = "cpu"
        self._model: Any = None

    @property
    def model(self) -> Any:
        """The model, loaded on first use.

        Raises:
            ImportError: diffusers is not installed. FileNotFoundError: not found. ValueError: another kind of model.
        """
        if self._model is None:
            try:
                from diffusers import AutoencoderKL
            except ImportError as error:
                raise ImportError(f"the FLUX autoencoder needs diffusers: {INSTALL}") from error
            folder = subfolder_of(self.source, self.subfolder)
            arguments = {"torch_dtype": self.dtype, **({"subfolder": folder} if folder else {})}
            model = from_source(AutoencoderKL, self.source, "the autoencoder", arguments)
            factor = 2 ** (len(model.config.block_out_channels) - 1)
            if (model.config.latent_channels, factor) != (self.channels, self.stride):
                raise ValueError(
                    f"{self.source} has latents of {model.config.latent_channels} channels and stride {factor}; "
                    f"{self.channels} and {self.stride} are asked for (encoders.autoencoder)"
                )
            self._model = model.eval().requires_grad_(False).to(self.device)
        return self._model

    def to(self, device: torch.device | str) -> Self:
        self.device = device
        if self._model is not None:
            self._model.to(device)
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Encode by the mean of the posterior: the same image always gives the same latent."""
        model = self.model
        pixels = (images.float() / 127.5 - 1).to(self.device, self.dtype)
        mean = model.encode(pixels).latent_dist.mode().float()
        return (mean - (model.config.shift_factor or 0.0)) * model.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        model = self.model
        raw = latents.float() / model.config.scaling_factor + (model.config.shift_factor or 0.0)
        return (model.decode(raw.to(self.device, self.dtype)).sample.float() + 1) / 2

    def settings(self) -> dict[str, Any]:
        return {"kind": "AutoencoderKL"}

    def description(self) -> dict[str, Any]:
        names = ("latent_channels", "block_out_channels", "scaling_factor", "shift_factor")
        config = {name: getattr(self.model.config, name) for name in names}
        return {**self.settings(), "config": config, **sample_of(self.model)}
