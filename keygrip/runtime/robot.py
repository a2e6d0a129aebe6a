"""The interface between a control loop and an arm, simulated or real.

Units: metres, radians, seconds on the robot's own clock; quaternions wxyz; gripper 0 closed .. 1 open.
Shape legend: A arms, J joints of an arm.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol, runtime_checkable

import numpy as np

from keygrip.robots.joint_arms import JointArms


class RobotLostError(ConnectionError):
    """The robot does not respond, or its response cannot be read.

    Attributes:
        arms: indices of the arms that do not respond, if all others do; None: unknown, all arms count as lost.
    """

    def __init__(self, message: str, arms: Collection[int] | None = None) -> None:
        super().__init__(message)
        self.arms = None if arms is None else frozenset(arms)


class CameraLostError(RobotLostError):
    """A camera does not respond, and all arms do."""


class Robot(Protocol):
    """The interface that the control loop requires of a robot.

    Attributes:
        control_hz: commands per second.
    """

    control_hz: float

    def now(self) -> float:
        """Seconds on the robot's clock, which has an arbitrary start and never goes back."""
        ...

    def wait_until(self, moment: float) -> None:
        """Return at a moment of that clock, immediately if it has passed."""
        ...

    def observe(self, images: bool = True) -> dict[str, Any]:
        """Return an observation as in :mod:`keygrip.models.policy`, with `time_s`: when its oldest part was measured.
        This may be after the call began (a camera's next frame) and is not after it returns.

        Args:
            images: whether to read cameras; without them only the arm's own entries are needed.

        Raises:
            RobotLostError: The arm does not respond. CameraLostError: A camera alone does not.
        """
        ...

    def command(self, poses: np.ndarray) -> None:
        """Command the tool poses for one control period from now.

        Args:
            poses: [A, 8] position, quaternion, gripper opening.

        Raises:
            keygrip.robots.joint_motion.JointMotionError: A pose that the joints must not take; the arm stays under its
                last command. RobotLostError: An arm does not respond; the arms that the error does not name have their
                command.
        """
        ...

    def stop(self) -> None:
        """End the motion at the current pose and accept no further command. Safe to call twice."""
        ...

    def close(self) -> None:
        """Close devices; call it after `stop`."""
        ...


@runtime_checkable
class JointRobot(Robot, JointArms, Protocol):
    """A robot that can follow the joints of a plan, if the policy plans joints. Other robots follow its poses.

    It may have an attribute `joint_motion` (:class:`keygrip.robots.joint_motion.ArmMotions`, or None): the joint limits
    with the state after the last command. It reports which arms the joint speed limit has held back, and a dry run
    tests its commands on a copy.
    """

    @property
    def commanded_joints(self) -> np.ndarray:
        """[A, J] rad of the last command, given as joints or poses; at the start, the current joints."""
        ...

    def command(self, poses: np.ndarray, joints: np.ndarray | None = None) -> None:
        """As `Robot.command`.

        Args:
            poses: [A, 8]. joints: [A, J] rad that a plan has for them. They are sent unchanged if their tool poses are
                the given poses; otherwise joints are computed from the poses, starting at the given joints.

        Raises:
            As `Robot.command`; also `JointMotionError` for joints in a collision.
        """
        ...
