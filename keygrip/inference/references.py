"""Reference images of `keygrip sample`: crops, masks of regions, and combinations of several references."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

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

Read = TypeVar("Read")
MOST_CUT = 0.05  # largest fraction of an image that is cropped without a warning to fit a trained size


@dataclass(frozen=True)
class Reference:
    """An image at the size to generate.

    Args:
        pixels: uint8 [H, W, 3]. view: uint8 [vh, vw, 3], the same crop for DINO. file: its path.
        size: (width, height) of the whole image, pixels. box: the crop within the image.
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
    """Return (width, height) of a file given by the setting `name`. Raises FileNotFoundError or ValueError if it does
    not exist or cannot be read."""
    return _read_file(image, name, size_of)


def warn_of_cut(size: tuple[int, int], bucket: Bucket, called: str, otherwise: str) -> None:
    """Warn if much of an image is cropped to fit a trained size that the user did not request.

    Args:
        size: (width, height) of the image, pixels. bucket: the size to generate. called: name of the image in the
            warning. otherwise: the option that sets another size, for the warning.
    """
    left, top, right, bottom = shared_crop(*size, bucket)
    if (right - left) * (bottom - top) < (1 - MOST_CUT) * size[0] * size[1]:
        log.warning(
            "%s: of its %d x %d pixels the middle %d x %d are used, in the shape of the %d x %d that are drawn, a size "
            "that the model was trained on; give %s for another",
            *(called, *size, round(right - left), round(bottom - top), bucket.width, bucket.height, otherwise),
        )


def open_reference(image: str, bucket: Bucket, encoders: Encoders, name: str = "image") -> Reference:
    """Open an image, crop it to the size to generate, and take the DINO view from the same crop.

    Args:
        name: of the setting, for messages.

    Raises:
        FileNotFoundError, ValueError: The file does not exist or cannot be read.
    """
    return reference_of(decoded_file(image, name), bucket, encoders, image)


def reference_of(whole: Image, bucket: Bucket, encoders: Encoders, called: str) -> Reference:
    """The same as `open_reference` for an opened image, 8-bit RGB. called: its name in messages."""
    box = shared_crop(*whole.size, bucket)
    view = encoders.view_size(bucket.width, bucket.height)
    pixels = cut_out(whole, box, (bucket.width, bucket.height))
    return Reference(pixels, cut_out(whole, box, view), called, whole.size, box)


def open_mask(mask: str, of: Reference, name: str) -> Tensor:
    """Return float [1, H, W] in 0..1: the brightness of a mask at the size to generate, cropped as its image; white is
    1.

    Args:
        mask: a file that covers the whole image `of`, at any scale. It is cropped like the image.
        name: of the setting, for messages.

    Raises:
        FileNotFoundError, ValueError: The file does not exist or cannot be read. Its aspect ratio differs from the
            image's, so the covered part of the image is unknown. Or it has transparent parts, which are ambiguous.
    """
    whole = decoded_file(mask, name)
    try:
        with open_image(mask) as image:
            refuse_transparency(image)
    except BadSample as error:
        raise ValueError(f"{name}={mask} cannot be read as a mask: {error.what}") from error
    return mask_of(whole, of, f"{name}={mask}")


def mask_of(whole: Image, of: Reference, called: str) -> Tensor:
    """The same for an opened mask. called: its name in messages. Raises ValueError if its aspect ratio differs."""
    (width, height), (own_width, own_height) = whole.size, of.size
    # Sides rounded to whole pixels, of the mask or of the image, have errors below one pixel.
    if abs(width * own_height - height * own_width) > max(*whole.size, *of.size):
        raise ValueError(
            f"{called} has {width} x {height} pixels and its image {of.file} {own_width} x {own_height}, another "
            "shape: give a mask that covers the whole image, at any scale"
        )
    scale = width / own_width, height / own_height
    left, top, right, bottom = of.box
    box = left * scale[0], top * scale[1], min(right * scale[0], width), min(bottom * scale[1], height)
    # Area averages: other filters would spread white into pixels that are entirely black.
    size = of.pixels.shape[1], of.pixels.shape[0]
    pixels = np.asarray(whole.convert("RGB").resize(size, Resampling.BOX, box=box))
    return torch.from_numpy(pixels.astype(np.float32).mean(axis=2) / 255)[None]


def decoded_file(image: str, name: str) -> Image:
    """Decode a whole image as RGB. Raises FileNotFoundError or ValueError if it does not exist or cannot be read."""
    return _read_file(image, name, decode_image)


def _read_file(image: str, name: str, read: Callable[[str], Read]) -> Read:
    if not Path(image).exists():
        raise FileNotFoundError(f"{name}={image}: there is no such file")
    try:
        return read(image)
    except BadSample as error:
        raise ValueError(f"{name}={image} cannot be read as an image: {error.what}") from error


