"""Motion limits between a policy's plan and a robot: speed, acceleration, workspace, table and gripper.

The plans of a learned policy are not bounded by anything except its data. :class:`MotionLimits` states what the arm may
do, :class:`LimitedMotion` converts any sequence of target poses to commands within the limits at every control period,
and :func:`refuse_unsafe` rejects a plan that cannot be followed within the limits.

The command's position is a point mass. Each axis may accelerate by a / sqrt(3), so that the norm of the acceleration
stays below a. Near a wall of the workspace an axis is slowed to the largest speed w from which it can still stop,
w dt + w^2 / (2 a) <= distance; if that holds in one period, braking at full rate makes it hold in the next, so the
command never leaves the workspace. Speed is bounded because each new velocity lies on the segment between the old
velocity and the desired one, and both are inside the ball of the speed limit.

Frames and units: world frame, metres, seconds, radians; quaternions w, x, y, z; gripper 0 closed .. 1 open.
Shape legend: A arms, T planned steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.models.policy import Plan

QUATERNION_TOLERANCE = 0.05  # deviation of the norm from 1; a larger one is not a rounding error
ROUNDING_M = 1e-9
ROUNDING_RAD = 1e-12
REST_M_S, REST_RAD_S = 1e-6, 1e-6  # a slower motion is a rounding error of an arm at rest
# longer plans are refused: a plan is simulated before it is followed, while the arm waits for its next command
LONGEST_PLAN_S = 60.0


class UnsafePlanError(ValueError):
    """A plan that cannot be executed within the limits; the message states which limit and by how much."""


@dataclass(frozen=True)
class MotionLimits:
    """Motion limits of one arm.

    Args:
        speed_m_s: of the tool, along any direction.
        acceleration_m_s2: of the commanded position; also the braking rate.
        turn_rad_s: angular speed of the tool.
        turn_acceleration_rad_s2: rate of change of the angular velocity.
        gripper_per_s: fraction of the full opening per second.
        workspace_low, workspace_high: corners [3] of the box that the tool must stay in, metres; None: no bound.
        table_height_m: the tool stays above it, independent of the workspace; None: no table.
        tolerance_m: a planned position outside the workspace by at most this is moved to its edge; if it is farther
            outside, the plan is refused.
        lag_m: a plan is refused if the limited motion falls behind it by more than this, because it then requires
            speeds above the limit.
    """

    speed_m_s: float = 0.6
    acceleration_m_s2: float = 6.0
    turn_rad_s: float = 3.0
    turn_acceleration_rad_s2: float = 30.0
    gripper_per_s: float = 10.0
    workspace_low: tuple[float, float, float] | None = None
    workspace_high: tuple[float, float, float] | None = None
    table_height_m: float | None = 0.0
    tolerance_m: float = 0.02
    lag_m: float = 0.15

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith(("workspace", "table")):
                if value is not None and not np.isfinite(value).all():
                    raise ValueError(f"limits.{field.name} must be finite, got {value}")
            elif not (math.isfinite(value) and value > 0):
                raise ValueError(f"limits.{field.name} must be finite and above 0, got {value}")
        low, high = self.box()
        for axis, least, most in zip("xyz", low, high, strict=True):
            if least >= most:
                raise ValueError(
                    f"limits: the workspace is empty along {axis} ({least:g} m to {most:g} m; "
                    f"table_height_m={self.table_height_m})"
                )

    @property
    def axis_acceleration_m_s2(self) -> float:
        """Acceleration of each axis: if all three axes have it, the norm is `acceleration_m_s2`."""
        return self.acceleration_m_s2 / math.sqrt(3)

    @property
    def braking_s(self) -> float:
        """Longest time that braking to a stop takes."""
        turn_s = self.turn_rad_s / self.turn_acceleration_rad_s2
        return max(self.speed_m_s / self.axis_acceleration_m_s2, turn_s)

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lower and upper corner [3] of the allowed tool positions, metres; infinite without a bound."""
        low = np.array(self.workspace_low or (-np.inf,) * 3, dtype=np.float64)
        high = np.array(self.workspace_high or (np.inf,) * 3, dtype=np.float64)
        if self.table_height_m is not None:
            low[2] = max(low[2], self.table_height_m)
        return low, high


