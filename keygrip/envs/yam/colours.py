"""Colours of objects, RGB within 0 .. 1."""

from __future__ import annotations

import numpy as np

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.82, 0.10, 0.10),
    "blue": (0.10, 0.25, 0.82),
    "green": (0.10, 0.58, 0.20),
    "yellow": (0.92, 0.78, 0.10),
    "purple": (0.50, 0.16, 0.65),
    "orange": (0.95, 0.48, 0.08),
    "white": (0.93, 0.93, 0.93),
}


def _equal_luminance(luminance: float = 0.25) -> dict[str, tuple[float, float, float]]:
    """Scale hues to one luminance (Rec. 709, linear light): bright hues are dimmed, dark ones mixed with white."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    hues = {
        "red": (1.0, 0.05, 0.05),
        "yellow": (1.0, 0.8, 0.0),
        "green": (0.05, 1.0, 0.05),
        "cyan": (0.0, 0.9, 1.0),
        "blue": (0.10, 0.18, 1.0),
        "purple": (0.75, 0.08, 1.0),
    }
    colours = {}
    for name, hue in hues.items():
        hue_luminance = float(weights @ np.array(hue))
        white = max(0.0, (luminance - hue_luminance) / (1 - hue_luminance))
        linear = (
            np.array(hue) * min(1.0, luminance / hue_luminance)
            if hue_luminance > luminance
            else np.array(hue) * (1 - white) + white
        )
        r, g, b = (float(v) for v in linear ** (1 / 2.2))
        colours[name] = (r, g, b)
    return colours


EQUAL_LUMINANCE = _equal_luminance()  # these differ only in hue
