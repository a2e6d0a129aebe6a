"""Asynchronous chunk execution: the arm moves along the current plan while the next plan is computed.

A plan contains the arm's poses k steps after its observation. It arrives later than the observation, so its first steps
have already passed. If the plan were executed from its first step, the arm would lag behind by the latency. So commands
are interpolated from the plan at the current time, and a new plan is blended with the current one. The next plan is
requested early by the measured latency, so that it arrives when the executed part ends.

Shape legend: A arms, T planned steps, W = 8 values of a pose with gripper opening, or more if joints are followed and
come after them (:mod:`keygrip.runtime.plan_terms`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from keygrip.models.policy import Observation, Plan, UnderWay, held_back_m
from keygrip.robots.joint_arms import JointArms
from keygrip.runtime.plan_terms import (
    POSE,
    Follow,
    as_followed,
    check_follow,
    complete_command,
    observed_poses,
    waypoints_of,
)
from keygrip.runtime.planners import Planner, PlanOutcome, PlanRequest
from keygrip.runtime.trajectory import (
    ROUNDING_S,
    Trajectory,
    blended,
    check_grip,
    executed_steps,
    gripped,
    initial_grip,
)

LATENCIES_KEPT = 8  # the expected latency of the next plan is the largest of this many


@dataclass
class ChunkExecution:
    """Convert plans to one target pose for each control period, on the robot's clock.

    Args:
        planner: computes plans. control_hz: commands per second.
        asynchronous: the arm moves while a plan is computed. False: it holds, and the plan starts when it arrives.
        execute_seconds: how long a plan is followed after its observation (after its arrival if the arm holds).
        blend_seconds: time over which a new plan replaces the current one; not used if the arm holds.
        still_distance_m: a plan whose executed part moves less than this is followed further (up to its last step but
            one), as in :class:`~keygrip.runtime.chunk_execution.RecedingHorizon`.
        grip_below, release_above: dead band of the gripper's command; None: the predicted opening is sent unchanged.
        continue_chunks: real-time chunking: the policy is given the current plan and continues it (flow-matching
            policies only; others are refused).
        follow: what is followed if a plan holds joints as well as poses: joints, poses, or auto (joints if the arms
            accept them).
        accept: called with every plan, converted to what is followed, and the current time before the plan is used;
            raises ValueError to refuse it.
        arms: set by the sender of the commands if the arms accept joints.
        joint_plans: how many of `plans` were followed by their joints.
        held_back: for each of `plans`, the largest distance in metres by which the policy clamped it, 0: none; empty if
            the policy clamps none.
    """

    planner: Planner
    control_hz: float
    asynchronous: bool = True
    execute_seconds: float = 1.2
    blend_seconds: float = 0.2
    still_distance_m: float = 0.015
    grip_below: float | None = 0.4
    release_above: float | None = 0.6
    continue_chunks: bool = False
    follow: Follow = "auto"
    accept: Callable[[Plan, float], None] | None = None
    arms: JointArms | None = field(default=None, init=False)
    plans: int = field(default=0, init=False)
    joint_plans: int = field(default=0, init=False)
    held_back: list[float] = field(default_factory=list, init=False)
    last_plan: Plan | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_follow(self.follow, "execution.follow")
        for name, least in (("execute_seconds", 1e-3), ("blend_seconds", 0.0), ("still_distance_m", 0.0)):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= least):
                raise ValueError(f"execution.{name} is at least {least:g}, got {value}")
        check_grip(self.grip_below, self.release_above, "execution")
        self._waits: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self.all_latencies: list[float] = []
        self._asked_from: np.ndarray | None = None
        self._outdated = False
        self.reset()

    def reset(self) -> None:
        """Forget the current plan and the gripper's state. Call it at the start of an episode."""
        self._gripper: np.ndarray | None = None
        self._target: np.ndarray | None = None
        self.plans, self.joint_plans, self.held_back, self.last_plan = 0, 0, [], None
        self.drop()

    def reset_gripper(self, opening: np.ndarray) -> None:
        """Set the gripper's command [A] after another controller has changed it."""
        self._gripper = initial_grip(opening, self.grip_below)

    def drop(self) -> None:
        """Forget the current plan and any plan being computed: the arm was held, or moved by another controller."""
        self._current: Trajectory | None = None
        self._previous: Trajectory | None = None
        self._blend_from = self._due = 0.0
        self._target = None
        self._outdated = self.planner.busy_since is not None

    def discard(self, now: float) -> None:
        """Remove a plan requested before `drop` from the planner once it is ready, so that the next can be requested.
        Call it in every control period, also while the arm is held or moved by another controller."""
        if self._outdated and self.planner.poll(now) is not None:
            self._outdated = False

    @property
    def has_plan(self) -> bool:
        """Whether a plan is being followed."""
        return self._current is not None

    @property
    def expected_latency_s(self) -> float:
        """Expected time of the next plan from observation to arrival: the largest of the last few."""
        return max(self.all_latencies[-LATENCIES_KEPT:], default=0.0)

    @property
    def expected_wait_s(self) -> float:
        """Expected time of the next plan from request to arrival: the latency without the age of the observation,
        because the request cannot be earlier."""
        return max(self._waits, default=0.0)

    def wants_plan(self, now: float) -> bool:
        """Return whether the next `target` requests a plan and so needs camera images."""
        if self.planner.busy_since is not None:
            return False
        lead = self.expected_wait_s if self.asynchronous else 0.0
        return self._current is None or now >= self._due - lead - ROUNDING_S

    def target(
        self, observation: Observation, now: float, commanded: np.ndarray | None = None, may_ask: bool = True
    ) -> np.ndarray:
        """Return the target poses [A, W] one control period from now; the current pose if there is no plan.

        Args:
            observation: the current one; it needs images if `wants_plan`.
            commanded: [A, 8] the last command, where a plan starts; with `arms`, [A, 8 + J] with their joints. None:
                the last target, or the observed pose, if the arms accept no joints.
            may_ask: False: the observation has no images, and the next plan is requested one period later.

        Raises:
            ValueError: The policy has no plan for its observation, or `accept` refuses it. Exception: any other error
                of the policy. Hold the arm and call `drop` then.
        """
        if commanded is not None:
            self._target = np.array(commanded, float)
        elif self._target is None:
            self._target = observed_poses(observation)
        if self._gripper is None:
            self.reset_gripper(self._target[:, 7])
        self._take(self.planner.poll(now), now)
        if may_ask and self.wants_plan(now):
            self._ask(observation, now)
            self._take(self.planner.poll(now), now)
        if self._current is None:
            return self._target[:, :POSE].copy()
        self._target = self._read(now + 1.0 / self.control_hz)
        return self._target.copy()

    def _ask(self, observation: Observation, now: float) -> None:
        assert self._target is not None
        executing = self.last_plan if self.continue_chunks and self._current is not None else None
        under_way = None if executing is None else UnderWay(executing, self.expected_latency_s)
        self._asked_from, self._outdated = self._target.copy(), False
        self.planner.request(PlanRequest(observation, now, under_way))

    def _take(self, outcome: PlanOutcome | None, now: float) -> None:
        if outcome is None:
            return
        if self._outdated:
            self._outdated = False
            return
        if outcome.error is not None:
            raise outcome.error
        assert outcome.plan is not None
        observed_s = float(outcome.request.observation.get("time_s", outcome.request.time_s))
        self._waits.append(now - outcome.request.time_s)
        self.all_latencies.append(now - observed_s)
        plan = replace(outcome.plan, time_s=observed_s if self.asynchronous else now)
        in_terms = as_followed(plan, self.follow, self.arms)
        if self.accept is not None:
            self.accept(in_terms, now)
        self._follow(in_terms, now)
        self.plans, self.last_plan = self.plans + 1, plan
        self.joint_plans += in_terms.joints is not None
        if (held := held_back_m(plan)) is not None:
            self.held_back.append(held)

    def _follow(self, plan: Plan, now: float) -> None:
        assert plan.time_s is not None
        assert self._asked_from is not None
        assert self._target is not None
        assert self._gripper is not None
        anchor = self._asked_from if self.asynchronous else self._target
        steps = plan.gripper.shape[1]
        times = plan.time_s + plan.step_seconds * np.arange(steps + 1)
        waypoints = waypoints_of(plan).transpose(1, 0, 2)  # [T, A, W]
        poses = np.concatenate([anchor[None, :, : waypoints.shape[2]], waypoints])
        # the last commanded opening: the gripper may still be moving, and the plan may be older
        poses[0, :, 7] = self._gripper
        self._previous = self._current if self.asynchronous else None
        self._current, self._blend_from = Trajectory(times, poses, self.arms), now
        self._due = plan.time_s + plan.step_seconds * self.steps_followed(plan, poses[0])

    def steps_followed(self, plan: Plan, start: np.ndarray) -> int:
        """Return how many steps of a plan are followed from poses [A, 7 or more] before the next plan replaces it."""
        positions = np.concatenate([start[None, :, :3], plan.position.transpose(1, 0, 2)])
        execute = max(1, round(self.execute_seconds / plan.step_seconds))
        return executed_steps(positions, execute, self.still_distance_m)

    def _read(self, moment: float) -> np.ndarray:
        assert self._current is not None
        assert self._gripper is not None
        if not self.asynchronous:
            moment = min(moment, self._due)  # holds there until the next plan arrives
        pose = self._current.at(moment)
        if self._previous is not None:
            previous_pose = self._previous.at(moment)
            first_step_reached = moment >= self._current.times[1] - ROUNDING_S
            # otherwise plans that replace each other within a step would never move the gripper
            if not first_step_reached:
                pose[:, 7] = previous_pose[:, 7]
            share = (moment - self._blend_from) / self.blend_seconds if self.blend_seconds > 0 else 1.0
            if share < 1:
                pose = complete_command(blended(previous_pose, pose, share), self.arms)
            elif first_step_reached:
                self._previous = None
        pose[:, 7] = gripped(pose[:, 7], self._gripper, self.grip_below, self.release_above)
        self._gripper = pose[:, 7].copy()
        return pose
