"""Robot demonstrations on disk: what one is, how the native folder is read, checked and written.

Conventions, named in every file and compared on load: world frame z up, metres; OpenCV camera (x right, y down, z
forward) with a 4x4 `world_to_camera`; pixels (x, y) with the corner convention (0, 0 is the top-left corner of the
first pixel); unit quaternions w, x, y, z; gripper opening 0 closed .. 1 open; times in nanoseconds.

Legend of shapes: N frames of a demo, J joints, H and W the height and width of a picture.

A native demo is a folder with `metadata.json` (written last: the mark that the demo is complete), `trajectory.npz`,
`cameras.npz`, frames (JPEG files or one video a camera), optionally depth (16-bit PNG, millimetres) and `text.json`.
"""

from __future__ import annotations

import bisect
import importlib
import io
import json
import math
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from PIL import Image

SCHEMA = "keygrip.demo/1"
CONVENTIONS = {
    "quaternion": "wxyz",
    "world": "z-up, metres",
    "camera": "opencv, world_to_camera",
    "pixel": "corner",
    "gripper": "0 closed, 1 open",
    "time": "ns",
}
FOREIGN_FORMATS = ("raiden", "yam_abc", "lerobot_v3", "libero")
FORMATS = ("native", *FOREIGN_FORMATS)

QUATERNION_TOLERANCE = (
    1e-2  # |norm - 1| above this is a wrong order, a wrong unit or a broken sensor, not float32 rounding
)
ROTATION_TOLERANCE = 1e-3  # largest entry of R R^T - I that rounding and hand-eye calibration files produce
GRIPPER_TOLERANCE = (
    1e-3  # opening may overshoot [0, 1] by this much (encoder noise); more means another unit or polarity
)
SEARCH_DEPTH = 3  # folders below `root` that are searched: root/demo, root/task/demo, root/robot/task/demo


class DemoError(ValueError):
    """One demo cannot be used. `name` says which, `reason` why; the run goes on without it unless too many are
    broken."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"demo {name!r}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return DemoError, (self.name, self.reason)


# --------------------------------------------------------------------------------------------------------------- frames


@runtime_checkable
class FrameSource(Protocol):
    """Pictures of one camera by frame index. Must be picklable (it travels to loader workers) and hold no open file."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """Frame `index`: H x W x 3 uint8 RGB (depth: H x W uint16, millimetres). Raises IndexError, OSError or
        ValueError."""
        ...

    def identity(self) -> str:
        """Text that changes when the pictures on disk change (paths, sizes, modification times): names the frame
        cache."""
        ...


def _file_identity(path: Path) -> str:
    stat = path.stat()
    return f"{path.absolute()}:{stat.st_size}:{stat.st_mtime_ns}"


def _rotated(picture: np.ndarray, rotate: int) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(picture, -rotate // 90)) if rotate else picture


def _checked_rotation(rotate: int) -> int:
    if rotate not in (0, 90, 180, 270):
        raise ValueError(f"rotate must be 0, 90, 180 or 270 degrees (clockwise), not {rotate}")
    return rotate


def _checked_index(index: int, length: int, what: object) -> int:
    if not 0 <= index < length:
        raise IndexError(f"{what}: frame {index} asked for, it holds frames 0 to {length - 1}")
    return index


@dataclass(frozen=True)
class JpegFrames:
    """One picture file a frame (JPEG or PNG). `pattern` holds one integer field for the frame number, such as
    `%06d.jpg`.

    Args:
        folder: where the files are.
        pattern: printf pattern of a file name.
        frames: how many there are.
        start: number of the first file.
        rotate: clockwise degrees by which each picture is turned after decoding (0, 90, 180, 270).
    """

    folder: Path
    pattern: str
    frames: int
    start: int = 0
    rotate: int = 0

    def __post_init__(self) -> None:
        _checked_rotation(self.rotate)

    def __len__(self) -> int:
        return self.frames

    def path(self, index: int) -> Path:
        return self.folder / (self.pattern % (self.start + _checked_index(index, self.frames, self.folder)))

    def read(self, index: int) -> np.ndarray:
        with Image.open(self.path(index)) as picture:
            return _rotated(np.asarray(picture.convert("RGB")), self.rotate)

    def encoded(self, index: int) -> bytes | None:
        """The file's bytes when they can be copied as they are (JPEG, not turned), else None."""
        path = self.path(index)
        return path.read_bytes() if not self.rotate and path.suffix.lower() in (".jpg", ".jpeg") else None

    def identity(self) -> str:
        with os.scandir(self.folder) as entries:
            lines = sorted(f"{e.name}:{e.stat().st_size}:{e.stat().st_mtime_ns}" for e in entries if e.is_file())
        return "\n".join([f"{self.folder.absolute()}:{self.pattern}:{self.start}:{self.frames}:{self.rotate}", *lines])


@dataclass(frozen=True)
class DepthFrames:
    """16-bit PNG depth, millimetres, one file a frame; 0 means no reading."""

    folder: Path
    pattern: str
    frames: int
    start: int = 0
    rotate: int = 0

    def __post_init__(self) -> None:
        _checked_rotation(self.rotate)

    def __len__(self) -> int:
        return self.frames

    def read(self, index: int) -> np.ndarray:
        path = self.folder / (self.pattern % (self.start + _checked_index(index, self.frames, self.folder)))
        with Image.open(path) as picture:
            depth = np.asarray(picture)
        if depth.ndim != 2:
            raise ValueError(f"{path}: depth must have one channel, it has shape {depth.shape}")
        return _rotated(depth.astype(np.uint16), self.rotate)

    def identity(self) -> str:
        return JpegFrames(self.folder, self.pattern, self.frames, self.start, self.rotate).identity()


