"""One camera and the arms that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from keygrip.data.robot.doctor.registration import NUMBERS
from keygrip.data.robot.doctor.views import Placement, View
from keygrip.robots.surface import RobotSurface


@dataclass
class Seen:
    """One camera and its arms: views with the robot's places, by demo. `arm`: its name, or those of several."""

    camera: str
    arm: str
    pairs: dict[str, tuple[View, Placement]]
    model: RobotSurface | None = None
    scores: dict[str, float] = field(default_factory=dict)
    change: np.ndarray = field(default_factory=lambda: np.zeros(NUMBERS))
