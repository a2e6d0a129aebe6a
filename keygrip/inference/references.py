"""Reference images of `keygrip sample`: their crops, masks of regions, and several of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from keygrip.data.bad_samples import BadSample
from keygrip.data.image_text.crops import Bucket, cut_out, shared_crop
from keygrip.data.image_text.decoding import decode_image, size_of
from keygrip.models.patch_dit.context import Conditions
from keygrip.models.patch_dit.encoders import Encoders


@dataclass(frozen=True)
class Reference:
    """An image at the size to draw.

    Args:
        pixels: uint8 [H, W, 3]. view: uint8 [vh, vw, 3], the same crop for DINO.
    """

    pixels: np.ndarray
    view: np.ndarray

    @property
    def shown(self) -> Tensor:
        """[3, H, W] in 0..1."""
        return torch.from_numpy(self.pixels.copy()).permute(2, 0, 1) / 255


def image_size(image: str) -> tuple[int, int]:
    """(width, height) of a file. Raises FileNotFoundError, ValueError: there is none, or it cannot be read."""
    if not Path(image).exists():
        raise FileNotFoundError(f"image={image}: there is no such file")
    try:
        return size_of(image)
    except BadSample as error:
        raise ValueError(f"image={image} cannot be read as an image: {error.what}") from error


def open_reference(image: str, bucket: Bucket, encoders: Encoders, name: str = "image") -> Reference:
    """What an image shows of itself at the size to draw, and the DINO view of the very same crop.

    Args:
        name: of the setting, for messages.

    Raises:
        FileNotFoundError, ValueError: there is none, or it cannot be read.
    """
    if not Path(image).exists():
        raise FileNotFoundError(f"{name}={image}: there is no such file")
    try:
        whole = decode_image(image)
    except BadSample as error:
        raise ValueError(f"{name}={image} cannot be read as an image: {error.what}") from error
    box = shared_crop(*whole.size, bucket)
    view = encoders.view_size(bucket.width, bucket.height)
    return Reference(cut_out(whole, box, (bucket.width, bucket.height)), cut_out(whole, box, view))


def open_mask(image: str, bucket: Bucket, encoders: Encoders, name: str) -> Tensor:
    """float [1, H, W] in 0..1: the lightness of an image at the size to draw, white is 1."""
    pixels = open_reference(image, bucket, encoders, name).pixels
    return torch.from_numpy(pixels.astype(np.float32).mean(axis=2) / 255)[None]


def patch_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """bool [gh * gw]: patches of which at least half lies where a mask [1, H, W] is white."""
    return functional.adaptive_avg_pool2d(mask[None], grid).flatten() >= 0.5


def cell_mask(mask: Tensor, stride: int) -> Tensor:
    """float [1, h, w]: 1 for latent cells any pixel of which lies where a mask [1, H, W] is at least half white."""
    return functional.max_pool2d((mask >= 0.5).float()[None], stride)[0]


def blended(parts: Sequence[Conditions], masks: Sequence[Tensor] | None) -> Conditions:
    """Several references of the same samples as one.

    Args:
        parts: the same text with the DINO features of each reference. masks: bool [P] of each: where its patches
            count; where several do, the last one; where none does, no patch. None: every patch is their mean.

    Returns:
        with the mean of the CLS vectors.
    """
    first = parts[0]
    cls = [part.cls for part in parts if part.cls is not None]
    patches = [part.patches for part in parts if part.patches is not None]
    assert len(cls) == len(patches) == len(parts)
    mean = torch.stack(cls).mean(dim=0)
    if masks is None:
        return replace(first, cls=mean, patches=torch.stack(patches).mean(dim=0))
    found, told = torch.zeros_like(patches[0]), torch.zeros(patches[0].shape[:2], dtype=torch.bool)
    told = told.to(found.device)
    for own, mask in zip(patches, masks, strict=True):
        where = mask.to(found.device)
        found = torch.where(where[:, None], own, found)
        told = told | where
    return replace(first, cls=mean, patches=found, patch_mask=told)
