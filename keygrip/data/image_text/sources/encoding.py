"""Prepare images for a shard: crop them for their bucket, encode them and create the parts to store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from keygrip.data.image_text.crops import Box, Bucket, cut_out, shared_crop
from keygrip.data.image_text.samples import image_text_parts
from keygrip.data.shards.index import Parts, Row


class ViewShapes(Protocol):
    """Provides the shapes of an image's DINO view: size (width, height) in pixels and patch grid (rows, columns)."""

    def view_size(self, width: int, height: int) -> tuple[int, int]: ...
    def dino_grid(self, width: int, height: int) -> tuple[int, int]: ...


class ImageEncoders(ViewShapes, Protocol):
    """Converts images and captions into features; see :class:`keygrip.models.patch_dit.encoders.Encoders`."""

    latent_stride: int

    @property
    def captions_cut(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def description(self) -> dict[str, Any]: ...
    def to(self, device: torch.device | str) -> Any: ...
    def encode_images(self, images: Tensor) -> Tensor: ...
    def encode_view(self, views: Tensor) -> tuple[Tensor, Tensor]: ...
    def encode_text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class PreparedImage:
    """An image that is ready to be encoded; `pixels` and `view` both show `record["crop"]` of the source image.

    Args:
        pixels: uint8 [H, W, 3], in the bucket's size. view: uint8 [vh, vw, 3], for DINO.
    """

    key: str
    pixels: np.ndarray
    view: np.ndarray
    caption: str
    record: dict[str, Any]


def prepare_image(
    image: Any, caption: str, bucket: Bucket, shapes: ViewShapes, key: str, more: Mapping[str, Any] | None = None
) -> PreparedImage:
    """Resize the shared crop of a PIL image twice, once for the latent and once for DINO.

    Args:
        more: further entries of the record, for example `evidence`, or `captions` if there are several.
    """
    box: Box = shared_crop(image.width, image.height, bucket)
    view_size = shapes.view_size(bucket.width, bucket.height)
    record = {
        "caption": caption,
        "size": [image.width, image.height],
        "crop": [round(edge, 3) for edge in box],
        "bucket": [bucket.width, bucket.height],
        "patch_grid": list(shapes.dino_grid(bucket.width, bucket.height)),
        **(more or {}),
    }
    pixels = cut_out(image, box, (bucket.width, bucket.height))
    return PreparedImage(key, pixels, cut_out(image, box, view_size), caption, record)


@dataclass(frozen=True)
class Encoded:
    """Features of prepared images, on the CPU, as numpy arrays; the first dimension is the image.

    Args:
        more_text: states [L, Dt] and masks [L] of the second and further captions, by the image's index.
    """

    latents: np.ndarray
    states: np.ndarray
    mask: np.ndarray
    cls: np.ndarray
    patches: np.ndarray
    more_text: Mapping[int, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)

    def sample(
        self, number: int, record: Mapping[str, Any], trim_text: bool, image: np.ndarray | None = None
    ) -> tuple[Parts, Row]:
        """Create the parts and columns of one image, including its pixels uint8 [H, W, 3] if they are given.

        Raises:
            ValueError: values cannot be stored.
        """
        n = number
        return image_text_parts(
            *(self.latents[n], self.states[n], self.mask[n], self.cls[n], self.patches[n], record, trim_text),
            self.more_text.get(n, ()),
            image,
        )


def encode_images(
    encoders: ImageEncoders,
    pixels: Tensor,
    views: Tensor,
    captions: Sequence[str],
    more_captions: Mapping[int, Sequence[str]] | None = None,
) -> Encoded:
    """Encode images of one bucket: pixels uint8 [B, 3, H, W] and views [B, 3, vh, vw].

    Args:
        captions: the first caption of each image. more_captions: the further captions, by the image's index.
    """
    latents = encoders.encode_images(pixels)
    cls, patches = encoders.encode_view(views)
    states, mask = encoders.encode_text(captions)
    more_text: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    further_captions = [(index, text) for index, texts in (more_captions or {}).items() for text in texts]
    for start in range(0, len(further_captions), len(captions)):
        part = further_captions[start : start + len(captions)]
        encoded_parts = (values.cpu().numpy() for values in encoders.encode_text([text for _, text in part]))
        for (index, _), *pair in zip(part, *encoded_parts, strict=True):
            more_text.setdefault(index, []).append((pair[0], pair[1]))
    latents, states, mask, cls, patches = (part.cpu() for part in (latents, states, mask, cls, patches))
    return Encoded(latents.numpy(), states.numpy(), mask.numpy(), cls.numpy(), patches.numpy(), more_text)


def as_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """Stack images [H, W, 3] into uint8 [B, 3, H, W]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
