"""A Meta-World task as an `Environment`: images with camera calibration, fingertip poses, commands by pose.

Meta-World moves a mocap body to which the hand is welded; an action is a step of that body. A commanded position is the
mocap body's target, shifted by the offset of the fingertips below it. During motion the hand lags behind the body by 3
to 7 cm, so a demonstration is replayed from commanded positions, not from reached ones. The gripper points down; no
action rotates it.

Frames: world z up, metres; camera OpenCV; quaternions wxyz; gripper 0 closed .. 1 open.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from keygrip.envs.metaworld.tasks import CAMERAS, HZ, UPSIDE_DOWN, MetaWorldTask
from keygrip.envs.rendering import world_to_camera
from keygrip.robots.mujoco_backend import INSTALL_ADVICE, RenderingUnavailableError, mujoco

try:
    import metaworld
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"Meta-World needs {error.name}, in a Python environment of its own: `make metaworld-install` makes it"
    ) from error

# LeRobot's camera position; at the original one, a pixel of 192 covers four times the area
CORNER2_POSITION = (0.75, 0.075, 0.7)
DOWN = np.array([1.0, 0.0, 1.0, 0.0]) / np.sqrt(2)  # the mocap body's rotation
CLOSED_EFFORT, OPEN_EFFORT = 0.6, -1.0  # at effort 1 a peg rotates between the fingers
GENTLE = {"pick-out-of-hole-v3": 0.1}  # its script's own effort; at 0.6 the puck slips out of the fingers
HALF_TURN = np.diag([-1.0, -1.0, 1.0, 1.0])  # about the optical axis


class MetaWorldEnvironment:
    """One task; see `keygrip.envs.environment.Environment`. Object positions are determined by the episode's seed.

    Args:
        task: the task and its camera.
        image_size: edge of the square image, pixels.
        hz: control periods per second; the benchmark has one rate.
        cameras: names of cameras, the main one first; None: the task's own.
        render_images: False: physics only.

    Raises:
        ValueError: The rate differs, the scene does not have a camera, or the image size is outside [16, 1280].
    """

    def __init__(
        self,
        task: MetaWorldTask,
        image_size: int = 224,
        hz: float = HZ,
        cameras: tuple[str, ...] | None = None,
        render_images: bool = True,
    ) -> None:
        if hz != HZ:
            raise ValueError(f"Meta-World is controlled at {HZ} Hz, not at {hz}")
        self.task, self.image_size, self.hz, self.render_images = task, image_size, HZ, render_images
        self.cameras = tuple(cameras or (task.camera,))
        if unknown := [name for name in self.cameras if name not in CAMERAS]:
            raise ValueError(f"Meta-World has no camera {unknown[0]!r}; it has {', '.join(CAMERAS)}")
        if not 16 <= image_size <= 1280:
            raise ValueError(f"image_size={image_size} is outside [16, 1280] pixels")
        suite = metaworld.MT1(task.name, seed=42)  # the seed of 50 predefined positions, which are not used
        self.env: Any = suite.train_classes[task.name]()
        self.env.set_task(suite.train_tasks[0])
        self.env.max_path_length = 10**9  # `outcome` ends an episode; recording may continue after it
        self._renderer: mujoco.Renderer | None = None
        self._success = False
        self.elapsed = 0

    def reset(self, *, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start the episode of a seed: positions are sampled from the benchmark's own ranges."""
        env = self.env
        env.seed(seed)
        env._freeze_rand_vec, env.seeded_rand_vec = False, True  # the public way to sample positions by seed
        self.sensed, _ = env.reset()
        env.model.cam_pos[env.model.camera("corner2").id] = CORNER2_POSITION
        mujoco.mj_forward(env.model, env.data)  # updates the positions of goal marks
        self.offset = env.tcp_center - env.data.body("hand").xpos
        self._success, self.elapsed, self.seed, self._opening = False, 0, seed, 1.0
        return self.observation(), self._info(False)

    def advance(self, action: np.ndarray) -> None:
        """Simulate one control period towards a commanded pose: position 3, quaternion 4 (not used), opening 1.

        Raises:
            ValueError: The action is not 8 finite numbers.
        """
        action = np.asarray(action, float)
        if action.shape != (8,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 8 finite numbers, got {action.tolist()}")
        self.step_body((action[:3] - self.commanded_position) / self.env.action_scale, float(action[7]))

    def step_body(self, change: np.ndarray, opening: float) -> None:
        """Simulate one control period in the benchmark's own units: a step of the mocap body in units of 1 cm, each
        within [-1, 1], and the gripper closed below 0.5."""
        closed = GENTLE.get(self.task.name, CLOSED_EFFORT)
        effort = closed if opening < 0.5 else OPEN_EFFORT
        self.sensed, _, _, _, info = self.env.step(np.append(change, effort).clip(-1, 1).astype(np.float32))
        self._success, self._opening = bool(info["success"]), opening
        self.elapsed += 1

    def outcome(self) -> tuple[bool, bool, dict[str, Any]]:
        """Return success as the benchmark reports it at this step, whether the time is over, and `info`."""
        over = not self._success and self.elapsed >= self.task.step_limit
        return self._success, over, self._info(over)

    def _info(self, over: bool) -> dict[str, Any]:
        return {
            "success": self._success,
            "failure_reason": "timeout" if over else None,
            "instruction": self.task.instruction,
            "seed": self.seed,
        }

    @property
    def position(self) -> np.ndarray:
        """[3] reached position between the fingertips of an open gripper: the hand's position, shifted."""
        return self.env.data.body("hand").xpos + self.offset

    @property
    def commanded_position(self) -> np.ndarray:
        """[3] commanded position: the mocap body's position, shifted."""
        return self.env.data.mocap_pos[0] + self.offset

    @property
    def opening(self) -> float:
        """Reached opening of the gripper."""
        return float(np.clip(self.sensed[3], 0.0, 1.0))

    def observation(self) -> dict[str, Any]:
        """Return the observation of the current state."""
        entries: dict[str, Any] = {
            "position": self.position,
            "quaternion": DOWN.copy(),
            "gripper": np.array(self.opening),
            "instruction": self.task.instruction,
        }
        if self.render_images:
            views = {camera: self.view(camera) for camera in self.cameras}
            entries |= views[self.cameras[0]]
            if len(views) > 1:
                entries["cameras"] = views
        return entries

    def view(self, camera: str) -> dict[str, np.ndarray]:
        """Return the current `image` [H, W, 3] uint8, `intrinsics` [3, 3] and `world_to_camera` [4, 4] of a camera."""
        model, data, size = self.env.model, self.env.data, self.image_size
        if self._renderer is None:
            buffer = model.vis.global_  # gymnasium's is 640 x 480
            buffer.offwidth, buffer.offheight = max(buffer.offwidth, size), max(buffer.offheight, size)
            try:
                self._renderer = mujoco.Renderer(model, size, size)
            except Exception as error:  # the error depends on MuJoCo's backend
                raise RenderingUnavailableError(f"MuJoCo cannot draw: {INSTALL_ADVICE}") from error
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self._renderer.scene.flags[flag] = int(self.task.shadows)
        self._renderer.update_scene(data, camera)
        image, index = self._renderer.render(), model.camera(camera).id
        transform = world_to_camera(data, index)
        if camera in UPSIDE_DOWN:
            image, transform = image[::-1, ::-1], HALF_TURN @ transform
        focal = 0.5 * size / np.tan(np.deg2rad(model.cam_fovy[index]) / 2)
        intrinsics = np.array([[focal, 0.0, size / 2], [0.0, focal, size / 2], [0.0, 0.0, 1.0]])
        return {"image": np.ascontiguousarray(image), "intrinsics": intrinsics, "world_to_camera": transform}

    def close(self) -> None:
        """Free the GL context."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
