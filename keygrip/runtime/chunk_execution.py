"""Convert plans to commands: receding horizon and temporal ensembling, for every policy of keygrip.

A policy receives one observation and returns a :class:`~keygrip.models.policy.Plan`, a few future poses some tenths of
a second apart. A controller decides when to plan again and converts the plan to one command per control period.

Shape legend: A arms, W = 8 values of a pose with gripper opening, or more if joints are followed and come after them
(:mod:`keygrip.runtime.plan_terms`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.models.policy import Observation, Plan, Policy, arm_axis
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
from keygrip.runtime.trajectory import Trajectory, check_grip, control_periods, executed_steps, gripped
from keygrip.training.parts import ReadWhere


@dataclass
class RecedingHorizon:
    """Execute the first part of a plan, then plan again; the arm waits while the policy computes.

    Args:
        policy: computes the plans.
        control_hz: commands per second.
        execute_seconds: executed time of a plan before the next plan, rounded to whole steps of the plan (at least
            one).
        still_distance_m: a plan whose executed part moves less than this is followed further (up to its last step but
            one). If a demonstration pauses, e.g. while the gripper closes, a short executed part would never get past
            the pause. 0 switches this off.
        ensemble: average each step with the poses that earlier plans predicted for the same time, weighted by
            ``exp(-ensemble_decay * age in plans)``. The newest plan has the largest weight. In Zhao et al. ("Learning
            Fine-Grained Bimanual Manipulation with Low-Cost Hardware", 2023) the oldest has; a negative decay gives
            that. Needs ``execute_seconds`` shorter than the plan to have any effect.
        grip_below, release_above: the gripper is commanded closed below the first and open above the second, and its
            state does not change in between, because a half-open command does not hold an object. Both None: the
            predicted opening is sent unchanged.
        follow: what is followed if a plan holds joints as well as poses: joints, poses, or auto (joints if the arms
            accept them).
        arms: set by the sender of the commands if the arms accept joints; observations then hold `joints`. Without
            it, commands hold poses only.
        joint_plans: how many of `plans` were followed by their joints.
    """

    read_where: ClassVar = {"ensemble_decay": ReadWhere("ensemble")}
    policy: Policy
    control_hz: float
    execute_seconds: float = 1.2
    still_distance_m: float = 0.015
    ensemble: bool = False
    ensemble_decay: float = 0.5
    grip_below: float | None = 0.4
    release_above: float | None = 0.6
    follow: Follow = "auto"
    arms: JointArms | None = field(default=None, init=False)
    plans: int = field(default=0, init=False)
    joint_plans: int = field(default=0, init=False)
    last_plan: Plan | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_follow(self.follow, "control.follow")
        if not (np.isfinite(self.execute_seconds) and self.execute_seconds > 0):
            raise ValueError(f"control.execute_seconds is above 0, got {self.execute_seconds}.")
        check_grip(self.grip_below, self.release_above, "control")
        self.reset()

    def reset(self) -> None:
        """Forget the current plan. Call it at the start of an episode."""
        self._queue: list[np.ndarray] = []
        self._commanded: np.ndarray | None = None  # [A, W] the last waypoint of the plan, sent completely
        self._gripper: np.ndarray | None = None  # [A] commanded opening
        self._history: list[tuple[float, Plan]] = []  # start time in seconds and plan, newest last
        self._time = 0.0
        self.plans = self.joint_plans = 0
        self.last_plan = None

    @property
    def wants_observation(self) -> bool:
        """Whether the next `act` plans and so needs a new observation; otherwise an old one suffices, without
        rendering."""
        return not self._queue

    def act(self, observation: Observation) -> np.ndarray:
        """Return the command for the next control period: ``[A, 8]`` position, quaternion wxyz, gripper opening; if
        joints are followed ``[A, 8 + J]``, with the joints last.

        Raises:
            ValueError: The policy has no plan for the observation, or its plan is refused.
        """
        if not self._queue:
            self._replan(observation)
        self._time += 1.0 / self.control_hz
        return self._queue.pop(0)

    def _replan(self, observation: Observation) -> None:
        plan = self.policy.plan(observation)
        self.plans += 1
        self.last_plan = plan
        plan = as_followed(plan, self.follow, self.arms)
        self.joint_plans += plan.joints is not None
        self._history.append((self._time, plan))
        self._history = [
            (start, old) for start, old in self._history if start + old.gripper.shape[1] * old.step_seconds > self._time
        ]
        if self._commanded is None:
            self._commanded = observed_poses(observation)
            if self.grip_below is not None:
                self._gripper = self._commanded[:, 7] = np.where(self._commanded[:, 7] < 0.5, 0.0, 1.0)
        if plan.joints is None:
            self._commanded = self._commanded[:, :POSE]
        elif self._commanded.shape[1] == POSE:
            self._commanded = np.concatenate([self._commanded, arm_axis(observation["joints"], 1)], axis=1)
        waypoints = [self._waypoint(plan, step) for step in range(plan.gripper.shape[1])]
        poses = np.stack([self._commanded, *waypoints])
        execute = max(1, round(self.execute_seconds / plan.step_seconds))
        poses = poses[: executed_steps(poses[:, :, :3], execute, self.still_distance_m) + 1]
        if self._gripper is not None:
            for pose in poses[1:]:
                pose[:, 7] = self._gripper = gripped(pose[:, 7], self._gripper, self.grip_below, self.release_above)
        self._commanded = poses[-1]
        # sampled by time, because a step of a plan need not be a whole number of control periods
        trajectory = Trajectory(plan.step_seconds * np.arange(len(poses)), poses, self.arms)
        periods = control_periods(trajectory.times[-1], self.control_hz)
        self._queue.extend(trajectory.at(tick / self.control_hz) for tick in range(1, periods + 1))

    def _waypoint(self, plan: Plan, step: int) -> np.ndarray:
        """Return the waypoint ``[A, W]`` of one step, with ensembling if enabled."""
        if self.ensemble and len(self._history) > 1:
            return complete_command(self._ensemble_waypoint(plan, step), self.arms)
        return waypoints_of(plan)[:, step]

    def _ensemble_waypoint(self, plan: Plan, step: int) -> np.ndarray:
        moment = self._time + (step + 1) * plan.step_seconds
        poses, weights = [], []
        for age, (start, old) in enumerate(reversed(self._history)):
            if plan.joints is not None and old.joints is None:
                continue  # this plan has no joints
            index = (moment - start) / old.step_seconds - 1
            low = int(np.floor(index + 1e-9))
            if low < 0 or low > old.gripper.shape[1] - 1 or index > old.gripper.shape[1] - 1 + 1e-6:
                continue
            high, share = min(low + 1, old.gripper.shape[1] - 1), index - low
            poses.append((old, low, high, share))
            weights.append(np.exp(-self.ensemble_decay * age))
        weight = np.array(weights) / np.sum(weights)

        def mean(name: str) -> np.ndarray:
            values = [getattr(p, name)[:, a] * (1 - s) + getattr(p, name)[:, b] * s for p, a, b, s in poses]
            return np.einsum("n,n...->...", weight, np.stack(values))

        nearest = [p.quaternion[:, a if s < 0.5 else b] for p, a, b, s in poses]
        quaternion = np.stack(
            [
                Rotation.from_quat(np.stack([q[arm] for q in nearest]), scalar_first=True)
                .mean(weight)
                .as_quat(scalar_first=True)
                for arm in range(plan.position.shape[0])
            ]
        )
        parts = [mean("position"), quaternion, mean("gripper")[:, None]]
        return np.concatenate(parts if plan.joints is None else [*parts, mean("joints")], axis=1)
