"""Arms that are driven by joints: the interface for following planned joints.

Units: metres, radians; quaternions wxyz. Shape legend: A arms, J joints of an arm.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class JointArms(Protocol):
    """The arms of a robot or of an environment.

    Attributes:
        joint_ranges: [A, J, 2] lowest and highest angle that may be commanded for each joint.
    """

    @property
    def joint_ranges(self) -> np.ndarray: ...

    def poses_at(self, joints: np.ndarray) -> np.ndarray:
        """Return the tool poses at joints [A, ..., J]: [A, ..., 7] position and quaternion in the world."""
        ...
