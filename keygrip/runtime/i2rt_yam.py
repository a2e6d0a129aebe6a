"""Real YAM arms through the driver interface of the i2rt package (`i2rt.robots.robot.Robot`).

This module has not been tested on a real arm, because none was available. It was tested with i2rt's own simulated robot
(`get_yam_robot(sim=True)`) and a mock with the same methods.

The driver accepts joint angles and the gripper's opening (0 closed .. 1 open) as one vector, repeats the last command
to the motors itself, and applies its own joint limits. This module converts poses to joint angles: inverse kinematics,
joint limits, collisions of an arm with itself and between arms (:mod:`keygrip.robots.joint_motion`).

Shape legend: A arms.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.data.robot.calibration import Calibration, read_calibration
from keygrip.data.robot.corrections import corrected_calibration
from keygrip.robots.joint_motion import ArmMotions, JointLimits, JointMotion
from keygrip.robots.kinematics import (
    arm_chain,
    forward_kinematics,
    matrix_from_quaternion,
    quaternion_from_matrix,
)
from keygrip.robots.self_collision import HELD
from keygrip.runtime.cameras import Camera
from keygrip.runtime.robot import CameraLostError, RobotLostError

log = logging.getLogger(__name__)

JOINTS = 6
START_SLACK_RAD = 0.15  # the driver itself accepts this much beyond the joints' ranges


class Driver(Protocol):
    """The methods of i2rt's robot that are used."""

    def get_joint_pos(self) -> np.ndarray:
        """Return [7] joint angles in rad and the gripper's opening, 0 to 1."""

    def command_joint_pos(self, joint_pos: np.ndarray) -> None:
        """Command [7] joint angles in rad and an opening; return immediately."""

    def close(self) -> None: ...


def connect(
    channel: str, arm: str, gripper: str, sim: bool = False, gripper_limits: Sequence[float] | None = None
) -> Driver:
    """Connect the driver of the YAM arm on a CAN channel. From then on it holds the arm at its position.

    Args:
        channel: e.g. can0. arm, gripper: model names of i2rt; motors, gains, gravity and ranges depend on them.
        sim: use i2rt's simulated robot instead of an arm.
        gripper_limits: the gripper motor's angles closed and open, rad. None: i2rt drives the fingers of a real arm to
            both ends to find them, and meanwhile holds its joints by constant torques only.

    Raises:
        RobotLostError: No arm responds.
    """
    from i2rt.robots.get_robot import get_yam_robot
    from i2rt.robots.utils import ArmType, GripperType

    models = {"arm_type": ArmType.from_string_name(arm), "gripper_type": GripperType.from_string_name(gripper)}
    limits = None if gripper_limits is None else np.array(gripper_limits, float)
    if limits is None and not sim:
        log.warning(
            "%s: the fingers are now driven to both ends, with up to 0.5 Nm for about 4 s, and the arm is held by "
            "constant torques alone meanwhile: support it, and keep the fingers free and empty",
            channel,
        )
    try:
        driver: Driver = get_yam_robot(
            channel=channel, zero_gravity_mode=False, sim=sim, gripper_limits_override=limits, **models
        )
    except Exception as error:  # any error of CAN, sockets or motors
        raise RobotLostError(f"no YAM arm answers on {channel}: {type(error).__name__}: {error}") from error
    return driver


def _has_ended(driver: Driver) -> bool:
    """Return whether a thread of i2rt has ended (CAN, a motor error, a joint out of its range). The driver continues to
    report the last state and to accept commands then."""
    server = getattr(driver, "_server_thread", None)
    chain_runs = getattr(getattr(driver, "motor_chain", None), "running", True)
    return not chain_runs or (server is not None and not server.is_alive())


