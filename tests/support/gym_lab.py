"""A gymnasium environment of a third party, and the one small class that makes it an environment of keygrip."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

CLOSED = "POINT_MASS_CLOSED"  # environment variable: a file that is created when an environment is closed
GOAL = np.array([0.3, 0.1, 0.2])


class PointMass(gymnasium.Env[np.ndarray, np.ndarray]):
    """A point moved by up to 5 cm per step; done within 2 cm of the goal. It renders 32 x 32 pixels without a camera
    model. The seed determines its start."""

    observation_space = spaces.Box(-1, 1, (3,), np.float64)
    action_space = spaces.Box(-1, 1, (3,), np.float64)
    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.point = self.np_random.uniform(-0.1, 0.1, 3)
        return self.point.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.point = self.point + 0.05 * np.clip(action, -1, 1)
        return self.point.copy(), 0.0, False, False, {"is_success": bool(np.linalg.norm(self.point - GOAL) < 0.02)}

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        return np.full((32, 32, 3), 90, np.uint8) if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        if file := os.environ.get(CLOSED):
            Path(file).touch()


class Calibrated(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Observations with camera and gripper pose; actions from commanded poses. The expert moves straight to the
    goal."""

    def _seen(self, point: np.ndarray) -> dict[str, Any]:
        intrinsics = np.array([[40.0, 0, 16], [0, 40.0, 16], [0, 0, 1]])
        world_to_camera = np.diag([1.0, -1.0, -1.0, 1.0])
        world_to_camera[2, 3] = 1.0  # a metre above the table, looking down
        camera = {"image": self.env.render(), "intrinsics": intrinsics, "world_to_camera": world_to_camera}
        return {**camera, "position": point, "quaternion": np.array([1.0, 0, 0, 0]), "gripper": np.array(1.0)}

    def reset(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        self.point, info = self.env.reset(**options)
        return self._seen(self.point), info

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        self.point, *rest = self.env.step((action[:3] - self.point) / 0.05)
        return (self._seen(self.point), *rest)  # type: ignore[return-value]

    def expert_action(self) -> np.ndarray:
        step = GOAL - self.point
        there = self.point + step * min(1.0, 0.04 / max(float(np.linalg.norm(step)), 1e-9))
        return np.concatenate([there, [1.0, 0, 0, 0], [1.0]])


class Wide(gymnasium.ObservationWrapper[Any, Any, Any]):
    """The calibrated observation with 16 more image columns on the right."""

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        return {**observation, "image": np.pad(observation["image"], ((0, 0), (0, 16), (0, 0)))}


class TwoArms(gymnasium.Wrapper[Any, Any, Any, Any]):
    """The point is the left arm. The right arm is its mirror image, and so are the expert's commands for it."""

    mirror = np.array([1.0, -1.0, 1.0])

    def _seen(self, seen: dict[str, Any]) -> dict[str, Any]:
        both = {name: np.stack([seen[name]] * 2) for name in ("position", "quaternion", "gripper")}
        both["position"][1] *= self.mirror
        return {**seen, **both}

    def reset(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        seen, info = self.env.reset(**options)
        return self._seen(seen), info

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        seen, *rest = self.env.step(action[0])
        return (self._seen(seen), *rest)  # type: ignore[return-value]

    def expert_action(self) -> np.ndarray:
        left = self.env.get_wrapper_attr("expert_action")()
        right = left.copy()
        right[:3] *= self.mirror
        right[7] = 0.0
        return np.stack([left, right])


class Inexpert(gymnasium.ObservationWrapper[Any, Any, Any]):
    """The calibrated observation without an expert."""

    def observation(self, observation: np.ndarray) -> dict[str, Any]:
        return Calibrated._seen(self, observation)  # type: ignore[arg-type]


class TwoCameras(gymnasium.Wrapper[Any, Any, Any, Any]):
    """A second camera, 10 cm from the first and darker. The instruction is given only at reset."""

    def _seen(self, seen: dict[str, Any]) -> dict[str, Any]:
        beside = seen["world_to_camera"].copy()
        beside[0, 3] += 0.1
        over = {part: seen[part] for part in ("image", "intrinsics", "world_to_camera")}
        return {
            **seen,
            "cameras": {"over": over, "side": {**over, "image": over["image"] // 2, "world_to_camera": beside}},
        }

    def reset(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        seen, info = self.env.reset(**options)
        return self._seen(seen), {**info, "instruction": "go to the goal"}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        seen, *rest = self.env.step(action)
        return (self._seen(seen), *rest)  # type: ignore[return-value]


class SmallSide(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Two cameras, of which the second has images of half the size."""

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        side = observation["cameras"]["side"]
        intrinsics = side["intrinsics"] * [[0.5], [0.5], [1]]
        small = {**side, "image": side["image"][::2, ::2], "intrinsics": intrinsics}
        return {**observation, "cameras": {**observation["cameras"], "side": small}}


gymnasium.register("PointMass-v0", PointMass, max_episode_steps=40)
gymnasium.register(
    "CalibratedPointMass-v0", lambda: Calibrated(gymnasium.make("PointMass-v0", render_mode="rgb_array"))
)
gymnasium.register("Blind-v0", lambda: Calibrated(gymnasium.make("PointMass-v0")))
gymnasium.register("WidePointMass-v0", lambda: Wide(gymnasium.make("CalibratedPointMass-v0")))
gymnasium.register("TwoArmPointMass-v0", lambda: TwoArms(gymnasium.make("CalibratedPointMass-v0")))
gymnasium.register("TwoCameraPointMass-v0", lambda: TwoCameras(gymnasium.make("CalibratedPointMass-v0")))
gymnasium.register("SmallSidePointMass-v0", lambda: SmallSide(gymnasium.make("TwoCameraPointMass-v0")))
gymnasium.register("EndlessPointMass-v0", lambda: Calibrated(PointMass(render_mode="rgb_array")))
gymnasium.register("Inexpert-v0", lambda: Inexpert(gymnasium.make("PointMass-v0", render_mode="rgb_array")))
