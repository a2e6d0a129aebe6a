"""Convert tool poses to joint angles that arms may be commanded to: inverse kinematics with all checks.

Units: metres, radians, seconds; poses of one arm in its base frame, of several in the world. Shape legend: A arms,
J = 6 joints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.robots.inverse_kinematics import solve
from keygrip.robots.kinematics import ArmChain, arm_chain, matrix_from_quaternion
from keygrip.robots.self_collision import (
    MOVING,
    PAIRS,
    PAIRS_OF_TWO,
    intrusion,
    link_gaps,
    link_gaps_of_two,
    link_heights,
)

CURVED_M = 1e-3  # largest distance by which a short joint motion may move the tool farther than a straight path
NEARER_POSES = 4  # tried if the path is curved, each half as far, with few iterations, because a period is short
NEARER_ITERATIONS = 20
POSTURE_RAD = 0.1  # joints of the same pose that differ by more belong to another posture
STILL_RAD = 1e-6  # joints that rotate by less do not move


class JointMotionError(ValueError):
    """A pose that must not be commanded; the message states why and by how much."""


@dataclass(frozen=True)
class JointLimits:
    """Limits of the joints.

    Args:
        speed_rad_s: of every joint; a faster command is slowed for all joints equally, or replaced by a closer pose on
            its path.
        position_tolerance_m, angle_tolerance_rad: a pose with a larger remaining error is out of reach.
        margin_rad: distance from the ends of each joint's range; joints that are nearer to an end may stay there.
        clearance_m: smallest distance between links that are not neighbours; None: not checked.
        arms_clearance_m: smallest distance between the links of two arms; None: not checked (grippers that meet).
        table_clearance_m: smallest height of the links above the table; None: no table.
        table_height_m: of the table in the base frame.
    """

    speed_rad_s: float = 3.0
    position_tolerance_m: float = 0.01
    angle_tolerance_rad: float = 0.1
    margin_rad: float = 0.01
    clearance_m: float | None = 0.005
    arms_clearance_m: float | None = 0.005
    table_clearance_m: float | None = 0.0
    table_height_m: float = 0.0

    def __post_init__(self) -> None:
        for name in ("speed_rad_s", "position_tolerance_m", "angle_tolerance_rad"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"joints.{name} must be finite and above 0, got {getattr(self, name)}")
        for name in ("margin_rad", "clearance_m", "arms_clearance_m"):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value >= 0):
                raise ValueError(f"joints.{name} must be finite and at least 0, got {value}")


class JointMotion:
    """Joint commands of one arm, each within the limits relative to the previous one.

    Args:
        limits: see `JointLimits`.
        joints: [J] rad, current joints of the arm.
        chain: of the arm; None: the YAM with its linear gripper.

    Attributes:
        held_back: whether the speed limit shortened the last step, so that the tool has not reached its pose.
    """

    def __init__(self, limits: JointLimits, joints: np.ndarray, chain: ArmChain | None = None) -> None:
        self.limits, self.chain = limits, chain or arm_chain()
        ends = self.chain.limits
        self.ranges = np.stack([ends[:, 0] + limits.margin_rad, ends[:, 1] - limits.margin_rad], axis=1)  # [J, 2]
        self.reset(joints)

    def reset(self, joints: np.ndarray) -> None:
        """Set the current joints [J] of the arm."""
        joints = np.asarray(joints, float)
        if joints.shape != (len(self.chain.limits),) or not np.isfinite(joints).all():
            raise ValueError(f"joints are {len(self.chain.limits)} finite angles in rad, got {joints.tolist()}")
        self._take(joints.copy())

    def _take(self, joints: np.ndarray, held_back: bool = False) -> None:
        self.joints, self.held_back = joints, held_back
        # a command that moves out of a collision is allowed, one that moves further into it is not
        self._gaps, self._heights = link_gaps(joints, self.chain), link_heights(joints, self.chain)

    def step(self, pose: np.ndarray, seconds: float, joints: np.ndarray | None = None) -> np.ndarray:
        """Return the joints [J] for a tool pose at the end of a control period.

        Args:
            pose: [8] position, quaternion wxyz, opening (not used). seconds: length of the period.
            joints: [J] that a plan has for the pose: used if their tool pose is this pose, otherwise inverse kinematics
                starts from them. None: it starts from the current joints.

        Raises:
            JointMotionError: A value is not finite, the pose is out of reach, the arm would collide with itself, a link
                would be below the table, the speed limit allows no motion towards the pose, or planned joints are so
                far from the current ones that the tool would leave its path. Nothing is changed then.
        """
        target = self.check(pose, joints)
        max_step_rad = self.limits.speed_rad_s * seconds
        held_back = float(np.abs(target - self.joints).max()) > max_step_rad
        if held_back:
            shortened = self._shorten(target, max_step_rad)
            if joints is not None and not self._is_straight(shortened, pose):
                self._refuse_other_posture(target, shortened, pose)
            target = self._straighten(shortened, pose, max_step_rad)
            self._refuse_collision(target)  # a shortened path to a collision-free pose may end in a collision
        self._take(target, held_back)
        return target.copy()

    def check(self, pose: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """Return the joints [J] of a tool pose [8], found from `start` [J]; None: from the current joints. Raises
        JointMotionError as `step`."""
        start = self.joints if start is None else start
        if not (np.isfinite(pose).all() and np.isfinite(start).all()):
            raise JointMotionError("the pose, or the joints for it, hold numbers that are not finite")
        rotation = matrix_from_quaternion(pose[3:7])
        solution = solve(pose[:3], rotation, start, self.chain)
        self._refuse_error(pose, solution.position_error, solution.angle_error)
        joints = self._clip_to_range(solution.joints)
        if not np.array_equal(joints, solution.joints):
            tool, tool_rotation, *_ = self.chain.frames(joints)
            angle = float(Rotation.from_matrix(rotation @ tool_rotation.T).magnitude())
            reason = f" with its joints joints.margin_rad={self.limits.margin_rad:g} from the ends of their ranges"
            self._refuse_error(pose, float(np.linalg.norm(pose[:3] - tool)), angle, reason)
        self._refuse_collision(joints)
        return joints

    def _refuse_error(self, pose: np.ndarray, distance: float, angle: float, reason: str = "") -> None:
        """Raise JointMotionError if a tool at this distance, metres, and angle, rad, from a pose [8] is beside it."""
        if distance > self.limits.position_tolerance_m or angle > self.limits.angle_tolerance_rad:
            raise JointMotionError(
                f"the arm cannot reach {np.round(pose[:3], 3).tolist()} m{reason}: it ends {100 * distance:.1f} cm and "
                f"{np.rad2deg(angle):.0f} degrees beside it"
            )

    def _clip_to_range(self, joints: np.ndarray) -> np.ndarray:
        low, high = self.ranges.T
        return np.clip(joints, np.minimum(low, self.joints), np.maximum(high, self.joints))

    def _shorten(self, joints: np.ndarray, max_step_rad: float) -> np.ndarray:
        """Return joints [J] on the way to the given ones, none of which rotates by more than `max_step_rad` rad."""
        change = joints - self.joints
        return self.joints + change * min(1.0, max_step_rad / max(float(np.abs(change).max()), 1e-12))

    def _straighten(self, joints: np.ndarray, pose: np.ndarray, max_step_rad: float) -> np.ndarray:
        """Return shortened joints [J] on the way to a pose. If the tool would leave its path, use the way to closer
        poses, because a closer pose gives a straighter path. Raises JointMotionError if the closest pose leaves the
        path too, or does not move the joints."""
        tool, tool_rotation, *_ = self.chain.frames(self.joints)
        turn = Rotation.from_matrix(matrix_from_quaternion(pose[3:7]) @ tool_rotation.T).as_rotvec()
        offset, limits = pose[:3] - tool, self.limits
        for halving in range(1, NEARER_POSES + 1):
            if self._is_straight(joints, pose):
                break
            share = 0.5**halving
            rotation = Rotation.from_rotvec(share * turn).as_matrix() @ tool_rotation
            solution = solve(tool + share * offset, rotation, self.joints, self.chain, NEARER_ITERATIONS)
            joints = self._shorten(self._clip_to_range(solution.joints), max_step_rad)
        distance, angle = float(np.linalg.norm(offset)), float(np.linalg.norm(turn))
        arrived = distance <= limits.position_tolerance_m and angle <= limits.angle_tolerance_rad
        stuck = not arrived and np.allclose(joints, self.joints, rtol=0, atol=STILL_RAD)
        if stuck or not self._is_straight(joints, pose):
            raise JointMotionError(
                f"the arm cannot begin the way to a pose {100 * distance:.1f} cm and {np.rad2deg(angle):.0f} degrees "
                f"away: at joints.speed_rad_s={limits.speed_rad_s:g} its joints move the tool "
                + ("no nearer" if stuck else "off its way")
            )
        return joints

    def _is_straight(self, joints: np.ndarray, pose: np.ndarray) -> bool:
        """Return whether joints on the way to a pose move the tool no farther than straight to it, and not away."""
        moved, remaining, straight = self._way(joints, pose)
        return max(moved, remaining) <= straight + CURVED_M

    def _way(self, joints: np.ndarray, pose: np.ndarray) -> tuple[float, float, float]:
        """Return the tool's motion to joints [J], its distance from a pose [8] then, and its distance now, metres."""
        before, after = (self.chain.frames(angles)[0] for angles in (self.joints, joints))
        offsets = (after - before, pose[:3] - after, pose[:3] - before)
        moved, remaining, straight = (float(np.linalg.norm(offset)) for offset in offsets)
        return moved, remaining, straight

    def _refuse_other_posture(self, planned: np.ndarray, shortened: np.ndarray, pose: np.ndarray) -> None:
        """Raise JointMotionError if planned joints differ from those that inverse kinematics finds for their pose from
        the current joints. `shortened`: joints on the way to them."""
        solution = solve(pose[:3], matrix_from_quaternion(pose[3:7]), self.joints, self.chain)
        if np.abs(solution.joints - planned).max() > POSTURE_RAD:
            moved, remaining, straight = self._way(shortened, pose)
            raise JointMotionError(
                f"the planned joints are of another posture, too far to reach at joints.speed_rad_s="
                f"{self.limits.speed_rad_s:g}: on the way the tool would move by {100 * moved:.1f} cm, to "
                f"{100 * remaining:.1f} cm from its pose, which is {100 * straight:.1f} cm away"
            )

    def _refuse_collision(self, joints: np.ndarray) -> None:
        limits = self.limits
        if limits.clearance_m is not None:
            gaps = link_gaps(joints, self.chain)
            index = intrusion(gaps, self._gaps, limits.clearance_m)
            if index is not None:
                first, second = PAIRS[index]
                raise JointMotionError(
                    f"{first} and {second} would come within {100 * gaps[index]:.1f} cm of each other "
                    f"(joints.clearance_m={limits.clearance_m:g})"
                )
        if limits.table_clearance_m is None:
            return
        heights = link_heights(joints, self.chain)
        index = intrusion(heights, self._heights, limits.table_height_m + limits.table_clearance_m)
        if index is not None:
            height = heights[index] - limits.table_height_m
            raise JointMotionError(f"{MOVING[index]} would be {100 * height:.1f} cm above the table")


