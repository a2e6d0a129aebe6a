"""Writes native demonstrations, frame by frame or as whole demos that were read from another format."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from keygrip.artifacts import move_folder, scratch_folder, write_json
from keygrip.data.robot.frames import JpegFrames, depth_millimetres
from keygrip.data.robot.integrity import write_manifest
from keygrip.data.robot.schema import (
    CONVENTIONS,
    SCHEMA,
    ArmTrajectory,
    Demo,
    DemoError,
    FrameSource,
    check_image,
    demo_guard,
    missing_camera,
)
from keygrip.data.untrusted_files import open_image
from keygrip.data.video import VideoWriter

# Arrays of an arm in trajectory.npz and the fields of `ArmPose` that they hold; the second group is for reached poses
# only.
POSE_ARRAYS = {"position_m": "position", "quaternion_wxyz": "quaternion", "gripper_opening": "gripper"}
REACHED_ARRAYS = {"joint_positions_rad": "joints", "controller_action": "controller"}


@dataclass(frozen=True)
class ArmPose:
    """One arm at one frame: position [3] m, quaternion [4] w x y z, gripper opening 0..1, joints [J] rad or None, and
    the input of its own controller [D] or None."""

    position: np.ndarray
    quaternion: np.ndarray
    gripper: float
    joints: np.ndarray | None = None
    controller: np.ndarray | None = None


@dataclass(frozen=True)
class CameraPose:
    """One camera at one frame: intrinsics [3, 3] pixels, world_to_camera [4, 4]."""

    intrinsics: np.ndarray
    world_to_camera: np.ndarray


class DemoWriter:
    """Writes one native demo folder, frame by frame; a context manager.

    Everything is written to a hidden folder in the same place. When the block ends without an error, all files are
    flushed to the disk, and the folder gets the final name. After an exception, `discard()` or a kill, no folder has
    the final name. (The reader skips the hidden folder that a kill leaves; a later process that writes a demo next to
    it removes it.) If its files are removed during writing, the block ends with FileNotFoundError.

    Args:
        folder: the demo's folder; must not exist.
        robot, task, instruction: text for the metadata; `instruction`, `source` and `text` may be set until the block
            ends.
        fps: frames per second.
        source: any JSON content (simulator: task, seed, options, success).
        text: {"captions": [...], "questions": [...]}, optionally "camera": the camera whose image they describe; or
            None.
        video: one H.264 file per camera instead of JPEG files.
        uncalibrated: by camera, why its pose is not known; its `CameraPose`s are then not stored.
        jpeg_quality: 95 keeps the error of a pixel near that of the sensor; below 92 blocks are visible in heatmaps.

    `add` expects a frame of every camera and arm; the first call determines the cameras and arms.
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
        uncalibrated: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        if self.folder.exists():
            raise FileExistsError(f"demo folder {self.folder} exists already; remove it or write under another name")
        self.robot, self.task, self.instruction, self.fps = robot, task, instruction, float(fps)
        self.source: dict[str, Any] = dict(source or {})
        self.text: dict[str, Any] = dict(text or {})
        self.video, self.jpeg_quality = video, jpeg_quality
        self._scratch = scratch_folder(self.folder)
        self.uncalibrated = dict(uncalibrated or {})
        self._timestamps: list[int] = []
        self._interventions: list[bool] = []
        self._reached: dict[str, list[ArmPose]] = {}
        self._commanded: dict[str, list[ArmPose]] = {}
        self._cameras: dict[str, list[CameraPose]] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._depth: set[str] = set()
        self._videos: dict[str, VideoWriter] = {}
        self._files: list[Path] = []
        self._discarded = False

    def __enter__(self) -> Self:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._scratch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            stack.push(self._scratch)
            for video in self._videos.values():
                video.close()
            if error is not None:
                raise error  # passed through the scratch folder, which adds the location if a disk is full
            if not self._discarded:
                self._finish()

    def discard(self) -> None:
        """Discard the demo (a failed episode): the block ends without creating the folder."""
        self._discarded = True

    def __len__(self) -> int:
        return len(self._timestamps)

    def add(
        self,
        timestamp_ns: int,
        images: Mapping[str, np.ndarray | bytes],
        cameras: Mapping[str, CameraPose],
        reached: Mapping[str, ArmPose],
        commanded: Mapping[str, ArmPose] | None = None,
        depth: Mapping[str, np.ndarray] | None = None,
        intervention: bool = False,
    ) -> None:
        """Add a frame.

        Args:
            timestamp_ns: increasing.
            images: by camera, H x W x 3 uint8 RGB, or the bytes of a JPEG, which are stored unchanged.
            cameras: pose and intrinsics by camera; if they never change, one matrix is stored.
            reached: measured pose by arm.
            commanded: the command given at this frame, by arm (the target pose for the next frame); in all frames or in
                none.
            depth: by camera, H x W uint16 millimetres, of the size of its image; in all frames or in none.
            intervention: a person moved the arm at this frame instead of the policy.

        Raises:
            ValueError: cameras or arms differ from those of the first frame, an image size changes, depth or commands
                are given in some frames only, or depth is not in millimetres or of another size than the image.
        """
        index = len(self._timestamps)
        commanded, depth = commanded or {}, depth or {}
        if index == 0:
            self._reached = {arm: [] for arm in reached}
            self._commanded = {arm: [] for arm in commanded}
            self._cameras = {camera: [] for camera in images}
            self._depth = set(depth)
        for kind, given, needed in (
            ("arms", reached, self._reached),
            ("commanded arms", commanded, self._commanded),
            ("images", images, self._cameras),
            ("camera poses", cameras, self._cameras),
            ("depth", depth, self._depth),
        ):
            if set(given) != set(needed):
                raise ValueError(
                    f"{self.folder.name}, frame {index}: {kind} of {sorted(given)} given, {sorted(needed)} needed"
                )
        if not set(self._commanded) <= set(self._reached) or not self._depth <= set(self._cameras):
            raise ValueError(
                f"{self.folder.name}: commands or depth given for an arm or camera that has no pose or image"
            )
        # before an image is written: a frame of a video cannot be removed again
        checked_depth = {camera: _checked_depth(camera, values, images[camera]) for camera, values in depth.items()}
        files = len(self._files)
        try:
            for camera, image in images.items():
                self._add_image(camera, index, image)
            for camera, millimetres in checked_depth.items():
                path = self._register_file("depth", camera, f"{index:06d}.png")
                Image.fromarray(millimetres).save(path, compress_level=1)
            self._timestamps.append(int(timestamp_ns))
            self._interventions.append(bool(intervention))
            for store, given_poses in ((self._reached, reached), (self._commanded, commanded)):
                for arm, pose in given_poses.items():
                    store[arm].append(copy.deepcopy(pose))  # the caller may change its arrays later
            for camera, camera_pose in cameras.items():
                self._cameras[camera].append(copy.deepcopy(camera_pose))
        except BaseException:  # also a signal: the frames before stay a whole demo
            self._forget_frame(index, files)
            raise

    def _forget_frame(self, index: int, files: int) -> None:
        """Remove what was stored of frame `index`, before which there were `files` files."""
        for path in self._files[files:]:
            path.unlink(missing_ok=True)
        del self._files[files:], self._timestamps[index:], self._interventions[index:]
        for poses in (*self._reached.values(), *self._commanded.values()):
            del poses[index:]
        for camera_poses in self._cameras.values():
            del camera_poses[index:]

    def _add_image(self, camera: str, index: int, image: np.ndarray | bytes) -> None:
        if isinstance(image, bytes):
            with Image.open(io.BytesIO(image)) as opened:
                size, kind = opened.size, opened.format
            if self.video or kind != "JPEG":
                image = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        if isinstance(image, np.ndarray):
            check_image(image, f"camera {camera!r}: an image")
            size = (image.shape[1], image.shape[0])
        if self._sizes.setdefault(camera, size) != size:
            raise ValueError(f"camera {camera!r}: frame {index} is {size}, the first one was {self._sizes[camera]}")
        if isinstance(image, np.ndarray) and self.video:
            if camera not in self._videos:
                self._videos[camera] = VideoWriter(self._register_file("rgb", f"{camera}.mp4"), *size, self.fps)
            self._videos[camera].write(np.ascontiguousarray(image))
            return
        path = self._register_file("rgb", camera, f"{index:06d}.jpg")
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            # 4:4:4: chroma at full resolution, because the policy localises thin coloured edges
            Image.fromarray(image).save(path, quality=self.jpeg_quality, subsampling=0)

    def _register_file(self, *names: str) -> Path:
        path = self._temporary.joinpath(*names)
        within = path.parents[: len(names) - 1]  # not the hidden folder itself: recreating it would hide lost files
        try:
            for folder in reversed(within):
                folder.mkdir(exist_ok=True)
        except FileNotFoundError as error:
            raise self._folder_removed_error() from error
        self._files.append(path)
        return path

    def _folder_removed_error(self) -> FileNotFoundError:
        return FileNotFoundError(f"{self._temporary} was removed while {self.folder} was written: record it again")

    def _finish(self) -> None:
        if len(self._timestamps) < 2:
            raise ValueError(f"demo {self.folder.name} has {len(self._timestamps)} frames; at least 2 are needed")
        if not all(path.is_file() for path in self._files):
            raise self._folder_removed_error()
        trajectory: dict[str, np.ndarray] = {"timestamps_ns": np.asarray(self._timestamps, dtype=np.int64)}
        if any(self._interventions):
            trajectory["intervention"] = np.asarray(self._interventions, dtype=bool)
        for prefix, store in (("", self._reached), ("commanded_", self._commanded)):
            for arm, poses in store.items():
                for name, attribute in (POSE_ARRAYS if prefix else POSE_ARRAYS | REACHED_ARRAYS).items():
                    values = [getattr(pose, attribute) for pose in poses]
                    if all(value is not None for value in values):
                        trajectory[f"{arm}/{prefix}{name}"] = np.asarray(values, dtype=np.float64)
        cameras: dict[str, np.ndarray] = {}
        entries: dict[str, dict[str, Any]] = {}
        for camera, camera_poses in self._cameras.items():
            for attribute in () if camera in self.uncalibrated else ("intrinsics", "world_to_camera"):
                matrices = np.stack([np.asarray(getattr(pose, attribute), dtype=np.float64) for pose in camera_poses])
                cameras[f"{camera}/{attribute}"] = matrices[0] if (matrices == matrices[0]).all() else matrices
            width, height = self._sizes[camera]
            entries[camera] = {
                "width": width,
                "height": height,
                "frames": f"rgb/{camera}.mp4" if self.video else f"rgb/{camera}/%06d.jpg",
                "depth": f"depth/{camera}/%06d.png" if camera in self._depth else None,
            }
            if camera in self.uncalibrated:
                entries[camera]["uncalibrated"] = self.uncalibrated[camera]
        np.savez(self._temporary / "trajectory.npz", **trajectory)  # type: ignore[arg-type]
        np.savez(self._temporary / "cameras.npz", **cameras)  # type: ignore[arg-type]
        if self.text:
            write_json(self._temporary / "text.json", self.text)
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
        write_json(self._temporary / "metadata.json", metadata)
        write_manifest(self._temporary)
        move_folder(self._temporary, self.folder)


