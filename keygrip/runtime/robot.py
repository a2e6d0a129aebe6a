"""The interface between a control loop and an arm, simulated or real.

Units: metres, radians, seconds on the robot's own clock; quaternions wxyz; gripper 0 closed .. 1 open.
Shape legend: A arms, J joints of an arm.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

from keygrip.robots.joint_arms import JointArms


class RobotLostError(ConnectionError):
    """The robot does not answer, or what it answers cannot be read."""


class Robot(Protocol):
    """What the control loop needs of a robot.

    Attributes:
        control_hz: commands per second.
    """

    control_hz: float

    def now(self) -> float:
        """Seconds on the robot's clock, which starts anywhere and never goes back."""
        ...

    def wait_until(self, moment: float) -> None:
        """Returns at a moment of that clock, at once where it has passed."""
        ...

    def observe(self, images: bool = True) -> dict[str, Any]:
        """An observation as in :mod:`keygrip.models.policy`, with `time_s`: when the oldest part of it was measured,
        which may be after the call began (a camera's next frame), and is not after it returns.

        Args:
            images: whether cameras are wanted; without them only the arm's own entries need be there.

        Raises:
            RobotLostError: the arm or a camera does not answer.
        """
        ...

    def command(self, poses: np.ndarray) -> None:
        """Where the tools shall be one control period from now.

        Args:
            poses: [A, 8] position, quaternion, gripper opening.

        Raises:
            keygrip.robots.joint_motion.JointMotionError: a pose that the joints may not take; the arm stays under its
                last command. RobotLostError: the arm does not answer.
        """
        ...

    def stop(self) -> None:
        """Ends the motion where the arm is and takes no further command. Safe to call twice."""
        ...

    def close(self) -> None:
        """Gives back devices; after `stop`."""
        ...


@runtime_checkable
class JointRobot(Robot, JointArms, Protocol):
    """A robot that also follows the joints of a plan, where a policy plans them; others follow its poses.

    It may have an attribute `joint_motion` (:class:`keygrip.robots.joint_motion.ArmMotions`, or None): what bounds the
    joints, after the last command. It says which arms the joints' speed has held back, and a copy of it tries out the
    commands of a dry run.
    """

    @property
    def commanded_joints(self) -> np.ndarray:
        """[A, J] rad of the last command, however it was given; at the start, where the joints are."""
        ...

    def command(self, poses: np.ndarray, joints: np.ndarray | None = None) -> None:
        """As `Robot.command`.

        Args:
            poses: [A, 8]. joints: [A, J] rad that a plan has for them: they are sent as they are where they put the
                tools at the poses, else those found from them that do.

        Raises:
            As `Robot.command`; `JointMotionError` also for joints in a collision.
        """
        ...
