"""Convert frames of videos: to the orientation in which players show them, and to the pixel format of the encoder."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from keygrip.data.untrusted_files import MAX_PIXELS

# How a player transforms a stored frame, by the display matrix [[a, b], [c, d]], which maps the pixel (x, y) to
# (ax + cy, bx + dy); PIL rotates counterclockwise.
SHOWN_BY = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
ABOUT = 0.01  # tolerance for the matrix entries: half a degree, as FFmpeg rounds
REORDERED = ("h264", "hevc")  # codecs whose frames are usually stored in another order than they are shown


def untimed_order(container: Any, stream: Any) -> bool:
    """Whether a file contains decoding times of its frames and no presentation times: an AVI with a codec that uses
    B-frames, where libav counts the stored frames. Frames are decoded in the right order, and their decoding times
    increase evenly."""
    return container.format.name == "avi" and stream.codec_context.name in REORDERED


def upright_frame(frame: Any, pixel_shape: Fraction | None) -> Image.Image:
    """Convert a decoded frame to the image that players show: stretched if its pixels are not square, and rotated by
    multiples of 90 degrees and mirrored according to its display matrix.

    Args:
        pixel_shape: width of a pixel divided by its height; None: square.

    Raises:
        ValueError: the frame has too many pixels for an image, as stored or after stretching; or its display matrix
            rotates by another angle or skews.
    """
    _refuse_large(frame)
    shown_by = _display_transpose(frame.side_data.get("DISPLAYMATRIX"))
    image: Image.Image = frame.to_image()
    if pixel_shape and pixel_shape != 1:  # one side is enlarged, none is reduced: no pixel is lost
        width, height = image.width * max(pixel_shape, Fraction(1)), image.height / min(pixel_shape, Fraction(1))
        if width * height > MAX_PIXELS:
            raise ValueError(f"shown with pixels of {pixel_shape}, its frames have more than {MAX_PIXELS} pixels")
        image = image.resize((round(width), round(height)))
    return image if shown_by is None else image.transpose(shown_by)


def stored_frame(frame: Any) -> np.ndarray:
    """Return a decoded frame as it is stored, H x W x 3 uint8 RGB. Raise ValueError if it has too many pixels."""
    _refuse_large(frame)
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    return pixels


def _refuse_large(frame: Any) -> None:
    """Raise ValueError if a frame has more pixels than an image may have. Every frame of a video states its own size,
    which the file's header does not contain."""
    if frame.width * frame.height > MAX_PIXELS:
        raise ValueError(f"a frame has more than the {MAX_PIXELS} pixels that an image may have")


def _display_transpose(display_matrix: Any) -> Image.Transpose | None:
    """Return how a frame must be rotated and mirrored. A frame whose matrix has a zero width or height is shown as
    stored, as FFmpeg does.

    Args:
        display_matrix: from FFmpeg, 9 int32 in row-major order; None: there is no matrix.

    Raises:
        ValueError: the rotation is not a multiple of 90 degrees.
    """
    if display_matrix is None:
        return None
    a, b, _, c, d, *_ = np.frombuffer(bytes(display_matrix), np.int32).tolist()
    across, down = math.hypot(a, c), math.hypot(b, d)
    if not across or not down:
        return None
    entries = (a / across, b / down, c / across, d / down)
    nearest = tuple(round(entry) for entry in entries)
    if nearest not in SHOWN_BY or max(abs(e - n) for e, n in zip(entries, nearest, strict=True)) > ABOUT:
        raise ValueError(
            f"its display matrix ({', '.join(f'{entry:.2f}' for entry in entries)}) turns its frames by no quarter "
            "turn: write it anew as it is to be seen (`ffmpeg -i IN OUT` does)"
        )
    return SHOWN_BY[nearest]


# FFmpeg's conversions from RGB to YUV and back truncate fractions, which darkens every image by 1 to 2 of 255. Written
# values are therefore rounded, and increased by the amount that reading removes: measured with FFmpeg's default reader,
# the mean error of uniform and of textured colours is within 0.5 of 255 for every channel.
LUMA_LIFT, CHROMA_LIFT = 0.75, -0.1
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32) * np.float32(219 / 255)  # BT.601, limited range
_CHROMA = np.array(
    [[-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=np.float32
) * np.float32(224 / 255)  # fmt: skip


def yuv420p(image: np.ndarray) -> np.ndarray:
    """Convert an image, H x W x 3 uint8 RGB with even sides, to the planes [H * 3 / 2, W] uint8 that the encoder
    expects: BT.601, limited range, chroma at half resolution."""
    height, width = image.shape[:2]
    rgb = image.astype(np.float32)
    luma = rgb @ _LUMA + (16 + LUMA_LIFT)
    halved = rgb.reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))
    chroma = halved @ _CHROMA.T + (128 + CHROMA_LIFT)
    planes = np.concatenate([luma.ravel(), chroma[..., 0].ravel(), chroma[..., 1].ravel()])
    planes = np.clip(np.rint(planes), 0, 255).astype(np.uint8)
    return planes.reshape(height * 3 // 2, width)
