"""A small scene that the tests of all formats record: a gripper's path, a camera, and images with a disc at the
gripper.

If a reader gets a convention wrong (axes, inverse, rotation, flip, half a pixel, the other arm's base), the projected
gripper is not on the disc.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from keygrip.data.robot.schema import Demo

WIDTH, HEIGHT, FRAMES = 96, 72, 6


def looking_at(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return world_to_camera of an OpenCV camera; z is up in the world."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, -rotation @ eye
    return pose


@dataclass
class Scene:
    """Ground truth: world_to_camera [4, 4], K for pixel corners [3, 3], the gripper's path in the world."""

    world_to_camera: np.ndarray
    intrinsics: np.ndarray
    position: np.ndarray  # [N, 3]
    rotation: np.ndarray  # [N, 3, 3]
    gripper: np.ndarray  # [N]
    width: int = WIDTH
    height: int = HEIGHT
    background: np.ndarray = field(default_factory=lambda: np.array([20, 30, 40]))

    def pixels(self, position: np.ndarray | None = None) -> np.ndarray:
        """Return the [N, 2] pixels of world points, computed without the package."""
        points = self.position if position is None else position
        camera = points @ self.world_to_camera[:3, :3].T + self.world_to_camera[:3, 3]
        return np.stack(
            [
                self.intrinsics[0, 0] * camera[:, 0] / camera[:, 2] + self.intrinsics[0, 2],
                self.intrinsics[1, 1] * camera[:, 1] / camera[:, 2] + self.intrinsics[1, 2],
            ],
            axis=1,
        )

    def picture(self, pixel: np.ndarray) -> np.ndarray:
        """Draw a red disc of radius 5 around a pixel, antialiased so that its centroid is exact."""
        x, y = np.meshgrid(np.arange(self.width) + 0.5, np.arange(self.height) + 0.5)
        disc = np.clip(5.5 - np.hypot(x - pixel[0], y - pixel[1]), 0, 1)[..., None]
        picture = self.background * (1 - disc) + np.array([230, 20, 20]) * disc
        return picture.round().astype(np.uint8)

    def pictures(self, position: np.ndarray | None = None) -> np.ndarray:
        return np.stack([self.picture(pixel) for pixel in self.pixels(position)])


def disc_centre(picture: np.ndarray) -> np.ndarray:
    """Return the centroid of the disc in pixels, in the corner convention."""
    red = np.clip(picture[..., 0].astype(float) - picture[..., 2].astype(float) - 10, 0, None)
    y, x = np.mgrid[0 : picture.shape[0], 0 : picture.shape[1]] + 0.5
    return np.array([(x * red).sum(), (y * red).sum()]) / red.sum()


@pytest.fixture
def scene() -> Scene:
    step = np.linspace(0, 1, FRAMES)
    position = np.stack([0.35 + 0.1 * step, -0.15 + 0.3 * step, 0.25 - 0.2 * step], axis=1)
    down = Rotation.from_matrix([[1, 0, 0], [0, -1, 0], [0, 0, -1]])
    rotation = (
        Rotation.from_euler("z", step[:, None]) * down * Rotation.from_euler("x", 0.3 * step[:, None])
    ).as_matrix()
    intrinsics = np.array([[90.0, 0, 47.0], [0, 92.0, 35.0], [0, 0, 1]])
    world_to_camera = looking_at(np.array([0.9, -0.3, 0.7]), np.array([0.4, 0.0, 0.1]))
    return Scene(world_to_camera, intrinsics, position, rotation, np.linspace(1, 0, FRAMES))


@pytest.fixture
def check_geometry() -> Callable[..., None]:
    """Return a function that asserts that the projected gripper of a demo lies on the disc of every image, within half
    a pixel."""

    def check(demo: Demo, camera: str, arm: str, tolerance: float = 0.5) -> None:
        track, trajectory = demo.cameras[camera], demo.arms[arm]
        for index in range(len(demo)):
            pose, matrix = track.world_to_camera[index], track.intrinsics[index]
            point = pose[:3, :3] @ trajectory.position[index] + pose[:3, 3]
            pixel = (matrix @ (point / point[2]))[:2]
            found = disc_centre(track.frames.read(index))
            assert np.abs(pixel - found).max() < tolerance, f"frame {index}: {pixel} projected, {found} seen"

    return check


@pytest.fixture
def write_video() -> Callable[..., None]:
    def write(path: Path, pictures: np.ndarray, fps: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height, stream.pix_fmt = pictures.shape[2], pictures.shape[1], "yuv420p"
            stream.options = {"crf": "12", "g": "3"}
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())

    return write


@pytest.fixture
def calibration_text() -> Callable[[Scene], dict]:
    """Return a function that gives the user's calibration of the scene's camera, in OpenCV's pixel convention."""

    def make(scene: Scene) -> dict:
        return {
            "width": scene.width,
            "height": scene.height,
            "intrinsics": {
                "fx": float(scene.intrinsics[0, 0]),
                "fy": float(scene.intrinsics[1, 1]),
                "cx": float(scene.intrinsics[0, 2]) - 0.5,
                "cy": float(scene.intrinsics[1, 2]) - 0.5,
            },
            "world_to_camera": scene.world_to_camera.tolist(),
        }

    return make
