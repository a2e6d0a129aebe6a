"""From a tool pose to joint angles that an arm may be sent: inverse kinematics with everything checked.

Units: metres, radians, seconds; poses in the arm's base frame. Shape legend: J = 6 joints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keygrip.robots.inverse_kinematics import solve
from keygrip.robots.kinematics import ArmChain, arm_chain, matrix_from_quaternion
from keygrip.robots.self_collision import closest_links, lowest_link

CURVED_M = 1e-3  # by which a short way of the joints may move the tool farther than a straight one


class JointMotionError(ValueError):
    """A pose that may not be sent to the joints; the message says why and by how much."""


@dataclass(frozen=True)
class JointLimits:
    """Limits of the joints.

    Args:
        speed_rad_s: of every joint; a faster command is slowed, all joints alike, so that the path stays the same.
        position_tolerance_m, angle_tolerance_rad: a pose that the arm misses by more is out of its reach.
        margin_rad: distance kept from the ends of each joint's range.
        clearance_m: least distance between links that are not neighbours; None: not looked at.
        table_clearance_m: least height of the links above the table; None: no table.
        table_height_m: of the table in the base frame.
    """

    speed_rad_s: float = 3.0
    position_tolerance_m: float = 0.01
    angle_tolerance_rad: float = 0.1
    margin_rad: float = 0.01
    clearance_m: float | None = 0.005
    table_clearance_m: float | None = 0.0
    table_height_m: float = 0.0

    def __post_init__(self) -> None:
        for name in ("speed_rad_s", "position_tolerance_m", "angle_tolerance_rad"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"joints.{name} must be finite and above 0, got {getattr(self, name)}")
        for name, value in (("margin_rad", self.margin_rad), ("clearance_m", self.clearance_m)):
            if value is not None and not (np.isfinite(value) and value >= 0):
                raise ValueError(f"joints.{name} must be finite and at least 0, got {value}")


class JointMotion:
    """Joint commands of one arm, each within the limits of the one before.

    Args:
        limits: see there.
        joints: [J] rad where the arm is.
        chain: of the arm; None: the YAM with its linear gripper.
    """

    def __init__(self, limits: JointLimits, joints: np.ndarray, chain: ArmChain | None = None) -> None:
        self.limits, self.chain = limits, chain or arm_chain()
        ends = self.chain.limits
        self.ranges = np.stack([ends[:, 0] + limits.margin_rad, ends[:, 1] - limits.margin_rad], axis=1)  # [J, 2]
        self.reset(joints)

    def reset(self, joints: np.ndarray) -> None:
        """The arm is at these joints [J] now."""
        joints = np.asarray(joints, float)
        if joints.shape != (len(self.chain.limits),) or not np.isfinite(joints).all():
            raise ValueError(f"joints are {len(self.chain.limits)} finite angles in rad, got {joints.tolist()}")
        self._take(joints.copy())

    def _take(self, joints: np.ndarray) -> None:
        self.joints = joints
        # a command that moves out of a collision is allowed, one that moves further in is not
        self._gap, self._height = closest_links(joints, self.chain).distance, lowest_link(joints, self.chain)[0]

    def step(self, pose: np.ndarray, seconds: float, joints: np.ndarray | None = None) -> np.ndarray:
        """The joints [J] for a tool pose at the end of a control period.

        Args:
            pose: [8] position, quaternion wxyz, opening (not used). seconds: length of the period.
            joints: [J] that a plan has for it: they are taken where they put the tool there, else those found from
                them. None: those found from where the arm is.

        Raises:
            JointMotionError: not finite, out of reach, a collision of the arm with itself, a link below the table, or
                joints so far from the present ones that the tool would leave its way. Nothing has changed then.
        """
        wanted = self.check(pose, joints)
        change = wanted - self.joints
        fastest = float(np.abs(change).max()) / seconds
        if fastest > self.limits.speed_rad_s:
            # a way to a free pose that is cut short may end in a collision
            wanted = self.joints + change * (self.limits.speed_rad_s / fastest)
            self._refuse_collision(wanted)
            if joints is not None:
                self._refuse_swing(wanted, pose)
        self._take(wanted)
        return wanted.copy()

    def check(self, pose: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """The joints [J] of a tool pose [8], found from `start` [J]; None: from where the arm is now. Raises
        JointMotionError as `step`."""
        limits = self.limits
        start = self.joints if start is None else start
        if not (np.isfinite(pose).all() and np.isfinite(start).all()):
            raise JointMotionError("the pose, or the joints for it, hold numbers that are not finite")
        found = solve(pose[:3], matrix_from_quaternion(pose[3:7]), start, self.chain)
        if found.position_error > limits.position_tolerance_m or found.angle_error > limits.angle_tolerance_rad:
            raise JointMotionError(
                f"the arm cannot reach {np.round(pose[:3], 3).tolist()} m: it ends {100 * found.position_error:.1f} cm "
                f"and {np.rad2deg(found.angle_error):.0f} degrees beside it"
            )
        low, high = self.ranges.T
        joints = np.clip(found.joints, np.minimum(low, self.joints), np.maximum(high, self.joints))
        self._refuse_collision(joints)
        return joints

    def _refuse_swing(self, joints: np.ndarray, pose: np.ndarray) -> None:
        """Of joints on the way to those of a pose: the tool may move no farther than straight to that pose."""
        before, after = (self.chain.frames(angles)[0] for angles in (self.joints, joints))
        moved, straight = float(np.linalg.norm(after - before)), float(np.linalg.norm(pose[:3] - before))
        if moved > straight + CURVED_M:
            raise JointMotionError(
                f"the planned joints are of another posture, too far to reach at joints.speed_rad_s="
                f"{self.limits.speed_rad_s:g}: on the way the tool would move by {100 * moved:.1f} cm in place of "
                f"{100 * straight:.1f} cm"
            )

    def _refuse_collision(self, joints: np.ndarray) -> None:
        limits = self.limits
        if limits.clearance_m is not None:
            near = closest_links(joints, self.chain)
            if near.distance < limits.clearance_m and near.distance < self._gap:
                raise JointMotionError(
                    f"{near.first} and {near.second} would come within {100 * near.distance:.1f} cm of each other "
                    f"(joints.clearance_m={limits.clearance_m:g})"
                )
        if limits.table_clearance_m is None:
            return
        height, link = lowest_link(joints, self.chain)
        above = height - limits.table_height_m
        if above < limits.table_clearance_m and height < self._height:
            raise JointMotionError(f"{link} would be {100 * above:.1f} cm above the table")
