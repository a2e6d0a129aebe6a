"""Near copies among images, as another format, quality or size of one file makes them: by thumbnails in their records.

Files of one content are one sample, and copies without loss have one latent; what this finds has neither.
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
TOLERANCE = 5  # of 255, in every number: each is a mean over many pixels, which compression and scaling hardly change
HEX = re.compile(rf"[0-9a-f]{{{2 * 3 * EDGE**2}}}")


def thumbnail_of(pixels: np.ndarray) -> str:
    """Mean colours over 8 x 8 fields of an image uint8 [H, W, 3], in hexadecimal digits."""
    return Image.fromarray(pixels).resize((EDGE, EDGE), Image.Resampling.BOX).tobytes().hex()


def thumbnail_in(record: Mapping[str, Any]) -> bytes | None:
    """The thumbnail of a sample's record; None where it has none."""
    value = record.get(THUMBNAIL)
    return bytes.fromhex(value) if isinstance(value, str) and HEX.fullmatch(value) else None


def near_copies(thumbnails: Sequence[bytes], others: Sequence[bytes] | None = None) -> list[tuple[int, int]]:
    """Numbers of those that have a near copy, each with that of the nearest.

    Args:
        others: among which copies are looked for; None: among the thumbnails themselves.
    """
    pool = thumbnails if others is None else others
    if not thumbnails or not pool:
        return []
    tree = cKDTree(_numbers(pool))
    reach, places = tree.query(_numbers(thumbnails), k=[1, 2], p=np.inf, distance_upper_bound=TOLERANCE + 0.5)
    found: list[tuple[int, int]] = []
    for number, place in np.argwhere(np.isfinite(reach)).tolist():
        other = int(places[number, place])
        if (others is not None or other != number) and (not found or found[-1][0] != number):
            found.append((number, other))
    return found


def _numbers(thumbnails: Sequence[bytes]) -> np.ndarray:
    return np.stack([np.frombuffer(thumbnail, np.uint8) for thumbnail in thumbnails]).astype(np.float32)
