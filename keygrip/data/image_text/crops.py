"""Aspect buckets, and the crop of an image that its latent and its DINO view share.

A crop is a box (left, top, right, bottom) in pixels of the source image; the edges may be fractions. The image for the
latent and the DINO view are both resized from this box, so that they show the same rectangle at any size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

BUCKET_NAME = re.compile(r"^bucket_(\d+)x(\d+)$")
Box = tuple[float, float, float, float]


@dataclass(frozen=True, order=True)
class Bucket:
    """A size in pixels to which images are cropped and resized."""

    width: int
    height: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"bucket_{self.width}x{self.height}"

    @classmethod
    def from_name(cls, name: str) -> Bucket:
        """Parse a bucket's name. Raise ValueError if it is not valid."""
        found = BUCKET_NAME.match(name)
        if found is None:
            raise ValueError(f"{name!r} does not name a bucket: bucket_<width>x<height>, in pixels")
        return cls(int(found[1]), int(found[2]))


def aspect_buckets(size: int, bucket_step: int, max_aspect: float) -> list[Bucket]:
    """Return sizes with an area of about `size` x `size` pixels, with sides that are multiples of `bucket_step` and
    aspect ratios up to `max_aspect` : 1 in both directions.

    Each width gets the height that comes nearest to that area; the square is always included.

    Raises:
        ValueError: `size` is not a multiple of `bucket_step`, `bucket_step` or `max_aspect` is below 1.
    """
    if bucket_step < 1:
        raise ValueError(f"bucket_step={bucket_step} must be at least 1")
    if size < bucket_step or size % bucket_step:
        raise ValueError(f"size={size} must be a multiple of bucket_step={bucket_step}")
    if max_aspect < 1:
        raise ValueError(f"max_aspect={max_aspect:g} must be at least 1")
    buckets = {Bucket(size, size)}
    for width in range(size, int(size * math.sqrt(max_aspect)) + bucket_step, bucket_step):
        height = max(bucket_step, round(size * size / width / bucket_step) * bucket_step)
        if width / height <= max_aspect + 1e-9:
            buckets |= {Bucket(width, height), Bucket(height, width)}
    return sorted(buckets)


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """Return the bucket with the nearest aspect ratio; among equally near ones the first."""
    return min(buckets, key=lambda b: abs(math.log(width / height) - math.log(b.width / b.height)))


def shared_crop(width: int, height: int, bucket: Bucket) -> Box:
    """Return the largest centred box with the bucket's aspect ratio in an image."""
    scale = min(width / bucket.width, height / bucket.height)
    wide, high = min(bucket.width * scale, width), min(bucket.height * scale, height)  # clips rounding errors only
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, min(left + wide, width), min(top + high, height)


def cut_out(image: Image.Image, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Crop a box from an image and resize it to `size` (width, height): uint8 [height, width, 3]."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=box))
