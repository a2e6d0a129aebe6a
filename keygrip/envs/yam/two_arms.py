"""Two YAM arms side by side at one table: the environment of the task `handover`.

Frames as in `keygrip.envs.yam.environment`; arrays have a leading axis of arms, in the order of `handover.ARMS`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from keygrip.envs.rendering import CameraViews, Lens, substeps_of
from keygrip.envs.yam import handover, scene
from keygrip.envs.yam.episode import LIFTED, Progress, next_joints, settle, start_of, touching
from keygrip.envs.yam.handover import ARMS, BASES, HandoverLayout, HandoverTask, sample_handover
from keygrip.robots.kinematics import arm_chain, forward_kinematics, quaternion_from_matrix
from keygrip.robots.mujoco_backend import mujoco

NAMES = {"left": scene.RobotNames("left_yam_", "left_"), "right": scene.YAM}
HANDED_HEIGHT = 0.06  # m above the table: minimum height of the bar when the left arm holds it
GONE = 0.06  # m from the middle of the bar at which the right hand counts as gone


class HandoverCell(CameraViews):
    """Both arms and a bar.

    Action, float64 [2, 8]: for each arm, tool position (3, world, m), quaternion wxyz (4), gripper opening (1).
    Observation: as in `YamCell`, with a leading axis of arms in `position`, `quaternion`, `gripper` and `joints`.
    `info`: `success`, `failure_reason` (None before the end and on success, else missed, dropped, unreachable or
    timeout), `instruction`, `seed`.

    Args:
        task: what may vary. image_size: edge of the square image, pixels. hz: control periods per second.
        cameras: names among "over" and "front"; the task's own by default.
        render_images: False: observations hold no images, and no GL library is needed.
    """

    arms = ARMS

    def __init__(
        self,
        task: HandoverTask,
        image_size: int = 224,
        hz: float = 10.0,
        cameras: tuple[str, ...] | None = None,
        render_images: bool = True,
    ) -> None:
        self.task, self.hz = task, float(hz)
        self._set_cameras(cameras or (task.camera,), handover.CAMERAS, image_size, task.shadows, render_images)
        self.lenses = {
            name: Lens.from_field_of_view(image_size, image_size, handover.CAMERAS[name][3]) for name in self.cameras
        }
        model = self.model = build_two_arms().compile()
        self.data = mujoco.MjData(model)
        self._substeps = substeps_of(hz, model.opt.timestep)
        names = [NAMES[arm] for arm in ARMS]
        self._arm_qpos = np.array([[model.joint(n).qposadr[0] for n in robot.joints] for robot in names])  # [2, 6]
        self._finger_qpos = np.array([[model.joint(n).qposadr[0] for n in robot.finger_joints] for robot in names])
        self._finger_range = float(model.joint(names[0].finger_joints[0]).range[1])
        motors = [
            [f"{robot.motors}motor{i + 1}" for i in range(6)] + [f"{robot.motors}motor_gripper"] for robot in names
        ]
        self._motors = np.array([[model.actuator(name).id for name in row] for row in motors])  # [2, 7]
        self._tools = [model.site(robot.tool).id for robot in names]
        self._fingers = [[model.body(name).id for name in robot.fingers] for robot in names]
        self._bar = model.body("object").id
        self.layout: HandoverLayout | None = None
        self.seed: int | None = None

    def reset(self, *, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the episode of a seed."""
        model, data = self.model, self.data
        self.seed, self.layout = int(seed), sample_handover(self.task, int(seed))
        layout = self.layout
        mujoco.mj_resetData(model, data)
        data.qpos[self._arm_qpos], data.qpos[self._finger_qpos] = layout.start_joints, self._finger_range
        data.ctrl[self._motors[:, :6]], data.ctrl[self._motors[:, 6]] = layout.start_joints, self._finger_range
        address = model.jnt_qposadr[model.body_jntadr[self._bar]]
        half = layout.yaw / 2
        data.qpos[address : address + 7] = [*(layout.bar + [0, 0, 0.001]), np.cos(half), 0.0, 0.0, np.sin(half)]
        model.geom_rgba[np.flatnonzero(model.geom_bodyid == self._bar)] = [*layout.colour, 1.0]
        settle(model, data)
        self.progress, self.elapsed = Progress(), 0
        self.commanded_joints, self.commanded_gripper = layout.start_joints.copy(), np.ones(2)
        self._rest_height = float(data.xpos[self._bar][2])
        return self.observation(), self._info()

    def advance(self, action: np.ndarray, joints: np.ndarray | None = None) -> None:
        """Simulate one control period towards the arms' poses [2, 8]; nothing is rendered.

        Args:
            joints: [2, 6] rad that a plan has for these poses, as in `YamCell`.

        Raises:
            ValueError: The action is not two times 8 finite numbers with valid quaternions, or the joints are not two
                times 6 finite angles.
        """
        if self.layout is None:
            raise RuntimeError("HandoverCell: call reset(seed=...) before the first step")
        action = np.asarray(action, float)
        usable = action.shape == (2, 8) and np.isfinite(action).all()
        if not usable or (np.linalg.norm(action[:, 3:7], axis=1) < 1e-6).any():
            raise ValueError(f"an action is 8 finite numbers for each of {', '.join(ARMS)}, got {action.tolist()}")
        starts = start_of(joints, self.commanded_joints)
        target_joints, position_error = self.commanded_joints.copy(), 0.0
        for arm, pose in enumerate(action):
            in_base = np.concatenate([pose[:3] - BASES[arm], pose[3:]])
            target_joints[arm], arm_error = next_joints(in_base, starts[arm], self.commanded_joints[arm], self.hz)
            position_error = max(position_error, arm_error)
        gripper = np.clip(action[:, 7], 0.0, 1.0)
        previous_control = np.concatenate(
            [self.commanded_joints, self.commanded_gripper[:, None] * self._finger_range], axis=1
        )
        next_control = np.concatenate([target_joints, gripper[:, None] * self._finger_range], axis=1)
        for i in range(self._substeps):
            self.data.ctrl[self._motors] = (
                previous_control + (next_control - previous_control) * (i + 1) / self._substeps
            )
            mujoco.mj_step(self.model, self.data)
        mujoco.mj_forward(self.model, self.data)
        self.commanded_joints, self.commanded_gripper = target_joints, gripper
        self.elapsed += 1
        self._judge(position_error)

    def outcome(self) -> tuple[bool, bool, dict[str, Any]]:
        """Return success, whether the episode is over without it, and `info`."""
        over = self.progress.lost or self.elapsed / self.hz >= self.task.time_limit_s
        truncated = over and not self.progress.success
        return self.progress.success, truncated, self._info(truncated)

    # ---- what can be seen ------------------------------------------------------------------------------------------

    def observation(self) -> dict[str, Any]:
        """Return the observation of the current state."""
        position, quaternion = self.tool_poses
        return {
            "position": position,
            "quaternion": quaternion,
            "gripper": self.gripper_openings,
            "joints": self.joints,
            "instruction": self.layout.instruction if self.layout is not None else "",
        } | self.views()

    @property
    def tool_poses(self) -> tuple[np.ndarray, np.ndarray]:
        """Reached positions [2, 3] and quaternions [2, 4] of the grasp sites."""
        turns = [quaternion_from_matrix(self.data.site_xmat[tool].reshape(3, 3)) for tool in self._tools]
        return self.data.site_xpos[self._tools].copy(), np.stack(turns)

    @property
    def commanded_poses(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions [2, 3] and quaternions [2, 4] of the commanded joints."""
        poses = self.poses_at(self.commanded_joints)
        return poses[:, :3], poses[:, 3:]

    @property
    def joints(self) -> np.ndarray:
        """[2, 6] reached joint angles, rad."""
        return self.data.qpos[self._arm_qpos].copy()

    @property
    def joint_ranges(self) -> np.ndarray:
        """[2, 6, 2] of the joints."""
        return np.stack([arm_chain().limits] * len(ARMS))

    def poses_at(self, joints: np.ndarray) -> np.ndarray:
        """Return [2, ..., 7] the tool poses of joints [2, ..., 6]."""
        poses = np.concatenate(forward_kinematics(joints), axis=-1)
        poses[..., :3] += BASES.reshape(len(ARMS), *[1] * (poses.ndim - 2), 3)
        return poses

    @property
    def gripper_openings(self) -> np.ndarray:
        """[2] reached openings, 0 closed .. 1 open."""
        return self.data.qpos[self._finger_qpos].sum(axis=1) / (2 * self._finger_range)

    @property
    def object_position(self) -> np.ndarray:
        """[3] middle of the bar."""
        return self.data.xpos[self._bar].copy()

    # ---- what has happened -----------------------------------------------------------------------------------------

    def _judge(self, position_error: float) -> None:
        touched = touching(self.model, self.data, self._bar)
        left, right = ([finger in touched for finger in fingers] for fingers in self._fingers)
        height = float(self.data.xpos[self._bar][2])
        self.progress.lifted |= height - self._rest_height > LIFTED and (all(left) or all(right))
        right_clear = float(np.linalg.norm(self.data.site_xpos[self._tools[1]] - self.data.xpos[self._bar])) > GONE
        handed = all(left) and not any(right) and height > HANDED_HEIGHT and right_clear
        self.progress.update(1 / self.hz, height, position_error, handed)

    @property
    def failure_reason(self) -> str | None:
        """Why the episode would count as failed if it ended now; None on success."""
        progress = self.progress
        if progress.success:
            return None
        if progress.lifted:
            in_air = float(self.data.xpos[self._bar][2]) - self._rest_height > LIFTED
            return "timeout" if in_air else "dropped"
        return "unreachable" if progress.unreachable else "missed"

    def _info(self, over: bool = False) -> dict[str, Any]:
        assert self.layout is not None
        return {
            "success": self.progress.success,
            "failure_reason": self.failure_reason if over else None,
            "instruction": self.layout.instruction,
            "seed": self.seed,
        }


def build_two_arms(arm: str = "yam", gripper: str = "linear_4310") -> mujoco.MjSpec:
    """Build two arms side by side, the bar and the cameras."""
    middle = (0.3, float(handover.LEFT_BASE[1]) / 2)
    spec = scene.empty_cell(middle)
    for name, base in zip(ARMS, BASES, strict=True):
        scene.add_robot(spec, arm, gripper, NAMES[name], (float(base[0]), float(base[1]), float(base[2])))
    scene.add_loose(spec, "object", ("bar",), np.array(handover.BAR_HALF))
    for camera, (azimuth, elevation, distance, fovy) in handover.CAMERAS.items():
        position, quaternion = scene.orbit_pose(handover.CAMERA_TARGET, azimuth, elevation, distance)
        spec.worldbody.add_camera(name=camera, pos=position, quat=quaternion, fovy=fovy)
    return spec
