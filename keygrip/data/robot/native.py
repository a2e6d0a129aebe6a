"""Reader of native demonstrations: a folder per demo.

A native demo is a folder with `metadata.json` (written last: the mark that the demo is complete), `trajectory.npz`,
`cameras.npz`, frames (JPEG files or one video per camera), optionally depth (16-bit PNG, millimetres) and `text.json`.
`native_writer.py` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.data.bad_samples import BadSample
from keygrip.data.robot.demo_folders import demo_folders, folder_references, read_object
from keygrip.data.robot.frames import DepthFrames, JpegFrames, VideoFrames
from keygrip.data.robot.reference import DemoReference
from keygrip.data.robot.schema import (
    CONVENTIONS,
    SCHEMA,
    ArmTrajectory,
    CameraTrack,
    Demo,
    DemoError,
    FrameSource,
    words,
)
from keygrip.data.untrusted_files import inside, read_json, read_npz

RECORDING_FILE = "recording.json"  # next to the demos: settings of the recorder and its failed seeds
POSES = ("position_m", "quaternion_wxyz", "gripper_opening")
ARM_ARRAYS = (*POSES, *(f"commanded_{part}" for part in POSES), "joint_positions_rad", "controller_action")
# Entries of a demo's source which readers write and read, and which an imported demo keeps.
LISTS_OF_READERS, OBJECTS_OF_READERS = ("notes", "renamed"), ("damaged", "left_out", "uncalibrated")
PATTERN = re.compile(r"[^%]*%(0\d{1,2})?d[^%]*")  # one frame number in a file name; a wider field could fill memory


def _looks_native(folder: Path) -> bool:
    """Return whether a folder holds files of a native recorder only: trajectory.npz, or metadata with our schema."""
    if (folder / "trajectory.npz").is_file():
        return True
    metadata = folder / "metadata.json"
    if not metadata.is_file():
        return False
    try:
        content = read_json(metadata)
    except BadSample:
        return False
    return isinstance(content, dict) and str(content.get("schema", "")).startswith("keygrip.demo/")


def _is_demo(folder: Path) -> bool:
    """Return whether a folder holds any part of a demo; this includes demos that were cut off."""
    return any((folder / part).exists() for part in ("metadata.json", "trajectory.npz", "cameras.npz", "rgb"))


def find(root: Path) -> list[DemoReference]:
    """Return references to the native demos under `root`, without reading them."""
    return folder_references(root, demo_folders(root, _is_demo), "native", read_native)


def detect(root: Path) -> bool:
    """Return whether a folder holds native demos."""
    return any(map(_looks_native, demo_folders(root, _is_demo)))


def _read_arrays(name: str, path: Path, keys: Iterable[str]) -> Mapping[str, np.ndarray]:
    """Return those of the wanted arrays that a file contains; other arrays are not read."""
    if not path.is_file():
        raise DemoError(name, f"{path.name} is missing")
    try:
        return read_npz(path, set(keys), path.name)
    except BadSample as error:
        raise DemoError(name, f"{path.name} cannot be read ({error.what})") from error


def _require_array(name: str, archive: Mapping[str, np.ndarray], key: str, file: str) -> np.ndarray:
    if key not in archive:
        raise DemoError(name, f"{file} has no {key!r}; it holds {', '.join(sorted(archive)) or 'nothing'}")
    return archive[key]


def _read_arm(name: str, archive: Mapping[str, np.ndarray], arm: str) -> ArmTrajectory:
    def poses(prefix: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        keys = [f"{arm}/{prefix}{part}" for part in POSES]
        arrays = [np.asarray(_require_array(name, archive, key, "trajectory.npz"), dtype=np.float64) for key in keys]
        return arrays[0], arrays[1], arrays[2]

    commanded = None
    if any(key.startswith(f"{arm}/commanded_") for key in archive):
        commanded = ArmTrajectory(*poses("commanded_"))
    joints, controller = (archive.get(f"{arm}/{part}") for part in ("joint_positions_rad", "controller_action"))
    return ArmTrajectory(
        *poses(""),
        joints=None if joints is None else np.asarray(joints, dtype=np.float64),
        commanded=commanded,
        controller=None if controller is None else np.asarray(controller, dtype=np.float64),
    )


def _check_intervention(name: str, archive: Mapping[str, np.ndarray], frames: int) -> np.ndarray | None:
    flags = archive.get("intervention")
    if flags is not None and (flags.shape != (frames,) or flags.dtype != bool):
        raise DemoError(name, f"intervention is {flags.dtype} {flags.shape}, bool ({frames},) is needed")
    return flags


def _resolve_inside(name: str, folder: Path, relative: str) -> Path:
    try:
        return inside(folder, relative)
    except BadSample as error:
        raise DemoError(name, f"metadata.json: {error.what}") from error


def _count_files(name: str, folder: Path, pattern: str, frames: int, camera: str) -> None:
    if not folder.is_dir():
        raise DemoError(name, f"camera {camera!r}: folder {folder.name} is missing")
    file_names = {path.name for path in folder.iterdir()}
    missing = [index for index in range(frames) if pattern % index not in file_names]
    if missing:
        raise DemoError(
            name, f"camera {camera!r}: {len(missing)} of {frames} images are missing, first {pattern % missing[0]}"
        )


def _frame_source(name: str, folder: Path, pattern: str, frames: int, camera: str, depth: bool) -> FrameSource:
    path = _resolve_inside(name, folder, pattern)
    if "%" in path.name:
        if not PATTERN.fullmatch(path.name):
            raise DemoError(name, f"camera {camera!r}: {path.name!r} is not a pattern with one frame number")
        _count_files(name, path.parent, path.name, frames, camera)
        return (DepthFrames if depth else JpegFrames)(path.parent, path.name, frames)
    if depth:
        raise DemoError(name, f"camera {camera!r}: depth must be 16-bit PNG files, not {pattern!r}")
    if not path.is_file():
        raise DemoError(name, f"camera {camera!r}: video {pattern} is missing")
    source = VideoFrames(path)
    try:
        count = source.frames_in_file()
    except OSError as error:
        raise DemoError(name, f"camera {camera!r}: {error}") from error
    if count != frames:
        raise DemoError(
            name,
            f"camera {camera!r}: video {pattern} holds {count} frames, the demo {frames}: it was cut off or dropped "
            "frames",
        )
    return VideoFrames(path, frames)


def _read_metadata(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "metadata.json"
    if not path.is_file():
        raise DemoError(name, "no completion mark (metadata.json is written last): the recording was cut off")
    metadata = read_object(path, name)
    if metadata.get("schema") != SCHEMA:
        raise DemoError(name, f"schema is {metadata.get('schema')!r}, this version reads {SCHEMA!r}")
    if metadata.get("complete") is not True:
        raise DemoError(name, "no completion mark (metadata.json lacks complete: true): the recording was cut off")
    for key in ("robot", "task", "instruction", "fps", "frames", "arms", "cameras", "conventions"):
        if key not in metadata:
            raise DemoError(name, f"metadata.json has no {key!r}")
    _check_source(name, metadata.get("source"))
    stated = metadata["conventions"]
    for key, value in CONVENTIONS.items():
        if not isinstance(stated, dict) or stated.get(key) != value:
            actual = stated.get(key) if isinstance(stated, dict) else stated
            raise DemoError(
                name, f"convention {key!r} is {actual!r}, {value!r} is needed: convert the demo before loading it"
            )
    return metadata


def _check_source(name: str, source: Any) -> None:
    """Raise DemoError unless a demo's `source` is an object whose entries written by readers have their types."""
    source = {} if source is None else source
    if not isinstance(source, dict):
        raise DemoError(name, f"metadata.json: source must be an object, not {source!r:.80}")
    for keys, kind, words_of_kind in ((LISTS_OF_READERS, list, "a list"), (OBJECTS_OF_READERS, dict, "an object")):
        for key in keys:
            if not isinstance(source.get(key, kind()), kind):
                raise DemoError(name, f"metadata.json: source.{key} must be {words_of_kind}, not {source[key]!r:.80}")