@dataclass(frozen=True)
class ArrayFrames:
    """Pictures that are in memory already: [N, H, W, 3] uint8 (or [N, H, W] uint16 depth). For importers and tests."""

    pictures: np.ndarray

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, index: int) -> np.ndarray:
        return self.pictures[_checked_index(index, len(self), "frames in memory")]

    def identity(self) -> str:
        import hashlib

        return hashlib.sha256(np.ascontiguousarray(self.pictures).tobytes()).hexdigest()


@dataclass(frozen=True)
class _VideoIndex:
    """Presentation times of a video's frames in order, and (presentation, decoding time) of its key frames."""

    times: list[int]
    keys: list[tuple[int, int]]


def _open_container(path: Path) -> tuple[Any, Any]:
    """The container and its video stream, decoded by one thread: workers are the parallelism."""
    import av

    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise OSError(f"{path}: the video cannot be opened ({error}); it is cut off or not a video") from error
    if not container.streams.video:
        container.close()
        raise OSError(f"{path}: the file has no video stream; it is cut off or not a video")
    stream = container.streams.video[0]
    stream.thread_type = "NONE"
    return container, stream


def _make_index(path: Path) -> _VideoIndex:
    """Reads the packets, decoding none: their presentation times, sorted, are the frames."""
    container, stream = _open_container(path)
    shown: list[int] = []
    keys: list[tuple[int, int]] = []
    with container:
        for packet in container.demux(stream):
            if packet.pts is None or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise OSError(f"{path}: the video is cut off or damaged after {len(shown)} frames")
            shown.append(packet.pts)
            if packet.is_keyframe:
                keys.append((packet.pts, packet.dts if packet.dts is not None else packet.pts))
    if len(set(shown)) != len(shown):
        raise OSError(f"{path}: two frames of the video carry the same time stamp, so frames cannot be told apart")
    return _VideoIndex(sorted(shown), sorted(keys))


class _OpenVideo:
    """One open container; `read` decodes forward where it can and seeks where it must.

    A seek goes to the last key frame that is not *shown* after the wanted frame and is checked by the first packet that
    follows it: with B-frames decoding order differs from presentation order, and some demuxers land one group of
    pictures too late.
    """

    def __init__(self, path: Path, index: _VideoIndex) -> None:
        self.container, self.stream = _open_container(path)
        self.path, self.times, self.keys = path, index.times, index.keys
        self.position: int | None = None  # presentation time of the frame given last
        self.decoder: Any = None

    def close(self) -> None:
        self.decoder = None
        self.container.close()

    def _frames_from(self, key: int) -> Any:
        """Decoded frames from key frame number `key` (-1: the start of the file) on; None where the seek landed behind
        that key frame."""
        if key >= 0:
            wanted, decoding_time = self.keys[key]
            self.container.seek(decoding_time, stream=self.stream, backward=True)
        else:
            wanted = self.times[0]
            self.container.seek(min(0, self.times[0]), stream=self.stream, backward=True)
        packets = self.container.demux(self.stream)
        first = next(packets, None)
        while first is not None and first.pts is None and first.size > 0:
            first = next(packets, None)
        if first is None or first.pts is None or (key >= 0 and first.pts > wanted):
            return None

        def decode() -> Iterable[Any]:
            yield from first.decode()
            for packet in packets:
                yield from packet.decode()

        return iter(decode())

    def _advance(self, target: int) -> Any:
        """The frame shown at `target`, decoding forward; None where the decoder passes it or ends."""
        for frame in self.decoder:
            if frame.pts is None:
                continue
            self.position = frame.pts
            if frame.pts == target:
                return frame
            if frame.pts > target:
                return None
        return None

    def read(self, index: int) -> np.ndarray:
        import av

        target = self.times[index]
        nearest = bisect.bisect_right(self.keys, (target, math.inf)) - 1  # last key frame not shown after it; -1: none
        nearest_key = self.keys[nearest][0] if nearest >= 0 else self.times[0]
        try:
            # forward from where the decoder stands, unless a key frame between here and there makes a seek cheaper
            if self.decoder is not None and self.position is not None and nearest_key <= self.position < target:
                frame = self._advance(target)
                if frame is not None:
                    return frame.to_ndarray(format="rgb24")
            for key in (*range(nearest, max(-1, nearest - 3), -1), -1):
                self.stream.codec_context.flush_buffers()
                self.decoder = self._frames_from(key)
                frame = self._advance(target) if self.decoder is not None else None
                if frame is not None:
                    if frame.is_corrupt:
                        break
                    return frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, EOFError) as error:
            self.decoder = self.position = None
            raise OSError(
                f"{self.path}: frame {index} cannot be decoded ({error}); the video is cut off or damaged"
            ) from error
        self.decoder = self.position = None
        raise OSError(f"{self.path}: frame {index} cannot be decoded; the video is cut off or damaged")


_VIDEO_INDICES: dict[str, _VideoIndex] = {}  # by file; made once, and inherited by loader workers that are forked
_OPEN_VIDEOS: OrderedDict[tuple[int, str], _OpenVideo] = OrderedDict()
_OPEN_VIDEO_LIMIT = 16  # open containers a process; each holds a decoder with a few frames


def _video_index(path: Path) -> _VideoIndex:
    identity = _file_identity(path)
    if identity not in _VIDEO_INDICES:
        _VIDEO_INDICES[identity] = _make_index(path)
    return _VIDEO_INDICES[identity]


def _open_video(path: Path) -> _OpenVideo:
    """The process's open container for `path`; one inherited by fork is not used, as it shares its file offset."""
    key = (os.getpid(), _file_identity(path))
    video = _OPEN_VIDEOS.get(key)
    if video is None:
        video = _OPEN_VIDEOS[key] = _OpenVideo(path, _video_index(path))
        while len(_OPEN_VIDEOS) > _OPEN_VIDEO_LIMIT:
            (process, _), oldest = _OPEN_VIDEOS.popitem(last=False)
            if process == os.getpid():
                oldest.close()
    _OPEN_VIDEOS.move_to_end(key)
    return video


