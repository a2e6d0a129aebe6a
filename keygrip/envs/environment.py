"""The interface of an environment: a robot with a task, seen by calibrated cameras, commanded by gripper poses.

`keygrip evaluate`, the `closed_loop` callback and the recorders use environments only through this interface. A new one
consists of two classes: the environment, and the dataclass of its task, which names the environment's class::

    @dataclass(frozen=True)
    class LiftTask:                                       # what may vary; conditions of an evaluation change its fields
        environment: ClassVar[str] = "my_lab.lift.LiftEnvironment"
        name: str = "lift"
        object_size_m: float = 0.04

    class LiftEnvironment:
        def __init__(self, task, image_size, hz, cameras=None): ...
        def reset(self, *, seed): ...                     # and the other methods of `Environment`

A gymnasium environment whose observations and actions have the format below needs neither class:
`env=gymnasium env.task.id=...`. With a method `expert_action()` its demonstrations can be recorded too.

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
    """One robot with one task. Actions are gripper poses; the environment converts them to the simulator's own actions.

    An environment with several arms also has `arms`, their names in the order of the axis of arms. A policy with
    another order of arms is refused.

    Attributes:
        hz: control periods per second.
    """

    hz: float

    def reset(self, *, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the episode of a seed, which is determined by the seed only; return `observation()` and `info`."""
        ...

    def advance(self, action: np.ndarray) -> None:
        """Simulate one control period towards a gripper pose [8]: position m, quaternion wxyz, opening (several arms:
        [A, 8]). Nothing is rendered."""
        ...

    def outcome(self) -> tuple[bool, bool, dict[str, Any]]:
        """Return whether the task is done, whether the episode is over without success, and `info` with at least:
        `success`, `failure_reason` (None before the end and on success) and `instruction`."""
        ...

    def observation(self) -> dict[str, Any]:
        """Return the current observation, as in `keygrip.models.policy.Observation`: `image`, `intrinsics` and
        `world_to_camera` (of several cameras: in `cameras`, by name), `position`, `quaternion`, `gripper`,
        `instruction`."""
        ...

    def close(self) -> None:
        """Free the resources of rendering."""
        ...


@runtime_checkable
class JointEnvironment(Environment, JointArms, Protocol):
    """An environment whose arms can also follow the joints of a plan. Its observations hold the reached `joints` [A, J]
    (one arm: [J])."""

    def advance(self, action: np.ndarray, joints: np.ndarray | None = None) -> None:
        """As `Environment.advance`.

        Args:
            action: [8], or [A, 8] for several arms. joints: [J], or [A, J], rad that a plan has for these poses. They
                are used if their tool poses are the given poses; otherwise joints are computed from the poses, starting
                at the given joints.
        """
        ...


class Task(Protocol):
    """A dataclass of a task's options. `environment` is the dotted name of the class that is built with it, so that a
    simulator is imported only when it is used."""

    environment: ClassVar[str]


def open_environment(task: Any, image_size: int, hz: float, cameras: tuple[str, ...] | None = None) -> Environment:
    """Open the environment of a task.

    Args:
        task: see `Task`. image_size: edge of the square images, pixels. hz: control periods per second.
        cameras: names, the main one first; None: the task's own.

    Raises:
        ValueError: The task names no environment, or the environment refuses its settings.
    """
    name = getattr(type(task), "environment", None)
    if not isinstance(name, str):
        raise ValueError(f"{type(task).__name__} names no environment: give it a class attribute `environment`")
    found: Environment = pkgutil.resolve_name(name)(task, image_size, hz, cameras)
    return found
