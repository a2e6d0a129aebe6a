"""Corrections that `prepare step=calibrate` found. They are applied to recorded demos on reading (files stay unchanged)
and to the cameras of a robot on which a policy runs.

A calibration file (`calibration.py`) holds them under `corrections`, by camera:

```yaml
corrections:
  over:
    camera_change: [[...4], [...4], [...4], [...4]]   # left of every recorded world_to_camera, in the camera's axes
    focal_factor: 1.02                                # of the recorded focal lengths
    lag_frames: 2                                     # images are so many frames late (negative: early)
    uncertainty: {turn_deg: 0.1, shift_mm: 3, focal_percent: 0.5, lag_frames: 0.05}   # one standard deviation
    corrected: {intrinsics: [...], world_to_camera: [...]}                           # of the first demo, to look at
```
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.data.robot.calibration import Calibration, read_mapping
from keygrip.data.robot.frames import checked_index, verify_source
from keygrip.data.robot.schema import ArmTrajectory, CameraTrack, Demo, DemoError, FrameSource, left_out_cameras
from keygrip.data.robot.transforms import invert, rigid

log = logging.getLogger(__name__)

KEYS = {"camera_change", "focal_factor", "lag_frames", "uncertainty", "corrected"}
LARGEST_LAG = 1000


@dataclass(frozen=True)
class Correction:
    """Correction of one camera: change [4, 4], multiplied with world_to_camera from the left; factor of the focal
    lengths; number of frames by which images are late."""

    change: np.ndarray
    focal: float
    lag: int


@dataclass(frozen=True)
class OffsetFrames:
    """`count` images of a source, beginning with index `start`."""

    source: FrameSource
    start: int
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> np.ndarray:
        return self.source.read(self.start + checked_index(index, self.count, "an offset camera"))

    def verify(self) -> None:
        """Check the whole source, see `verify_source`."""
        verify_source(self.source)

    def identity(self) -> str:
        return f"{self.source.identity()}:offset {self.start}:{self.count}"


def read_corrections(path: Path, content: Any) -> dict[str, Correction]:
    """Read the section `corrections` of a calibration file.

    Raises:
        ValueError: an entry is misspelt or impossible.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: corrections must be a mapping of cameras")
    corrections = {}
    for camera, entry in content.items():
        label = f"{path}: corrections.{camera}"
        if not isinstance(entry, Mapping) or not set(entry) <= KEYS:
            raise ValueError(f"{label} must be a mapping with {', '.join(sorted(KEYS))}")
        try:
            focal, lag = float(entry.get("focal_factor", 1.0)), int(entry.get("lag_frames", 0))
            change = np.asarray(entry.get("camera_change", np.eye(4)), dtype=np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{label} holds something that is not a number") from error
        if change.shape != (4, 4):
            raise ValueError(f"{label}.camera_change must be 4 x 4, it is {list(change.shape)}")
        if not 0.2 < focal < 5:
            raise ValueError(f"{label}.focal_factor is {focal:g}; 0.2 to 5 can be")
        if abs(lag) > LARGEST_LAG:
            raise ValueError(f"{label}.lag_frames is {lag}; at most {LARGEST_LAG} either way")
        corrections[str(camera)] = Correction(rigid(change, f"{label}.camera_change"), focal, lag)
    return corrections


def corrected(demo: Demo, corrections: Mapping[str, Correction], path: Path) -> Demo:
    """Return a demo with corrected cameras. Frames for which a late or early camera has no image are left out.

    Corrections of cameras that the demo does not have are left out, with a note in its `source`.

    Raises:
        DemoError: the demo has none of the cameras, or fewer than two frames remain after shifting by the lags.
    """
    absent = [camera for camera in corrections if camera not in demo.cameras]
    if len(set(absent) - left_out_cameras(demo).keys()) == len(corrections):
        raise DemoError(
            demo.name, f"{path} corrects camera {absent[0]!r}; the demo has {', '.join(sorted(demo.cameras))}"
        )
    notes = [f"{path} corrects camera {camera!r}, which not every demo has" for camera in absent]
    if notes:
        demo = replace(demo, source=demo.source | {"notes": [*demo.source.get("notes", []), *notes]})
    lags = {camera: corrections[camera].lag if camera in corrections else 0 for camera in demo.cameras}
    first, last = max(0, *(-lag for lag in lags.values())), len(demo) - max(0, *lags.values())
    if last - first < 2:
        raise DemoError(demo.name, f"{path} shifts images by more frames than the demo has")
    frame_slice = slice(first, last)
    cameras = {}
    for camera, track in demo.cameras.items():
        correction = corrections.get(camera, Correction(np.eye(4), 1.0, 0))
        intrinsics = np.array(track.intrinsics[frame_slice])
        intrinsics[:, 0, 0] *= correction.focal
        intrinsics[:, 1, 1] *= correction.focal
        cameras[camera] = replace(
            track,
            intrinsics=intrinsics,
            world_to_camera=correction.change @ np.asarray(track.world_to_camera[frame_slice]),
            frames=_shift_frames(track.frames, first + correction.lag, last - first),
            depth=None if track.depth is None else _shift_frames(track.depth, first + correction.lag, last - first),
        )
    if (first, last) == (0, len(demo)):
        return replace(demo, cameras=cameras)
    return replace(
        demo,
        timestamps=demo.timestamps[frame_slice],
        arms={name: _slice_arm(arm, frame_slice) for name, arm in demo.arms.items()},
        cameras=cameras,
        intervention=None if demo.intervention is None else demo.intervention[frame_slice],
    )


def corrected_calibration(calibration: Calibration, read: Collection[str]) -> Calibration:
    """Apply the corrections of a calibration file to its own cameras, for the images of a robot. A lag cannot be
    corrected in live images.

    Args:
        read: names of the robot's cameras; corrections of other cameras are not applied.

    Raises:
        ValueError: a correction is impossible, or the file does not list its camera, not even as null.
    """
    path = calibration.path
    corrections = read_corrections(path, read_mapping(path).get("corrections") or {})
    cameras = dict(calibration.cameras)
    for name, correction in corrections.items():
        if name not in (*calibration.cameras, *calibration.left_out):
            raise ValueError(f"{path}: corrections.{name} corrects no camera: there is no cameras.{name}")
        if name not in read or name in calibration.left_out:
            continue
        camera = calibration.camera(name)
        focal = np.array([[correction.focal, 1, 1], [1, correction.focal, 1], [1, 1, 1]])
        pose, mounted = camera.world_to_camera, camera.camera_to_gripper
        cameras[name] = replace(
            camera,
            intrinsics=camera.intrinsics * focal,
            world_to_camera=None if pose is None else correction.change @ pose,
            camera_to_gripper=None if mounted is None else mounted @ invert(correction.change),
        )
        log.info("camera %s: corrected as %s says", name, path)
        if correction.lag:
            log.warning(
                "camera %s: in the recordings that %s was made from, images are %d frames late, and demonstrations are "
                "read without that; the robot's images are taken as of the time at which they arrive",
                name,
                path,
                correction.lag,
            )
    return replace(calibration, cameras=cameras)


def _shift_frames(frames: FrameSource, start: int, count: int) -> FrameSource:
    return frames if start == 0 and count == len(frames) else OffsetFrames(frames, start, count)


def _slice_arm(arm: ArmTrajectory, frame_slice: slice) -> ArmTrajectory:
    return ArmTrajectory(
        position=arm.position[frame_slice],
        quaternion=arm.quaternion[frame_slice],
        gripper=arm.gripper[frame_slice],
        joints=None if arm.joints is None else arm.joints[frame_slice],
        commanded=None if arm.commanded is None else _slice_arm(arm.commanded, frame_slice),
        controller=None if arm.controller is None else arm.controller[frame_slice],
    )


def _read_corrected(reader: Callable[[], Demo], corrections: dict[str, Correction], path: Path) -> Demo:
    return corrected(reader(), corrections, path)


def with_corrections(reader: Callable[[], Demo], corrections: dict[str, Correction], path: Path) -> Callable[[], Demo]:
    """Return a reader that corrects the demos of `reader`; picklable if `reader` is."""
    return partial(_read_corrected, reader, corrections, path)


def entry(
    change: np.ndarray, focal: float, lag: int, uncertainty: Mapping[str, float], track: CameraTrack
) -> dict[str, Any]:
    """Return the entry of a camera under `corrections` as plain values."""
    intrinsics = np.array(track.intrinsics[0])
    intrinsics[0, 0] *= focal
    intrinsics[1, 1] *= focal
    return {
        "camera_change": change.tolist(),
        "focal_factor": float(focal),
        "lag_frames": int(lag),
        "uncertainty": dict(uncertainty),
        "corrected": {
            "intrinsics": intrinsics.tolist(),
            "world_to_camera": (change @ np.asarray(track.world_to_camera[0])).tolist(),
        },
    }
