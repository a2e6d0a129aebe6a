"""From plans to commands: receding horizon and temporal ensembling, for every policy of keygrip.

A policy looks at one observation and gives a :class:`~keygrip.models.policy.Plan`, a few future poses some tenths of a
second apart. A controller decides when to plan again and turns the plan into one command for each control period.

Shape legend: A arms, W = 8 numbers of a pose with its opening, or more with the joints behind them where these are
followed (:mod:`keygrip.runtime.plan_terms`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.models.policy import Observation, Plan, Policy, arm_axis
from keygrip.robots.joint_arms import JointArms
from keygrip.runtime.plan_terms import POSE, Follow, check_follow, followed, observed_poses, placed, waypoints_of
from keygrip.runtime.trajectory import Trajectory, check_grip, control_periods, executed_steps, gripped
from keygrip.training.parts import ReadWhere


@dataclass
class RecedingHorizon:
    """Execute the first part of a plan, then plan again; the arm waits while the policy computes.

    Args:
        policy: gives the plans.
        control_hz: commands per second.
        execute_seconds: of a plan that are executed before the next one, rounded to whole steps of the plan (at least
            one).
        still_distance_m: a plan whose executed part moves less than this is followed further (up to its last step but
            one): where a demonstration pauses, e.g. while the gripper closes, a short look ahead never gets past the
            pause. 0 switches this off.
        ensemble: average each step with the poses that earlier plans predicted for the same time, weighted by
            ``exp(-ensemble_decay * age in plans)``: the newest plan counts most, where Zhao et al. ("Learning
            Fine-Grained Bimanual Manipulation with Low-Cost Hardware", 2023) let the oldest count most; a negative
            decay does as they do. Needs ``execute_seconds`` shorter than the plan to have any effect.
        grip_below, release_above: the gripper is commanded shut below the one and open above the other, and keeps its
            state between: a half-open command does not hold an object. Equal None: the predicted opening is sent as it
                is.
        follow: what of a plan that holds joints beside its poses: joints, poses, or auto, the joints where the arms
            take them.
        arms: set by whoever sends the commands, where the arms take joints; observations then hold `joints`. Without
            them commands hold poses alone.
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
        """Forget the running plan: call it at the start of an episode."""
        self._queue: list[np.ndarray] = []
        self._commanded: np.ndarray | None = None  # [A, W] the last waypoint that was sent in full
        self._gripper: np.ndarray | None = None  # [A] commanded opening
        self._history: list[tuple[float, Plan]] = []  # start time in seconds and plan, newest last
        self._time = 0.0
        self.plans = self.joint_plans = 0
        self.last_plan = None

    @property
    def wants_observation(self) -> bool:
        """Whether the next `act` plans and so reads its observation; else an old one does, and none need be drawn."""
        return not self._queue

    def act(self, observation: Observation) -> np.ndarray:
        """The command for the next control period: ``[A, 8]`` position, quaternion wxyz, gripper opening; where joints
        are followed ``[A, 8 + J]``, the joints behind them.

        Raises:
            ValueError: the policy has no plan for the observation, or one that is refused.
        """
        if not self._queue:
            self._replan(observation)
        self._time += 1.0 / self.control_hz
        return self._queue.pop(0)

    def _replan(self, observation: Observation) -> None:
        plan = self.policy.plan(observation)
        self.plans += 1
        self.last_plan = plan
        plan = followed(plan, self.follow, self.arms)
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
        # read off by time: the steps of a plan need not be whole control periods
        way = Trajectory(plan.step_seconds * np.arange(len(poses)), poses, self.arms)
        periods = control_periods(way.times[-1], self.control_hz)
        self._queue.extend(way.at(tick / self.control_hz) for tick in range(1, periods + 1))

    def _waypoint(self, plan: Plan, step: int) -> np.ndarray:
        """The waypoint ``[A, W]`` of one step, ensembled if asked for."""
        if self.ensemble and len(self._history) > 1:
            return placed(self._ensembled(plan, step), self.arms)
        return waypoints_of(plan)[:, step]

    def _ensembled(self, plan: Plan, step: int) -> np.ndarray:
        moment = self._time + (step + 1) * plan.step_seconds
        poses, weights = [], []
        for age, (start, old) in enumerate(reversed(self._history)):
            if plan.joints is not None and old.joints is None:
                continue  # it says nothing of joints
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
