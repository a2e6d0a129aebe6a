"""The frozen encoders of the patch-conditioned DiT: autoencoder, text encoder and DINO view.

`Encoders` is the interface to the rest of the package. Parts load their weights on first use: a training run on
finished shards needs only the autoencoder, for the samples in validation.

Images are uint8 [B, 3, H, W] RGB in 0..255 on the way in and float32 [B, 3, H, W] in 0..1 on the way out.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from keygrip.data.batches import ImageTextStatistics
from keygrip.data.image_text.encoder_settings import differing_settings
from keygrip.models.nn.precision import without_autocast
from keygrip.models.patch_dit.autoencoders import Autoencoder, PixelPacking
from keygrip.models.patch_dit.dino_view import COLOUR, GAMMA, GREY, DinoView, grey
from keygrip.models.patch_dit.feature_statistics import UNKNOWN
from keygrip.models.patch_dit.text_encoders import RandomWordVectors, TextEncoder
from keygrip.models.patch_dit.trained_autoencoder import TrainedAutoencoder
from keygrip.training.parts import model_part

log = logging.getLogger(__name__)


@model_part
class Encoders:
    """All frozen parts of a patch-conditioned DiT.

    Args:
        autoencoder, text, view: the parts.
        dino_view: "colour", or "grey": DINO receives only the luminance of linear light, and colour is specified by
            the text.

    Attributes:
        latent_channels, latent_stride, text_dim, text_length, dino_dim: sizes, known without loading anything.
    """

    def __init__(self, autoencoder: Autoencoder, text: TextEncoder, view: DinoView, dino_view: str = COLOUR) -> None:
        if dino_view not in (GREY, COLOUR):
            raise ValueError(f"encoders.dino_view must be {GREY} or {COLOUR}, not {dino_view!r}")
        self.autoencoder, self.text, self.view, self.dino_view = autoencoder, text, view, dino_view
        self.latent_channels, self.latent_stride = autoencoder.channels, autoencoder.stride
        self.text_dim, self.text_length = text.width, text.length
        self.dino_dim = view.width
        self.device: torch.device | str = "cpu"

    def to(self, device: torch.device | str) -> Self:
        """Set the device of the parts: inputs may be on any device, outputs are on this one."""
        self.device = device
        for part in (self.autoencoder, self.text, self.view):
            part.to(device)
        return self

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> latents, float32 [B, C, h, w].

        Raises:
            ValueError: H or W does not divide by the stride.
        """
        stride = self.latent_stride
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images are uint8 [B, 3, H, W], got {images.dtype} {list(images.shape)}")
        if images.shape[2] % stride or images.shape[3] % stride:
            raise ValueError(
                f"an image of {images.shape[3]} x {images.shape[2]} pixels does not divide by the latent's stride of "
                f"{stride}"
            )
        with torch.no_grad():
            return self.autoencoder.encode(images.to(self.device)).float()

    def decode_latents(self, latents: Tensor) -> Tensor:
        """float32 [B, C, h, w] -> images, float32 [B, 3, H, W] in 0..1.

        Computed in the autoencoder's own dtype, also under autocast: rounding to bfloat16 causes grain, and large
        autoencoders exceed the range of float16.
        """
        latents = latents.to(self.device).float()
        with torch.no_grad(), without_autocast(latents):
            return self.autoencoder.decode(latents).float().clamp(0, 1)

    def encode_text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States float32 [B, L, Dt], zeros at padding, and mask bool [B, L].

        A blank caption counts as none: its row has no token, even if the text encoder ends every text with a token.
        """
        with torch.no_grad():
            states, mask = self.text.encode(captions)
        captioned = torch.tensor([bool(caption.strip()) for caption in captions], device=mask.device)
        states, mask = states * captioned[:, None, None], mask & captioned[:, None]
        return states.to(self.device), mask.to(self.device)

    @property
    def captions_cut(self) -> int:
        """Number of captions so far that exceeded the text encoder's length and were cut off."""
        return self.text.cut

    def encode_view(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, vh, vw], of `view_size` -> cls float32 [B, D] and patches float32 [B, gh * gw, D], raw."""
        if views.dtype != torch.uint8 or views.ndim != 4:
            raise ValueError(f"DINO views are uint8 [B, 3, h, w], got {views.dtype} {list(views.shape)}")
        with torch.no_grad():
            pixels = views.to(self.device).float() / 255
            return self.view.encode(grey(pixels) if self.dino_view == GREY else pixels)

    def view_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels of the DINO view of an image of that size: the whole image, resized."""
        return self.view.size_of(width, height)

    def dino_grid(self, width: int, height: int) -> tuple[int, int]:
        """The grid of patches (gh, gw) for an image of that size."""
        view_width, view_height = self.view_size(width, height)
        return view_height // self.view.patch, view_width // self.view.patch

    @property
    def description(self) -> dict[str, Any]:
        """Plain values that identify these encoders. Loads the weights that are needed for it."""
        return {
            **self._view_settings,
            "autoencoder": self.autoencoder.description(),
            "text": self.text.description(),
            "view": self.view.description(),
        }

    @property
    def fingerprint(self) -> str:
        """Hash of the description: shards and checkpoints store that of the encoders that they were made with."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def quick_fingerprint(self) -> str | None:
        """The fingerprint if it is known without loading large weights, otherwise None."""
        small = isinstance(self.autoencoder, PixelPacking | TrainedAutoencoder)
        small = small and isinstance(self.text, RandomWordVectors)
        return self.fingerprint if small and self.view.state() is not None else None

    @property
    def _view_settings(self) -> dict[str, Any]:
        return {"dino_view": self.dino_view} | ({"gamma": GAMMA} if self.dino_view == GREY else {})

    def check_shards(self, statistics: ImageTextStatistics) -> None:
        """Check that shards were made with these encoders, as far as this is known without loading large weights: large
        encoders are compared as a whole when they are used (`load_state`).

        Raises:
            ValueError: they were made with other encoders, or with other options of them.
        """
        if statistics.text_dim != self.text_dim:
            raise ValueError(
                f"The shards' text states have {statistics.text_dim} numbers and the encoders' {self.text_dim}: choose "
                "the encoders= that the shards were made with."
            )
        if statistics.encoders == UNKNOWN:
            return
        parts = {
            "autoencoder": self.autoencoder.settings(),
            "text": self.text.settings(),
            "view": self.view.settings(),
        }
        different = differing_settings(statistics.encoder_settings, self._view_settings | parts)
        if different:
            raise ValueError(
                f"The shards were made with other encoders than these ({'; '.join(different)}): choose the encoders= "
                "and options that the shards were made with, or make the shards again."
            )
        fingerprint = self.quick_fingerprint
        if fingerprint not in (None, statistics.encoders):
            raise ValueError(
                f"The shards were made with the encoders {statistics.encoders} and these are {fingerprint}: choose the "
                "encoders= and options (encoders.dino_view, ...) that the shards were made with."
            )

    @property
    def exact(self) -> bool:
        """Whether latents contain every pixel exactly."""
        return self.autoencoder.exact

    def weights(self) -> dict[str, dict[str, Tensor] | None]:
        """Weights of the small parts, which are stored with a model: DINO and keygrip's own autoencoder; None for parts
        that are known by name or have no weights."""
        autoencoder = self.autoencoder
        autoencoder_weights = autoencoder.state() if isinstance(autoencoder, TrainedAutoencoder) else None
        return {"view": self.view.state(), "autoencoder": autoencoder_weights}

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Load what :meth:`weights` returned. Raise ValueError for weights of another autoencoder."""
        self.view.load_state(weights["view"])
        if isinstance(self.autoencoder, TrainedAutoencoder):
            autoencoder_weights = weights.get("autoencoder")
            if autoencoder_weights is None:
                raise ValueError("the checkpoint holds no weights of its autoencoder")
            self.autoencoder.load_state(autoencoder_weights)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint: the fingerprint, and the weights of small parts."""
        return {"fingerprint": self.fingerprint, **self.weights()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state` returned.

        Raises:
            ValueError: the state is of other encoders; images would be wrong.
        """
        self.load_weights(state)
        if self.fingerprint != state["fingerprint"]:
            raise ValueError(
                f"these encoders have the fingerprint {self.fingerprint}, those of the checkpoint "
                f"{state['fingerprint']}: use the same encoders= with the same options as for its shards"
            )