class LimitedMotion:
    """Commands that follow targets within limits, for one arm.

    Args:
        limits: see `MotionLimits`.
        pose: [8] current pose of the arm at rest: position, quaternion, gripper opening. A start outside the workspace
            is allowed; from there the arm only moves inwards.

    Raises:
        ValueError: The pose is not finite, or its quaternion is not a rotation.
    """

    def __init__(self, limits: MotionLimits, pose: np.ndarray) -> None:
        self.limits = limits
        self._low, self._high = limits.box()
        self.reset(pose)

    def reset(self, pose: np.ndarray) -> None:
        """Reset to rest at a pose [8], at the start of an episode or after a stop."""
        pose = _checked_pose(np.asarray(pose, dtype=np.float64))
        self.position = pose[:3].copy()
        self.velocity = np.zeros(3)
        self.turn_velocity = np.zeros(3)
        self.rotation = Rotation.from_quat(pose[3:7], scalar_first=True)
        self.gripper = float(np.clip(pose[7], 0.0, 1.0))

    def held_back_at(self, pose: np.ndarray, seconds: float) -> None:
        """Continue from a pose [8] that the arm was sent to instead of the last command, at the speed at which the arm
        gets there. `seconds`: length of that command's period."""
        pose = _checked_pose(np.asarray(pose, dtype=np.float64))
        previous_rotation = Rotation.from_rotvec(-self.turn_velocity * seconds) * self.rotation
        self.velocity = self.velocity + (pose[:3] - self.position) / seconds
        self.position, self.rotation = pose[:3].copy(), Rotation.from_quat(pose[3:7], scalar_first=True)
        self.turn_velocity = (self.rotation * previous_rotation.inv()).as_rotvec() / seconds

    @property
    def at_rest(self) -> bool:
        """Whether the command stands still."""
        return bool(np.abs(self.velocity).max() <= REST_M_S and np.abs(self.turn_velocity).max() <= REST_RAD_S)

    def command(self) -> np.ndarray:
        """Return the current command [8]."""
        quaternion = self.rotation.as_quat(canonical=True, scalar_first=True)
        return np.concatenate([self.position, quaternion, [self.gripper]])

    def step(self, target: np.ndarray, seconds: float) -> np.ndarray:
        """Move towards a target pose for one control period.

        Args:
            target: [8] position, quaternion, gripper opening.
            seconds: length of the period.

        Returns:
            [8] the command at the end of the period.

        Raises:
            ValueError: The target is not finite, or the period is not above 0.
        """
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"a control period is above 0 s, got {seconds}")
        target = _checked_pose(np.asarray(target, dtype=np.float64))
        self.move(target[:3], seconds)
        self._turn(Rotation.from_quat(target[3:7], scalar_first=True), seconds)
        self._move_gripper(float(target[7]), seconds)
        return self.command()

    def drive(self, velocity: np.ndarray, turn_velocity: np.ndarray, opening: float, seconds: float) -> np.ndarray:
        """Move at a velocity for one control period, or as close to it as the limits permit.

        A target one period ahead would not do: `step` moves so slowly that it can stop at its target.

        Args:
            velocity: [3] m/s. turn_velocity: [3] rad/s, about world axes. opening: of the gripper.
            seconds: length of the period.

        Returns:
            [8] the command at the end of the period.

        Raises:
            ValueError: A velocity or the opening is not finite.
        """
        velocity, turn_velocity = np.asarray(velocity, np.float64), np.asarray(turn_velocity, np.float64)
        if not np.isfinite([*velocity, *turn_velocity, opening]).all():
            raise ValueError(
                f"a velocity is finite, got {velocity.tolist()} m/s, {turn_velocity.tolist()} rad/s and an opening of "
                f"{opening}"
            )
        self._accelerate(_shortened(velocity, self.limits.speed_m_s), seconds)
        self._accelerate_turn(_shortened(turn_velocity, self.limits.turn_rad_s), seconds)
        self._move_gripper(opening, seconds)
        return self.command()

    def hold(self, seconds: float) -> np.ndarray:
        """Brake to a stop within the limits and stay there; return the command [8]."""
        change = self.limits.axis_acceleration_m_s2 * seconds
        speed = np.abs(self.velocity).max()
        self._advance(self.velocity * (max(0.0, speed - change) / speed if speed > 0 else 0.0), seconds)
        self._accelerate_turn(np.zeros(3), seconds)
        return self.command()

    def move(self, goal: np.ndarray, seconds: float) -> None:
        """Move only the position towards a goal [3] for one control period."""
        limits = self.limits
        offset = np.clip(goal, self._low, self._high) - self.position
        distance = float(np.linalg.norm(offset))
        target_velocity = np.zeros(3)
        if distance > ROUNDING_M:
            speed = min(distance / seconds, limits.speed_m_s)
            # a target closer than one period's braking distance is reached exactly
            if distance / seconds > limits.axis_acceleration_m_s2 * seconds:
                speed = min(speed, _speed_that_stops_within(distance, limits.axis_acceleration_m_s2, seconds))
            target_velocity = offset * (speed / distance)
        self._accelerate(target_velocity, seconds)

    def _accelerate(self, wanted_velocity: np.ndarray, seconds: float) -> None:
        """Move for one period at a velocity [3] m/s, or as close to it as acceleration and workspace permit."""
        change = wanted_velocity - self.velocity
        max_change = self.limits.axis_acceleration_m_s2 * seconds
        share = min(1.0, max_change / max(float(np.abs(change).max()), 1e-300))
        self._advance(self.velocity + share * change, seconds)

    def _advance(self, velocity: np.ndarray, seconds: float) -> None:
        """Apply a velocity for one period, reduced near the walls of the workspace."""
        for axis in range(3):
            position = self.position[axis]
            room = self._high[axis] - position if velocity[axis] > 0 else position - self._low[axis]
            max_speed = _speed_that_stops_within(room, self.limits.axis_acceleration_m_s2, seconds) if room > 0 else 0.0
            velocity[axis] = float(np.clip(velocity[axis], -max_speed, max_speed))
        self.velocity = velocity
        new_position = self.position + velocity * seconds
        inside = (self.position >= self._low) & (self.position <= self._high)
        # rounding must not move the command past a wall
        self.position = np.where(inside, np.clip(new_position, self._low, self._high), new_position)

    def _turn(self, goal: Rotation, seconds: float) -> None:
        offset = (goal * self.rotation.inv()).as_rotvec()
        angle, rate = float(np.linalg.norm(offset)), self.limits.turn_acceleration_rad_s2
        turn_velocity = np.zeros(3)
        if angle > ROUNDING_RAD:
            speed = min(self.limits.turn_rad_s, angle / seconds)
            # a goal closer than one period's braking angle is reached exactly
            if angle / seconds > rate * seconds:
                speed = min(speed, max(_speed_that_stops_within(angle, rate, seconds), rate * seconds))
            turn_velocity = offset * (speed / angle)
        self._accelerate_turn(turn_velocity, seconds)

    def _accelerate_turn(self, wanted_velocity: np.ndarray, seconds: float) -> None:
        """Rotate for one period at an angular velocity [3] rad/s, or as close to it as the acceleration permits."""
        change = wanted_velocity - self.turn_velocity
        max_change = self.limits.turn_acceleration_rad_s2 * seconds
        self.turn_velocity = self.turn_velocity + change * min(
            1.0, max_change / max(float(np.linalg.norm(change)), 1e-300)
        )
        self.rotation = Rotation.from_rotvec(self.turn_velocity * seconds) * self.rotation

    def _move_gripper(self, opening: float, seconds: float) -> None:
        change = self.limits.gripper_per_s * seconds
        self.gripper += float(np.clip(np.clip(opening, 0.0, 1.0) - self.gripper, -change, change))


