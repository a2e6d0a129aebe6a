"""The closed-loop environment: a YAM arm at a table, one target pose per control period.

Frames: world = the arm's base frame, z up, metres; camera OpenCV; quaternions wxyz; gripper 0 closed .. 1 open.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from keygrip.envs.rendering import CameraViews, Lens, substeps_of
from keygrip.envs.yam import scene, tasks
from keygrip.envs.yam.episode import LIFTED, Progress, next_joints, settle, start_of, touching
from keygrip.envs.yam.tasks import EpisodeLayout, Placed, TaskOptions, refuse_negative, sample_layout
from keygrip.envs.yam.text import Sight
from keygrip.robots.inverse_kinematics import yaw_of
from keygrip.robots.kinematics import arm_chain, forward_kinematics, quaternion_from_matrix
from keygrip.robots.mujoco_backend import mujoco

PICK_HEIGHT = 0.07  # m that `pick` must lift the object
REACH_DISTANCE = 0.015
STILL_SPEED = 0.05  # m/s
SUNK = 0.002  # m below the table's surface: the top of an unused pedestal


@dataclass
class TaskProgress(Progress):
    """The events in an episode of one arm so far."""

    held: bool = False
    let_go: bool = False  # released by command after being lifted
    yaw_error: float | None = None  # rad, closing axis relative to the object, at the start of the first grasp
    other_lifted: bool = False  # named_place: an object that the instruction does not name was lifted
    other_in_bowl: bool = False  # such an object is in the bowl now


class YamCell(CameraViews, gymnasium.Env[dict[str, Any], np.ndarray]):
    """One arm, one task.

    Action, float64 [8]: tool position (3, world, m), quaternion wxyz (4), gripper opening (1). It is the target for the
    end of the control period; the joint targets in between are interpolated.

    Observation: `image` [H, W, 3] uint8, `intrinsics` [3, 3] and `world_to_camera` [4, 4] of that image, `position`
    [3], `quaternion` [4], `gripper` [] and `joints` [6] as reached (not as commanded), `instruction` a sentence. With
    several `cameras` these are of the first, and `cameras` holds the three camera entries of each by name. Without
    `render_images` the camera entries are absent and no GL library is needed. With a second arm the robot's entries
    would have a leading axis.

    `terminated` is success. `truncated` is the time limit, or the object fell off the table. `info`: `success`,
    `failure_reason` (None before the end and on success, else missed, dropped, wrong_place, wrong_object, unreachable
    or timeout), `commanded_position`, `commanded_quaternion`, `commanded_gripper`, `yaw_error_rad` (None before the
    first grasp), `instruction`, `seed`, `object_colour` and `object_height_m` (height above the table of the surface
    that the object stands on at the start).

    Args:
        task: the task and its variations.
        image_size: edge of the square image, pixels.
        hz: control periods per second.
        cameras: names among "over", "front", "wrist"; the task's own camera by default.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  (gymnasium's own declaration)

    def __init__(
        self,
        task: TaskOptions,
        image_size: int = 224,
        hz: float = 10.0,
        cameras: tuple[str, ...] | None = None,
        render_images: bool = True,
    ) -> None:
        self.task, self.hz = task, float(hz)
        self.metadata = {**self.metadata, "render_fps": self.hz}
        self._set_cameras(cameras or (task.camera,), tasks.CAMERAS, image_size, task.shadows, render_images)
        self.render_mode = "rgb_array" if render_images else None
        self.lenses: dict[str, Lens] = {c: scene.lens_of(c, image_size, image_size) for c in self.cameras}
        self._build_model()
        self._substeps = substeps_of(hz, self.model.opt.timestep)
        shapes: dict[str, tuple[int, ...]] = {"position": (3,), "quaternion": (4,), "gripper": (), "joints": (6,)}
        entries: dict[str, spaces.Space[Any]] = {
            key: spaces.Box(-np.inf, np.inf, shape, np.float64) for key, shape in shapes.items()
        }
        entries["instruction"] = spaces.Text(max_length=100, charset=string.ascii_lowercase + " ,")
        if render_images:
            view: dict[str, spaces.Space[Any]] = {
                "image": spaces.Box(0, 255, (image_size, image_size, 3), np.uint8),
                "intrinsics": spaces.Box(-np.inf, np.inf, (3, 3), np.float64),
                "world_to_camera": spaces.Box(-np.inf, np.inf, (4, 4), np.float64),
            }
            entries |= view
            if len(self.cameras) > 1:
                entries["cameras"] = spaces.Dict({camera: spaces.Dict(view) for camera in self.cameras})
        self.observation_space = spaces.Dict(entries)
        low, high = np.array([-1.0] * 7 + [0.0]), np.array([1.0] * 8)
        self.action_space = spaces.Box(low, high, dtype=np.float64)
        self.layout: EpisodeLayout | None = None
        self.seed: int | None = None

    # ---- the model -------------------------------------------------------------------------------------------------

    def _build_model(self) -> None:
        model = self.model = scene.build_spec(self.task).compile()
        self.data = mujoco.MjData(model)
        self._arm_qpos = np.array([model.joint(n).qposadr[0] for n in scene.ARM_JOINT_NAMES])
        self._finger_qpos = np.array([model.joint(n).qposadr[0] for n in scene.FINGER_JOINT_NAMES])
        self._finger_range = float(model.joint(scene.FINGER_JOINT_NAMES[0]).range[1])
        self._tool = model.site(scene.TOOL_SITE).id
        self._object = model.body("object").id
        self._finger_bodies = [model.body(n).id for n in scene.FINGERS]
        self._goal_body = model.body("goal").id if self.task.name != "pick" else -1
        distractors = self.task.distractors if self.task.name == "named_place" else 0
        self._others = [model.body(f"distractor{i}").id for i in range(distractors)]

    def _place(self, body: str, position: np.ndarray, yaw: float) -> None:
        model, data = self.model, self.data
        quaternion = np.array([np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)])
        index = model.body(body).id
        if model.body_mocapid[index] >= 0:
            data.mocap_pos[model.body_mocapid[index]] = position
            data.mocap_quat[model.body_mocapid[index]] = quaternion
        elif model.body_jntnum[index]:
            address = model.jnt_qposadr[model.body_jntadr[index]]
            data.qpos[address : address + 7] = np.concatenate([position, quaternion])
        else:
            model.body_pos[index], model.body_quat[index] = position, quaternion

    def _enable_shape(self, thing: Placed) -> None:
        """Enable one shape, visible and with contacts, of a distractor that can be a cube, a ball or a cylinder."""
        if not (self.task.varied_shapes and thing.name != "object"):
            return
        for shape in tasks.SHAPES:
            geom, enabled = self.model.geom(f"{thing.name}_{shape}").id, int(shape == thing.shape)
            self.model.geom_contype[geom] = self.model.geom_conaffinity[geom] = enabled
            self.model.geom_group[geom] = 0 if enabled else scene.HIDDEN_GROUP

    def _paint(self, body: str, rgb: tuple[float, float, float], digit: int | None = None) -> None:
        index = self.model.body(body).id
        geoms = np.flatnonzero(self.model.geom_bodyid == index)
        self.model.geom_rgba[geoms] = [*rgb, 1.0]
        self.model.geom_matid[geoms] = -1 if digit is None else self.model.material(f"digit{digit}").id

    def _arrange(self, layout: EpisodeLayout) -> None:
        """Write a layout into the model and the data."""
        model, data, look = self.model, self.data, layout.appearance
        mujoco.mj_resetData(model, data)
        data.qpos[self._arm_qpos] = layout.start_joints
        data.qpos[self._finger_qpos] = self._finger_range
        data.ctrl[:6], data.ctrl[6] = layout.start_joints, self._finger_range
        for thing in layout.placed:
            self._enable_shape(thing)
            self._place(thing.name, thing.position + [0, 0, 0.001], thing.yaw)
            self._paint(thing.name, self.task.palette[thing.colour], thing.digit)
            if self.task.pedestal_m:
                # only the top of a pedestal is visible; in the table's colour its edges show only by shading
                sunk = thing.pedestal - self.task.pedestal_m / 2 - (0.0 if thing.pedestal else SUNK)
                self._place(f"{thing.name}_pedestal", np.array([*thing.position[:2], sunk]), thing.yaw)
                self._paint(f"{thing.name}_pedestal", look.table_rgb)
        if self._goal_body >= 0:
            self._place("goal", layout.goal, layout.goal_yaw)
            self._paint("goal", self.task.palette[layout.goal_colour])
        if self.task.name == "reach":
            post = model.geom("post").id
            model.geom_size[post, 1] = layout.goal[2] / 2
            self._place("post", np.array([layout.goal[0], layout.goal[1], layout.goal[2] / 2]), 0.0)
            self._paint("post", (0.25, 0.25, 0.27))
        for name in tasks.CAMERA_ORBITS:
            pose = layout.camera if name == self.task.camera else layout.other_cameras.get(name)
            turn = (pose.azimuth_deg, pose.elevation_deg) if pose is not None else (0.0, 0.0)
            camera = model.camera(name).id
            model.cam_pos[camera], model.cam_quat[camera] = scene.camera_pose(name, *turn)
            if name == layout.hidden_from:
                screen, eye = model.body_mocapid[model.body("screen").id], model.cam_pos[camera]
                data.mocap_pos[screen] = eye + scene.SCREEN_SHARE * (layout.object.position - eye)
                data.mocap_quat[screen] = model.cam_quat[camera]
        table, floor = model.geom("table").id, model.geom("floor").id
        model.geom_rgba[table], model.geom_rgba[floor] = [*look.table_rgb, 1.0], [*look.floor_rgb, 1.0]
        model.geom_matid[table] = model.material(f"table{look.table}").id if look.table else -1
        model.vis.headlight.ambient[:] = look.ambient
        model.vis.headlight.diffuse[:] = 0.3
        model.vis.headlight.specular[:] = 0.1
        model.light_diffuse[0] = look.diffuse
        direction = np.array(look.light_direction) / np.linalg.norm(look.light_direction)
        model.light_dir[0] = direction
        model.light_pos[0] = model.stat.center - 1.5 * direction  # centres the shadow map on the table
        settle(model, data)

    # ---- gymnasium -------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the episode of `seed` (random without one); `options` are not used and must be empty."""
        if options:
            raise ValueError(f"YamCell takes its options when it is built, not at reset: {sorted(options)}")
        if seed is not None:
            refuse_negative(seed)
        super().reset(seed=seed)
        self.seed = int(seed) if seed is not None else int(self.np_random.integers(0, 2**31))
        self.layout = sample_layout(self.task, self.seed)
        self._arrange(self.layout)
        self.progress = TaskProgress()
        self.elapsed = 0
        self.commanded_joints = self.layout.start_joints.copy()
        self.commanded_gripper = 1.0
        self._rest_height = float(self.object_position[2])
        self._other_rests = [float(self.data.xpos[body][2]) for body in self._others]
        return self.observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Simulate one control period; the reward is 1 on success, else 0.

        Raises:
            ValueError: The action is not 8 finite numbers with a valid quaternion.
        """
        self.advance(action)
        success, truncated, info = self.outcome()
        return self.observation(), float(success), success, truncated, info

    def outcome(self) -> tuple[bool, bool, dict[str, Any]]:
        """Return `terminated`, `truncated` and `info` of the current state, as in `step`, without rendering."""
        progress = self.progress
        truncated = not progress.success and (progress.lost or self.elapsed / self.hz >= self.task.time_limit_s)
        return progress.success, truncated, self._info(truncated)

    def advance(self, action: np.ndarray, joints: np.ndarray | None = None) -> None:
        """Simulate the physics of `step` without rendering (see `outcome` for the rest). May continue after success,
        because the recorder finishes the motion.

        Args:
            action: [8]. joints: [6] rad that a plan has for its pose: used if they put the tool there, else the start
                of the inverse kinematics. None: it starts from the last commanded joints.

        Raises:
            ValueError: as in `step`; or the joints are not 6 finite angles.
        """
        if self.layout is None:
            raise RuntimeError("YamCell: call reset(seed=...) before the first step")
        action = np.asarray(action, float)
        if action.shape != (8,) or not np.isfinite(action).all() or np.linalg.norm(action[3:7]) < 1e-6:
            raise ValueError(
                f"an action is 8 finite numbers (position 3, quaternion wxyz 4, gripper 1), got {action.tolist()}"
            )
        start = start_of(joints, self.commanded_joints)
        target_joints, position_error = next_joints(action, start, self.commanded_joints, self.hz)
        gripper = float(np.clip(action[7], 0.0, 1.0))
        previous_control = np.append(self.commanded_joints, self.commanded_gripper * self._finger_range)
        next_control = np.append(target_joints, gripper * self._finger_range)
        if gripper < 0.5 <= self.commanded_gripper and self.progress.yaw_error is None:
            self.progress.yaw_error = self.yaw_error
        for i in range(self._substeps):
            self.data.ctrl[:] = previous_control + (next_control - previous_control) * (i + 1) / self._substeps
            mujoco.mj_step(self.model, self.data)
        mujoco.mj_forward(self.model, self.data)  # positions of sites are one step behind after mj_step
        self.commanded_joints, self.commanded_gripper = next_control[:6], gripper
        self.elapsed += 1
        self._judge(position_error)

    def render(self) -> np.ndarray:
        """Return the [H, W, 3] uint8 image of the first camera."""
        return self.frame(self.cameras[0])

    # ---- what can be seen ------------------------------------------------------------------------------------------

    def observation(self) -> dict[str, Any]:
        """Return the observation of the current state."""
        position, quaternion = self.tool_pose
        return {
            "position": position,
            "quaternion": quaternion,
            "gripper": np.array(self.gripper_opening),
            "joints": self.joints,
            "instruction": self.layout.instruction if self.layout is not None else "",
        } | self.views()

    @property
    def tool_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Reached position [3] and quaternion wxyz [4] of the grasp site."""
        rotation = self.data.site_xmat[self._tool].reshape(3, 3)
        return self.data.site_xpos[self._tool].copy(), quaternion_from_matrix(rotation)

    @property
    def commanded_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Position [3] and quaternion [4] of the commanded joints; the arm lags behind by about 1 cm."""
        return forward_kinematics(self.commanded_joints)

    @property
    def joints(self) -> np.ndarray:
        """[6] reached joint angles, rad."""
        return self.data.qpos[self._arm_qpos].copy()

    @property
    def joint_ranges(self) -> np.ndarray:
        """[1, 6, 2] of the joints."""
        return arm_chain().limits[None]

    def poses_at(self, joints: np.ndarray) -> np.ndarray:
        """Return [1, ..., 7] the tool poses of joints [1, ..., 6]."""
        return np.concatenate(forward_kinematics(joints), axis=-1)

    @property
    def gripper_opening(self) -> float:
        """Reached opening, 0 closed .. 1 open."""
        return float(self.data.qpos[self._finger_qpos].sum() / (2 * self._finger_range))

    def body_position(self, name: str) -> np.ndarray:
        """Return [3] the centre of a body: "object", "goal" or "distractor<i>"."""
        return self.data.xpos[self.model.body(name).id].copy()

    @property
    def object_position(self) -> np.ndarray:
        """[3] centre of the object to move."""
        return self.data.xpos[self._object].copy()

    @property
    def yaw_error(self) -> float:
        """Angle (rad, >= 0) about the vertical between the closing axis and the object's nearest grasp."""
        across = self.data.xmat[self._object].reshape(3, 3)[:2, 1]
        period = self.task.yaw_period
        turn = yaw_of(self.data.site_xmat[self._tool].reshape(3, 3)) - np.arctan2(-across[0], across[1])
        return float(abs((turn + period / 2) % period - period / 2))

    def sight(self, camera: str) -> Sight:
        """Return where the loose objects and the goal are in a camera's image, and how much of them is visible."""
        labels = self.segmentation(camera)
        bodies = np.where(labels >= 0, self.model.geom_bodyid[np.maximum(labels, 0)], -1)
        transform, intrinsics = self.world_to_camera(camera), self.lenses[camera].intrinsics
        centres, visible = {}, {}
        assert self.layout is not None
        for name in [p.name for p in self.layout.placed] + (["goal"] if self._goal_body >= 0 else []):
            body = self.model.body(name).id
            in_camera = transform[:3, :3] @ self.data.xpos[body] + transform[:3, 3]
            u, v, depth = intrinsics @ in_camera
            centres[name] = (float(u / depth), float(v / depth))
            visible[name] = int((bodies == body).sum())
        return Sight(centres, visible, self.image_size, self.image_size)

    # ---- what has happened -----------------------------------------------------------------------------------------

    def _judge(self, position_error: float) -> None:
        """Update the progress after a control period."""
        progress, touched = self.progress, touching(self.model, self.data, self._object)
        speed = float(np.linalg.norm(self.data.cvel[self._object][3:]))
        held = all(finger in touched for finger in self._finger_bodies)
        height = float(self.object_position[2])
        raised = height - self._rest_height
        if progress.held and not held and progress.lifted and self.commanded_gripper >= 0.5:
            progress.let_go = True
        if held and raised > LIFTED:
            progress.lifted, progress.let_go = True, False
        progress.held = held
        self._check_others_unmoved()
        progress.update(1 / self.hz, height, position_error, self._goal_met(held, raised, touched, speed))

    def _check_others_unmoved(self) -> None:
        """Check whether an object that the instruction does not name is moved instead."""
        self.progress.other_in_bowl = False
        for body, rest_height in zip(self._others, self._other_rests, strict=True):
            touched = touching(self.model, self.data, body)
            gripped = all(finger in touched for finger in self._finger_bodies)
            self.progress.other_lifted |= gripped and float(self.data.xpos[body][2]) - rest_height > LIFTED
            self.progress.other_in_bowl |= self._goal_body in touched and self._is_in_bowl(self.data.xpos[body])

    def _is_in_bowl(self, position: np.ndarray) -> bool:
        assert self.layout is not None
        inside = np.hypot(*(position[:2] - self.layout.goal[:2])) < tasks.BOWL_RADIUS
        return bool(inside and position[2] < tasks.BOWL_HEIGHT + self.task.half_extents[2])

    def _goal_met(self, held: bool, raised: float, touched: set[int], speed: float) -> bool:
        assert self.layout is not None
        if self.task.name == "reach":
            return bool(np.linalg.norm(self.tool_pose[0] - self.layout.goal) < REACH_DISTANCE)
        if self.task.name == "pick":
            return held and raised > PICK_HEIGHT
        released = self.commanded_gripper >= 0.5 and not touched.intersection(self._finger_bodies)
        rests = released and speed < STILL_SPEED and touched == {self._goal_body}
        position = self.object_position
        if self.task.name in tasks.IN_BOWL:
            return rests and self._is_in_bowl(position) and not self.progress.other_in_bowl
        if self.task.name == "peg":
            return rests and abs(position[2] - tasks.SLOT_FLOOR - self.task.half_extents[2]) < 0.006
        top = self.data.xpos[self._goal_body][2] + tasks.BLOCK_SIZE / 2 + self.task.half_extents[2]
        return bool(rests and abs(position[2] - top) < 0.008)

    @property
    def failure_reason(self) -> str | None:
        """Why the episode would count as failed if it ended now; None on success."""
        progress = self.progress
        if progress.success:
            return None
        if self.task.name == "reach":
            return "unreachable" if progress.unreachable else "missed"
        if progress.other_in_bowl or (progress.other_lifted and not progress.lifted):
            return "wrong_object"
        if progress.lifted and progress.held:
            return "timeout"
        if progress.lifted:
            return "wrong_place" if progress.let_go and self.task.name != "pick" else "dropped"
        return "unreachable" if progress.unreachable else "missed"

    def _info(self, over: bool = False) -> dict[str, Any]:
        assert self.layout is not None
        position, quaternion = self.commanded_pose
        return {
            "success": self.progress.success,
            "failure_reason": self.failure_reason if over else None,
            "commanded_position": position,
            "commanded_quaternion": quaternion,
            "commanded_gripper": self.commanded_gripper,
            "yaw_error_rad": self.progress.yaw_error,
            "instruction": self.layout.instruction,
            "seed": self.seed,
            "object_colour": self.layout.object.colour,
            "object_height_m": self.layout.object.pedestal,
        }
