"""Signs of quaternions along a recorded trajectory."""

from __future__ import annotations

import numpy as np


class SignKeeper:
    """Choose the sign of each quaternion of a trajectory closest to the previous one. q and -q are the same rotation,
    but readers interpolate."""

    def __init__(self) -> None:
        self._last: np.ndarray | None = None

    def __call__(self, quaternion: np.ndarray) -> np.ndarray:
        if self._last is not None and float(quaternion @ self._last) < 0:
            quaternion = -quaternion
        self._last = np.array(quaternion)  # a copy: a robot may reuse its array
        return quaternion
