"""Data types of a robot demonstration.

Conventions, stored in every native file and checked on load: world frame z up, metres; OpenCV camera (x right, y down,
z forward) with a 4x4 `world_to_camera`; pixels (x, y) with the corner convention (0, 0 is the top-left corner of the
first pixel); unit quaternions w, x, y, z; gripper opening 0 closed .. 1 open; times in nanoseconds.

Legend of shapes: N frames of a demo, J joints, H and W the height and width of an image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from keygrip.data.bad_samples import HOSTILE, BadSample, is_of_the_machine, reason_of

SCHEMA = "keygrip.demo/1"
CONVENTIONS = {
    "quaternion": "wxyz",
    "world": "z-up, metres",
    "camera": "opencv, world_to_camera",
    "pixel": "corner",
    "gripper": "0 closed, 1 open",
    "time": "ns",
}


class DemoError(BadSample):
    """One demo cannot be used; the run goes on without it unless too many are broken.

    Args:
        name: of the demo. reason: why it cannot be used. cause: the likely cause in a few words, if known. remedy: what
            to do; the reason then ends with this sentence.
    """

    def __init__(self, name: str, reason: str, cause: str = "", remedy: str = "") -> None:
        super().__init__(name, reason)
        self.name, self.reason, self.cause, self.remedy = name, reason, cause, remedy

    def __str__(self) -> str:
        return f"demo {self.name!r}: {self.reason}"


@contextlib.contextmanager
def demo_guard(name: str, what: str = "") -> Iterator[None]:
    """Convert errors that broken data cause inside the block into a DemoError.

    Args:
        name: of the demo. what: beginning of the reason.

    Raises:
        DemoError: the data are broken. A DemoError raised in the block and errors of the machine pass unchanged.
    """
    try:
        yield
    except DemoError:
        raise
    except HOSTILE as error:
        if is_of_the_machine(error):
            raise
        raise DemoError(name, f"{what}{reason_of(error)}") from error


def words(value: Any) -> str:
    """Return a sentence as a string. Files hold it as text, as a list of its words, or as null for none.

    Raises:
        ValueError: `value` is something else.
    """
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return " ".join(value)
    if not isinstance(value, str):
        raise ValueError(f"where an instruction should be it says {str(value)[:60]!r}")
    return value


def check_image(image: np.ndarray, name: str = "an image") -> None:
    """Raise ValueError if an image, called `name` in the message, is not H x W x 3 uint8."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"{name} must be H x W x 3 uint8, not {image.shape} {image.dtype}")


@runtime_checkable
class FrameSource(Protocol):
    """Images of one camera by frame index. Must be picklable (it is sent to loader workers) and hold no open file."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """Frame `index`: H x W x 3 uint8 RGB (depth: H x W uint16, millimetres). Raises IndexError, OSError or
        ValueError."""
        ...

    def identity(self) -> str:
        """Text that changes when the images on disk change (paths, sizes, modification times); the frame cache is named
        after its hash."""
        ...


@dataclass(frozen=True)
class ArmTrajectory:
    """Poses of one end effector over a demo, in the world frame.

    Args:
        position: [N, 3] metres.
        quaternion: [N, 4] unit, w x y z.
        gripper: [N] opening, 0 closed .. 1 open.
        joints: [N, J] radians, or None.
        commanded: the commanded poses, or None if they were not recorded. Row i is the command given at frame i: the
            target for frame i + 1.
        controller: [N, D] input of the robot's own controller, in its own units, or None. Row i leads to frame i + 1.
    """

    position: np.ndarray
    quaternion: np.ndarray
    gripper: np.ndarray
    joints: np.ndarray | None = None
    commanded: ArmTrajectory | None = None
    controller: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.position)


@dataclass(frozen=True)
class CameraTrack:
    """One camera over a demo.

    Args:
        width, height: size of every frame, pixels.
        intrinsics: [N, 3, 3], pixels; [3, 3] is broadcast by `CameraTrack.broadcast`.
        world_to_camera: [N, 4, 4] rigid.
        frames: the images.
        depth: uint16 millimetres, or None.
        uncalibrated: why this camera's pose is not known; its matrices then have no meaning. Empty: it is
            calibrated.
    """

    width: int
    height: int
    intrinsics: np.ndarray
    world_to_camera: np.ndarray
    frames: FrameSource
    depth: FrameSource | None = None
    uncalibrated: str = ""

    @staticmethod
    def without_calibration(
        width: int, height: int, frames: FrameSource, count: int, reason: str, depth: FrameSource | None = None
    ) -> CameraTrack:
        """A camera of `count` frames whose pose is not known, for models that do not read it."""
        focal = float(max(width, height))
        intrinsics = np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])
        matrices = (CameraTrack.broadcast(intrinsics, count), CameraTrack.broadcast(np.eye(4), count))
        return CameraTrack(width, height, *matrices, frames, depth, reason)

    @staticmethod
    def broadcast(matrix: np.ndarray, frames: int) -> np.ndarray:
        """[R, C] -> [frames, R, C] without a copy; [frames, R, C] unchanged."""
        matrix = np.asarray(matrix, dtype=np.float64)
        return np.broadcast_to(matrix, (frames, *matrix.shape)) if matrix.ndim == 2 else matrix


@dataclass(frozen=True)
class Demo:
    """One demonstration. `timestamps` is [N] int64 nanoseconds; `arms` and `cameras` are keyed by name; `source`
    describes its origin. `intervention` is bool [N]: frames in which a person corrected a policy; None: no frame."""

    name: str
    path: Path
    robot: str
    task: str
    instruction: str
    fps: float
    timestamps: np.ndarray
    arms: dict[str, ArmTrajectory]
    cameras: dict[str, CameraTrack]
    source: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    intervention: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.timestamps)


def left_out_cameras(demo: Demo) -> dict[str, str]:
    """Return why the reader of a demo left out cameras that were recorded, by name."""
    left_out = demo.source.get("left_out")
    return {str(name): str(reason) for name, reason in left_out.items()} if isinstance(left_out, dict) else {}


def missing_camera(demo: Demo, camera: str) -> str:
    """Return why a demo lacks a camera: its reader left it out, or there is none."""
    if camera in (left_out := left_out_cameras(demo)):
        return f"its camera {camera!r} is left out: {left_out[camera]}"
    return f"it has no camera {camera!r}; it has {', '.join(demo.cameras)}"
