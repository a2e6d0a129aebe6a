"""One camera and the arms with which its images are compared."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from keygrip.data.robot.doctor.registration import NUMBERS
from keygrip.data.robot.doctor.views import Placement, View
from keygrip.robots.surface import RobotSurface


@dataclass
class Seen:
    """One camera and its arms: views with the robot's placement, by demo. `arm`: name of the arm, or of several."""

    camera: str
    arm: str
    pairs: dict[str, tuple[View, Placement]]
    model: RobotSurface | None = None
    scores: dict[str, float] = field(default_factory=dict)
    change: np.ndarray = field(default_factory=lambda: np.zeros(NUMBERS))