def _checked_depth(camera: str, values: np.ndarray, image: np.ndarray | bytes) -> np.ndarray:
    """Return a camera's depth as uint16 [H, W]. Raise ValueError if it is not in millimetres or not of the size of the
    camera's image."""
    try:
        millimetres = depth_millimetres(np.asarray(values))
    except ValueError as error:
        raise ValueError(f"camera {camera!r}: {error}") from error
    if isinstance(image, bytes):
        with Image.open(io.BytesIO(image)) as opened:
            shape = opened.size[::-1]
    else:
        shape = image.shape[:2]
    if millimetres.shape != shape:
        raise ValueError(f"camera {camera!r}: depth is {millimetres.shape}, its image {shape}")
    return np.ascontiguousarray(millimetres)


def write_demo(
    demo: Demo,
    folder: Path | str,
    cameras: Sequence[str] | None = None,
    video: bool = False,
    jpeg_quality: int = 95,
) -> Path:
    """Write `demo`, read from any format, as a native folder. JPEG files are copied byte by byte. Return the folder.

    Args:
        demo: what to write.
        folder: must not exist.
        cameras: cameras to keep; None: all.
        video, jpeg_quality: as for `DemoWriter`.
    """
    names = list(demo.cameras) if cameras is None else list(cameras)
    absent = [name for name in names if name not in demo.cameras]
    if absent:
        raise DemoError(demo.name, missing_camera(demo, absent[0]))
    tracks = {name: demo.cameras[name] for name in names}
    source = {"imported_from": str(demo.path), **demo.source}
    uncalibrated = {name: track.uncalibrated for name, track in tracks.items() if track.uncalibrated}
    words = (demo.robot, demo.task, demo.instruction, demo.fps, source, demo.text)
    with DemoWriter(folder, *words, video, jpeg_quality, uncalibrated) as writer:
        for index in range(len(demo)):
            images: dict[str, np.ndarray | bytes] = {}
            for name, track in tracks.items():
                with demo_guard(demo.name, f"camera {name!r}, frame {index}: "):
                    images[name] = _image_to_write(track.frames, index, video)
            writer.add(
                int(demo.timestamps[index]),
                images,
                {
                    name: CameraPose(track.intrinsics[index], track.world_to_camera[index])
                    for name, track in tracks.items()
                },
                {name: _pose_at(arm, index) for name, arm in demo.arms.items()},
                {name: _pose_at(arm.commanded, index) for name, arm in demo.arms.items() if arm.commanded is not None},
                {name: track.depth.read(index) for name, track in tracks.items() if track.depth is not None},
                intervention=demo.intervention is not None and bool(demo.intervention[index]),
            )
    return Path(folder)


def _image_to_write(frames: FrameSource, index: int, video: bool) -> np.ndarray | bytes:
    """Return the bytes of an image file that is copied unchanged, else the pixels."""
    encoded = frames.encoded(index) if isinstance(frames, JpegFrames) and not video else None
    if not isinstance(frames, JpegFrames) or encoded is None:
        return frames.read(index)
    with open_image(encoded, frames.path(index)):  # reads the header; the message of the writer could not name the file
        return encoded


def _pose_at(arm: ArmTrajectory, index: int) -> ArmPose:
    return ArmPose(
        arm.position[index],
        arm.quaternion[index],
        float(arm.gripper[index]),
        None if arm.joints is None else arm.joints[index],
        None if arm.controller is None else arm.controller[index],
    )
