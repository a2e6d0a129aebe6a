"""Small images of a demo's camera, their foreground, and the robot's poses: inputs of comparing images with poses.

Shape legend: F frames that are compared, N frames of the demo, P points, h and w of the small images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from keygrip.data.robot.doctor.examination import yam_model
from keygrip.data.robot.doctor.misread_rotations import angles_to
from keygrip.data.robot.schema import CameraTrack, Demo
from keygrip.data.robot.transforms import transform
from keygrip.data.spacing import evenly
from keygrip.robots.inverse_kinematics import solve
from keygrip.robots.kinematics import ArmChain, arm_chain, matrix_from_quaternion
from keygrip.robots.model_file import yam_surface
from keygrip.robots.surface import RobotSurface, gripper_blob

SIDE = 160  # pixels of the longer side of images that are compared with poses
MOST_FRAMES = 400  # largest number of frames read per demo; of longer demos every second, third, ...
STATIC_M, STATIC_DEG = 2e-3, 0.1  # a camera that moves less than this within a demo is static
IK_MISS_M, IK_MISS_RAD = 0.01, 0.1
# The base is solved without rotations farther from it than this, and than WRONG_USUAL times the median: wrong readings.
WRONG_DEG, WRONG_USUAL = 15.0, 3.0


@dataclass(frozen=True)
class View:
    """Small images of a static camera in a demo.

    Args:
        index: [F] frames. images: [F, h, w, 3] uint8. scale: size of the small images relative to the large ones.
        intrinsics: [3, 3] for the small images. world_to_camera: [4, 4], of a static camera.
        foreground: [F, h, w] float32 in 0..1, certainty that a pixel differs from the demo's background.
    """

    demo: Demo
    camera: str
    index: np.ndarray
    images: np.ndarray
    scale: float
    intrinsics: np.ndarray
    world_to_camera: np.ndarray
    foreground: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the small images."""
        return self.images.shape[1], self.images.shape[2]

    def with_images(self, images: np.ndarray) -> View:
        """Return the same view with other images, such as rotated or mirrored ones."""
        return replace(self, images=images, foreground=foreground(images))


