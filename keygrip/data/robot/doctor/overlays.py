"""Figures of the report for a camera: the robot's outline over images, and the agreement by lag."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from keygrip.data.robot.doctor.examination import Examination
from keygrip.data.robot.doctor.registration import LAG, NUMBERS, agreement_of, silhouette
from keygrip.data.robot.doctor.silhouettes import outline_of
from keygrip.data.robot.doctor.views import Placement, View
from keygrip.data.spacing import evenly

RECORDED, FITTED = (235, 40, 40), (40, 210, 80)
SHOWN, SIZE = 3, 360  # number of demos shown; pixels of an image's longer side
LAGS = range(-5, 6)


def overlay(view: View, placement: Placement, change: np.ndarray | None, frame: int) -> np.ndarray:
    """Return image `frame` of a view with the recorded outline and, if there is a change, the fitted one, uint8
    [H, W, 3]."""
    scale = max(1, round(SIZE / max(view.size)))
    image = Image.fromarray(view.images[frame]).resize((view.size[1] * scale, view.size[0] * scale))
    canvas = np.array(image)
    for parameters, colour in ((np.zeros(NUMBERS), RECORDED), (change, FITTED)):
        if parameters is None:
            continue
        edge = outline_of(silhouette(view, placement, parameters, half=False, every=2)[frame : frame + 1])[0]
        edge = edge.repeat(scale, axis=0).repeat(scale, axis=1)
        canvas[edge] = colour
    return canvas


def add_overlays(
    exam: Examination, camera: str, arm: str, pairs: dict[str, tuple[View, Placement]], change: np.ndarray | None
) -> None:
    """Add images and the curve of agreement by lag to the report; `change` is the fitted change, None if there is no
    fit."""
    names = list(pairs)
    for index in evenly(len(names), SHOWN):
        view, robot = pairs[names[index]]
        frame = len(view.index) // 2
        caption = f"{names[index]}, camera {camera}, arm {arm}, frame {int(view.index[frame])}"
        exam.overlays.append((caption, overlay(view, robot, change, frame)))
    exam.measures[f"camera/{camera}/arm/{arm}/agreement_by_lag"] = _agreement_by_lag([pairs[n] for n in names[:SHOWN]])


def _agreement_by_lag(pairs: Sequence[tuple[View, Placement]]) -> dict[str, float]:
    agreements = {}
    for lag in LAGS:
        change = np.zeros(NUMBERS)
        change[LAG] = -lag
        agreements[str(lag)] = round(agreement_of(pairs, change), 3)
    return agreements
