"""Off-screen images, depth and segmentation of MuJoCo models, with any pinhole intrinsics."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keygrip.robots.mujoco_backend import INSTALL_ADVICE, RenderingUnavailableError, mujoco


@dataclass(frozen=True)
class Lens:
    """Pinhole intrinsics of an image of `width` x `height` pixels; pixel corners lie at integers."""

    width: int
    height: int
    intrinsics: np.ndarray  # [3, 3]

    @classmethod
    def from_field_of_view(
        cls, width: int, height: int, fovy_deg: float, shift: tuple[float, float] = (0.0, 0.0)
    ) -> Lens:
        """Create a lens whose optical axis meets the image at its centre plus `shift` (fractions of the size)."""
        focal = 0.5 * height / np.tan(np.deg2rad(fovy_deg) / 2)
        centre = (width * (0.5 + shift[0]), height * (0.5 + shift[1]))
        return cls(width, height, np.array([[focal, 0.0, centre[0]], [0.0, focal, centre[1]], [0.0, 0.0, 1.0]]))


def world_to_camera(data: mujoco.MjData, camera: int) -> np.ndarray:
    """Return the [4, 4] world-to-camera transform of a MuJoCo camera in OpenCV axes (x right, y down, z forward)."""
    rotation = data.cam_xmat[camera].reshape(3, 3) @ np.diag([1.0, -1.0, -1.0])  # camera to world
    transform = np.eye(4)
    transform[:3, :3] = rotation.T
    transform[:3, 3] = -rotation.T @ data.cam_xpos[camera]
    return transform


class CameraRenderer:
    """Render one model at one image size, through any camera and lens.

    Raises:
        RenderingUnavailableError: No GL context can be created.
    """

    def __init__(self, model: mujoco.MjModel, width: int, height: int, shadows: bool = False) -> None:
        self.width, self.height = width, height
        try:
            self._renderer = mujoco.Renderer(model, height, width)
        except Exception as error:  # the error depends on MuJoCo's backend
            backend = os.environ.get("MUJOCO_GL", "")
            raise RenderingUnavailableError(f"MuJoCo (MUJOCO_GL={backend}) cannot draw: {INSTALL_ADVICE}") from error
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = int(shadows)
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._options = mujoco.MjvOption()
        self._options.sitegroup[:] = 0  # sites would be visible in the image

    def _draw(self, data: mujoco.MjData, camera: str, lens: Lens) -> np.ndarray:
        if (lens.width, lens.height) != (self.width, self.height):
            raise ValueError(f"lens is {lens.width}x{lens.height}, the renderer {self.width}x{self.height}")
        self._renderer.update_scene(data, camera=camera, scene_option=self._options)
        (fx, _, cx), (_, fy, cy) = lens.intrinsics[0], lens.intrinsics[1]
        for view in self._renderer.scene.camera:
            near = view.frustum_near
            left, right = -cx / fx * near, (self.width - cx) / fx * near
            view.frustum_center, view.frustum_width = (left + right) / 2, (right - left) / 2
            view.frustum_top, view.frustum_bottom = cy / fy * near, -(self.height - cy) / fy * near
        return self._renderer.render().copy()

    def image(self, data: mujoco.MjData, camera: str, lens: Lens) -> np.ndarray:
        """Render [H, W, 3] uint8 RGB."""
        return self._draw(data, camera, lens)

    def depth(self, data: mujoco.MjData, camera: str, lens: Lens) -> np.ndarray:
        """Render [H, W] float32, metres along the optical axis."""
        self._renderer.enable_depth_rendering()
        try:
            return self._draw(data, camera, lens)
        finally:
            self._renderer.disable_depth_rendering()

    def segmentation(self, data: mujoco.MjData, camera: str, lens: Lens) -> np.ndarray:
        """Render [H, W] int32 geom ids, -1 where there is none."""
        self._renderer.enable_segmentation_rendering()
        try:
            labels = self._draw(data, camera, lens)
        finally:
            self._renderer.disable_segmentation_rendering()
        return np.where(labels[..., 1] == int(mujoco.mjtObj.mjOBJ_GEOM), labels[..., 0], -1).astype(np.int32)

    def close(self) -> None:
        """Free the GL context."""
        self._renderer.close()


class CameraViews:
    """The images of the cameras of a simulated cell; a base class of the cells.

    Attributes:
        model, data: of MuJoCo. cameras: names; the first is the main one. lenses: of each camera. image_size: edge of
            the square images, pixels. shadows: whether shadows are rendered. render_images: whether observations have
            images.
    """

    model: mujoco.MjModel
    data: mujoco.MjData
    cameras: tuple[str, ...]
    lenses: dict[str, Lens]
    image_size: int
    shadows: bool
    render_images: bool
    _renderer: CameraRenderer | None = None

    def _set_cameras(
        self, cameras: Sequence[str], available: Collection[str], image_size: int, shadows: bool, render_images: bool
    ) -> None:
        """Raise ValueError if a camera is unknown, or the image size is outside [16, 1280]."""
        unknown = [name for name in cameras if name not in available]
        if unknown:
            raise ValueError(f"unknown cameras {unknown}; choose from {', '.join(available)}")
        if not 16 <= image_size <= 1280:
            raise ValueError(f"image_size={image_size} is outside [16, 1280] pixels")
        self.cameras, self.image_size = tuple(cameras), image_size
        self.shadows, self.render_images = shadows, render_images

    def _draw(self) -> CameraRenderer:
        if self._renderer is None:
            self._renderer = CameraRenderer(self.model, self.image_size, self.image_size, self.shadows)
        return self._renderer

    def close(self) -> None:
        """Free the GL context; the next image creates a new one."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def frame(self, camera: str) -> np.ndarray:
        """Return the [H, W, 3] uint8 image of one of `cameras`."""
        return self._draw().image(self.data, camera, self.lenses[camera])

    @property
    def far(self) -> float:
        """Metres to the far plane: the depth of the empty background."""
        return float(self.model.vis.map.zfar * self.model.stat.extent)

    def depth(self, camera: str) -> np.ndarray:
        """Return [H, W] float32 metres along the optical axis; `far` where there is nothing."""
        return self._draw().depth(self.data, camera, self.lenses[camera])

    def segmentation(self, camera: str) -> np.ndarray:
        """Return [H, W] int32 geom ids, -1 for none."""
        return self._draw().segmentation(self.data, camera, self.lenses[camera])

    def world_to_camera(self, camera: str) -> np.ndarray:
        """Return [4, 4] of the camera's current pose (a camera on the wrist moves)."""
        return world_to_camera(self.data, self.model.camera(camera).id)

    def views(self) -> dict[str, Any]:
        """Return entries of an observation: `image`, `intrinsics` and `world_to_camera` of the first camera, and if
        there are several, all in `cameras` by name; none without `render_images`."""
        if not self.render_images:
            return {}
        views = {
            camera: {
                "image": self.frame(camera),
                "intrinsics": self.lenses[camera].intrinsics.copy(),
                "world_to_camera": self.world_to_camera(camera),
            }
            for camera in self.cameras
        }
        return views[self.cameras[0]] | ({"cameras": views} if len(views) > 1 else {})


def substeps_of(hz: float, timestep: float) -> int:
    """Return the physics steps per control period. Raises ValueError if the period is not a whole number of steps."""
    if not hz > 0:
        raise ValueError(f"hz={hz}: give a rate above 0")
    substeps = round(1 / hz / timestep)
    if abs(substeps * timestep - 1 / hz) > 1e-9:
        raise ValueError(f"hz={hz}: a period must be whole steps of {timestep} s; use 5, 10, 20 or 50")
    return substeps
