"""Reference images of `keygrip sample`: their crops, masks of regions, and several of them together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor
from torch.nn import functional

from keygrip.data.bad_samples import BadSample
from keygrip.data.image_text.crops import Box, Bucket, cut_out, shared_crop
from keygrip.data.image_text.decoding import decode_image, refuse_transparency, size_of
from keygrip.data.untrusted_files import open_image
from keygrip.models.patch_dit.context import Conditions
from keygrip.models.patch_dit.encoders import Encoders
from keygrip.models.patch_dit.module import PatchDiTModule
from keygrip.models.patch_dit.sampler import Edit

log = logging.getLogger(__name__)

MOST_CUT = 0.05  # of an image, which is cut off without a word to give it the shape of a trained size


@dataclass(frozen=True)
class Reference:
    """An image at the size to draw.

    Args:
        pixels: uint8 [H, W, 3]. view: uint8 [vh, vw, 3], the same crop for DINO. file: where it comes from.
        size: (width, height) of the whole image, pixels. box: what is shown of it.
    """

    pixels: np.ndarray
    view: np.ndarray
    file: str
    size: tuple[int, int]
    box: Box

    @property
    def shown(self) -> Tensor:
        """[3, H, W] in 0..1."""
        return torch.from_numpy(self.pixels.copy()).permute(2, 0, 1) / 255


def image_size(image: str, name: str = "image") -> tuple[int, int]:
    """(width, height) of a file, which the setting `name` gives. Raises FileNotFoundError, ValueError: there is none,
    or it cannot be read."""
    if not Path(image).exists():
        raise FileNotFoundError(f"{name}={image}: there is no such file")
    try:
        return size_of(image)
    except BadSample as error:
        raise ValueError(f"{name}={image} cannot be read as an image: {error.what}") from error


def warn_of_cut(size: tuple[int, int], bucket: Bucket, called: str, otherwise: str) -> None:
    """Warns where much of an image is cut off to give it the shape of a trained size that nobody asked for.

    Args:
        size: (width, height) of the image, pixels. bucket: what is drawn. called: the image, and `otherwise` what gives
            another size, in the warning.
    """
    left, top, right, bottom = shared_crop(*size, bucket)
    if (right - left) * (bottom - top) < (1 - MOST_CUT) * size[0] * size[1]:
        log.warning(
            "%s: of its %d x %d pixels the middle %d x %d are used, in the shape of the %d x %d that are drawn, a size "
            "that the model was trained on; give %s for another",
            *(called, *size, round(right - left), round(bottom - top), bucket.width, bucket.height, otherwise),
        )


def open_reference(image: str, bucket: Bucket, encoders: Encoders, name: str = "image") -> Reference:
    """What an image shows of itself at the size to draw, and the DINO view of the very same crop.

    Args:
        name: of the setting, for messages.

    Raises:
        FileNotFoundError, ValueError: there is none, or it cannot be read.
    """
    return reference_of(decoded_file(image, name), bucket, encoders, image)


def reference_of(whole: Image, bucket: Bucket, encoders: Encoders, called: str) -> Reference:
    """The same of an opened image, 8-bit RGB; `called` in messages."""
    box = shared_crop(*whole.size, bucket)
    view = encoders.view_size(bucket.width, bucket.height)
    pixels = cut_out(whole, box, (bucket.width, bucket.height))
    return Reference(pixels, cut_out(whole, box, view), called, whole.size, box)


def open_mask(mask: str, of: Reference, name: str) -> Tensor:
    """float [1, H, W] in 0..1: the lightness of a mask where its image is shown, at the size to draw; white is 1.

    Args:
        mask: a file that covers the whole image `of`, at any scale: what is shown of the image is cut out of it too.
        name: of the setting, for messages.

    Raises:
        FileNotFoundError, ValueError: there is none, it cannot be read, or it has another shape than the image, so
            that nobody knows which part of the image it covers; or parts of it are transparent, which says nothing.
    """
    whole = decoded_file(mask, name)
    try:
        with open_image(mask) as image:
            refuse_transparency(image)
    except BadSample as error:
        raise ValueError(f"{name}={mask} cannot be read as a mask: {error.what}") from error
    return mask_of(whole, of, f"{name}={mask}")


def mask_of(whole: Image, of: Reference, called: str) -> Tensor:
    """The same of an opened mask; `called` in messages. Raises ValueError: it has another shape than the image."""
    (width, height), (own_width, own_height) = whole.size, of.size
    # Sides that were rounded to whole pixels differ by less than one, those of the mask or those of the image.
    if abs(width * own_height - height * own_width) > max(*whole.size, *of.size):
        raise ValueError(
            f"{called} has {width} x {height} pixels and its image {of.file} {own_width} x {own_height}, another "
            "shape: give a mask that covers the whole image, at any scale"
        )
    scale = width / own_width, height / own_height
    left, top, right, bottom = of.box
    box = left * scale[0], top * scale[1], min(right * scale[0], width), min(bottom * scale[1], height)
    # Means of areas: other filters would let what is white shine into pixels that are black all over.
    size = of.pixels.shape[1], of.pixels.shape[0]
    pixels = np.asarray(whole.convert("RGB").resize(size, Resampling.BOX, box=box))
    return torch.from_numpy(pixels.astype(np.float32).mean(axis=2) / 255)[None]


def decoded_file(image: str, name: str) -> Image:
    """A whole image in RGB. Raises FileNotFoundError, ValueError: there is none, or it cannot be read."""
    if not Path(image).exists():
        raise FileNotFoundError(f"{name}={image}: there is no such file")
    try:
        return decode_image(image)
    except BadSample as error:
        raise ValueError(f"{name}={image} cannot be read as an image: {error.what}") from error


def patch_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """bool [gh * gw]: patches of which at least half lies where a mask [1, H, W] is white."""
    return functional.adaptive_avg_pool2d(mask[None], grid).flatten() >= 0.5


def cell_mask(mask: Tensor, stride: int) -> Tensor:
    """float [1, h, w]: 1 for latent cells any pixel of which lies where a mask [1, H, W] is at least half white."""
    return functional.max_pool2d((mask >= 0.5).float()[None], stride)[0]


def conditions_of(
    module: PatchDiTModule,
    prompts: Sequence[str],
    references: Sequence[Sequence[Reference]],
    masks: Sequence[Sequence[Tensor]],
    masks_called: Sequence[str],
    bucket: Bucket,
) -> Conditions:
    """Words and reference images of some drawings, as the network takes them, on its device.

    Args:
        prompts: of each drawing; empty: none. references: of each drawing, as many of all; empty: none.
        masks: for each reference of a drawing, float [1, H, W] of each drawing: where its patches count; empty:
            everywhere. masks_called: each of them, in messages.

    Raises:
        ValueError: a mask under which no patch of its image counts.
    """
    encoders, statistics = module.encoders, module.statistics
    grid = encoders.dino_grid(bucket.width, bucket.height)
    states, mask = encoders.encode_text(prompts) if prompts else (None, None)
    words = Conditions(states, mask, None, None, grid)
    parts = []
    for place in range(len(references[0]) if references else 0):
        views = np.stack([each[place].view for each in references])
        raw_cls, raw_patches = encoders.encode_view(torch.from_numpy(views).permute(0, 3, 1, 2).contiguous())
        cls, patches = statistics.normalised("cls", raw_cls), statistics.normalised("patch", raw_patches)
        parts.append(replace(words, cls=cls, patches=patches))
    covered = [torch.stack([patch_mask(each, grid) for each in of_reference]) for of_reference in masks]
    for place, (name, where) in enumerate(zip(masks_called, covered, strict=True)):
        uncovered = torch.nonzero(~where.any(dim=1)).flatten().tolist()
        if uncovered:
            raise ValueError(
                f"{name} is nowhere white over half of a patch of {references[uncovered[0]][place].file}, so that none "
                f"of its {grid[0]} x {grid[1]} patches would count: give a mask with a larger white part, or leave the "
                "image out"
            )
    found = parts[0] if parts else words
    if len(parts) > 1:
        found = blended(parts, covered or None)
    elif covered:
        assert found.patches is not None
        found = replace(found, patch_mask=covered[0].to(found.patches.device))
    return found.to(module.device)


def edit_of(module: PatchDiTModule, start: Reference, redraw: Tensor | None, strength: float, count: int) -> Edit:
    """The latents that `count` drawings start from. redraw: float [1, H, W], where they are drawn anew; None: all."""
    pixels = torch.from_numpy(start.pixels.copy()).permute(2, 0, 1)[None]
    latents = module.statistics.normalised("latent", module.encoders.encode_images(pixels).to(module.device))
    cells = None if redraw is None else cell_mask(redraw, module.encoders.latent_stride)[None].to(module.device)
    if cells is not None and not bool(cells.any()):
        raise ValueError("redraw is nowhere at least half white: nothing would be drawn anew")
    return Edit(latents.expand(count, -1, -1, -1), strength, None if cells is None else cells.expand(count, -1, -1, -1))


def blended(parts: Sequence[Conditions], masks: Sequence[Tensor] | None) -> Conditions:
    """Several references of the same samples as one.

    Args:
        parts: the same text with the DINO features of each reference. masks: bool [B, P] of each: where its
            patches count; where several do, the last one; where none does, no patch. None: every patch is their mean.

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
    found, in_reference = torch.zeros_like(patches[0]), torch.zeros(patches[0].shape[:2], dtype=torch.bool)
    in_reference = in_reference.to(found.device)
    for own, mask in zip(patches, masks, strict=True):
        where = mask.to(found.device)
        found = torch.where(where[..., None], own, found)
        in_reference = in_reference | where
    return replace(first, cls=mean, patches=found, patch_mask=in_reference)
