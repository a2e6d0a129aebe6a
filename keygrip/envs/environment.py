"""What an environment is: a robot at a task, seen by cameras of known pose, driven by poses of its gripper.

`keygrip evaluate`, the `closed_loop` callback and the recorders know environments by this interface alone. A new one is
two classes: the environment, and the dataclass of its task, which names the environment's class::

    @dataclass(frozen=True)
    class LiftTask:                                       # what may vary; conditions of an evaluation change its fields
        environment: ClassVar[str] = "my_lab.lift.LiftEnvironment"
        name: str = "lift"
        object_size_m: float = 0.04

    class LiftEnvironment:
        def __init__(self, task, image_size, hz, cameras=None): ...
        def reset(self, *, seed): ...                     # and the other methods of `Environment`

A gymnasium environment whose observations and actions are those below needs neither: `env=gymnasium env.task.id=...`;
with a method `expert_action()` it is recorded too.

Frames: world z up, metres; camera OpenCV (x right, y down, z forward); quaternions wxyz; gripper 0 closed .. 1 open.
"""

from __future__ import annotations

import pkgutil
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from keygrip.robots.joint_arms import JointArms

INFO = ("success", "failure_reason", "instruction")


@runtime_checkable
class Environment(Protocol):
    """One robot at one task. The simulator's own actions are the environment's matter: it is given poses.

    One of several arms also has `arms`, their names in the order of the axis of arms: a policy that has them in another
    order is refused.

    Attributes:
        hz: control periods per second.
    """

    hz: float

    def reset(self, *, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts the episode of a seed, which alone decides it; returns `observation()` and `info`."""
        ...

    def advance(self, action: np.ndarray) -> None:
        """One control period towards a gripper pose [8]: position m, quaternion wxyz, opening (several arms: [A, 8]);
        draws nothing."""
        ...

    def outcome(self) -> tuple[bool, bool, dict[str, Any]]:
        """Whether the task is done, whether the episode is over without success, and `info`: `success`,
        `failure_reason` (None before the end and on success) and `instruction`, at least."""
        ...

    def observation(self) -> dict[str, Any]:
        """What the robot senses now, as in `keygrip.models.policy.Observation`: `image`, `intrinsics` and
        `world_to_camera` (of several cameras: in `cameras`, by name), `position`, `quaternion`, `gripper`,
        `instruction`."""
        ...

    def close(self) -> None:
        """Frees what drawing needs."""
        ...


@runtime_checkable
class JointEnvironment(Environment, JointArms, Protocol):
    """An environment whose arms also follow the joints of a plan. Its observations hold `joints` [A, J] (one arm: [J]),
    as reached."""

    def advance(self, action: np.ndarray, joints: np.ndarray | None = None) -> None:
        """As `Environment.advance`.

        Args:
            action: [8], or [A, 8] of several arms. joints: [J], or [A, J], rad that a plan has for these poses: they
                are taken where they put the tools there, else those found from them that do.
        """
        ...


class Task(Protocol):
    """A dataclass of a task's options. `environment` is the dotted name of the class that is built with it, so that a
    simulator is imported only where it is used."""

    environment: ClassVar[str]


def open_environment(task: Any, image_size: int, hz: float, cameras: tuple[str, ...] | None = None) -> Environment:
    """The environment of a task.

    Args:
        task: see `Task`. image_size: edge of the square images, pixels. hz: control periods per second.
        cameras: names, the main one first; None: the task's own.

    Raises:
        ValueError: the task names no environment, or one that refuses its settings.
    """
    name = getattr(type(task), "environment", None)
    if not isinstance(name, str):
        raise ValueError(f"{type(task).__name__} names no environment: give it a class attribute `environment`")
    found: Environment = pkgutil.resolve_name(name)(task, image_size, hz, cameras)
    return found
