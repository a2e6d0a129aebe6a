"""Whether an image shows anything: one criterion for the server, which refuses such images, and for the policies of
several cameras, which mask them. What the one lets through, the other leaves out.

Shape legend: ``*`` leading shape, H rows, W columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

DARK_LEVELS = 4.0  # an image whose brightness varies by less, of 255, shows nothing: a covered lens has noise of 1 or 2
LOOKED_AT = 64  # pixels along an image's shorter side, which tell whether it shows anything


def brightness_spread(images: Tensor) -> Tensor:
    """Levels ``[*]`` between the darkest and the brightest hundredth of images' pixels, uint8 ``[*, 3, H, W]``."""
    step = max(1, min(images.shape[-2:]) // LOOKED_AT)
    brightness = images[..., ::step, ::step].float().mean(-3).flatten(-2).sort(-1).values
    left_out = brightness.shape[-1] // 100  # at either end: single bright pixels of a sensor show nothing
    return brightness[..., -1 - left_out] - brightness[..., left_out]


def shows_nothing(images: Tensor) -> Tensor:
    """Bool ``[*]`` of images ``[*, 3, H, W]`` uint8: of one colour, or of sensor noise."""
    return brightness_spread(images) < DARK_LEVELS


def image_shows_nothing(image: Any) -> bool:
    """The same of a camera's image ``[H, W, 3]`` uint8."""
    return spread_of_image(image) < DARK_LEVELS


def spread_of_image(image: Any) -> float:
    """`brightness_spread` of a camera's image ``[H, W, 3]`` uint8."""
    return float(brightness_spread(torch.tensor(np.asarray(image)).permute(2, 0, 1)))
