"""Asynchronous chunk execution: plans carry their observation's time; the arm moves while the next one is computed.

A plan says where the arm shall be k steps after its observation. It arrives later than that: its first steps have
passed. Executed by the clock, what is left of it is right; executed from its start, the arm would lag behind by the
latency. So commands are read off the plan at their own time, and a new plan is blended with the one under way. The
next plan is asked for early by the latency that was measured, so that it arrives when the executed part ends.

Shape legend: A arms, T planned steps, W = 8 numbers of a pose with its opening, or more with the joints behind them
where these are followed (:mod:`keygrip.runtime.plan_terms`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from keygrip.models.policy import Observation, Plan, UnderWay, held_back_m
from keygrip.robots.joint_arms import JointArms
from keygrip.runtime.plan_terms import POSE, Follow, check_follow, followed, observed_poses, placed, waypoints_of
from keygrip.runtime.planners import Planner, PlanOutcome, PlanRequest
from keygrip.runtime.trajectory import ROUNDING_S, Trajectory, blended, check_grip, executed_steps, gripped

LATENCIES_KEPT = 8  # the next plan is expected to take as long as the slowest of this many


@dataclass
class ChunkExecution:
    """Turns plans into one target pose for each control period, on the robot's clock.

    Args:
        planner: computes plans. control_hz: commands per second.
        asynchronous: the arm moves on while a plan is computed. False: it holds, and the plan starts when it arrives.
        execute_seconds: a plan is followed for so long after its observation (after its arrival where the arm holds).
        blend_seconds: over which a new plan replaces the one under way.
        still_distance_m: a plan whose executed part moves less than this is followed further (up to its last step but
            one), as in :class:`~keygrip.runtime.chunk_execution.RecedingHorizon`.
        grip_below, release_above: dead band of the gripper's command; None: the predicted opening is sent as it is.
        continue_chunks: real-time chunking: the policy is given the plan under way and continues it (flow-matching
            policies; others are refused).
        follow: what of a plan that holds joints beside its poses: joints, poses, or auto, the joints where the arms
            take them.
        accept: called with every plan, in the terms in which it is followed, and the present time before it is used;
            raises ValueError to refuse it.
        arms: set by whoever sends the commands, where the arms take joints.
        joint_plans: how many of `plans` were followed by their joints.
        held_back: by how many metres at most the policy held each of `plans` back, 0: not at all; empty where it holds
            none back.
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
        """Forget the running plan and the gripper's state: call it at the start of an episode."""
        self._gripper: np.ndarray | None = None
        self._target: np.ndarray | None = None
        self.plans, self.joint_plans, self.held_back, self.last_plan = 0, 0, [], None
        self.drop()

    def reset_gripper(self, opening: np.ndarray) -> None:
        """Sets the gripper's command [A] after another controller has changed it."""
        self._gripper = np.array(opening) if self.grip_below is None else np.where(opening < 0.5, 0.0, 1.0)

    def drop(self) -> None:
        """Forget the running plan, and the one being computed: the arm was held, or moved by another controller."""
        self._current: Trajectory | None = None
        self._previous: Trajectory | None = None
        self._blend_from = self._due = 0.0
        self._target = None
        self._outdated = self.planner.busy_since is not None

    def discard(self, now: float) -> None:
        """Takes a plan from before `drop` off the planner once it is ready, so that the next can be asked for: call it
        in every control period, also while the arm is held, or moved by another controller."""
        if self._outdated and self.planner.poll(now) is not None:
            self._outdated = False

    @property
    def has_plan(self) -> bool:
        """Whether a plan is being followed."""
        return self._current is not None

    @property
    def expected_latency_s(self) -> float:
        """Of the next plan, from its observation to its arrival: the longest of the last few."""
        return max(self.all_latencies[-LATENCIES_KEPT:], default=0.0)

    @property
    def expected_wait_s(self) -> float:
        """For the next plan, from the request to its arrival: the latency without the age of the observation, which
        the request cannot precede."""
        return max(self._waits, default=0.0)

    def wants_plan(self, now: float) -> bool:
        """Whether the next `target` asks for a plan and so reads the cameras."""
        if self.planner.busy_since is not None:
            return False
        lead = self.expected_wait_s if self.asynchronous else 0.0
        return self._current is None or now >= self._due - lead - ROUNDING_S

    def target(
        self, observation: Observation, now: float, commanded: np.ndarray | None = None, may_ask: bool = True
    ) -> np.ndarray:
        """Where the arms [A, W] shall be one control period from now; the present pose where there is no plan.

        Args:
            observation: of now; it needs images where `wants_plan`.
            commanded: [A, 8] the command that the arm is under, where a plan begins, with `arms` and their joints
                [A, 8 + J]; None: the last target, or the observed pose, of arms that take no joints.
            may_ask: False: the observation has no images, and the next plan is asked for a period later.

        Raises:
            ValueError: the policy has no plan for its observation, or `accept` refuses it. Exception: whatever else the
                policy ended with. Hold the arm and call `drop` then.
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
        in_terms = followed(plan, self.follow, self.arms)
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
        poses[0, :, 7] = self._gripper  # the last opening asked for: the command may be on its way, the plan be older
        self._previous = self._current if self.asynchronous else None
        self._current, self._blend_from = Trajectory(times, poses, self.arms), now
        self._due = plan.time_s + plan.step_seconds * self.steps_followed(plan, poses[0])

    def steps_followed(self, plan: Plan, start: np.ndarray) -> int:
        """How many steps of a plan are followed from poses [A, 7 or more] before the next plan replaces it."""
        positions = np.concatenate([start[None, :, :3], plan.position.transpose(1, 0, 2)])
        execute = max(1, round(self.execute_seconds / plan.step_seconds))
        return executed_steps(positions, execute, self.still_distance_m)

    def _read(self, moment: float) -> np.ndarray:
        assert self._current is not None
        assert self._gripper is not None
        if not self.asynchronous:
            moment = min(moment, self._due)  # holds there until the next plan has come
        pose = self._current.at(moment)
        if self._previous is not None:
            before = self._previous.at(moment)
            reached = moment >= self._current.times[1] - ROUNDING_S
            if not reached:  # plans that follow each other within a step would never move the gripper
                pose[:, 7] = before[:, 7]
            share = (moment - self._blend_from) / self.blend_seconds if self.blend_seconds > 0 else 1.0
            if share < 1:
                pose = placed(blended(before, pose, share), self.arms)
            elif reached:
                self._previous = None
        pose[:, 7] = gripped(pose[:, 7], self._gripper, self.grip_below, self.release_above)
        self._gripper = pose[:, 7].copy()
        return pose
