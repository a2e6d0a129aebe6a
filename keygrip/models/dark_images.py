"""Detection of images that show nothing. The server, which refuses such images, and policies with several cameras,
which mask them, use the same criterion: the policy masks exactly those dark images that the server accepts.

Shape legend: ``*`` leading shape, H rows, W columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

DARK_LEVELS = 4.0  # an image whose brightness varies by less, of 255, shows nothing: a covered lens has noise of 1 or 2
LOOKED_AT = 64  # pixels along an image's shorter side that are evaluated


def brightness_spread(images: Tensor) -> Tensor:
    """Return the levels ``[*]`` between the darkest and the brightest 1% of pixels of images uint8 ``[*, 3, H, W]``."""
    step = max(1, min(images.shape[-2:]) // LOOKED_AT)
    brightness = images[..., ::step, ::step].float().mean(-3).flatten(-2).sort(-1).values
    left_out = brightness.shape[-1] // 100  # at either end: single bright pixels of a sensor are noise
    return brightness[..., -1 - left_out] - brightness[..., left_out]


def shows_nothing(images: Tensor) -> Tensor:
    """Return bool ``[*]``: whether images ``[*, 3, H, W]`` uint8 have only one colour, or sensor noise."""
    return brightness_spread(images) < DARK_LEVELS


def image_shows_nothing(image: Any) -> bool:
    """`shows_nothing` of a camera's image ``[H, W, 3]`` uint8."""
    return spread_of_image(image) < DARK_LEVELS


def spread_of_image(image: Any) -> float:
    """`brightness_spread` of a camera's image ``[H, W, 3]`` uint8."""
    pixels = torch.tensor(np.ascontiguousarray(image))  # torch refuses flipped views: their strides are negative
    return float(brightness_spread(pixels.permute(2, 0, 1)))
