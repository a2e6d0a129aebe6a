"""Helpers for matplotlib figures: render without a display, and escape text that the font cannot show."""

from __future__ import annotations

import functools

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def figure_to_image(figure: Figure) -> np.ndarray:
    """Render a matplotlib figure without a display; ``[H, W, 3]`` uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def printable(text: str) -> str:
    r"""Return a text on one line, with characters that cannot be printed as escapes (``\x1c``, ``\n``)."""
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def drawable(text: str) -> str:
    """As `printable`, and also escape characters that matplotlib's font lacks.

    A model at the beginning of its training may output any characters: control characters, partial characters, other
    scripts. Matplotlib draws an empty box for each, with a warning. Use the result with ``parse_math=False``, because a
    dollar sign would start a formula.
    """
    known = _font_characters()
    return "".join(c if ord(c) in known else _escape(c) for c in printable(text))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


@functools.cache
def _font_characters() -> frozenset[int]:
    """Return the code points of matplotlib's font."""
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return frozenset(font.get_charmap())
