"""What the cells with one and with two arms share: where the joints go, what touches what, what has happened so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keygrip.robots.inverse_kinematics import solve
from keygrip.robots.kinematics import matrix_from_quaternion
from keygrip.robots.mujoco_backend import mujoco

LIFTED = 0.03  # m above its rest at which the object counts as lifted
STEADY_S = 0.3  # a success must last this long
OUT_OF_REACH = 0.01  # m left by the inverse kinematics, a centimetre or more for half a second
OUT_OF_REACH_S = 0.5
FASTEST_JOINT = 4.0  # rad/s: a wild command becomes a fast motion, not a jump
SETTLE_STEPS = 100


@dataclass
class Progress:
    """What has happened in the episode so far."""

    lifted: bool = False
    steady_s: float = 0.0
    out_of_reach_s: float = 0.0
    unreachable: bool = False
    lost: bool = False  # the object fell off the table
    success: bool = False

    def update(self, period_s: float, height: float, position_error: float, goal_met: bool) -> None:
        """After a control period.

        Args:
            height: of the object's centre above the table, m. position_error: m left by the inverse kinematics.
            goal_met: whether the object is now where it shall be.
        """
        self.lost = height < -0.05
        self.out_of_reach_s = self.out_of_reach_s + period_s if position_error > OUT_OF_REACH else 0.0
        self.unreachable |= self.out_of_reach_s >= OUT_OF_REACH_S - 1e-9
        self.steady_s = self.steady_s + period_s if goal_met else 0.0
        self.success = self.steady_s >= STEADY_S - 1e-9


def settle(model: mujoco.MjModel, data: mujoco.MjData) -> None:
    """Lets what was placed come to rest; the clock then stands at 0."""
    mujoco.mj_forward(model, data)
    for _ in range(SETTLE_STEPS):
        mujoco.mj_step(model, data)
    data.time = 0.0
    mujoco.mj_forward(model, data)


def touching(model: mujoco.MjModel, data: mujoco.MjData, body: int) -> set[int]:
    """Numbers of the bodies in contact with a body."""
    pairs = model.geom_bodyid[data.contact.geom[: data.ncon]]  # [C, 2]
    return set(pairs[(pairs == body).any(axis=1)].ravel().tolist()) - {body}


def next_joints(pose: np.ndarray, start: np.ndarray, commanded: np.ndarray, hz: float) -> tuple[np.ndarray, float]:
    """The joints [6] of an arm at the end of a control period, and the metres by which the pose is out of its reach.

    Args:
        pose: [8] of the tool in the arm's base frame; its opening is not used. start: [6] of the inverse kinematics.
        commanded: [6] at the beginning of the period. hz: control periods per second.
    """
    found = solve(pose[:3], matrix_from_quaternion(pose[3:7]), start)
    change = found.joints - commanded
    change *= min(1.0, FASTEST_JOINT / hz / max(float(np.abs(change).max()), 1e-12))
    return commanded + change, found.position_error


def start_of(planned: np.ndarray | None, commanded: np.ndarray) -> np.ndarray:
    """The joints from which inverse kinematics starts: those of a plan where there are any.

    Raises:
        ValueError: they are not as many finite angles as the commanded ones.
    """
    if planned is None:
        return commanded
    planned = np.asarray(planned, float)
    if planned.shape != commanded.shape or not np.isfinite(planned).all():
        raise ValueError(f"joints are {' x '.join(map(str, commanded.shape))} finite angles, got {planned.tolist()}")
    return planned
