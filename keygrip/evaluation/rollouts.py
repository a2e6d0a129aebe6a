"""Run one episode: a policy drives an environment through a controller. Imports neither torch nor a simulator, so that
workers in another Python environment run the same loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.envs.environment import Environment, JointEnvironment, open_environment
from keygrip.evaluation.rollout_video import RolloutVideo
from keygrip.models.policy import LONGEST_INSTRUCTION, Needs, arm_axis, held_back_m, views_or_none
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.runtime.plan_terms import POSE, Follow, refuse_idle_follow

VIDEO_HZ = 10.0  # maximum frames per second of a video: rendering takes most of an episode's time


@dataclass(frozen=True)
class EpisodeResult:
    """One episode.

    Attributes:
        failure: None on success, else missed, dropped, wrong_place, wrong_object, unreachable, timeout, or policy_error
            (the policy could not plan).
        seconds: simulated time. plans: number of plans. joint_plans: how many of them were followed by their joints.
            plan_ms: median planning time.
        yaw_error_deg: of the first grasp, if there was one. video: file name, if one was written.
        clamped_plans: how many of `plans` the policy clamped to the positions seen in training; clamped_most_m: the
            largest distance along an axis. None: the policy does not clamp.
        instruction: of the task. colour: of the object to move. height_cm: of the surface under it.
    """

    seed: int
    success: bool
    failure: str | None
    seconds: float
    plans: int
    plan_ms: float
    yaw_error_deg: float | None
    video: str | None
    detail: str | None = None
    instruction: str = ""
    colour: str = ""
    height_cm: float = 0.0
    joint_plans: int = 0
    clamped_plans: int | None = None
    clamped_most_m: float | None = None


def run_episode(
    environment: Environment,
    policy: Any,
    control: Callable[..., RecedingHorizon],
    seed: int,
    video: Path | None = None,
) -> EpisodeResult:
    """Run the episode of a seed until success or its end.

    Args:
        environment: is reset here. policy: computes plans; reset with the seed if it has `reset`.
        control: the controller, without policy and rate. video: the file for the episode's video, or None.

    Raises:
        ValueError: The environment does not provide the policy's inputs, or cannot follow the controller's commands.
            This is not counted as a failed episode.
    """
    timed = _TimedPolicy(policy)
    controller = control(policy=timed, control_hz=environment.hz)
    jointed = environment if isinstance(environment, JointEnvironment) else None
    refuse_idle_follow(controller.follow, "control.follow", getattr(policy, "needs", None), jointed is not None)
    controller.arms = jointed
    if hasattr(policy, "reset"):
        policy.reset(seed)
    observation, info = environment.reset(seed=seed)
    if (needs := getattr(policy, "needs", None)) is not None:
        _refuse_unfit(environment, observation, needs)
    recording, draw_every = None, max(1, round(environment.hz / VIDEO_HZ))
    if video is not None:
        recording = RolloutVideo(video, environment.hz / draw_every, info["instruction"])
    steps, over, failure, detail = 0, False, None, None
    while not over:
        if needs is not None and needs.instruction:
            _refuse_unfit_instruction(observation)  # an environment may change it during an episode
        try:
            action = controller.act(observation)
            if not np.isfinite(action).all():
                raise ValueError("the policy's plan is not finite")
        # no valid 3D point: the episode counts as policy_error and the evaluation continues
        except ValueError as error:
            failure, detail = "policy_error", str(error)
            break
        if recording is not None and steps % draw_every == 0:
            recording.add(observation, controller.last_plan)
        command = action[0] if len(action) == 1 else action
        if jointed is None or command.shape[-1] == POSE:
            environment.advance(command)
        else:
            jointed.advance(command[..., :POSE], command[..., POSE:])
        success, truncated, info = environment.outcome()
        steps += 1
        over = success or truncated
        is_recorded = recording is not None and (over or steps % draw_every == 0)
        if is_recorded or (controller.wants_observation and not over):
            observation = environment.observation()  # rendered only when needed: it takes most of an episode's time
    if recording is not None:
        recording.add(observation, controller.last_plan)
        recording.close()
    yaw = info.get("yaw_error_rad")
    return EpisodeResult(
        seed=seed,
        success=bool(info["success"]) and failure is None,
        failure=failure or info["failure_reason"],
        seconds=steps / environment.hz,
        plans=controller.plans,
        plan_ms=float(np.median(timed.milliseconds)) if timed.milliseconds else 0.0,
        yaw_error_deg=None if yaw is None else float(np.rad2deg(yaw)),
        video=None if video is None else video.name,
        detail=detail,
        instruction=info["instruction"],
        colour=info.get("object_colour", ""),
        height_cm=round(100 * info.get("object_height_m", 0.0), 2),
        joint_plans=controller.joint_plans,
        clamped_plans=sum(by > 0 for by in timed.held_back) if timed.held_back else None,
        clamped_most_m=round(max(timed.held_back), 5) if timed.held_back else None,
    )


def check_environment(
    task: Any,
    image_size: int,
    hz: float,
    cameras: tuple[str, ...] | None,
    seed: int,
    needs: Needs | None,
    follow: Follow = "auto",
) -> None:
    """Open an environment and check its observation at the start of an episode.

    Args:
        task, image_size, hz, cameras: as in `open_environment`. needs: of the policy; None: unknown.
        follow: of the controller.

    Raises:
        ValueError: The environment refuses its settings, does not provide the policy's inputs, or cannot follow
            `follow`.
    """
    environment = open_environment(task, image_size, hz, cameras)
    try:
        refuse_idle_follow(follow, "control.follow", needs, isinstance(environment, JointEnvironment))
        observation, _ = environment.reset(seed=seed)
        if needs is not None:
            _refuse_unfit(environment, observation, needs)
    finally:
        environment.close()


def _refuse_unfit(environment: Environment, observation: Any, needs: Needs) -> None:
    views_or_none(observation, needs.cameras)
    if needs.instruction:
        _refuse_unfit_instruction(observation)
    arms = len(arm_axis(observation["position"], 1))
    if arms != len(needs.arms):
        raise ValueError(
            f"the environment has {arms} arms, the policy moves {len(needs.arms)}: {', '.join(needs.arms)}"
        )
    # with one arm the names may differ; in other environments `arms` may be something else
    arm_names = getattr(environment, "arms", None) if arms > 1 else None
    order = list(arm_names) if isinstance(arm_names, Iterable) and not isinstance(arm_names, str) else []
    if not all(isinstance(name, str) for name in order):
        return
    if list(needs.arms) != order and sorted(needs.arms) == sorted(order):
        raise ValueError(
            f"the policy's arms are {', '.join(needs.arms)} in this order, the environment gives {', '.join(order)}: "
            f"plans would move the wrong arm; train with data.arms=[{','.join(order)}]"
        )


def _refuse_unfit_instruction(observation: Any) -> None:
    """Refuse an instruction that a policy server would refuse, wherever the policy plans. Otherwise the same episodes
    would succeed in one process and be failures of the policy in several."""
    text = str(observation.get("instruction") or "")
    if not text.strip():
        raise ValueError(
            "the environment gives no instruction, and this policy needs one: its info needs `instruction` "
            "(of env=gymnasium, env.task.instruction=... gives one)"
        )
    if (size := len(text.encode(errors="replace"))) > LONGEST_INSTRUCTION:
        raise ValueError(
            f"the environment's instruction has {size} bytes, more than {LONGEST_INSTRUCTION}: give one sentence in "
            "`instruction` of its info"
        )
    if not text.isprintable():
        raise ValueError(
            f"the environment's instruction {text!r} holds characters that are not printable, such as line breaks, "
            "tabs or no-break spaces: give one line with ordinary spaces in `instruction` of its info"
        )


class _TimedPolicy:
    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.milliseconds: list[float] = []
        self.held_back: list[float] = []

    def plan(self, observation: Any) -> Any:
        started = time.perf_counter()
        plan = self.policy.plan(observation)
        self.milliseconds.append((time.perf_counter() - started) * 1e3)
        distance = held_back_m(plan)
        if distance is not None:
            self.held_back.append(distance)
        return plan