def held_back(
    command: np.ndarray, reached: np.ndarray, which: np.ndarray, motions: Sequence[LimitedMotion], seconds: float
) -> np.ndarray:
    """Return commands [A, 8] in which arms held back by their joint speed limit have their reached poses. The motions
    of these arms continue from there.

    Args:
        command: [A, 8] within the limits. reached: [A, 7] tool poses of the joints. which: [A] arms that are held
            back. motions: of each arm; empty: there are no limits. seconds: length of the control period.
    """
    command = command.copy()
    for arm in np.flatnonzero(which).tolist():
        command[arm, :7] = reached[arm]
        if motions:
            motions[arm].held_back_at(command[arm], seconds)
    return command


def refuse_unsafe(plan: Plan, motions: list[LimitedMotion], control_hz: float, passed: int = 0) -> None:
    """Raise UnsafePlanError if a plan cannot be executed within the limits.

    Args:
        plan: of all arms. motions: the current motion of each arm (left unchanged). control_hz: commands per second.
        passed: 1 if the plan's first step is already due: the arm need not reach it, but commands are interpolated
            from it to the next step.

    Raises:
        UnsafePlanError: A value is not finite, a quaternion is not a rotation, an opening is far from 0 .. 1, the plan
            lasts longer than `LONGEST_PLAN_S`, a position lies outside the workspace by more than the tolerance, or the
            plan moves so fast that the limited motion falls behind by more than `lag_m`.
    """
    arms, steps = plan.gripper.shape
    if arms != len(motions):
        raise UnsafePlanError(f"the plan is for {arms} arms, the robot has {len(motions)}")
    for name, values in (("position", plan.position), ("quaternion", plan.quaternion), ("gripper", plan.gripper)):
        if not np.isfinite(values).all():
            raise UnsafePlanError(f"the plan's {name} is not finite")
    norms = np.linalg.norm(plan.quaternion, axis=-1)
    if (np.abs(norms - 1) > QUATERNION_TOLERANCE).any():
        raise UnsafePlanError(f"a planned quaternion has norm {norms.flat[np.abs(norms - 1).argmax()]:.3g}, not 1")
    if plan.gripper.min() < -0.5 or plan.gripper.max() > 1.5:
        raise UnsafePlanError(f"a planned opening is {plan.gripper.min():.3g} .. {plan.gripper.max():.3g}, not 0 .. 1")
    if not (math.isfinite(plan.step_seconds) and plan.step_seconds > 0):
        raise UnsafePlanError(f"the plan's step_seconds is {plan.step_seconds}")
    # each step is simulated for at least one period
    if (steps - passed) * max(plan.step_seconds, 1 / control_hz) > LONGEST_PLAN_S:
        raise UnsafePlanError(
            f"the plan has {steps} steps of {plan.step_seconds:g} s: plans of up to {LONGEST_PLAN_S:g} s are followed"
        )
    for arm, motion in enumerate(motions):
        limits, (low, high) = motion.limits, motion.limits.box()
        beyond = np.maximum(low - plan.position[arm], plan.position[arm] - high).max(axis=1)
        if beyond.max() > limits.tolerance_m:
            step = int(beyond.argmax())
            raise UnsafePlanError(
                f"step {step + 1} of the plan lies {100 * beyond[step]:.1f} cm outside the workspace, at "
                f"{np.round(plan.position[arm, step], 3).tolist()} m"
            )
        if passed:
            begin, end = np.clip(plan.position[arm, passed - 1 : passed + 1], low, high)
            lag = float(np.linalg.norm(end - begin)) - limits.speed_m_s * plan.step_seconds
            if lag > limits.lag_m:
                raise UnsafePlanError(
                    f"from the step that has just passed to the next the plan moves {100 * lag:.1f} cm farther than "
                    f"{limits.speed_m_s:g} m/s"
                )
        trial, ticks = copy(motion), 0  # a motion replaces its arrays and never changes them in place
        for step in range(passed, steps):
            goal, due = plan.position[arm, step], round((step + 1 - passed) * plan.step_seconds * control_hz)
            for _ in range(due - ticks):  # a step need not be a whole number of control periods
                trial.move(goal, 1.0 / control_hz)
            ticks = due
            lag = float(np.linalg.norm(np.clip(goal, low, high) - trial.position))
            if lag > limits.lag_m:
                raise UnsafePlanError(
                    f"at step {step + 1} the arm would be {100 * lag:.1f} cm behind the plan: it asks for more than "
                    f"{limits.speed_m_s:g} m/s"
                )


def _speed_that_stops_within(distance: float, deceleration: float, seconds: float) -> float:
    """The largest w with w dt + w^2 / (2 a) <= distance: after one more period at w, braking at a stops in time."""
    if math.isinf(distance):
        return math.inf
    return deceleration * (math.sqrt(seconds * seconds + 2 * max(distance, 0.0) / deceleration) - seconds)


def _shortened(vector: np.ndarray, length: float) -> np.ndarray:
    """Return a vector with at most the given length, in the same direction."""
    return vector * min(1.0, length / max(float(np.linalg.norm(vector)), 1e-300))


def _checked_pose(pose: np.ndarray) -> np.ndarray:
    if pose.shape != (8,) or not np.isfinite(pose).all():
        raise ValueError(f"a pose is 8 finite numbers (position 3, quaternion wxyz 4, gripper 1), got {pose.tolist()}")
    norm = float(np.linalg.norm(pose[3:7]))
    if abs(norm - 1) > QUATERNION_TOLERANCE:
        raise ValueError(f"the quaternion of a pose has norm {norm:.3g}, not 1")
    return np.concatenate([pose[:3], pose[3:7] / norm, pose[7:]])
