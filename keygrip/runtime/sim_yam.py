"""The simulated YAM cell as a robot: in real time, or on a clock that advances with the simulation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from keygrip.envs.yam.camera_moves import refuse_unseen_moves
from keygrip.envs.yam.environment import YamCell
from keygrip.envs.yam.tasks import CAMERAS, TaskOptions
from keygrip.robots.joint_motion import ArmMotions, JointLimits, JointMotion, JointMotionError
from keygrip.robots.kinematics import forward_kinematics
from keygrip.runtime.robot import RobotLostError


class SimulatedYam:
    """One simulated arm at a table (see :class:`keygrip.envs.yam.environment.YamCell`).

    Args:
        task: objects on the table. image_size: edge of the square image, pixels. cameras: None: the task's own;
            `keygrip run` then selects those that the policy was trained on, if they are `known_cameras`.
        control_hz: commands per second. seed: of the episode.
        joints: limits of the joints, checked before every command; None: only the cell's own inverse kinematics.
        real_time: use the machine's clock. False: the clock advances by one period with every accepted command, and to
            the moment given to `wait_until`, so that a run does not depend on the machine's speed.
    """

    robot, arms = "yam", ("right",)
    known_cameras = CAMERAS

    def __init__(
        self,
        task: TaskOptions,
        image_size: int = 224,
        control_hz: float = 10.0,
        cameras: Sequence[str] | None = None,
        seed: int = 0,
        joints: JointLimits | None = None,
        real_time: bool = True,
    ) -> None:
        self.cell = YamCell(task, image_size, control_hz, None if cameras is None else tuple(cameras))
        refuse_unseen_moves(task, self.cell.cameras)
        self.control_hz, self.real_time, self.joint_limits = float(control_hz), real_time, joints
        self.cameras = self.cell.cameras
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Start the episode of a seed, with the arm at rest."""
        self._observation, info = self.cell.reset(seed=seed)
        self.instruction = str(info["instruction"])
        self.stopped = self._refused = False
        self._outcome: tuple[bool, str | None] | None = None
        self._ticks = 0
        self._motion = None
        if self.joint_limits is not None:
            self._motion = JointMotion(self.joint_limits, self.cell.commanded_joints)

    def now(self) -> float:
        return time.monotonic() if self.real_time else self._ticks / self.control_hz

    def wait_until(self, moment: float) -> None:
        if self._refused:  # a period without a command: the arm stays under the last command
            self._advance(np.append(np.concatenate(self.cell.commanded_pose), self.cell.commanded_gripper))
        if self.real_time:
            time.sleep(max(0.0, moment - time.monotonic()))
            return
        while self.now() < moment - 1e-9:  # a stopped robot accepts no command, but time advances
            self._ticks += 1

    def observe(self, images: bool = True) -> dict[str, Any]:
        observed_s = self.now()
        if images:
            return {**self.cell.observation(), "time_s": observed_s}
        position, quaternion = self.cell.tool_pose
        return {
            "position": position,
            "quaternion": quaternion,
            "gripper": np.array(self.cell.gripper_opening),
            "joints": self.cell.joints,
            "instruction": self.instruction,
            "time_s": observed_s,
        }

    @property
    def joint_ranges(self) -> np.ndarray:
        return self.cell.joint_ranges if self._motion is None else self._motion.ranges[None]

    @property
    def commanded_joints(self) -> np.ndarray:
        return self.cell.commanded_joints[None].copy()

    @property
    def joint_motion(self) -> ArmMotions | None:
        """The joint limits with the state after the last command; None: only the cell limits joints."""
        return None if self._motion is None else ArmMotions([self._motion], [np.eye(4)], self.arms)

    def poses_at(self, joints: np.ndarray) -> np.ndarray:
        return self.cell.poses_at(joints)

    def command(self, poses: np.ndarray, joints: np.ndarray | None = None) -> None:
        if self.stopped:
            raise RobotLostError("the robot was stopped: it takes no command")
        pose, planned = np.asarray(poses, float)[0], None if joints is None else np.asarray(joints, float)[0]
        if self._motion is not None:
            try:
                allowed = self._motion.step(pose, 1.0 / self.control_hz, planned)
            except JointMotionError:
                self._refused = True  # another command may follow in the same period
                raise
            position, quaternion = forward_kinematics(allowed)
            pose, planned = np.concatenate([position, quaternion, pose[7:]]), allowed
        self._advance(pose, planned)

    def _advance(self, pose: np.ndarray, joints: np.ndarray | None = None) -> None:
        self._refused = False
        self.cell.advance(pose, joints)
        self._ticks += not self.real_time

    def outcome(self) -> tuple[bool, str | None]:
        """Return whether the task is done, and why it has failed; None while it continues. The first result that
        decides an episode stays, because the arm still moves while it brakes."""
        if self._outcome is not None:
            return self._outcome
        success, truncated, info = self.cell.outcome()
        outcome = bool(success), info["failure_reason"] if truncated else None
        if success or truncated:
            self._outcome = outcome
        return outcome

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.cell.close()
