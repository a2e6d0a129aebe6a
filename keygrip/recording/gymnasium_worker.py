"""Record a gymnasium environment's scripted expert; run by `keygrip.recording.gymnasium`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.data.robot.native_writer import ArmPose, CameraPose, DemoWriter
from keygrip.envs.gymnasium_environment import GymnasiumEnvironment, GymnasiumTask
from keygrip.envs.workers import serve_jobs
from keygrip.models.policy import arm_axis
from keygrip.recording.recorded_folder import demo_name

ARMS = {1: ("right",), 2: GymnasiumEnvironment.arms}  # names by number of arms, in the order of the axis of arms
CAMERA = "camera"  # the name of an unnamed camera


def start(settings: dict[str, Any]) -> Callable[[dict[str, Any]], Iterator[dict[str, Any]]]:
    """Return the function that records the episode of a seed."""
    task = GymnasiumTask(**settings["task"])
    cameras = None if settings["cameras"] is None else tuple(settings["cameras"])
    environment = GymnasiumEnvironment(task, settings["image_size"], settings["hz"], cameras)

    def work(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        folder = Path(settings["root"]) / demo_name(task.name, job["seed"])
        yield {"seed": job["seed"], "success": record_episode(environment, folder, job["seed"], settings["video"])}

    return work


def record_episode(environment: GymnasiumEnvironment, folder: Path, seed: int, video: bool) -> bool:
    """Record the episode of a seed; return whether the expert succeeded (a failure leaves no folder).

    Row i holds the observation before the expert's i-th pose, and this pose as its command.

    Raises:
        ValueError: The expert's poses are not those of one arm or two, or the observation has another number of arms.
    """
    observation, info = environment.reset(seed=seed)
    task = environment.task
    source = {"simulator": task.id, "seed": seed, "success": True}
    success = over = False
    with DemoWriter(folder, task.id, task.name, info["instruction"], environment.hz, source, video=video) as writer:
        while not success and not over:
            action = environment.expert_action()
            if action is None:
                break
            poses = arm_axis(action, 1)  # [A, 8]
            if poses.shape[1:] != (8,) or len(poses) not in ARMS:
                raise ValueError(
                    f"expert_action() of {task.id} gave shape {action.shape}: a pose is 8 numbers, those of two arms "
                    "(left, right) are 2 x 8"
                )
            arms = ARMS[len(poses)]
            views = _select_views(observation, environment.cameras)
            writer.add(
                round(len(writer) * 1e9 / environment.hz),
                {name: np.asarray(view["image"]) for name, view in views.items()},
                {name: CameraPose(view["intrinsics"], view["world_to_camera"]) for name, view in views.items()},
                _poses_by_arm(arms, observation["position"], observation["quaternion"], observation["gripper"]),
                _poses_by_arm(arms, poses[:, :3], poses[:, 3:7], poses[:, 7]),
            )
            environment.advance(action)
            success, over, _ = environment.outcome()
            observation = environment.observation()
        if not success or len(writer) < 2:
            writer.discard()
            success = False
    return success


def _select_views(observation: Mapping[str, Any], cameras: tuple[str, ...] | None) -> dict[str, Mapping[str, Any]]:
    """Return the recorded cameras, by name."""
    views = observation.get("cameras")
    if not views:
        return {cameras[0] if cameras else CAMERA: observation}
    return {name: views[name] for name in cameras or views}


def _poses_by_arm(arms: tuple[str, ...], position: Any, quaternion: Any, gripper: Any) -> dict[str, ArmPose]:
    """Convert [A, 3], [A, 4] and [A] to poses by arm; with one arm the A axis may be omitted."""
    count = len(arms)
    if np.size(gripper) != count:
        raise ValueError(f"the observation has {np.size(gripper)} arms, and expert_action() moves {count}")
    places = np.array(position, dtype=np.float64).reshape(count, 3)
    turns = np.asarray(quaternion, dtype=np.float64).reshape(count, 4)
    turns = turns / np.linalg.norm(turns, axis=1, keepdims=True)
    openings = np.clip(np.asarray(gripper, dtype=np.float64).reshape(count), 0.0, 1.0)
    return {arm: ArmPose(places[i], turns[i], float(openings[i])) for i, arm in enumerate(arms)}


if __name__ == "__main__":
    serve_jobs(start)
