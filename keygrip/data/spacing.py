"""Choose evenly spaced indices."""

from __future__ import annotations

import numpy as np


def evenly(count: int, most: int) -> list[int]:
    """Return at most `most` of the indices 0 .. count - 1, evenly spaced, including the first and the last."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()