class ArmMotions:
    """Joint commands of a robot's arms, each within the limits relative to the previous one. Either all arms move or
    none.

    Args:
        motions: of the arms, with the same limits. world_from_base: [4, 4] of each arm. names: of the arms.
    """

    def __init__(
        self, motions: Sequence[JointMotion], world_from_base: Sequence[np.ndarray], names: Sequence[str]
    ) -> None:
        self.motions, self.names = tuple(motions), tuple(names)
        self.world_from_base = [np.asarray(base, float) for base in world_from_base]

    @property
    def joints(self) -> np.ndarray:
        """[A, J] rad of the last command."""
        return np.stack([motion.joints for motion in self.motions])

    @property
    def held_back(self) -> np.ndarray:
        """[A] whether the speed limit shortened an arm's last step."""
        return np.array([motion.held_back for motion in self.motions])

    def step(self, poses: np.ndarray, seconds: float, joints: np.ndarray | None = None) -> np.ndarray:
        """Return the joints [A, J] for poses [A, 8] in the world at the end of a control period; `joints` [A, J] and
        errors as in `JointMotion.step`. Also raises JointMotionError if two arms would collide."""
        previous_joints = [motion.joints.copy() for motion in self.motions]
        try:
            for index, motion in enumerate(self.motions):
                pose = self._in_base(index, np.asarray(poses[index], float))
                motion.step(pose, seconds, None if joints is None else np.asarray(joints[index], float))
            self._refuse_meeting(previous_joints)
        except ValueError:
            for motion, start in zip(self.motions, previous_joints, strict=True):
                motion.reset(start)
            raise
        return self.joints

    def _in_base(self, index: int, pose: np.ndarray) -> np.ndarray:
        """Convert a pose [8] from the world to the arm's base."""
        base = self.world_from_base[index]
        turn = Rotation.from_matrix(base[:3, :3].T)
        quaternion = (turn * Rotation.from_quat(pose[3:7], scalar_first=True)).as_quat(scalar_first=True)
        return np.concatenate([turn.apply(pose[:3] - base[:3, 3]), quaternion, pose[7:]])

    def _refuse_meeting(self, previous_joints: Sequence[np.ndarray]) -> None:
        """Raise JointMotionError if links of two arms come too close to each other, unless the arms move apart."""
        clearance = self.motions[0].limits.arms_clearance_m
        if clearance is None:
            return
        joints = [motion.joints for motion in self.motions]
        for pair in combinations(range(len(joints)), 2):
            gaps = self._gaps(pair, joints)
            index = intrusion(gaps, self._gaps(pair, previous_joints), clearance)
            if index is not None:
                first, second = (
                    f"{link} of arm {self.names[arm]}" for link, arm in zip(PAIRS_OF_TWO[index], pair, strict=True)
                )
                raise JointMotionError(
                    f"{first} and {second} would come within {100 * gaps[index]:.1f} cm of each other "
                    f"(joints.arms_clearance_m={clearance:g})"
                )

    def _gaps(self, pair: Sequence[int], joints: Sequence[np.ndarray]) -> np.ndarray:
        return link_gaps_of_two(
            [joints[index] for index in pair],
            [self.motions[index].chain for index in pair],
            [self.world_from_base[index] for index in pair],
        )
