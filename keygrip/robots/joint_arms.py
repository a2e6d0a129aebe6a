"""Arms that are driven by joints: the interface that a follower of planned joints needs.

Units: metres, radians; quaternions wxyz. Shape legend: A arms, J joints of an arm.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class JointArms(Protocol):
    """The arms of a robot or of an environment.

    Attributes:
        joint_ranges: [A, J, 2] lowest and highest angle that each joint may be sent to.
    """

    @property
    def joint_ranges(self) -> np.ndarray: ...

    def poses_at(self, joints: np.ndarray) -> np.ndarray:
        """Where the tools are at joints: [A, ..., 7] position and quaternion in the world, of [A, ..., J]."""
        ...
