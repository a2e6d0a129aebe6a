"""Decoded frames of videos: as players show them, and whether their times can be believed."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from PIL import Image

from keygrip.data.bad_samples import MAX_PIXELS

QUARTER_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
REORDERED = ("h264", "hevc")  # codecs whose frames are usually stored in another order than they are shown in


def untimed_order(container: Any, stream: Any) -> bool:
    """Whether a file says when its frames are decoded and not when they are shown: an AVI of a codec with B-frames, of
    which libav counts the stored frames. Its frames come in the right order, and their times of decoding rise evenly.
    """
    return container.format.name == "avi" and stream.codec_context.name in REORDERED


def upright_frame(frame: Any, pixel_shape: Fraction | None) -> Image.Image:
    """A decoded frame as players show it: stretched where its pixels are not square, and turned by the quarter turns
    that its display matrix says (one that mirrors is not known).

    Args:
        pixel_shape: width of a pixel over its height; None: square.

    Raises:
        ValueError: it has more pixels than an image may have, or more when it is stretched.
    """
    if frame.width * frame.height > MAX_PIXELS:  # the header may say less
        raise ValueError(f"a frame has more than the {MAX_PIXELS} pixels that an image may have")
    image: Image.Image = frame.to_image()
    if pixel_shape and pixel_shape != 1:  # the shorter side grows: no pixel is lost
        width, height = image.width * max(pixel_shape, Fraction(1)), image.height / min(pixel_shape, Fraction(1))
        if width * height > MAX_PIXELS:
            raise ValueError(f"shown with pixels of {pixel_shape}, its frames have more than {MAX_PIXELS} pixels")
        image = image.resize((round(width), round(height)))
    turned = QUARTER_TURNS.get(round(frame.rotation) % 360)
    return image if turned is None else image.transpose(turned)