def readable_frames(demo: Demo) -> np.ndarray:
    """Return the numbers [F] of the frames that the doctor reads: all, or every n-th of a long demo."""
    return np.arange(0, len(demo), -(-len(demo) // MOST_FRAMES))


def shrunk(image: np.ndarray) -> np.ndarray:
    """Shrink an image [H, W, 3] so that its longer side has at most `SIDE` pixels."""
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def read_shrunk(track: CameraTrack, frame: int) -> np.ndarray:
    """Read one frame of a camera as a small image [h, w, 3], see `shrunk`.

    Raises:
        ValueError: the image has another size than the recording states.
    """
    image, expected = track.frames.read(frame), (track.height, track.width, 3)
    if image.shape != expected:
        raise ValueError(f"it has shape {image.shape}, the recording says {expected}")
    return shrunk(image)


def foreground(images: np.ndarray, background: np.ndarray | None = None) -> np.ndarray:
    """Return [F, h, w] in 0..1: how much each pixel differs from the median of all frames (or a given background)."""
    if background is None:
        background = np.median(images, axis=0)
    change = np.abs(images.astype(np.float32) - background.astype(np.float32)).max(axis=-1)
    noise = float(np.median(change))
    return np.clip((change - 6 - 2 * noise) / 24, 0, 1).astype(np.float32)


def is_static(demo: Demo, camera: str) -> bool:
    """Return whether a camera is calibrated and static throughout a demo."""
    if demo.cameras[camera].uncalibrated:
        return False
    pose = np.asarray(demo.cameras[camera].world_to_camera)
    centre = -(pose[:, :3, :3].transpose(0, 2, 1) @ pose[:, :3, 3:])[..., 0]
    angles = np.arccos(np.clip((np.einsum("nij,ij->n", pose[:, :3, :3], pose[0, :3, :3]) - 1) / 2, -1, 1))
    return bool(np.ptp(centre, axis=0).max() < STATIC_M and np.degrees(angles.max()) < STATIC_DEG)


def make_view(demo: Demo, camera: str, frames: int, held_images: dict[int, np.ndarray] | None = None) -> View:
    """Read `frames` images of a static camera, evenly spread over the demo (`held_images`: small ones read before)."""
    track = demo.cameras[camera]
    cached_images = held_images or {}
    index = readable_frames(demo)
    index = index[evenly(len(index), frames)]
    if len(cached_images) >= frames:
        index = np.array(sorted(cached_images))[evenly(len(cached_images), frames)]
    images = np.stack([cached_images[i] if i in cached_images else read_shrunk(track, i) for i in index.tolist()])
    scale_x, scale_y = images.shape[2] / track.width, images.shape[1] / track.height
    return View(
        demo=demo,
        camera=camera,
        index=index,
        images=images,
        scale=scale_x,
        intrinsics=np.diag([scale_x, scale_y, 1.0]) @ np.asarray(track.intrinsics[0]),
        world_to_camera=np.asarray(track.world_to_camera[0]),
        foreground=foreground(images),
    )


@dataclass(frozen=True)
class Placement:
    """Placement of the robot in each frame of a demo, given by its joints (for `gripper_blob` by the tool's poses).

    Args:
        surface: the robot's. joints: [N, J]. opening: [N]. base: [4, 4] world_from_base.
        source: "joints" (recorded), "inverse kinematics" (of the recorded poses), or "poses" (the gripper alone).
        others: the demo's other arms, whose points follow its own.
    """

    surface: RobotSurface
    joints: np.ndarray
    opening: np.ndarray
    base: np.ndarray
    source: str
    others: tuple[Placement, ...] = ()

    def at(self, when: np.ndarray, every: int = 1) -> np.ndarray:
        """Return points [F, P, 3] in the world at (fractional) frame numbers [F], constant beyond the demo's ends."""
        own = self.surface.at(*self._interpolated(when), every, self.base)
        return np.concatenate([own, *(other.at(when, every) for other in self.others)], axis=1) if self.others else own

    def speed(self, when: np.ndarray, which: np.ndarray, every: int = 1) -> np.ndarray:
        """Return speeds [M, 3], metres per frame, of the points `which` [M] of `at` at frame numbers `when` [M]."""
        speeds = np.zeros((len(which), 3))
        first = 0
        for robot in (self, *self.others):
            last = first + len(robot.surface.points[::every])
            in_robot = (which >= first) & (which < last)
            if in_robot.any():
                speeds[in_robot] = robot._own_speed(when[in_robot], (which[in_robot] - first) * every)
            first = last
        return speeds

    def _own_speed(self, when: np.ndarray, which: np.ndarray) -> np.ndarray:
        ahead = self.surface.some(*self._interpolated(when + 0.5), which)
        return np.asarray((ahead - self.surface.some(*self._interpolated(when - 0.5), which)) @ self.base[:3, :3].T)

    def _interpolated(self, when: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        last = len(self.joints) - 1
        when = np.clip(when, 0, last)
        low = np.minimum(when.astype(int), max(last - 1, 0))
        fraction = (when - low)[:, None]
        high = np.minimum(low + 1, last)
        joints = (1 - fraction) * self.joints[low] + fraction * self.joints[high]
        return joints, (1 - fraction[:, 0]) * self.opening[low] + fraction[:, 0] * self.opening[high]


def tool_poses(position: np.ndarray, quaternion: np.ndarray) -> np.ndarray:
    """Return world_from_tool [N, 4, 4]."""
    return transform(position, matrix_from_quaternion(quaternion))


def place(demo: Demo, arm: str, model: RobotSurface | None = None, poses: np.ndarray | None = None) -> Placement:
    """Place an arm in each frame: by recorded joints, else by inverse kinematics of a YAM, else only its gripper.

    Args:
        model: the arm's surface; None: that of a YAM if the recording names one, else only the gripper.
        poses: tool poses [N, 4, 4] instead of the recorded poses and joints.
    """
    trajectory = demo.arms[arm]
    opening = np.asarray(trajectory.gripper)
    tool = tool_poses(trajectory.position, trajectory.quaternion) if poses is None else poses
    yam = yam_model(demo, arm) if model is None else None
    model = model if yam is None else yam_surface(*yam)
    joints = trajectory.joints
    if model is not None and joints is not None and joints.shape[1] >= model.joints and poses is None:
        joints = joints[:, : model.joints]
        return Placement(model, joints, opening, base_of(model, joints, tool), "joints")
    if yam is not None and model is not None:
        solved = _solve_joints(tool, arm_chain(*yam))
        if solved is not None:
            return Placement(model, solved, opening, np.eye(4), "inverse kinematics")
    return Placement(gripper_blob(), tool[:, :3].reshape(len(tool), 12), opening, np.eye(4), "poses")


def place_all(demo: Demo, model: RobotSurface | None = None) -> Placement | None:
    """Place all arms of a demo as one robot, because all of them move in its images. None: one of several arms has no
    joints, so the pose of its base is not known (for a single arm it is the world)."""
    first, *others = (place(demo, arm, model) for arm in sorted(demo.arms))
    if others and any(robot.source != "joints" for robot in (first, *others)):
        return None
    return replace(first, others=tuple(others))


def _solve_joints(tool: np.ndarray, chain: ArmChain) -> np.ndarray | None:
    """Return joints [N, 6] of a YAM whose base is the world; None if it cannot reach more than a tenth of the poses."""
    guess, missed = np.array([0.0, 1.0, 1.0, -0.6, 0.0, 0.0]), 0
    joints: list[np.ndarray] = []
    for pose in tool:
        solution = solve(pose[:3, 3], pose[:3, :3], guess, chain)
        unreached = solution.position_error > IK_MISS_M or solution.angle_error > IK_MISS_RAD
        missed += unreached
        if missed > max(1, len(tool) // 10):
            return None
        guess = guess if unreached and joints else solution.joints
        joints.append(guess)
    return np.stack(joints)


def _nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(matrix)
    return np.asarray(left @ np.diag([1, 1, np.sign(np.linalg.det(left @ right))]) @ right)


def base_of(model: RobotSurface, joints: np.ndarray, tool: np.ndarray) -> np.ndarray:
    """Return world_from_base [4, 4]: maps tool poses of the kinematics to the recorded ones; identity if they agree."""
    if model.tool is None:
        return np.eye(4)
    tool_in_base = model.tool(joints)
    turns = tool[:, :3, :3] @ tool_in_base[:, :3, :3].transpose(0, 2, 1)
    rotation = _nearest_rotation(turns.sum(axis=0))
    angles = angles_to(rotation, turns)
    right_readings = angles <= max(WRONG_DEG, WRONG_USUAL * float(np.median(angles)))
    rotation = _nearest_rotation(turns[right_readings].sum(axis=0))
    return transform(np.median(tool[:, :3, 3] - tool_in_base[:, :3, 3] @ rotation.T, axis=0), rotation)
