"""The control loop: observation, plan, limits, watchdog, command, at a fixed rate on the robot's clock.

In every control period the arm receives a command within the limits. After a fault it brakes within the limits and
holds. A lasting fault ends in `Robot.stop`. The robot is stopped at the end of the loop, whatever ends it: at an
ordinary end and after a fault it first brakes within the limits, an exception (Ctrl-C, a signal) stops it at once.

Shape legend: A arms.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.models.policy import Plan
from keygrip.robots.joint_motion import ArmMotions, JointMotionError
from keygrip.runtime.asynchronous import ChunkExecution
from keygrip.runtime.limits import LimitedMotion, MotionLimits, UnsafePlanError, held_back, refuse_unsafe
from keygrip.runtime.plan_terms import POSE, observed_poses
from keygrip.runtime.robot import CameraLostError, JointRobot, Robot, RobotLostError
from keygrip.runtime.takeover import (
    Correction,
    CorrectionRecorder,
    Takeover,
    TakeoverLostError,
    moved_by,
    read_unheeded,
)
from keygrip.runtime.watchdog import State, Watchdog

log = logging.getLogger(__name__)

BESIDE_M, BESIDE_RAD = 1e-3, 1e-2  # a tool farther than this from a commanded pose has not reached it


@dataclass(frozen=True)
class Tick:
    """One control period.

    Attributes:
        time_s: on the robot's clock. target: [A, 8] from the plan (or a person), None while the arm is held.
        command: [A, 8] the command sent. state: of the watchdog. corrected: whether a person moved the arm.
        late_s: delay of the period's start.
    """

    time_s: float
    target: np.ndarray | None
    command: np.ndarray
    state: State
    corrected: bool
    late_s: float


@dataclass(frozen=True)
class RunReport:
    """Result of a run. `reason`: why it was stopped, None if it ended normally. `joint_plans`: how many of `plans` were
    followed by their joints. `held_back`: see `ChunkExecution`. `events`: the actions of the watchdog."""

    state: State
    reason: str | None
    seconds: float
    ticks: int
    plans: int
    joint_plans: int
    held_back: list[float]
    latencies_s: list[float]
    events: list[tuple[float, State, str]]
    late_ticks: int
    corrected_ticks: int

    def summary(self) -> dict[str, Any]:
        """Return plain values for a line of JSON. For a policy that clamps plans to the positions seen in training,
        `clamped_plans` is how many plans it clamped, and `clamped_most_m` the largest distance along an axis."""
        latencies = 1e3 * np.array(self.latencies_s) if self.latencies_s else np.zeros(1)
        return {
            "state": self.state.value,
            "reason": self.reason,
            "seconds": round(self.seconds, 2),
            "ticks": self.ticks,
            "late_ticks": self.late_ticks,
            "plans": self.plans,
            "joint_plans": self.joint_plans,
            **self._clamping_report(),
            "plan_latency_p50_ms": round(float(np.median(latencies)), 1),
            "plan_latency_max_ms": round(float(latencies.max()), 1),
            "holds": sum(state is State.HOLDING for _, state, _ in self.events),
            "corrected_ticks": self.corrected_ticks,
            "events": [f"{moment:.2f} s {state.value}: {reason}" for moment, state, reason in self.events],
        }

    def _clamping_report(self) -> dict[str, Any]:
        if not self.held_back:
            return {}
        most = round(max(self.held_back), 5)
        return {"clamped_plans": sum(by > 0 for by in self.held_back), "clamped_most_m": most}


class ControlLoop:
    """Drive a robot with a policy.

    Args:
        robot: see `Robot`; plans are followed by their joints if it is a `JointRobot` and `execution.follow` allows
            it. execution: converts plans to targets; its `accept` and `arms` are set here.
        limits: None: only the robot's own (the plan is sent unchanged).
        watchdog: handles faults. takeover: a person who may move the arm. recorder: records the corrections.
        on_tick: called with every control period.
    """

    def __init__(
        self,
        robot: Robot,
        execution: ChunkExecution,
        limits: MotionLimits | None,
        watchdog: Watchdog | None = None,
        takeover: Takeover | None = None,
        recorder: CorrectionRecorder | None = None,
        on_tick: Callable[[Tick], None] | None = None,
    ) -> None:
        self.robot, self.execution, self.limits = robot, execution, limits
        self.watchdog = watchdog or Watchdog()
        self.takeover, self.recorder, self.on_tick = takeover, recorder, on_tick
        self._jointed = robot if isinstance(robot, JointRobot) else None
        self.execution.accept, self.execution.arms = self._accept, self._jointed
        self._motions: list[LimitedMotion] = []
        self._command = np.zeros((0, 8))
        self._plan_fault: str | None = None  # fault of a plan or command, until the next plan or a person's command
        self._command_fault: str | None = None  # of the last period; a plan that came since does not end it unseen
        self._lost: set[int] = set()  # arms of which no observation has been accepted since they failed to respond

    def run(self, seconds: float, over: Callable[[], bool] = lambda: False) -> RunReport:
        """Run for the given seconds of the robot's clock, or until `over`; then brake, and stop the robot.

        The report's time ends before the braking.

        Raises:
            RobotLostError: The robot does not respond at the start; nothing has moved.
        """
        robot, period = self.robot, 1.0 / self.robot.control_hz
        self._rest(robot.observe(images=False))
        start = due = now = robot.now()
        ticks = late = corrected = 0
        try:
            # `over` also sees the state at the end of the seconds, before the arm brakes
            while not over() and now - start < seconds - 1e-9:
                tick = self._tick(now, max(0.0, now - due))
                ticks += 1
                late += tick.late_s > 0.5 * period
                corrected += tick.corrected
                # lost time is not caught up, because the arm would exceed its limits
                due = max(due, now) + period
                if tick.state is State.STOPPED:
                    break
                robot.wait_until(due)
                now = robot.now()
            ended = robot.now()
            self._come_to_rest(due)
        finally:
            robot.stop()
        state = self.watchdog.state
        return RunReport(
            state,
            self.watchdog.reason if state is State.STOPPED else None,
            ended - start,
            ticks,
            self.execution.plans,
            self.execution.joint_plans,
            list(self.execution.held_back),
            list(self.execution.all_latencies),
            [(moment - start, state, reason) for moment, state, reason in self.watchdog.events],
            late,
            corrected,
        )

    # ---- one period --------------------------------------------------------------------------------------------------

    def _tick(self, now: float, late_s: float) -> Tick:
        self.execution.discard(now)
        images = self.execution.wants_plan(now) or self.recorder is not None
        observation, fault = self._observe(now, images)
        correction: Correction | None = None
        if self.takeover is not None:
            try:
                if fault is None:
                    correction = self.takeover.read(now, self._command)
                else:  # what is pressed during a fault must not act after it
                    read_unheeded(self.takeover, now, self._command)
            except TakeoverLostError as error:
                fault = fault or str(error)
        if correction is None:  # with a person's command no plan is needed
            fault = fault or self._stuck_fault(now)
        target: np.ndarray | None = None
        if fault is not None:
            self.execution.drop()
        elif correction is not None:
            target = self._apply_correction(correction)
        else:
            target = self._follow(observation, now, images)
        state = self.watchdog.update(now, fault or self._command_fault or self._plan_fault)
        self._command_fault = None
        if state is not State.RUNNING:
            target = None
        self._send(target, correction)
        if correction is not None:
            self.execution.reset_gripper(self._command[:, 7])
        # frames seen while the arm was held are recorded too; otherwise the poses before and after would be adjacent
        if self.recorder is not None and "image" in observation and state is not State.STOPPED:
            self.recorder.add(observation, self._command, correction is not None and state is State.RUNNING, now)
        target_poses = None if target is None else target[:, :POSE]
        tick = Tick(now, target_poses, self._command.copy(), state, correction is not None, late_s)
        if self.on_tick is not None:
            self.on_tick(tick)
        if state is State.STOPPED:
            log.error("stopped: %s", self.watchdog.reason)
        return tick

    def _observe(self, now: float, images: bool) -> tuple[dict[str, Any], str | None]:
        """Return the current observation, empty if it cannot be used, and the fault or None."""
        arm_first = bool(self._lost) and images
        try:
            # a lost arm is observed without images first: a camera that is lost or old too would hide where the arm is
            observation = self.robot.observe(images=images and not arm_first)
            fault = self._observation_fault(observation)
            if arm_first and fault is None:
                observation = self.robot.observe(images=True)
                fault = self._observation_fault(observation)
        except RobotLostError as error:
            if not isinstance(error, CameraLostError):
                self._lost |= self._lost_arms(error)
            return {}, f"lost the robot: {error}"
        return (observation, None) if fault is None else ({}, fault)

    def _observation_fault(self, observation: dict[str, Any]) -> str | None:
        """Return why an observation cannot be used, or None. A lost arm is set at rest where it is observed; the other
        arms continue to brake."""
        for name in ("position", "quaternion", "gripper"):
            if not np.isfinite(np.asarray(observation[name], float)).all():
                return f"the observation's {name} is not finite"
        if self._lost:
            # the arm may have sunk or been pushed meanwhile; from the old command it would jump, also in a hold
            self._rest_lost(observation)
        # a driver that hangs, or waits for a camera, makes it old
        age = self.robot.now() - float(observation["time_s"])
        if not age >= -1.0 / self.robot.control_hz:  # also true for NaN
            return f"the observation is {-age:.2f} s ahead of the robot's clock"
        if age > self.watchdog.settings.stale_seconds:
            return f"stale observation: {age:.2f} s old"
        self._lost.clear()
        return None

    def _stuck_fault(self, now: float) -> str | None:
        """Return the fault of a plan that takes too long."""
        busy = self.execution.planner.busy_since
        if busy is not None and now - busy > self.watchdog.settings.stuck_seconds:
            return f"stuck policy: a plan has taken {now - busy:.1f} s"
        return None

    def _follow(self, observation: dict[str, Any], now: float, images: bool) -> np.ndarray | None:
        """Return the plan's target for this period; None if the plan has a fault."""
        command = self._command
        if self._jointed is not None:
            command = np.concatenate([command, self._jointed.commanded_joints], axis=1)
        try:
            target = self.execution.target(observation, now, command, may_ask=images)
        except ConnectionError as error:
            self._plan_fault = f"lost the policy: {error}"
        except UnsafePlanError as error:
            self._plan_fault = f"unsafe plan: {error}"
        except Exception as error:
            self._plan_fault = f"the policy failed: {type(error).__name__}: {error}"
        else:
            if self.execution.has_plan:
                self._plan_fault = None
            return target
        self.execution.drop()
        return None

    def _apply_correction(self, correction: Correction) -> np.ndarray:
        self.execution.drop()
        self._plan_fault = self._command_fault = None
        return moved_by(self._command, correction, 1.0 / self.robot.control_hz)

    # ---- motion ------------------------------------------------------------------------------------------------------

    def _rest(self, observation: dict[str, Any]) -> None:
        """Set all arms at rest at their observed poses and openings."""
        self._command = observed_poses(observation)
        if self.limits is not None:
            self._motions = [LimitedMotion(self.limits, pose) for pose in self._command]

    def _rest_lost(self, observation: dict[str, Any]) -> None:
        """Set the lost arms at rest at their observed poses, with the commanded openings: the observed opening is wider
        than the command while an object is held."""
        lost = sorted(self._lost)
        command = self._command.copy()
        command[lost, :7] = observed_poses(observation)[lost, :7]
        self._command = command
        self._reset_motions(lost)

    def _send(self, target: np.ndarray | None, correction: Correction | None = None) -> None:
        """Send the limited command towards a target [A, 8], or [A, 8 + J] with its joints. None: brake and hold.

        Args:
            correction: of which `target` is the target: the arm takes its velocity.
        """
        period, joints = 1.0 / self.robot.control_hz, None
        if target is not None and target.shape[1] > POSE:
            target, joints = target[:, :POSE], target[:, POSE:]
        # a motion replaces its arrays and never changes them in place
        previous_motions = [copy(motion) for motion in self._motions]
        if self.limits is None:
            command = self._command if target is None else target
        elif target is None:
            command = np.stack([motion.hold(period) for motion in self._motions])
        else:
            command = np.stack(
                [
                    motion.step(pose, period)
                    if correction is None or arm != correction.arm
                    else motion.drive(correction.velocity, correction.turn, float(pose[7]), period)
                    for arm, (motion, pose) in enumerate(zip(self._motions, target, strict=True))
                ]
            )
        try:
            self._command_robot(command, joints)
        except JointMotionError as error:
            self._refused(f"unsafe command: {error}")
            self._reset_motions(range(len(self._motions)))
            if previous_motions and target is not None:
                self._brake(previous_motions)

    def _come_to_rest(self, due: float) -> None:
        """Brake within the limits at the end of a run, period by period; without limits, do nothing.

        This takes at most as long as braking from the largest speed, and at most as long as a hold. A command that is
        refused, or that the robot does not answer, ends it; if only some arms do not answer, the others brake.

        Args:
            due: begin of the first of these periods, on the robot's clock.
        """
        if self.limits is None or self._at_rest():
            return
        robot, period = self.robot, 1.0 / self.robot.control_hz
        self._plan_fault = None
        until = due + self.watchdog.settings.hold_seconds
        for _ in range(math.ceil(self.limits.braking_s * robot.control_hz) + 1):
            robot.wait_until(due)
            self._send(None)
            due = max(due, robot.now()) + period
            if self._at_rest() or due >= until:
                break
        robot.wait_until(due)
        if self._plan_fault is not None:
            log.error("the run ended, and the arm was not braked within the limits: %s", self._plan_fault)

    def _at_rest(self) -> bool:
        return all(motion.at_rest for motion in self._motions)

    def _command_robot(self, command: np.ndarray, joints: np.ndarray | None) -> None:
        """Send poses [A, 8], with joints [A, J] if a plan has them, and keep the commanded tool poses: those of the
        planned joints, and behind the command if the joint speed limit held them back. An arm that does not respond
        stays at rest under its last command."""
        try:
            if self._jointed is None:
                self.robot.command(command)
            else:
                self._jointed.command(command, joints)
        except RobotLostError as error:
            self._refused(f"lost the robot: {error}")
            lost = sorted(self._lost_arms(error))
            self._lost.update(lost)
            if len(lost) < len(command):
                accepted = self._commanded_poses(command, joints).copy()
                accepted[lost] = self._command[lost]
                self._command = accepted
            self._reset_motions(lost)
        else:
            self._command = self._commanded_poses(command, joints)

    def _commanded_poses(self, command: np.ndarray, joints: np.ndarray | None) -> np.ndarray:
        """Return [A, 8] the tool poses of a command that was sent."""
        robot = self._jointed
        if robot is None:
            return command
        reached = robot.poses_at(robot.commanded_joints)
        bounds: ArmMotions | None = getattr(robot, "joint_motion", None)
        arms_behind = _differs_from_command(reached, command) if bounds is None else bounds.held_back
        command = held_back(command, reached, arms_behind, self._motions, 1.0 / self.robot.control_hz)
        return command if joints is None else np.concatenate([reached, command[:, 7:]], axis=1)

    def _brake(self, motions: list[LimitedMotion]) -> None:
        """In the period of a refused command, brake from the motions before it. If this command is refused too, the arm
        stays under the last command."""
        self._motions = motions
        period = 1.0 / self.robot.control_hz
        try:
            self._command_robot(np.stack([motion.hold(period) for motion in motions]), None)
        except JointMotionError:
            self._reset_motions(range(len(motions)))

    def _lost_arms(self, error: RobotLostError) -> set[int]:
        return set(range(len(self._command)) if error.arms is None else error.arms)

    def _refused(self, fault: str) -> None:
        self._plan_fault = self._command_fault = fault
        self.execution.drop()

    def _reset_motions(self, arms: Iterable[int]) -> None:
        """Set the limited motion of these arms at rest at their last command."""
        if self._motions:  # without limits there are none
            for arm in arms:
                self._motions[arm].reset(self._command[arm])

    def _accept(self, plan: Plan, now: float) -> None:
        """Refuse a plan that cannot be followed from here. Of the steps that have passed only the last is checked, from
        which commands are interpolated."""
        if self.limits is None:
            return
        assert plan.time_s is not None
        steps = plan.gripper.shape[1]
        due = max(int(np.floor((now - plan.time_s) / plan.step_seconds + 1e-6)), 0)
        first = min(due, steps - 1)
        begin = max(first - 1, 0) if due < steps else first  # after its end a plan stays at its last step
        remaining = replace(
            plan,
            position=plan.position[:, begin:],
            quaternion=plan.quaternion[:, begin:],
            gripper=plan.gripper[:, begin:],
        )
        refuse_unsafe(remaining, self._motions, self.robot.control_hz, passed=first - begin)


def _differs_from_command(reached_poses: np.ndarray, command: np.ndarray) -> np.ndarray:
    """Return [A] whether tools at [A, 7] differ from the command [A, 8]."""
    actual, commanded = (Rotation.from_quat(poses[:, 3:7], scalar_first=True) for poses in (reached_poses, command))
    distance = np.linalg.norm(reached_poses[:, :3] - command[:, :3], axis=1)
    return np.asarray((distance > BESIDE_M) | ((actual.inv() * commanded).magnitude() > BESIDE_RAD))
