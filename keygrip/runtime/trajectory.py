"""A plan as a motion over time, from which both ways of executing plans, and a dry run, read commands.

Shape legend: A arms, T planned steps, W = 8 values of a pose with gripper opening, or more if joints are followed and
come after them (:mod:`keygrip.runtime.plan_terms`).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from keygrip.robots.joint_arms import JointArms
from keygrip.runtime.plan_terms import complete_command

ROUNDING_S = 1e-6


def control_periods(seconds: float, control_hz: float) -> int:
    """Return the number of control periods of a motion of given length. The last period may be partial; rounding errors
    of the length start no further period."""
    return math.ceil((seconds - ROUNDING_S) * control_hz)


class Trajectory:
    """Poses over time: smooth at every waypoint; the gripper takes a waypoint's opening when the waypoint is reached.

    Args:
        times: [T + 1] seconds, increasing. poses: [T + 1, A, W], the first where the motion begins.
        arms: forward kinematics of the joints; required if the poses have joints.
    """

    def __init__(self, times: np.ndarray, poses: np.ndarray, arms: JointArms | None = None) -> None:
        self.times, self.poses, self.arms = times, poses, arms
        self._turns = [
            Slerp(times, Rotation.from_quat(poses[:, arm, 3:7], scalar_first=True)) for arm in range(poses.shape[1])
        ]

    def at(self, moment: float) -> np.ndarray:
        """Return [A, W] at a moment; the first pose before the beginning, the last pose after the end."""
        times, poses = self.times, self.poses
        moment = float(np.clip(moment, times[0], times[-1]))
        index = min(max(int(np.searchsorted(times, moment - ROUNDING_S)), 1), len(times) - 1)
        share = float(np.clip((moment - times[index - 1]) / (times[index] - times[index - 1]), 0, 1))
        eased = share * share * (3 - 2 * share)
        pose = poses[index - 1] + eased * (poses[index] - poses[index - 1])
        eased_moment = times[index - 1] + eased * (times[index] - times[index - 1])
        for arm, turn in enumerate(self._turns):
            pose[arm, 3:7] = turn(np.clip(eased_moment, times[0], times[-1])).as_quat(scalar_first=True)
        pose[:, 7] = poses[index if moment >= times[index] - ROUNDING_S else index - 1, :, 7]
        return complete_command(np.asarray(pose), self.arms)


def blended(old: np.ndarray, new: np.ndarray, share: float) -> np.ndarray:
    """Interpolate between two poses [A, W], with fraction `share` (at most 1) of the new one; the gripper's opening is
    the new one's. Joints are dropped if one of the two has none."""
    width = min(old.shape[1], new.shape[1])
    old, new = old[:, :width], new[:, :width]
    pose = old + share * (new - old)
    for arm in range(len(pose)):
        turns = Rotation.from_quat(np.stack([old[arm, 3:7], new[arm, 3:7]]), scalar_first=True)
        pose[arm, 3:7] = Slerp([0.0, 1.0], turns)(share).as_quat(scalar_first=True)
    pose[:, 7] = new[:, 7]
    return np.asarray(pose)


def executed_steps(positions: np.ndarray, steps: int, still_distance_m: float) -> int:
    """Return how many steps of a plan are followed: `steps`, or more (up to its last but one) while the arm stands
    still.

    Args:
        positions: [T + 1, A, 3] m, the first where the motion begins. steps: number followed in any case.
        still_distance_m: a shorter motion counts as standing still.
    """
    distance, last = 0.0, len(positions) - 1
    for step in range(last):
        is_still = distance < still_distance_m and step < last - 1
        if step >= steps and not is_still:
            return step
        distance += float(np.linalg.norm(positions[step + 1] - positions[step], axis=1).max())
    return last


def check_grip(below: float | None, above: float | None, settings: str) -> None:
    """Raise ValueError if the two ends of the gripper's dead band, `grip_below` and `release_above` of a group of
    settings, are not in order, or one is missing."""
    if (below is None) != (above is None):
        raise ValueError(f"{settings}.grip_below and {settings}.release_above are given together or not at all.")
    if below is not None and above is not None and below > above:
        raise ValueError(f"{settings}.grip_below must not exceed {settings}.release_above.")


def initial_grip(opening: np.ndarray, below: float | None) -> np.ndarray:
    """Return [A] the gripper's command before the first plan, for an opening [A] that was observed or commanded.
    `below`: None: there is no dead band."""
    return np.array(opening) if below is None else np.where(opening < 0.5, 0.0, 1.0)


def gripped(opening: np.ndarray, before: np.ndarray, below: float | None, above: float | None) -> np.ndarray:
    """Return [A] the gripper's command: closed below the first opening, open above the second, in between as `before`
    [A].

    Args:
        opening: [A] planned. below, above: None: the planned opening is commanded unchanged.
    """
    if below is None or above is None:
        return opening
    return np.where(opening < below, 0.0, np.where(opening > above, 1.0, before))
