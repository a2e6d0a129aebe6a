"""A script of our own for `handle-pull`.

Meta-World's lifts the handle by swinging up and down against it two to three times per second, which positions every
0.1 s do not reproduce. This one comes from the front, presses shut fingers against the bar, and lifts it by friction
in one slow stroke.
"""

from __future__ import annotations

import numpy as np

# Where the hand is to be, from the handle, metres; the bar runs along x, y points from the front to the back, z up.
IN_FRONT, PRESSED = -0.075, -0.03
ABOVE, BELOW = 0.1, -0.02
TOUCHES = -0.05  # the fingers are at the bar where y is above this
SLIPPED = 0.05  # they have lost it where z is above this
IN_LINE = 0.02  # in x
GAIN, FASTEST = 10.0, 0.5


class HandlePull:
    """Steps as Meta-World's scripted policies give them, from where hand and handle are."""

    def get_action(self, sensed: np.ndarray) -> np.ndarray:
        """[4] a step in units of 1 cm, and the gripper's effort, from an observation of the benchmark."""
        hand, handle = sensed[:3], sensed[4:7]
        change = GAIN * (self._target(hand, handle) - hand)
        return np.append(np.clip(change, -FASTEST, FASTEST), 1.0)

    @staticmethod
    def _target(hand: np.ndarray, handle: np.ndarray) -> np.ndarray:
        x, y, z = hand - handle
        in_line = abs(x) < IN_LINE
        if in_line and y > TOUCHES and z < SLIPPED:
            return np.array([handle[0], handle[1] + PRESSED, hand[2] + 1.0])
        if in_line and z < 0.0:
            return handle + [0.0, PRESSED, BELOW]
        if in_line and y < IN_FRONT + 0.01:
            return handle + [0.0, IN_FRONT, BELOW]
        return handle + [0.0, IN_FRONT - 0.01, ABOVE]
