"""Choosing some of many, evenly spaced."""

from __future__ import annotations

import numpy as np


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 .. count - 1, evenly spaced, the first and the last among them."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()