def _checked_gripper_limits(gripper_limits: Any, arms: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the gripper limits [closed, open] of the given arms. Raises ValueError if they are invalid."""
    if gripper_limits is not None and not isinstance(gripper_limits, Mapping):
        raise ValueError(f"robot.gripper_limits is {{ARM: [closed, open]}}, got {gripper_limits!r}")
    ends = {}
    for name, pair in (gripper_limits or {}).items():
        if name not in arms:
            raise ValueError(f"robot.gripper_limits.{name} is of no arm: robot.arms names {', '.join(arms)}")
        try:
            angles = np.asarray(pair, float)
        except (TypeError, ValueError):
            angles = np.empty(0)
        if angles.shape != (2,) or not np.isfinite(angles).all() or angles[0] == angles[1]:
            raise ValueError(f"robot.gripper_limits.{name} is [closed, open], two angles in rad, got {pair!r}")
        ends[name] = angles.tolist()
    return ends


class YamArms:
    """One or several YAM arms with their cameras.

    Args:
        arms: CAN channel, or a connected driver, of each arm by name, in the order of the policy's arms.
        cameras: by name, in the policy's order.
        calibration: calibration file with an entry for every camera, and the base pose of each of several arms.
        joints: limits of the joints. control_hz: commands per second. sim: i2rt's simulated robots instead of arms.
        instruction: the task instruction for the policy. gripper_limits: of some of the arms, see `connect`.

    Raises:
        RobotLostError: An arm does not respond. ValueError: The calibration is incomplete or not of these cameras and
            arms, or limits are invalid (both are found before an arm is connected); or a joint is out of its range.
    """

    robot = "yam"

    def __init__(
        self,
        arms: Mapping[str, str | Driver],
        cameras: Mapping[str, Camera],
        calibration: str | Path,
        joints: JointLimits | None = None,
        control_hz: float = 30.0,
        sim: bool = False,
        instruction: str = "",
        gripper_limits: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        if not arms:
            raise ValueError("robot.arms names no arm: e.g. robot.arms.right=can0")
        if not (np.isfinite(control_hz) and control_hz > 0):
            raise ValueError(f"robot.control_hz must be finite and above 0, got {control_hz}")
        ends = _checked_gripper_limits(gripper_limits, arms)
        if ends and sim:
            raise ValueError("robot.gripper_limits is of real grippers, and robot.sim=true has none: leave one out")
        self.control_hz, self.instruction, self.sim = float(control_hz), instruction, sim
        self._calibration: Calibration = corrected_calibration(read_calibration(Path(calibration)), cameras)
        self._feeds = dict(cameras)
        self.cameras = tuple(self._feeds)
        self.arms = tuple(arms)
        mountings = [self._calibration.arm(name, only=len(arms) == 1) for name in arms]
        self._world_from_base = [np.asarray(mounting.world_from_base, float) for mounting in mountings]
        self._chains = [arm_chain(mounting.arm, mounting.gripper) for mounting in mountings]
        self._models = [(mounting.arm, mounting.gripper) for mounting in mountings]
        limits = joints or JointLimits()
        self._refuse_unknown_links(limits)
        self._drivers: list[Driver] = []
        self._openings: list[float | None] = [None] * len(self.arms)  # the last accepted commands
        # connected by this object, and held since then
        self._connected = [isinstance(source, str) for source in arms.values()]
        self.stopped = False
        self._lost: set[int] = set()  # arms that have not responded since their joints were last reset
        try:
            self._refuse_other_cameras()
            for (name, source), model in zip(arms.items(), self._models, strict=True):
                driver = connect(source, *model, sim, ends.get(name)) if isinstance(source, str) else source
                self._drivers.append(driver)
            motions = [JointMotion(limits, self._start(index), chain) for index, chain in enumerate(self._chains)]
            self.joint_motion = ArmMotions(motions, self._world_from_base, self.arms)
        except BaseException:  # the drivers' threads would keep the process and the motors running
            self.close()
            raise

    def _refuse_other_cameras(self) -> None:
        """Raise ValueError if a camera has no entry in the calibration, is mounted on an arm that is not driven, or
        gives images of another shape than it was calibrated for."""
        for name, feed in self._feeds.items():
            mounted_on = self._calibration.camera(name).mounted_on
            if mounted_on is not None and mounted_on not in self.arms:
                raise ValueError(
                    f"{self._calibration.path}: cameras.{name} is mounted on arm {mounted_on}, and robot.arms names "
                    f"{', '.join(self.arms)}: correct cameras.{name}.mounted_on, or add the arm"
                )
            try:
                image, _ = feed.read()
            except RobotLostError:  # without an image: a lost camera at the first observation, which may come back
                continue
            self._upright(name, image)

    def _refuse_unknown_links(self, limits: JointLimits) -> None:
        """Raise ValueError if distances between links, or to the table, are set for an arm whose links are not known.
        The gripper is not part of the check of distances to the table."""
        for name, (arm, gripper) in self.models.items():
            unknown = {}
            if limits.clearance_m is not None and (arm, gripper) not in HELD:
                unknown["clearance_m"] = "itself"
            if limits.arms_clearance_m is not None and len(self.arms) > 1 and (arm, gripper) not in HELD:
                unknown["arms_clearance_m"] = "the other arms"
            if limits.table_clearance_m is not None and arm not in {held for held, _ in HELD}:
                unknown["table_clearance_m"] = "the table"
            if unknown:
                known_models = ", ".join(" with ".join(model) for model in HELD)
                free = " ".join(f"robot.joints.{setting}=null" for setting in unknown)
                raise ValueError(
                    f"{self._calibration.path}: arms.{name} is {arm} with {gripper}; where links are is known of "
                    f"{known_models} alone. {free} drives it without keeping it off {' and '.join(unknown.values())}"
                )

    def _start(self, index: int) -> np.ndarray:
        """Return the current joints [6] of an arm; refuse them if out of range, because the zero position is wrong
        then."""
        joints, limits = self._state(index)[:JOINTS], self._chains[index].limits
        beyond = np.maximum(limits[:, 0] - joints, joints - limits[:, 1])
        if beyond.max() > START_SLACK_RAD:
            joint = int(beyond.argmax())
            raise ValueError(
                f"joint {joint + 1} of arm {self.arms[index]} is at {joints[joint]:.2f} rad, outside "
                f"{limits[joint, 0]:.2f} to {limits[joint, 1]:.2f}: set its zero position"
            )
        return np.clip(joints, limits[:, 0], limits[:, 1])

    # ---- the robot ---------------------------------------------------------------------------------------------------

    @property
    def models(self) -> dict[str, tuple[str, str]]:
        """Arm and gripper model of each arm, by i2rt's names."""
        return dict(zip(self.arms, self._models, strict=True))

    def now(self) -> float:
        return time.monotonic()

    def wait_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - time.monotonic()))

    def observe(self, images: bool = True) -> dict[str, Any]:
        observed_s = self.now()
        states = self._states()
        for index in self._lost:  # it may have moved meanwhile: apply the speed limit from its current joints
            motion = self.joint_motion.motions[index]
            motion.reset(np.clip(states[index, :JOINTS], *motion.chain.limits.T))
        self._lost.clear()
        poses = [self._pose(index, state[:JOINTS]) for index, state in enumerate(states)]
        observation: dict[str, Any] = {
            "position": np.stack([pose[:3, 3] for pose in poses]),
            "quaternion": np.stack([quaternion_from_matrix(pose[:3, :3]) for pose in poses]),
            "gripper": np.clip(states[:, JOINTS], 0.0, 1.0),
            "joints": states[:, :JOINTS],
            "instruction": self.instruction,
            "time_s": observed_s,
        }
        if images:
            views, times = self._views(dict(zip(self.arms, poses, strict=True)))
            several = {"cameras": views} if len(views) > 1 else {}  # a single camera is used under any name
            observation |= {**views[self.cameras[0]], **several, "time_s": min([observed_s, *times])}
        return observation

    @property
    def joint_ranges(self) -> np.ndarray:
        return np.stack([motion.ranges for motion in self.joint_motion.motions])

    @property
    def commanded_joints(self) -> np.ndarray:
        return self.joint_motion.joints

    def poses_at(self, joints: np.ndarray) -> np.ndarray:
        poses = []
        for base, model, angles in zip(self._world_from_base, self._models, np.asarray(joints, float), strict=True):
            position, quaternion = forward_kinematics(angles, *model)
            rotation = base[:3, :3] @ matrix_from_quaternion(quaternion)
            poses.append(
                np.concatenate([position @ base[:3, :3].T + base[:3, 3], quaternion_from_matrix(rotation)], -1)
            )
        return np.stack(poses)

    def command(self, poses: np.ndarray, joints: np.ndarray | None = None) -> None:
        if self.stopped:
            raise RobotLostError("the robot was stopped: it takes no command")
        poses = np.asarray(poses, float)
        allowed = self.joint_motion.step(poses, 1.0 / self.control_hz, joints)
        errors: dict[int, RobotLostError] = {}
        for index, (angles, pose) in enumerate(zip(allowed, poses, strict=True)):
            opening = float(np.clip(pose[7], 0.0, 1.0))
            try:
                self._send(index, np.append(angles, opening))
            except RobotLostError as error:  # the other arms still get their command, of this period
                errors[index] = error
            else:
                self._openings[index] = opening
        self._refuse_lost(errors)

    def stop(self) -> None:
        """Hold every arm at its pose, with its gripper's command; the driver repeats this command until it is closed.
        An arm without any command is left unchanged if it was connected here, because its driver has held it since. A
        driver that was passed in may let the arm float, so that arm is commanded to hold."""
        if self.stopped:
            return
        self.stopped = True
        for index, opening in enumerate(self._openings):
            if opening is None and self._connected[index]:
                continue
            try:
                command = self._state(index)
                if opening is not None:
                    command[JOINTS] = opening  # not the measured opening, which a held object makes wider
                self._send(index, command)
            except RobotLostError as error:
                log.error("an arm could not be commanded to hold: %s", error)

    def close(self) -> None:
        """Close arms and cameras. A real arm loses its torque then and sinks: support it first."""
        arms = zip(self.arms, self._drivers, strict=False)  # fewer drivers if an arm did not respond
        devices: list[tuple[str, Driver | Camera]] = [*arms, *self._feeds.items()]
        for name, device in devices:
            try:
                device.close()
            except Exception as error:  # the remaining threads would keep the process running
                log.error("%s could not be closed: %s: %s", name, type(error).__name__, error)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _states(self) -> np.ndarray:
        """Return [A, 7] joints and openings. Raises RobotLostError with all arms that do not respond."""
        states, errors = [], dict[int, RobotLostError]()
        for index in range(len(self.arms)):
            try:
                states.append(self._state(index))
            except RobotLostError as error:
                errors[index] = error
        self._refuse_lost(errors)
        return np.stack(states)

    def _refuse_lost(self, errors: Mapping[int, RobotLostError]) -> None:
        """Raise RobotLostError if there are errors of arms, by index."""
        if errors:
            self._lost.update(errors)
            first = next(iter(errors.values()))
            raise RobotLostError("; ".join(map(str, errors.values())), arms=errors) from first

    def _state(self, index: int) -> np.ndarray:
        """Return [7] joints and opening."""
        driver = self._drivers[index]
        if _has_ended(driver):
            raise RobotLostError(f"arm {self.arms[index]}: its driver has ended with an error, which stands above")
        try:
            state = np.array(driver.get_joint_pos(), float)
        except Exception as error:  # the driver's thread may have raised any error
            raise RobotLostError(f"arm {self.arms[index]}: {type(error).__name__}: {error}") from error
        if state.shape != (JOINTS + 1,) or not np.isfinite(state).all():
            raise RobotLostError(f"arm {self.arms[index]} reports {state.tolist()}: 6 joints and an opening are needed")
        return state

    def _send(self, index: int, values: np.ndarray) -> None:
        try:
            self._drivers[index].command_joint_pos(values.copy())  # the driver clips in place
        except Exception as error:
            reason = f"a command was not taken: {type(error).__name__}: {error}"
            raise RobotLostError(f"arm {self.arms[index]}: {reason}") from error

    def _pose(self, index: int, joints: np.ndarray) -> np.ndarray:
        """Return [4, 4] world_from_gripper."""
        position, quaternion = forward_kinematics(joints, *self._models[index])
        pose = np.eye(4)
        pose[:3, :3] = Rotation.from_quat(quaternion, scalar_first=True).as_matrix()
        pose[:3, 3] = position
        return np.asarray(self._world_from_base[index] @ pose)

    def _views(self, grippers: dict[str, np.ndarray]) -> tuple[dict[str, dict[str, np.ndarray]], list[float]]:
        views, times = {}, []
        for name, camera in self._feeds.items():
            try:
                image, taken_s = camera.read()
            except RobotLostError as error:
                raise CameraLostError(f"camera {name}: {error}") from error
            upright, intrinsics = self._upright(name, image)
            poses = self._calibration.camera(name).poses({arm: pose[None] for arm, pose in grippers.items()}, 1)
            views[name] = {"image": upright, "intrinsics": intrinsics, "world_to_camera": poses[0]}
            times.append(taken_s)
        return views, times

    def _upright(self, name: str, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a camera's image [H, W, 3], rotated as calibrated, and its intrinsics [3, 3]. Raises ValueError if it
        has another shape than the calibration."""
        calibrated = self._calibration.camera(name)
        upright = np.ascontiguousarray(np.rot90(image, -calibrated.rotate // 90))
        height, width = upright.shape[:2]
        return upright, calibrated.intrinsics_for(width, height)