@dataclass(frozen=True)
class VideoFrames:
    """Frames of a video file (anything that FFmpeg decodes), exact to the frame whatever the group-of-pictures
    structure.

    Args:
        path: the video.
        frames: how many this source holds, None: all from `start` on. A file that holds fewer is refused by `len`,
            `read` and `verify`.
        start: frame of the file that is frame 0 here (several episodes may share a file).
        rotate: clockwise degrees by which each picture is turned after decoding.
    """

    path: Path
    frames: int | None = None
    start: int = 0
    rotate: int = 0

    def __post_init__(self) -> None:
        _checked_rotation(self.rotate)

    def __len__(self) -> int:
        return self.frames if self.frames is not None else self.frames_in_file() - self.start

    def frames_in_file(self) -> int:
        return len(_video_index(self.path).times)

    def verify(self) -> None:
        """Raises OSError where the file holds fewer frames than this source needs (counted from its packets)."""
        held, needed = self.frames_in_file(), self.start + (self.frames or 1)
        if held < needed:
            raise OSError(f"{self.path}: the video holds {held} frames, {needed} are needed; it is cut off")

    def read(self, index: int) -> np.ndarray:
        _checked_index(index, len(self), self.path)
        if self.start + index >= self.frames_in_file():
            self.verify()
        return _rotated(_open_video(self.path).read(self.start + index), self.rotate)

    def identity(self) -> str:
        return f"{_file_identity(self.path)}:{self.start}:{self.frames}:{self.rotate}"


# ------------------------------------------------------------------------------------------------------- what a demo is


@dataclass(frozen=True)
class ArmTrajectory:
    """Poses of one end effector over a demo, in the world frame.

    Args:
        position: [N, 3] metres.
        quaternion: [N, 4] unit, w x y z.
        gripper: [N] opening, 0 closed .. 1 open.
        joints: [N, J] radians, or None.
        commanded: what the arm was told to do, or None where it was not recorded. Row i is the command given at frame
            i: where the arm is told to be at frame i + 1.
    """

    position: np.ndarray
    quaternion: np.ndarray
    gripper: np.ndarray
    joints: np.ndarray | None = None
    commanded: ArmTrajectory | None = None

    def __len__(self) -> int:
        return len(self.position)


@dataclass(frozen=True)
class CameraTrack:
    """One camera over a demo.

    Args:
        width, height: of every frame, pixels.
        intrinsics: [N, 3, 3], pixels; [3, 3] is broadcast by `CameraTrack.static`.
        world_to_camera: [N, 4, 4] rigid.
        frames: the pictures.
        depth: uint16 millimetres, or None.
    """

    width: int
    height: int
    intrinsics: np.ndarray
    world_to_camera: np.ndarray
    frames: FrameSource
    depth: FrameSource | None = None

    @staticmethod
    def broadcast(matrix: np.ndarray, frames: int) -> np.ndarray:
        """[R, C] -> [frames, R, C] without a copy; [frames, R, C] as it is."""
        matrix = np.asarray(matrix, dtype=np.float64)
        return np.broadcast_to(matrix, (frames, *matrix.shape)) if matrix.ndim == 2 else matrix


@dataclass(frozen=True)
class Demo:
    """One demonstration. `timestamps` is [N] int64 nanoseconds; `arms` and `cameras` are by name; `source` says where
    it came from."""

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

    def __len__(self) -> int:
        return len(self.timestamps)


# --------------------------------------------------------------------------------------------------------------- checks


def _check_poses(name: str, arm: str, what: str, poses: ArmTrajectory, frames: int) -> None:
    shapes = {"position": (frames, 3), "quaternion": (frames, 4), "gripper opening": (frames,)}
    values = {"position": poses.position, "quaternion": poses.quaternion, "gripper opening": poses.gripper}
    for part, value in values.items():
        if value.shape != shapes[part]:
            raise DemoError(
                name,
                f"{what} {part} of arm {arm!r} has shape {value.shape}, {shapes[part]} is needed (the demo has "
                f"{frames} time stamps)",
            )
        bad = ~np.isfinite(value)
        if bad.any():
            raise DemoError(
                name,
                f"{what} {part} of arm {arm!r} is NaN or infinite, first at frame {int(np.argwhere(bad)[0][0])} of "
                f"{frames}",
            )
    norm = np.linalg.norm(poses.quaternion, axis=-1)
    worst = int(np.abs(norm - 1).argmax())
    if abs(norm[worst] - 1) > QUATERNION_TOLERANCE:
        raise DemoError(
            name,
            f"{what} quaternion of arm {arm!r} has norm {norm[worst]:.4f} at frame {worst}; unit quaternions in the "
            "order w, x, y, z are needed",
        )
    low, high = float(poses.gripper.min()), float(poses.gripper.max())
    if low < -GRIPPER_TOLERANCE or high > 1 + GRIPPER_TOLERANCE:
        raise DemoError(
            name,
            f"{what} gripper opening of arm {arm!r} runs from {low:.4g} to {high:.4g}; 0 (closed) to 1 (open) is "
            "needed",
        )
    if poses.joints is not None:
        if poses.joints.ndim != 2 or len(poses.joints) != frames:
            raise DemoError(
                name,
                f"{what} joint positions of arm {arm!r} have shape {poses.joints.shape}, ({frames}, joints) is needed",
            )
        if not np.isfinite(poses.joints).all():
            raise DemoError(name, f"{what} joint positions of arm {arm!r} hold NaN or infinite values")


