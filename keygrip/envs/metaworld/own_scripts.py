"""Own scripts for tasks in which Meta-World's scripted policy is unsuitable for imitation.

`handle-pull`: Meta-World's script lifts the handle by swinging up and down against it two to three times per second,
which positions every 0.1 s do not reproduce. This script approaches from the front, presses closed fingers against the
bar, and lifts it by friction in one slow stroke.

`door-open`: Meta-World's script moves down while the hand is still up to 6 cm short of the handle's far side. A policy
that is 3 cm behind in x then lands on top of the handle and misses it. This script moves down once the hand is there.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Script(Protocol):
    """Drive one task from the benchmark's observations."""

    def get_action(self, sensed: np.ndarray) -> np.ndarray:
        """Return [4] a step in units of 1 cm, and the gripper's effort, from an observation [39] of the benchmark."""
        ...


# Metres from the handle; y points from the front to the back, z up.
# Target positions of the hand at `handle-pull`, whose bar runs along x.
IN_FRONT, PRESSED = -0.075, -0.03
ABOVE, BELOW = 0.1, -0.02
TOUCHES = -0.05  # the fingers touch the bar if y is above this
SLIPPED = 0.05  # they have lost it if z is above this
IN_LINE = 0.02  # in x
GAIN, FASTEST = 10.0, 0.5
# At `door-open`: the handle protrudes towards the front, the hand pulls it from its far side.
HOOK = np.array([0.01, 0.02, 0.0])  # behind the handle
CENTRE = np.array([-0.05, 0.0, 0.0])  # target of a pull
HIGH = np.array([0.0, 0.0, 0.12])
ARRIVED = 0.05  # horizontal distance from HOOK at which the hand moves down
HELD = 0.12  # horizontal distance from CENTRE beyond which the hand has lost the handle
LOW_ENOUGH = 0.04
DOOR_GAIN = 25.0  # as in Meta-World; a slow hand loses the handle


class HandlePull:
    """Steps like those of Meta-World's scripted policies, from the positions of hand and handle."""

    def get_action(self, sensed: np.ndarray) -> np.ndarray:
        """Return [4] a step in units of 1 cm, and the gripper's effort, from an observation [39] of the benchmark."""
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


class DoorOpen:
    """Move down behind the handle, then pull; move up again if the handle was lost."""

    def get_action(self, sensed: np.ndarray) -> np.ndarray:
        """Return [4] a step in units of 1 cm, and the gripper's effort, from an observation [39] of the benchmark."""
        hand, handle = sensed[:3], sensed[4:7]
        change = DOOR_GAIN * (self._target(hand, handle) - hand)
        return np.append(np.clip(change, -1.0, 1.0), 1.0)

    @staticmethod
    def _target(hand: np.ndarray, handle: np.ndarray) -> np.ndarray:
        offset = hand - handle
        if abs(offset[2]) <= LOW_ENOUGH and np.linalg.norm((offset - CENTRE)[:2]) <= HELD:
            return handle + CENTRE
        if np.linalg.norm((offset - HOOK)[:2]) <= ARRIVED:
            return handle + HOOK
        return handle + HOOK + HIGH
