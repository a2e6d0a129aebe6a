"""Find near copies among images by the thumbnails in their records: copies in another format, quality or size.

Files with the same content are already one sample, and lossless copies have the same latent. The near copies found here
differ in both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

THUMBNAIL = "thumbnail"
EDGE = 8  # rows and columns of a thumbnail
TOLERANCE = 5  # of 255, for every value: each is a mean over many pixels, which compression and scaling hardly change
HEX = re.compile(rf"[0-9a-f]{{{2 * 3 * EDGE**2}}}")


def thumbnail_of(pixels: np.ndarray) -> str:
    """Return the mean colours of an 8 x 8 grid over an image uint8 [H, W, 3], in hexadecimal digits."""
    return Image.fromarray(pixels).resize((EDGE, EDGE), Image.Resampling.BOX).tobytes().hex()


def thumbnail_in(record: Mapping[str, Any]) -> bytes | None:
    """Return the thumbnail in a sample's record; None if it has none."""
    value = record.get(THUMBNAIL)
    return bytes.fromhex(value) if isinstance(value, str) and HEX.fullmatch(value) else None


def near_copies(thumbnails: Sequence[bytes], others: Sequence[bytes] | None = None) -> list[tuple[int, int]]:
    """Return the indices of the thumbnails that have a near copy, each with the index of the nearest copy.

    Args:
        others: thumbnails among which copies are searched; None: `thumbnails` itself.
    """
    pool = thumbnails if others is None else others
    if not thumbnails or not pool:
        return []
    tree = cKDTree(_stack_thumbnails(pool))
    distances, neighbours = tree.query(
        _stack_thumbnails(thumbnails), k=[1, 2], p=np.inf, distance_upper_bound=TOLERANCE + 0.5
    )
    pairs: list[tuple[int, int]] = []
    for index, column in np.argwhere(np.isfinite(distances)).tolist():
        neighbour = int(neighbours[index, column])
        if (others is not None or neighbour != index) and (not pairs or pairs[-1][0] != index):
            pairs.append((index, neighbour))
    return pairs


def _stack_thumbnails(thumbnails: Sequence[bytes]) -> np.ndarray:
    return np.stack([np.frombuffer(thumbnail, np.uint8) for thumbnail in thumbnails]).astype(np.float32)
