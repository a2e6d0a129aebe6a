"""Any gymnasium environment with calibrated cameras and pose commands as an `Environment`.

Its observation is a dictionary with `image` [H, W, 3] uint8, `intrinsics` [3, 3], `world_to_camera` [4, 4], `position`
[3], `quaternion` [4] wxyz and `gripper` []; its action is a gripper pose [8]; its `info` holds `success` (or
`is_success`) and may hold `instruction`. An environment with other observations or actions gets one
`gymnasium.Wrapper` that converts them: see ``docs/environments.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gymnasium
import numpy as np

NEEDED = ("image", "intrinsics", "world_to_camera", "position", "quaternion", "gripper")


@dataclass(frozen=True)
class GymnasiumTask:
    """A registered gymnasium environment. It is no `data_part`: `id` may import any module, so no checkpoint names it.

    Args:
        id: as for `gymnasium.make`; "my_lab.envs:Lift-v0" imports the module that registers it.
        name: for reports. instruction: where the environment's `info` has none.
        time_limit_s: of an episode. options: arguments of `gymnasium.make`.
    """

    environment: ClassVar[str] = "keygrip.envs.gymnasium_environment.GymnasiumEnvironment"
    id: str
    name: str = "task"
    instruction: str = ""
    time_limit_s: float = 20.0
    options: Mapping[str, Any] = field(default_factory=dict)


class GymnasiumEnvironment:
    """See the module.

    Args:
        task: which one. image_size: edge of the images, which the environment must give. hz: its control rate.
        cameras: must be in the observation's `cameras`, where several are asked for.

    Raises:
        ValueError: there is no such environment.
    """

    def __init__(self, task: GymnasiumTask, image_size: int, hz: float, cameras: tuple[str, ...] | None = None) -> None:
        self.task, self.image_size, self.hz, self.cameras = task, image_size, float(hz), cameras
        try:
            self.env = gymnasium.make(task.id, disable_env_checker=True, **dict(task.options))
        except (gymnasium.error.Error, ImportError) as error:
            raise ValueError(f"gymnasium cannot make {task.id!r}: {error}") from error
        self._elapsed = 0

    def reset(self, *, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts the episode of a seed.

        Raises:
            ValueError: the observation is not what a policy reads.
        """
        self._seen, self._info = self.env.reset(seed=seed)
        self._over, self._elapsed = False, 0
        self._check()
        return self.observation(), self.outcome()[2]

    def _check(self) -> None:
        seen = self._seen if isinstance(self._seen, dict) else {}
        absent = [name for name in NEEDED if name not in seen]
        if absent:
            raise ValueError(
                f"the observation of {self.task.id} lacks {', '.join(absent)}: wrap it as docs/environments.md shows"
            )
        shape = np.asarray(seen["image"]).shape
        if shape != (self.image_size, self.image_size, 3):
            raise ValueError(f"images of {self.task.id} are {shape}: give env.image_size={shape[0]}, or render squares")

    def advance(self, action: np.ndarray) -> None:
        """One step of the environment."""
        self._seen, _, terminated, truncated, self._info = self.env.step(action)
        self._elapsed += 1
        self._over = bool(terminated or truncated)

    def outcome(self) -> tuple[bool, bool, dict[str, Any]]:
        """Success as the environment's `info` says."""
        success = bool(self._info.get("success", self._info.get("is_success", False)))
        over = not success and (self._over or self._elapsed / self.hz >= self.task.time_limit_s)
        reason = self._info.get("failure_reason") or "timeout"
        info = {**self._info, "success": success, "failure_reason": reason if over else None}
        return success, over, {**info, "instruction": self._info.get("instruction", self.task.instruction)}

    def observation(self) -> dict[str, Any]:
        """The last observation, with the instruction."""
        return {"instruction": self._info.get("instruction", self.task.instruction), **self._seen}

    def close(self) -> None:
        """Closes it."""
        self.env.close()
