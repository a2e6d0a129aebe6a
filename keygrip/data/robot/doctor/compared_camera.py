"""One camera and the arms with which its images are compared."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from keygrip.data.robot.doctor.registration import NUMBERS
from keygrip.data.robot.doctor.views import Placement, View
from keygrip.robots.surface import RobotSurface


@dataclass
class ComparedCamera:
    """One camera and the arms in its images.

    arm: the name of the arm, or of several, joined by "and". pairs: a view and the robot's placement in it, by demo.
    scores: agreement of images and poses, by demo. change: the camera's fitted change, see `Fit`.
    """

    camera: str
    arm: str
    pairs: dict[str, tuple[View, Placement]]
    model: RobotSurface | None = None
    scores: dict[str, float] = field(default_factory=dict)
    change: np.ndarray = field(default_factory=lambda: np.zeros(NUMBERS))
