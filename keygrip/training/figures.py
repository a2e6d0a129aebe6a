"""Matplotlib figures of all systems: drawn without a display, and text in them as the font can show it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_to_image(figure: Figure) -> np.ndarray:
    """Render a matplotlib figure without a display; ``[H, W, 3]`` uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def printable(text: str) -> str:
    r"""A text on one line: what cannot be printed stands as its escape (``\x1c``, ``\n``)."""
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def drawable(text: str) -> str:
    """As `printable`, and what matplotlib's font lacks stands as its escape too.

    A model at the beginning of its training says anything: control characters, halves of letters, other scripts.
    Matplotlib draws an empty box for each, with a warning. Give the result with ``parse_math=False``: a dollar sign
    would begin a formula.
    """
    known = _characters()
    return "".join(c if ord(c) in known else _escape(c) for c in printable(text))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


@functools.cache
def _characters() -> frozenset[int]:
    """Code points that matplotlib's font has."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return frozenset(font.get_charmap())
