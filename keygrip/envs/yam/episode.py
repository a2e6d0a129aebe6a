"""The common part of the cells with one and with two arms: joint targets, contacts, and the progress of an episode."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keygrip.robots.inverse_kinematics import solve
from keygrip.robots.kinematics import matrix_from_quaternion
from keygrip.robots.mujoco_backend import mujoco

LIFTED = 0.03  # m above its initial height at which the object counts as lifted
STEADY_S = 0.3  # the goal must be met for this long
OUT_OF_REACH = 0.01  # m of remaining error of the inverse kinematics; more than this for half a second is unreachable
OUT_OF_REACH_S = 0.5
FASTEST_JOINT = 4.0  # rad/s: an extreme command causes a fast motion, not a jump
SETTLE_STEPS = 100


@dataclass
class Progress:
    """The events in the episode so far."""

    lifted: bool = False
    steady_s: float = 0.0
    out_of_reach_s: float = 0.0
    unreachable: bool = False
    lost: bool = False  # the object fell off the table
    success: bool = False

    def update(self, period_s: float, height: float, position_error: float, goal_met: bool) -> None:
        """Update the progress after a control period.

        Args:
            height: of the object's centre above the table, m. position_error: m, remaining error of the inverse
            kinematics.
            goal_met: whether the object is at its goal now.
        """
        self.lost = height < -0.05
        self.out_of_reach_s = self.out_of_reach_s + period_s if position_error > OUT_OF_REACH else 0.0
        self.unreachable |= self.out_of_reach_s >= OUT_OF_REACH_S - 1e-9
        self.steady_s = self.steady_s + period_s if goal_met else 0.0
        self.success = self.steady_s >= STEADY_S - 1e-9


def settle(model: mujoco.MjModel, data: mujoco.MjData) -> None:
    """Simulate until the placed objects are at rest; the clock is then set to 0."""
    mujoco.mj_forward(model, data)
    for _ in range(SETTLE_STEPS):
        mujoco.mj_step(model, data)
    data.time = 0.0
    mujoco.mj_forward(model, data)


def touching(model: mujoco.MjModel, data: mujoco.MjData, body: int) -> set[int]:
    """Return the ids of the bodies in contact with a body."""
    pairs = model.geom_bodyid[data.contact.geom[: data.ncon]]  # [C, 2]
    return set(pairs[(pairs == body).any(axis=1)].ravel().tolist()) - {body}


def next_joints(pose: np.ndarray, start: np.ndarray, commanded: np.ndarray, hz: float) -> tuple[np.ndarray, float]:
    """Return the joints [6] of an arm at the end of a control period, and by how many metres the pose is out of reach.

    Args:
        pose: [8] of the tool in the arm's base frame; its opening is not used. start: [6] of the inverse kinematics.
        commanded: [6] at the beginning of the period. hz: control periods per second.
    """
    solution = solve(pose[:3], matrix_from_quaternion(pose[3:7]), start)
    change = solution.joints - commanded
    change *= min(1.0, FASTEST_JOINT / hz / max(float(np.abs(change).max()), 1e-12))
    return commanded + change, solution.position_error


def start_of(planned: np.ndarray | None, commanded: np.ndarray) -> np.ndarray:
    """Return the joints from which inverse kinematics starts: those of the plan, if it has any.

    Raises:
        ValueError: They are not finite angles in the shape of the commanded ones.
    """
    if planned is None:
        return commanded
    planned = np.asarray(planned, float)
    if planned.shape != commanded.shape or not np.isfinite(planned).all():
        raise ValueError(f"joints are {' x '.join(map(str, commanded.shape))} finite angles, got {planned.tolist()}")
    return planned