def patch_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return bool [gh * gw]: True for patches of which at least half is white in a mask [1, H, W]."""
    return functional.adaptive_avg_pool2d(mask[None], grid).flatten() >= 0.5


def cell_mask(mask: Tensor, stride: int) -> Tensor:
    """Return float [1, h, w]: 1 for latent cells with any pixel where a mask [1, H, W] is at least half white."""
    return functional.max_pool2d((mask >= 0.5).float()[None], stride)[0]


def conditions_of(
    module: PatchDiTModule,
    prompts: Sequence[str],
    references: Sequence[Sequence[Reference]],
    masks: Sequence[Sequence[Tensor]],
    masks_called: Sequence[str],
    bucket: Bucket,
) -> Conditions:
    """Return text and reference images of some samples as network conditions, on the module's device.

    Args:
        prompts: of each sample; empty: none. references: of each sample, equally many for all; empty: none.
        masks: for each reference of a sample, float [1, H, W] for each sample: where its patches are used; empty:
            everywhere. masks_called: their names in messages.

    Raises:
        ValueError: A mask excludes all patches of its image.
    """
    encoders, statistics = module.encoders, module.statistics
    grid = encoders.dino_grid(bucket.width, bucket.height)
    states, mask = encoders.encode_text(prompts) if prompts else (None, None)
    text_conditions = Conditions(states, mask, None, None, grid)
    parts = []
    for index in range(len(references[0]) if references else 0):
        views = np.stack([each[index].view for each in references])
        raw_cls, raw_patches = encoders.encode_view(torch.from_numpy(views).permute(0, 3, 1, 2).contiguous())
        cls, patches = statistics.normalised("cls", raw_cls), statistics.normalised("patch", raw_patches)
        parts.append(replace(text_conditions, cls=cls, patches=patches))
    covered = [torch.stack([patch_mask(each, grid) for each in of_reference]) for of_reference in masks]
    for index, (name, coverage) in enumerate(zip(masks_called, covered, strict=True)):
        uncovered = torch.nonzero(~coverage.any(dim=1)).flatten().tolist()
        if uncovered:
            raise ValueError(
                f"{name} is nowhere white over half of a patch of {references[uncovered[0]][index].file}, so that none "
                f"of its {grid[0]} x {grid[1]} patches would count: give a mask with a larger white part, or leave the "
                "image out"
            )
    conditions = parts[0] if parts else text_conditions
    if len(parts) > 1:
        conditions = blended(parts, covered or None)
    elif covered:
        assert conditions.patches is not None
        conditions = replace(conditions, patch_mask=covered[0].to(conditions.patches.device))
    return conditions.to(module.device)


def edit_of(module: PatchDiTModule, start: Reference, redraw: Tensor | None, strength: float, count: int) -> Edit:
    """Return the latents from which `count` samples start. redraw: float [1, H, W], where to generate; None: all."""
    pixels = torch.from_numpy(start.pixels.copy()).permute(2, 0, 1)[None]
    latents = module.statistics.normalised("latent", module.encoders.encode_images(pixels).to(module.device))
    cells = None if redraw is None else cell_mask(redraw, module.encoders.latent_stride)[None].to(module.device)
    if cells is not None and not bool(cells.any()):
        raise ValueError("redraw is nowhere at least half white: nothing would be drawn anew")
    return Edit(latents.expand(count, -1, -1, -1), strength, None if cells is None else cells.expand(count, -1, -1, -1))


def blended(parts: Sequence[Conditions], masks: Sequence[Tensor] | None) -> Conditions:
    """Combine several references of the same samples into one.

    Args:
        parts: the same text with the DINO features of each reference. masks: bool [B, P] of each: where its
            patches are used. Where several masks are True, the last reference is used; where none is, no patch.
            None: every patch is the mean of the references.

    Returns:
        Conditions with the mean of the CLS vectors.
    """
    first = parts[0]
    cls = [part.cls for part in parts if part.cls is not None]
    patches = [part.patches for part in parts if part.patches is not None]
    assert len(cls) == len(patches) == len(parts)
    mean = torch.stack(cls).mean(dim=0)
    if masks is None:
        return replace(first, cls=mean, patches=torch.stack(patches).mean(dim=0))
    combined, in_reference = torch.zeros_like(patches[0]), torch.zeros(patches[0].shape[:2], dtype=torch.bool)
    in_reference = in_reference.to(combined.device)
    for reference_patches, mask in zip(patches, masks, strict=True):
        selected = mask.to(combined.device)
        combined = torch.where(selected[..., None], reference_patches, combined)
        in_reference = in_reference | selected
    return replace(first, cls=mean, patches=combined, patch_mask=in_reference)
