"""Any gymnasium environment with calibrated cameras and pose commands as an `Environment`.

Its observation is a dictionary with `image` [H, W, 3] uint8, `intrinsics` [3, 3], `world_to_camera` [4, 4], `position`
[3], `quaternion` [4] wxyz and `gripper` []. Several cameras are in `cameras`, by name, each with the first three. Its
action is a gripper pose [8]. With two arms, these have an additional first axis, left before right. Its `info` holds
`success` (or `is_success`) and may hold `instruction`. For recording, it or a wrapper of it has `expert_action()`,
which returns the next action of a demonstration, or None if the expert gives up. An environment with other observations
or actions needs one `gymnasium.Wrapper` that converts them: see ``docs/environments.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.wrappers import TimeLimit

CAMERA = ("image", "intrinsics", "world_to_camera")
NEEDED = (*CAMERA, "position", "quaternion", "gripper")


@dataclass(frozen=True)
class GymnasiumTask:
    """A registered gymnasium environment. No stored configuration may build one, because its `id` imports a module.

    Args:
        id: as for `gymnasium.make`; "my_lab.envs:Lift-v0" imports the module that registers it.
        name: for reports. instruction: used if the environment's `info` has none.
        time_limit_s: of an episode. None: the environment's own, the `max_episode_steps` that gymnasium counts.
        options: arguments of `gymnasium.make`.

    Raises:
        ValueError: `id` is empty, or the limit is not above 0.
    """

    environment: ClassVar[str] = "keygrip.envs.gymnasium_environment.GymnasiumEnvironment"
    id: str
    name: str = "task"
    instruction: str = ""
    time_limit_s: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("env.task.id is missing: the environment as gymnasium.make takes it, my_lab.envs:Lift-v0")
        if self.time_limit_s is not None and not self.time_limit_s > 0:
            raise ValueError(f"env.task.time_limit_s={self.time_limit_s}: give seconds above 0, or null")
        # a plain dictionary, which other processes can unpickle
        object.__setattr__(self, "options", dict(self.options))


class GymnasiumEnvironment:
    """See the module.

    Args:
        task: selects the environment. image_size: shorter edge of the observation's `image`, which the environment must
            provide; images in `cameras` may have other sizes. hz: its control rate. cameras: must be in the
            observation's `cameras`, if it has any; the first is then the main one.

    Raises:
        ValueError: The environment does not exist, or has no limit of its own and the task none.
    """

    arms = ("left", "right")  # names of two arms; a single arm has no name

    def __init__(self, task: GymnasiumTask, image_size: int, hz: float, cameras: tuple[str, ...] | None = None) -> None:
        self.task, self.image_size, self.hz, self.cameras = task, image_size, float(hz), cameras
        try:
            self.env = gymnasium.make(task.id, disable_env_checker=True, **dict(task.options))
        except (gymnasium.error.Error, ImportError, TypeError) as error:  # TypeError: options that it does not accept
            raise ValueError(f"gymnasium cannot make {task.id!r}: {error}") from error
        if task.time_limit_s is None and not _limits_steps(self.env):
            self.env.close()
            raise ValueError(
                f"{task.id} has no max_episode_steps, so that an episode might never end: give "
                "env.task.time_limit_s=SECONDS"
            )
        self._elapsed = 0

    def reset(self, *, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the episode of a seed.

        Raises:
            ValueError: The observation is not the input of a policy.
        """
        self._observation, self._info = self.env.reset(seed=seed)
        self._instruction = str(self._info.get("instruction") or self.task.instruction)  # the key may be there as None
        self._over, self._elapsed = False, 0
        self._check()
        return self.observation(), self.outcome()[2]

    def _check(self) -> None:
        observation = self._observation if isinstance(self._observation, dict) else {}
        absent = [name for name in NEEDED if name not in observation]
        if absent:
            raise ValueError(
                f"the observation of {self.task.id} lacks {', '.join(absent)}: wrap it as docs/environments.md shows"
            )
        views = observation.get("cameras") or {}
        if views or len(self.cameras or ()) > 1:
            missing = [name for name in self.cameras or () if name not in views]
            if missing:
                raise ValueError(
                    f"the observation of {self.task.id} has no camera {missing[0]!r} in `cameras`, which has "
                    f"{', '.join(views) or 'none'}: give env.cameras=[...], or add it there"
                )
        for name, view in {
            "": observation,
            **{name: views[name] for name in self.cameras or views if name in views},
        }.items():
            self._check_view(
                f"camera {name!r} of {self.task.id}" if name else f"the observation of {self.task.id}", view
            )

        height, width = np.shape(observation["image"])[:2]
        # of this image alone: whichever cameras a policy reads, evaluation and recording have the same image_size
        if min(height, width) != self.image_size:
            raise ValueError(
                f"images of the observation of {self.task.id} are {height} x {width}: give "
                f"env.image_size={min(height, width)}, their shorter edge (image_size where they are recorded), or "
                "render other images"
            )

    def _check_view(self, view_name: str, view: Mapping[str, Any]) -> None:
        absent = [part for part in CAMERA if part not in view]
        if absent:
            raise ValueError(f"{view_name} lacks {', '.join(absent)}: wrap it as docs/environments.md shows")
        if view["image"] is None:
            raise ValueError(f"the image of {view_name} is None: make the environment with render_mode='rgb_array'")
        image = np.asarray(view["image"])
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"images of {view_name} have shape {image.shape}: give H x W x 3")
        if image.dtype != np.uint8:
            raise ValueError(f"images of {view_name} are {image.dtype}: give uint8 RGB")
        for part, shape in (("intrinsics", (3, 3)), ("world_to_camera", (4, 4))):
            actual = np.asarray(view[part]).shape
            if actual != shape:
                raise ValueError(f"{part} of {view_name} has shape {actual}: it is {shape[0]} x {shape[1]}")

    def advance(self, action: np.ndarray) -> None:
        """Do one step of the environment."""
        self._observation, _, terminated, truncated, self._info = self.env.step(action)
        # many environments give it only at the start
        self._instruction = str(self._info.get("instruction") or self._instruction)
        self._elapsed += 1
        self._over = bool(terminated or truncated)

    def outcome(self) -> tuple[bool, bool, dict[str, Any]]:
        """Return success according to the environment's `info`."""
        success = bool(self._info.get("success", self._info.get("is_success", False)))
        limit = self.task.time_limit_s
        over = not success and (self._over or (limit is not None and self._elapsed / self.hz >= limit))
        reason = self._info.get("failure_reason") or "timeout"
        info = {**self._info, "success": success, "failure_reason": reason if over else None}
        return success, over, info | {"instruction": self._instruction}

    def observation(self) -> dict[str, Any]:
        """Return the last observation, with the instruction; the first of the named cameras is the main one."""
        views = self._observation.get("cameras") or {}
        main = {part: views[self.cameras[0]][part] for part in CAMERA} if self.cameras and views else {}
        return {"instruction": self._instruction, **self._observation, **main}

    def expert_action(self) -> np.ndarray | None:
        """Return the next action of a demonstration, [8] or [A, 8]; None: the expert gives up.

        Raises:
            ValueError: The environment has no expert.
        """
        try:
            expert = self.env.get_wrapper_attr("expert_action")
        except AttributeError as error:
            raise ValueError(
                f"{self.task.id} has no method expert_action(), the scripted expert that is recorded: see "
                "docs/environments.md"
            ) from error
        action = expert()
        return None if action is None else np.asarray(action, dtype=np.float64)

    def close(self) -> None:
        """Close the gymnasium environment."""
        self.env.close()


def _limits_steps(env: gymnasium.Env[Any, Any]) -> bool:
    """Return whether gymnasium ends episodes after a number of steps, in this environment or in one that it wraps."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, TimeLimit):
            return True
        env = env.env
    return False