def _check_camera(name: str, camera: str, track: CameraTrack, frames: int) -> None:
    where = f"camera {camera!r}"
    if track.intrinsics.shape != (frames, 3, 3) or track.world_to_camera.shape != (frames, 4, 4):
        raise DemoError(
            name,
            f"{where}: intrinsics {track.intrinsics.shape} and world_to_camera {track.world_to_camera.shape} do not "
            f"fit {frames} frames",
        )
    intrinsics, pose = np.asarray(track.intrinsics), np.asarray(track.world_to_camera)
    if intrinsics.strides[0] == 0:  # broadcast: one matrix stands for all frames
        intrinsics = intrinsics[:1]
    if pose.strides[0] == 0:
        pose = pose[:1]
    if not (np.isfinite(intrinsics).all() and np.isfinite(pose).all()):
        raise DemoError(name, f"{where}: intrinsics or world_to_camera hold NaN or infinite values")
    focal, centre = intrinsics[:, [0, 1], [0, 1]], intrinsics[:, :2, 2]
    size = np.array([track.width, track.height])
    if (
        (focal <= 0).any()
        or np.abs(intrinsics[:, 2] - [0, 0, 1]).max() > 1e-6
        or np.abs(intrinsics[:, 1, 0]).max() > 1e-6
    ):
        raise DemoError(
            name,
            f"{where}: intrinsics are not [[fx, s, cx], [0, fy, cy], [0, 0, 1]] with positive focal lengths in pixels",
        )
    if (focal < 0.05 * size).any() or (focal > 100 * size).any() or (centre < -size).any() or (centre > 2 * size).any():
        raise DemoError(
            name,
            f"{where}: focal length {focal[0].round(2).tolist()} and centre {centre[0].round(2).tolist()} do not fit "
            "a picture of "
            f"{track.width} x {track.height} pixels; were they made for another resolution or in other units?",
        )
    rotation = pose[:, :3, :3]
    defect = float(np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max())
    if defect > ROTATION_TOLERANCE or np.abs(pose[:, 3] - [0, 0, 0, 1]).max() > 1e-6:
        raise DemoError(
            name,
            f"{where}: world_to_camera is not a rigid transform (R R^T differs from the identity by {defect:.2g}, "
            "last row 0 0 0 1)",
        )
    determinant = np.linalg.det(rotation)
    if (determinant < 0).any():
        raise DemoError(
            name,
            f"{where}: the rotation of world_to_camera has determinant {determinant.min():.3f}: it mirrors; +1 is "
            "needed",
        )
    if len(track.frames) != frames:
        raise DemoError(name, f"{where}: {len(track.frames)} pictures for {frames} time stamps")


def _check_pictures(name: str, camera: str, track: CameraTrack, frames: int) -> None:
    try:
        if isinstance(track.frames, VideoFrames):
            track.frames.verify()
        for index in {0, frames - 1}:
            picture = track.frames.read(index)
            if picture.shape != (track.height, track.width, 3) or picture.dtype != np.uint8:
                raise DemoError(
                    name,
                    f"camera {camera!r}: frame {index} is {picture.shape} {picture.dtype}, the demo says "
                    f"{track.height} x {track.width} x 3 uint8",
                )
    except DemoError:
        raise
    except (OSError, ValueError, IndexError, SyntaxError) as error:
        raise DemoError(name, f"camera {camera!r}: {error}") from error


def check_demo(demo: Demo, pictures: bool = True, cameras: Iterable[str] | None = None) -> None:
    """Raises DemoError where the demo breaks a convention; every format's reader passes through here.

    Args:
        demo: what was read.
        pictures: also decode the first and last frame of each camera and count the frames of a video.
        cameras: cameras whose pictures are decoded; None: all.
    """
    name, frames = demo.name, len(demo.timestamps)
    if frames < 2:
        raise DemoError(name, f"it has {frames} frames; at least 2 are needed")
    if not demo.arms:
        raise DemoError(name, "it has no arm")
    if not demo.cameras:
        raise DemoError(name, "it has no camera")
    if not (np.isfinite(demo.fps) and demo.fps > 0):
        raise DemoError(name, f"fps is {demo.fps}; a positive number is needed")
    steps = np.diff(demo.timestamps)
    if (steps <= 0).any():
        raise DemoError(name, f"time stamps do not increase at frame {int((steps <= 0).argmax()) + 1}")
    for arm, trajectory in demo.arms.items():
        _check_poses(name, arm, "reached", trajectory, frames)
        if trajectory.commanded is not None:
            _check_poses(name, arm, "commanded", trajectory.commanded, frames)
    wanted = None if cameras is None else set(cameras)
    for camera, track in demo.cameras.items():
        _check_camera(name, camera, track, frames)
        if pictures and (wanted is None or camera in wanted):
            _check_pictures(name, camera, track, frames)


def _tidied(poses: ArmTrajectory) -> ArmTrajectory:
    """Poses that passed the checks, with what the tolerances let through put right: unit quaternions, openings in [0,
    1]."""
    norm = np.linalg.norm(poses.quaternion, axis=-1, keepdims=True)
    quaternion = poses.quaternion if np.abs(norm - 1).max() < 1e-6 else poses.quaternion / norm
    commanded = None if poses.commanded is None else _tidied(poses.commanded)
    return replace(poses, quaternion=quaternion, gripper=poses.gripper.clip(0, 1), commanded=commanded)


# -------------------------------------------------------------------------------------------------------- finding demos