def read_native(folder: Path | str, name: str | None = None) -> Demo:
    """Read one native demo folder. The conventions in its metadata are checked here; `check_demo` checks the values.

    Raises:
        DemoError: the demo was cut off, has another schema or convention, or lacks a part.
    """
    folder = Path(folder)
    name = folder.name if name is None else name
    metadata = _read_metadata(folder, name)
    frames = int(metadata["frames"])
    arms, entries = metadata["arms"], metadata["cameras"]
    if not isinstance(arms, list) or not isinstance(entries, dict):
        raise DemoError(name, "metadata.json: arms must be a list of names, cameras an object of entries by name")
    keys = [f"{arm}/{part}" for arm in arms for part in ARM_ARRAYS]
    trajectory = _read_arrays(name, folder / "trajectory.npz", ["timestamps_ns", "intervention", *keys])
    keys = [f"{camera}/{part}" for camera in entries for part in ("intrinsics", "world_to_camera")]
    poses = _read_arrays(name, folder / "cameras.npz", keys)
    timestamps = _require_array(name, trajectory, "timestamps_ns", "trajectory.npz")
    if timestamps.shape != (frames,) or not np.issubdtype(timestamps.dtype, np.integer):
        raise DemoError(
            name,
            f"timestamps_ns is {timestamps.dtype} {timestamps.shape}, metadata.json says {frames} frames (int64 ns)",
        )
    if not entries:
        raise DemoError(name, "metadata.json names no camera")
    cameras = {}
    for camera, entry in entries.items():
        for key in ("width", "height", "frames"):
            if not isinstance(entry, dict) or key not in entry:
                raise DemoError(name, f"camera {camera!r} of metadata.json has no {key!r}")
        width, height, depth = int(entry["width"]), int(entry["height"]), entry.get("depth")
        images = _frame_source(name, folder, entry["frames"], frames, camera, depth=False)
        depths = None if depth is None else _frame_source(name, folder, depth, frames, camera, depth=True)
        if reason := entry.get("uncalibrated"):
            cameras[camera] = CameraTrack.without_calibration(width, height, images, frames, str(reason), depths)
            continue
        intrinsics, world_to_camera = (
            CameraTrack.broadcast(_require_array(name, poses, f"{camera}/{part}", "cameras.npz"), frames)
            for part in ("intrinsics", "world_to_camera")
        )
        cameras[camera] = CameraTrack(width, height, intrinsics, world_to_camera, images, depths)
    text = read_object(folder / "text.json", name) if (folder / "text.json").is_file() else {}
    return Demo(
        name=name,
        path=folder,
        robot=str(metadata["robot"]),
        task=str(metadata["task"]),
        instruction=words(metadata["instruction"]),
        fps=float(metadata["fps"]),
        timestamps=timestamps.astype(np.int64),
        arms={arm: _read_arm(name, trajectory, arm) for arm in arms},
        cameras=cameras,
        source=dict(metadata.get("source") or {}),
        text=text,
        intervention=_check_intervention(name, trajectory, frames),
    )
