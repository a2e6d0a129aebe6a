"""Text in figures: any output of a model is drawn without a warning, and drawing it cannot fail."""

from __future__ import annotations

import warnings

import numpy as np

from keygrip.models.foveated_vlm.figures import draw_attention
from keygrip.training.figures import drawable, figure_to_image, printable


def test_what_cannot_be_printed_or_drawn_is_escaped() -> None:
    assert printable("a\x1c\nb") == "a\\x1c\\nb"
    assert printable("déjà 漢") == "déjà 漢"
    assert drawable("déjà ü 漢\x00") == "déjà ü \\u6f22\\x00"


def test_any_answer_gets_into_a_title() -> None:
    """This includes an invalid formula, whose dollar signs would make matplotlib raise."""
    frames, attention = np.zeros((2, 8, 8, 3), np.uint8), np.ones((2, 2, 2), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = draw_attention([("said: \x1c 漢 $\\frac{$\n", frames, attention)])
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3


def test_a_figure_becomes_its_pixels() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1), dpi=50, facecolor=(1, 0, 0))
    picture = figure_to_image(figure)
    assert picture.shape == (50, 100, 3)
    assert (picture == [255, 0, 0]).all()