@dataclass(frozen=True)
class DemoReference:
    """A demo that was found but not read yet.

    Args:
        name: unique under the root, stable (the folder's path below the root): the train/validation split hashes it.
        path: its folder or file.
        format: one of `FORMATS`.
        reader: makes the Demo; picklable (a `functools.partial` of a module's function). It may raise DemoError,
            OSError, ValueError or KeyError.
    """

    name: str
    path: Path
    format: str
    reader: Callable[[], Demo]

    def read(self, pictures: bool = True, cameras: Iterable[str] | None = None) -> Demo:
        """The demo, checked (see `check_demo`), with unit quaternions. Raises DemoError, whatever is wrong with it."""
        try:
            demo = self.reader()
            check_demo(demo, pictures=pictures, cameras=cameras)
        except DemoError as error:
            if error.name == self.name:
                raise
            raise DemoError(self.name, error.reason) from error
        except KeyError as error:
            raise DemoError(self.name, f"{error} is missing in {self.path}") from error
        except (OSError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise DemoError(self.name, f"{error} ({type(error).__name__})") from error
        return replace(demo, arms={name: _tidied(arm) for name, arm in demo.arms.items()})


def _looks_native(folder: Path) -> bool:
    """True for a folder that only a native recorder writes: its trajectory file, or metadata with our schema."""
    if (folder / "trajectory.npz").is_file():
        return True
    metadata = folder / "metadata.json"
    if not metadata.is_file():
        return False
    try:
        content = json.loads(metadata.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and str(content.get("schema", "")).startswith("keygrip.demo/")


def _demo_folders(root: Path, depth: int = SEARCH_DEPTH) -> list[Path]:
    """Folders that are demos, complete or cut off, in the order of their names. Hidden folders (a writer's unfinished
    ones) are passed over."""
    if any((root / part).exists() for part in ("metadata.json", "trajectory.npz", "cameras.npz", "rgb")):
        return [root]
    if depth == 0:
        return []
    children = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    return [demo for child in children for demo in _demo_folders(child, depth - 1)]


def _find_native(root: Path) -> list[DemoReference]:
    references = []
    for folder in _demo_folders(root):
        name = folder.name if folder == root else folder.relative_to(root).as_posix()
        references.append(DemoReference(name, folder, "native", partial(read_native, folder, name)))
    return references


def _detect_native(root: Path) -> bool:
    return any(_looks_native(folder) for folder in _demo_folders(root))


def _foreign(name: str) -> Any:
    return importlib.import_module(f"keygrip.data.robot.formats.{name}")


def find_demos(root: Path | str, format: str = "auto", calibration: Path | str | None = None) -> list[DemoReference]:
    """The demos under `root`, in the order of their names.

    Args:
        root: folder of a data set.
        format: one of `FORMATS`, or "auto": the one whose traits the folder shows.
        calibration: calibration file that some foreign formats need (cameras, base poses); native demos carry theirs.

    Raises:
        FileNotFoundError: the folder is missing or empty, or holds no demo.
        ValueError: unknown format, no format or several recognised, calibration given for native demos.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"data folder {root} does not exist; name a folder of demos with data.root=PATH")
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {root} is a file; name a folder of demos with data.root=PATH")
    if not any(root.iterdir()):
        raise FileNotFoundError(
            f"data folder {root} is empty; record demos into it or name another with data.root=PATH"
        )
    if format not in ("auto", *FORMATS):
        raise ValueError(f"unknown data format {format!r}; known are {', '.join(FORMATS)} and auto")
    if format == "auto" and _detect_native(root):
        # our own mark leaves no doubt; what else lies there is then reported as broken demos
        format = "native"
    if format == "auto":
        recognised = [name for name in FOREIGN_FORMATS if _foreign(name).detect(root)]
        if len(recognised) > 1:
            raise ValueError(f"{root} looks like {' and '.join(recognised)}; say which with data.format=NAME")
        if not recognised:
            raise FileNotFoundError(
                f"{root} holds no demos in a known format; looked for native (a folder a demo with metadata.json of "
                f"schema {SCHEMA!r} and "
                "trajectory.npz), raiden (<task>/0000/lowdim), yam_abc (<slug>/<stamp>_<id>/*-joint_pos.npy), "
                "lerobot_v3 (meta/info.json) and "
                "libero (*.hdf5)"
            )
        format = recognised[0]
    if format == "native":
        if calibration is not None:
            raise ValueError(
                f"calibration={calibration} has no effect: native demos carry their cameras; leave data.calibration out"
            )
        references = _find_native(root)
    else:
        references = _foreign(format).find(root, calibration=None if calibration is None else Path(calibration))
    if not references:
        raise FileNotFoundError(f"{root} holds no demos of format {format}")
    return references


# ------------------------------------------------------------------------------------------------------- native reading


def _archive(name: str, path: Path) -> dict[str, np.ndarray]:
    import zipfile

    if not path.is_file():
        raise DemoError(name, f"{path.name} is missing")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DemoError(name, f"{path.name} cannot be read ({error})") from error


def _part(name: str, archive: Mapping[str, np.ndarray], key: str, file: str) -> np.ndarray:
    if key not in archive:
        raise DemoError(name, f"{file} has no {key!r}; it holds {', '.join(sorted(archive)) or 'nothing'}")
    return archive[key]


def _read_arm(name: str, archive: Mapping[str, np.ndarray], arm: str) -> ArmTrajectory:
    def poses(prefix: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        keys = (f"{arm}/{prefix}position_m", f"{arm}/{prefix}quaternion_wxyz", f"{arm}/{prefix}gripper_opening")
        parts = [np.asarray(_part(name, archive, key, "trajectory.npz"), dtype=np.float64) for key in keys]
        return parts[0], parts[1], parts[2]

    commanded = None
    if any(key.startswith(f"{arm}/commanded_") for key in archive):
        commanded = ArmTrajectory(*poses("commanded_"))
    joints = archive.get(f"{arm}/joint_positions_rad")
    return ArmTrajectory(
        *poses(""), joints=None if joints is None else np.asarray(joints, dtype=np.float64), commanded=commanded
    )


def _inside(name: str, folder: Path, relative: str) -> Path:
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts:
        raise DemoError(name, f"metadata.json names the file {relative!r}; paths must be relative and inside the demo")
    return folder / path


def _count_files(name: str, folder: Path, pattern: str, frames: int, camera: str) -> None:
    if not folder.is_dir():
        raise DemoError(name, f"camera {camera!r}: folder {folder.name} is missing")
    held = {path.name for path in folder.iterdir()}
    missing = [index for index in range(frames) if pattern % index not in held]
    if missing:
        raise DemoError(
            name, f"camera {camera!r}: {len(missing)} of {frames} pictures are missing, first {pattern % missing[0]}"
        )


def _frame_source(name: str, folder: Path, pattern: str, frames: int, camera: str, depth: bool) -> FrameSource:
    path = _inside(name, folder, pattern)
    if "%" in path.name:
        try:
            path.name % 0
        except (TypeError, ValueError) as error:
            raise DemoError(name, f"camera {camera!r}: {path.name!r} is not a pattern with one frame number") from error
        _count_files(name, path.parent, path.name, frames, camera)
        return (DepthFrames if depth else JpegFrames)(path.parent, path.name, frames)
    if depth:
        raise DemoError(name, f"camera {camera!r}: depth must be 16-bit PNG files, not {pattern!r}")
    if not path.is_file():
        raise DemoError(name, f"camera {camera!r}: video {pattern} is missing")
    source = VideoFrames(path)
    try:
        held = source.frames_in_file()
    except OSError as error:
        raise DemoError(name, f"camera {camera!r}: {error}") from error
    if held != frames:
        raise DemoError(
            name,
            f"camera {camera!r}: video {pattern} holds {held} frames, the demo {frames}: it was cut off or dropped "
            "frames",
        )
    return VideoFrames(path, frames)


def _read_metadata(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "metadata.json"
    if not path.is_file():
        raise DemoError(name, "no completion mark (metadata.json is written last): the recording was cut off")
    try:
        metadata = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DemoError(name, f"metadata.json is not JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise DemoError(name, "metadata.json holds no object")
    if metadata.get("schema") != SCHEMA:
        raise DemoError(name, f"schema is {metadata.get('schema')!r}, this version reads {SCHEMA!r}")
    if metadata.get("complete") is not True:
        raise DemoError(name, "no completion mark (metadata.json lacks complete: true): the recording was cut off")
    for key in ("robot", "task", "instruction", "fps", "frames", "arms", "cameras", "conventions"):
        if key not in metadata:
            raise DemoError(name, f"metadata.json has no {key!r}")
    stated = metadata["conventions"]
    for key, value in CONVENTIONS.items():
        if not isinstance(stated, dict) or stated.get(key) != value:
            found = stated.get(key) if isinstance(stated, dict) else stated
            raise DemoError(
                name, f"convention {key!r} is {found!r}, {value!r} is needed: convert the demo before loading it"
            )
    return metadata


def read_native(folder: Path | str, name: str | None = None) -> Demo:
    """Reads one native demo folder. Conventions in its file are compared with ours; `check_demo` does the numbers.

    Raises:
        DemoError: cut off, another schema or convention, a part missing.
    """
    folder = Path(folder)
    name = folder.name if name is None else name
    metadata = _read_metadata(folder, name)
    frames = int(metadata["frames"])
    trajectory = _archive(name, folder / "trajectory.npz")
    poses = _archive(name, folder / "cameras.npz")
    timestamps = _part(name, trajectory, "timestamps_ns", "trajectory.npz")
    if timestamps.shape != (frames,) or not np.issubdtype(timestamps.dtype, np.integer):
        raise DemoError(
            name,
            f"timestamps_ns is {timestamps.dtype} {timestamps.shape}, metadata.json says {frames} frames (int64 ns)",
        )
    if not metadata["cameras"]:
        raise DemoError(name, "metadata.json names no camera")
    cameras = {}
    for camera, entry in metadata["cameras"].items():
        depth = entry.get("depth")
        cameras[camera] = CameraTrack(
            width=int(entry["width"]),
            height=int(entry["height"]),
            intrinsics=CameraTrack.broadcast(_part(name, poses, f"{camera}/intrinsics", "cameras.npz"), frames),
            world_to_camera=CameraTrack.broadcast(
                _part(name, poses, f"{camera}/world_to_camera", "cameras.npz"), frames
            ),
            frames=_frame_source(name, folder, entry["frames"], frames, camera, depth=False),
            depth=None if depth is None else _frame_source(name, folder, depth, frames, camera, depth=True),
        )
    text: dict[str, Any] = {}
    if (folder / "text.json").is_file():
        try:
            text = json.loads((folder / "text.json").read_text())
        except ValueError as error:
            raise DemoError(name, f"text.json is not JSON ({error})") from error
    return Demo(
        name=name,
        path=folder,
        robot=str(metadata["robot"]),
        task=str(metadata["task"]),
        instruction=str(metadata["instruction"]),
        fps=float(metadata["fps"]),
        timestamps=timestamps.astype(np.int64),
        arms={arm: _read_arm(name, trajectory, arm) for arm in metadata["arms"]},
        cameras=cameras,
        source=dict(metadata.get("source") or {}),
        text=text,
    )


# ------------------------------------------------------------------------------------------------------- native writing


@dataclass(frozen=True)
class ArmPose:
    """One arm at one frame: position [3] m, quaternion [4] w x y z, gripper opening 0..1, joints [J] rad or None."""

    position: np.ndarray
    quaternion: np.ndarray
    gripper: float
    joints: np.ndarray | None = None


@dataclass(frozen=True)
class CameraPose:
    """One camera at one frame: intrinsics [3, 3] pixels, world_to_camera [4, 4]."""

    intrinsics: np.ndarray
    world_to_camera: np.ndarray


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: under a temporary name beside it, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class _VideoWriter:
    """H.264 with B-frames off and a key frame every half second, so that random access stays cheap."""

    def __init__(self, path: Path, width: int, height: int, fps: float) -> None:
        from fractions import Fraction

        import av

        if width % 2 or height % 2:
            raise ValueError(f"video needs even picture sizes, not {width} x {height}; write JPEG files instead")
        self.container = av.open(str(path), "w")
        self.stream = self.container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        self.stream.options = {"crf": "18", "bf": "0", "g": str(max(1, round(fps / 2))), "preset": "veryfast"}

    def write(self, picture: np.ndarray) -> None:
        import av

        self.container.mux(self.stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))

    def close(self) -> None:
        self.container.mux(self.stream.encode())
        self.container.close()


class DemoWriter:
    """Writes one native demo folder, frame by frame; a context manager.

    Everything goes to a hidden folder beside the final one, which gets its name when the block ends well; after an
    exception, `discard()` or a kill there is no folder of that name (a hidden remainder of a kill is passed over by the
    reader).

    Args:
        folder: the demo's folder; must not exist.
        robot, task, instruction: words for the metadata; `instruction`, `source` and `text` may be set until the block
            ends.
        fps: frames a second.
        source: free, must be JSON (simulator: task, seed, options, success).
        text: {"captions": [...], "questions": [...]} or None.
        video: one H.264 file a camera in place of JPEG files.
        jpeg_quality: 95 keeps the error of a pixel near that of the sensor; below 92 blocks show in heatmaps.

    `add` takes a frame of every camera and arm; which cameras and arms there are is fixed by the first call.
    """

    def __init__(
        self,
        folder: Path | str,
        robot: str,
        task: str,
        instruction: str,
        fps: float,
        source: Mapping[str, Any] | None = None,
        text: Mapping[str, Any] | None = None,
        video: bool = False,
        jpeg_quality: int = 95,
    ) -> None:
        self.folder = Path(folder)
        if self.folder.exists():
            raise FileExistsError(f"demo folder {self.folder} exists already; remove it or write under another name")
        self.robot, self.task, self.instruction, self.fps = robot, task, instruction, float(fps)
        self.source: dict[str, Any] = dict(source or {})
        self.text: dict[str, Any] = dict(text or {})
        self.video, self.jpeg_quality = video, jpeg_quality
        self._temporary = self.folder.with_name(f".{self.folder.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
        self._timestamps: list[int] = []
        self._reached: dict[str, list[ArmPose]] = {}
        self._commanded: dict[str, list[ArmPose]] = {}
        self._cameras: dict[str, list[CameraPose]] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._depth: set[str] = set()
        self._videos: dict[str, _VideoWriter] = {}
        self._discarded = False

    def __enter__(self) -> Self:
        self._temporary.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for video in self._videos.values():
                video.close()
            if kind is None and not self._discarded:
                self._finish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def discard(self) -> None:
        """The demo is not wanted (a failed episode): the block ends without a folder."""
        self._discarded = True

    def __len__(self) -> int:
        return len(self._timestamps)

    def add(
        self,
        timestamp_ns: int,
        pictures: Mapping[str, np.ndarray | bytes],
        cameras: Mapping[str, CameraPose],
        reached: Mapping[str, ArmPose],
        commanded: Mapping[str, ArmPose] | None = None,
        depth: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Adds a frame.

        Args:
            timestamp_ns: increasing.
            pictures: by camera, H x W x 3 uint8 RGB, or the bytes of a JPEG that are stored as they are.
            cameras: pose and intrinsics by camera; where they never change one matrix is stored.
            reached: measured pose by arm.
            commanded: the command given at this frame by arm (where the arm is told to be at the next frame); in all
                frames or in none.
            depth: by camera, H x W uint16 millimetres; in all frames or in none.

        Raises:
            ValueError: cameras or arms differ from the first frame's, a size changes, depth or commands come and go.
        """
        index = len(self._timestamps)
        commanded, depth = commanded or {}, depth or {}
        if index == 0:
            self._reached = {arm: [] for arm in reached}
            self._commanded = {arm: [] for arm in commanded}
            self._cameras = {camera: [] for camera in pictures}
            self._depth = set(depth)
        for what, given, needed in (
            ("arms", reached, self._reached),
            ("commanded arms", commanded, self._commanded),
            ("pictures", pictures, self._cameras),
            ("camera poses", cameras, self._cameras),
            ("depth", depth, self._depth),
        ):
            if set(given) != set(needed):
                raise ValueError(
                    f"{self.folder.name}, frame {index}: {what} of {sorted(given)} given, {sorted(needed)} needed"
                )
        if not set(self._commanded) <= set(self._reached) or not self._depth <= set(self._cameras):
            raise ValueError(
                f"{self.folder.name}: commands or depth given for an arm or camera that has no pose or picture"
            )
        for camera, picture in pictures.items():
            self._add_picture(camera, index, picture)
        for camera, values in depth.items():
            folder = self._temporary / "depth" / camera
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(values, dtype=np.uint16)).save(
                folder / f"{index:06d}.png", compress_level=1
            )
        self._timestamps.append(int(timestamp_ns))
        for store, given_poses in ((self._reached, reached), (self._commanded, commanded)):
            for arm, pose in given_poses.items():
                store[arm].append(pose)
        for camera, camera_pose in cameras.items():
            self._cameras[camera].append(camera_pose)

    def _add_picture(self, camera: str, index: int, picture: np.ndarray | bytes) -> None:
        if isinstance(picture, bytes):
            with Image.open(io.BytesIO(picture)) as opened:
                size, kind = opened.size, opened.format
            if self.video or kind != "JPEG":
                picture = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
        if isinstance(picture, np.ndarray):
            if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
                raise ValueError(
                    f"camera {camera!r}: a picture must be H x W x 3 uint8, not {picture.shape} {picture.dtype}"
                )
            size = (picture.shape[1], picture.shape[0])
        if self._sizes.setdefault(camera, size) != size:
            raise ValueError(f"camera {camera!r}: frame {index} is {size}, the first one was {self._sizes[camera]}")
        folder = self._temporary / "rgb"
        if isinstance(picture, np.ndarray) and self.video:
            folder.mkdir(parents=True, exist_ok=True)
            if camera not in self._videos:
                self._videos[camera] = _VideoWriter(folder / f"{camera}.mp4", *size, self.fps)
            self._videos[camera].write(np.ascontiguousarray(picture))
            return
        folder = folder / camera
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{index:06d}.jpg"
        if isinstance(picture, bytes):
            path.write_bytes(picture)
        else:
            # 4:4:4: chroma at full resolution, since thin coloured edges are what the policy localises
            Image.fromarray(picture).save(path, quality=self.jpeg_quality, subsampling=0)

    def _finish(self) -> None:
        if len(self._timestamps) < 2:
            raise ValueError(f"demo {self.folder.name} has {len(self._timestamps)} frames; at least 2 are needed")
        trajectory: dict[str, np.ndarray] = {"timestamps_ns": np.asarray(self._timestamps, dtype=np.int64)}
        for prefix, store in (("", self._reached), ("commanded_", self._commanded)):
            for arm, poses in store.items():
                trajectory[f"{arm}/{prefix}position_m"] = np.stack(
                    [np.asarray(pose.position, dtype=np.float64) for pose in poses]
                )
                trajectory[f"{arm}/{prefix}quaternion_wxyz"] = np.stack(
                    [np.asarray(pose.quaternion, dtype=np.float64) for pose in poses]
                )
                trajectory[f"{arm}/{prefix}gripper_opening"] = np.asarray(
                    [pose.gripper for pose in poses], dtype=np.float64
                )
                if not prefix and all(pose.joints is not None for pose in poses):
                    trajectory[f"{arm}/joint_positions_rad"] = np.stack(
                        [np.asarray(pose.joints, dtype=np.float64) for pose in poses]
                    )
        cameras: dict[str, np.ndarray] = {}
        entries: dict[str, dict[str, Any]] = {}
        for camera, camera_poses in self._cameras.items():
            for part in ("intrinsics", "world_to_camera"):
                matrices = np.stack([np.asarray(getattr(pose, part), dtype=np.float64) for pose in camera_poses])
                cameras[f"{camera}/{part}"] = matrices[0] if (matrices == matrices[0]).all() else matrices
            width, height = self._sizes[camera]
            entries[camera] = {
                "width": width,
                "height": height,
                "frames": f"rgb/{camera}.mp4" if self.video else f"rgb/{camera}/%06d.jpg",
                "depth": f"depth/{camera}/%06d.png" if camera in self._depth else None,
            }
        np.savez(self._temporary / "trajectory.npz", **trajectory)  # type: ignore[arg-type]
        np.savez(self._temporary / "cameras.npz", **cameras)  # type: ignore[arg-type]
        if self.text:
            write_whole(self._temporary / "text.json", json.dumps(self.text, indent=1).encode())
        metadata = {
            "schema": SCHEMA,
            "complete": True,
            "robot": self.robot,
            "task": self.task,
            "instruction": self.instruction,
            "fps": self.fps,
            "frames": len(self._timestamps),
            "arms": sorted(self._reached),
            "cameras": entries,
            "conventions": CONVENTIONS,
            "source": self.source,
        }
        write_whole(self._temporary / "metadata.json", json.dumps(metadata, indent=1).encode())
        self._temporary.rename(self.folder)


def write_demo(
    demo: Demo,
    folder: Path | str,
    cameras: Sequence[str] | None = None,
    video: bool = False,
    jpeg_quality: int = 95,
) -> Path:
    """Writes `demo`, of whatever format it was read, as a native folder; JPEG files are copied byte by byte. Returns
    the folder.

    Args:
        demo: what to write.
        folder: must not exist.
        cameras: cameras to keep; None: all.
        video, jpeg_quality: as for `DemoWriter`.
    """
    names = list(demo.cameras) if cameras is None else list(cameras)
    absent = [name for name in names if name not in demo.cameras]
    if absent:
        raise DemoError(demo.name, f"it has no camera {absent[0]!r}; it has {', '.join(demo.cameras)}")
    tracks = {name: demo.cameras[name] for name in names}
    source = {"imported_from": str(demo.path), **demo.source}
    with DemoWriter(
        folder, demo.robot, demo.task, demo.instruction, demo.fps, source, demo.text, video, jpeg_quality
    ) as writer:
        for index in range(len(demo)):
            pictures: dict[str, np.ndarray | bytes] = {}
            for name, track in tracks.items():
                encoded = track.frames.encoded(index) if isinstance(track.frames, JpegFrames) and not video else None
                pictures[name] = track.frames.read(index) if encoded is None else encoded
            writer.add(
                int(demo.timestamps[index]),
                pictures,
                {
                    name: CameraPose(track.intrinsics[index], track.world_to_camera[index])
                    for name, track in tracks.items()
                },
                {name: _pose(arm, index) for name, arm in demo.arms.items()},
                {name: _pose(arm.commanded, index) for name, arm in demo.arms.items() if arm.commanded is not None},
                {name: track.depth.read(index) for name, track in tracks.items() if track.depth is not None},
            )
    return Path(folder)


def _pose(arm: ArmTrajectory, index: int) -> ArmPose:
    return ArmPose(
        arm.position[index],
        arm.quaternion[index],
        float(arm.gripper[index]),
        None if arm.joints is None else arm.joints[index],
    )
