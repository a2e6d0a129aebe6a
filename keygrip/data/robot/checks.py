"""Checks that every demonstration passes, whatever format it was read from.

Legend of shapes: N frames of a demo.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from keygrip.data.robot.frames import verify_source
from keygrip.data.robot.schema import ArmTrajectory, CameraTrack, Demo, DemoError, demo_guard

# |norm - 1| above this is a wrong order, a wrong unit or a broken sensor, not float32 rounding
QUATERNION_TOLERANCE = 1e-2
LARGEST_POSITION_M = 10.0  # more means another unit or a broken reading, and would stretch the height bins
FARTHEST_M = (0.07, 2.0)  # plausible range of an arm's largest coordinate on a table; used to guess the unit
FEW_READINGS = 0.3  # if the share of positions that are too far off is smaller, single readings are wrong, not the unit
OUTLIER_M, OUTLIER_QUARTILES = 0.1, 10.0
# m/s^2 that no arm in demonstrations reaches, however abruptly it starts or stops, and how many times faster than
# every other step the step to outliers is
OUTLIER_ACCELERATION, OUTLIER_SPEEDS = 30.0, 5.0
RATES_HZ = (0.01, 10_000.0)  # accepted frame rates of recordings; other values mean another unit
NAME = re.compile(r"\w[\w .:+-]{0,99}")  # names of arms and cameras; file names contain them
ROTATION_TOLERANCE = 1e-3  # largest entry of R R^T - I that rounding and hand-eye calibration files produce
# The opening may overshoot [0, 1] by this much (encoder noise); more means a wrong calibration, unit or polarity.
GRIPPER_TOLERANCE = 1e-3
BY_ITS_RANGE = "subtract what it reads when closed, and divide by its range"
FULL_SHARE = 0.85  # share of the range of percent or bytes that openings in this unit probably reach
OVERSHOOT = 0.2  # openings whose ends differ from 0 and 1 by at most this are probably in the right unit


def _explain_far_positions(far: np.ndarray) -> tuple[str, str]:
    """Return the likely cause of positions that are too far off, and the remedy. far: [N] m, by frame."""
    if np.median(far) <= FARTHEST_M[1]:
        return "positions with wrong readings", "Cut the demo there or record it again"
    if (far > LARGEST_POSITION_M).mean() < FEW_READINGS:
        return (
            "positions with wrong readings or in another unit",
            "Cut the demo there or record it again where single readings stand apart, else convert positions to metres",
        )
    farthest = {
        unit: (size, metres)
        for unit, size in (("centimetres", 100), ("millimetres", 1000))
        if FARTHEST_M[0] <= (metres := far.max() / size) <= FARTHEST_M[1]
    }
    if not farthest:
        return "positions in another unit", "Convert positions to metres"
    ways = (
        f"divide {unit} by {size}: the farthest is then {metres:.3g} m" for unit, (size, metres) in farthest.items()
    )
    return f"positions in {' or '.join(farthest)}", f"Convert positions to metres ({', or '.join(ways)})"


def _explain_openings(low: float, high: float) -> tuple[str, str]:
    """Return the likely cause of openings that run from `low` to `high`, and the remedy."""
    if low >= -OVERSHOOT and abs(high - 1) <= OVERSHOOT:
        return "gripper opening beyond its ends", "It overshoots: clip it, or calibrate what it reads closed and open"
    for unit, size in (("percent", 100), ("bytes", 255)):
        if low >= 0 and FULL_SHARE * size <= high <= size:
            advice = f"{unit.capitalize()} are likely: divide by {size}; else {BY_ITS_RANGE}"
            return f"gripper opening in {unit}", advice
    return "gripper opening in another unit", f"{BY_ITS_RANGE[0].upper()}{BY_ITS_RANGE[1:]}"


def _check_poses(name: str, arm: str, kind: str, poses: ArmTrajectory, frames: int) -> None:
    shapes = {"position": (frames, 3), "quaternion": (frames, 4), "gripper opening": (frames,)}
    values = {"position": poses.position, "quaternion": poses.quaternion, "gripper opening": poses.gripper}
    for part, value in values.items():
        if value.shape != shapes[part]:
            raise DemoError(
                name,
                f"{kind} {part} of arm {arm!r} has shape {value.shape}, {shapes[part]} is needed (the demo has "
                f"{frames} time stamps)",
            )
        bad = ~np.isfinite(value)
        if bad.any():
            raise DemoError(
                name,
                f"{kind} {part} of arm {arm!r} is NaN or infinite, first at frame {int(np.argwhere(bad)[0][0])} of "
                f"{frames}",
            )
    far = np.abs(poses.position).max(axis=-1)
    if far.max() > LARGEST_POSITION_M:
        cause, remedy = _explain_far_positions(far)
        raise DemoError(
            name,
            f"{kind} position of arm {arm!r} is {far.max():.4g} m from the origin at frame {int(far.argmax())}, more "
            f"than the {LARGEST_POSITION_M:g} m of any arm on a table. {remedy}",
            f"{kind} {cause}",
            remedy,
        )
    norm = np.linalg.norm(poses.quaternion, axis=-1)
    worst = int(np.abs(norm - 1).argmax())
    if abs(norm[worst] - 1) > QUATERNION_TOLERANCE:
        raise DemoError(
            name,
            f"{kind} quaternion of arm {arm!r} has norm {norm[worst]:.4f} at frame {worst}; unit quaternions in the "
            "order w, x, y, z are needed",
        )
    low, high = float(poses.gripper.min()), float(poses.gripper.max())
    if low < -GRIPPER_TOLERANCE or high > 1 + GRIPPER_TOLERANCE:
        cause, remedy = _explain_openings(low, high)
        raise DemoError(
            name,
            f"{kind} gripper opening of arm {arm!r} runs from {low:.4g} to {high:.4g}; 0 (closed) to 1 (open) is "
            f"needed. {remedy}",
            f"{kind} {cause}",
            remedy,
        )
    if poses.joints is not None:
        if poses.joints.ndim != 2 or len(poses.joints) != frames:
            raise DemoError(
                name,
                f"{kind} joint positions of arm {arm!r} have shape {poses.joints.shape}, ({frames}, joints) is needed",
            )
        if not np.isfinite(poses.joints).all():
            raise DemoError(name, f"{kind} joint positions of arm {arm!r} hold NaN or infinite values")
    if poses.controller is not None and (
        poses.controller.ndim != 2 or len(poses.controller) != frames or not np.isfinite(poses.controller).all()
    ):
        raise DemoError(
            name,
            f"the controller's actions of arm {arm!r} have shape {poses.controller.shape} or hold NaN or infinite "
            f"values; ({frames}, numbers) is needed",
        )


def _check_camera(name: str, camera: str, track: CameraTrack, frames: int) -> None:
    label = f"camera {camera!r}"
    if track.intrinsics.shape != (frames, 3, 3) or track.world_to_camera.shape != (frames, 4, 4):
        raise DemoError(
            name,
            f"{label}: intrinsics {track.intrinsics.shape} and world_to_camera {track.world_to_camera.shape} do not "
            f"fit {frames} frames",
        )
    intrinsics, pose = np.asarray(track.intrinsics), np.asarray(track.world_to_camera)
    if intrinsics.strides[0] == 0:  # broadcast: one matrix stands for all frames
        intrinsics = intrinsics[:1]
    if pose.strides[0] == 0:
        pose = pose[:1]
    if not (np.isfinite(intrinsics).all() and np.isfinite(pose).all()):
        raise DemoError(name, f"{label}: intrinsics or world_to_camera hold NaN or infinite values")
    focal, centre = intrinsics[:, [0, 1], [0, 1]], intrinsics[:, :2, 2]
    size = np.array([track.width, track.height])
    if (
        (focal <= 0).any()
        or np.abs(intrinsics[:, 2] - [0, 0, 1]).max() > 1e-6
        or np.abs(intrinsics[:, 1, 0]).max() > 1e-6
    ):
        raise DemoError(
            name,
            f"{label}: intrinsics are not [[fx, s, cx], [0, fy, cy], [0, 0, 1]] with positive focal lengths in pixels",
        )
    if (focal < 0.05 * size).any() or (focal > 100 * size).any() or (centre < -size).any() or (centre > 2 * size).any():
        raise DemoError(
            name,
            f"{label}: focal length {focal[0].round(2).tolist()} and centre {centre[0].round(2).tolist()} do not fit "
            "an image of "
            f"{track.width} x {track.height} pixels; were they made for another resolution or in other units?",
        )
    rotation = pose[:, :3, :3]
    defect = float(np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max())
    if defect > ROTATION_TOLERANCE or np.abs(pose[:, 3] - [0, 0, 0, 1]).max() > 1e-6:
        raise DemoError(
            name,
            f"{label}: world_to_camera is not a rigid transform (R R^T differs from the identity by {defect:.2g}, "
            "last row 0 0 0 1)",
        )
    determinant = np.linalg.det(rotation)
    if (determinant < 0).any():
        raise DemoError(
            name,
            f"{label}: the rotation of world_to_camera has determinant {determinant.min():.3f}: it mirrors; +1 is "
            "needed",
        )
    if len(track.frames) != frames:
        raise DemoError(name, f"{label}: {len(track.frames)} images for {frames} time stamps")


def check_images(name: str, camera: str, track: CameraTrack, frames: int) -> None:
    """Raise DemoError if the first or last frame of a camera cannot be used, or its video has too few frames.

    Args:
        name: of the demo. camera: name of the camera. track: the camera. frames: number of frames of the demo.
    """
    with demo_guard(name, f"camera {camera!r}: "):
        verify_source(track.frames)
        for index in {0, frames - 1}:
            image = track.frames.read(index)
            if image.shape != (track.height, track.width, 3) or image.dtype != np.uint8:
                raise DemoError(
                    name,
                    f"camera {camera!r}: frame {index} is {image.shape} {image.dtype}, the demo says "
                    f"{track.height} x {track.width} x 3 uint8",
                )


def check_depth(name: str, camera: str, track: CameraTrack, frames: int) -> None:
    """Raise DemoError if the first or last depth image of a camera cannot be used. A camera without depth is accepted.

    Args: as for `check_images`.
    """
    if track.depth is None:
        return
    with demo_guard(name, f"camera {camera!r}: "):
        for index in {0, frames - 1}:
            shape = track.depth.read(index).shape
            if shape != (track.height, track.width):
                raise DemoError(
                    name,
                    f"camera {camera!r}: depth {index} is {shape}, the demo says {track.height} x {track.width}",
                )


def pose_outliers(poses: ArmTrajectory) -> np.ndarray:
    """Return frames whose position is far from the path of their neighbours: single wrong readings.

    Returns:
        int [M], ascending: frames whose distance from the midpoint of the frames before and after them exceeds both
        10 cm and 10 times the lower quartile of that distance.
    """
    if len(poses) < 5:
        return np.zeros(0, dtype=np.int64)
    path = poses.position
    deviation = np.linalg.norm(path[1:-1] - (path[:-2] + path[2:]) / 2, axis=-1)
    # the frames before and after a wrong one lie close together; around a true jump they do not
    returns = np.linalg.norm(path[2:] - path[:-2], axis=-1) < deviation
    return (
        np.flatnonzero((deviation > max(OUTLIER_M, OUTLIER_QUARTILES * float(np.quantile(deviation, 0.25)))) & returns)
        + 1
    )


def reached_outliers(poses: ArmTrajectory, timestamps: np.ndarray, fps: float) -> np.ndarray:
    """Return the frames of `pose_outliers` in a reached track, and wrong readings that it does not cover: one or two at
    the beginning or the end, and two in succession.

    In these places the neighbours do not tell a wrong reading from a fast start, stop or stroke. So the steps before
    and after must have been impossible: longer than 10 cm, at more than 30 m/s^2 and 5 times as fast as every other
    step. Commands are not judged in this way: they may jump to a target and stay there.

    Args:
        timestamps: [N] ns. fps: the rate according to the metadata.

    Returns:
        int [M], ascending.
    """
    outliers = pose_outliers(poses)
    frames = len(poses)
    if frames < 10:
        return outliers
    path = poses.position
    seconds = np.maximum(np.diff(timestamps) * 1e-9, 1 / fps)  # time stamps closer than the rate may be wrong
    velocities = np.diff(path, axis=0) / seconds[:, None]
    speeds = np.linalg.norm(velocities, axis=-1)
    accelerations = 2 * np.linalg.norm(np.diff(velocities, axis=0), axis=-1) / (seconds[1:] + seconds[:-1])
    accelerations = np.concatenate([[np.inf], accelerations, [np.inf]])  # unknown in the first and last frame
    impossible = np.minimum(accelerations[:-1], accelerations[1:]) > OUTLIER_ACCELERATION  # at both ends of the step
    impossible &= speeds * seconds > OUTLIER_M
    fastest = float(speeds[~impossible].max(initial=0.0))
    impossible &= speeds > OUTLIER_SPEEDS * fastest

    def follows(first: int, second: int) -> bool:
        """Return whether the arm's other speeds are enough for the way from one frame to another."""
        seconds_between = float(seconds[first:second].sum())
        return bool(np.linalg.norm(path[second] - path[first]) <= fastest * seconds_between + 1e-3)

    found = set(outliers.tolist())
    for before in np.flatnonzero(impossible[:-2] & impossible[2:]).tolist():
        after = before + 3
        if follows(before, after) and not {before, after} & found:  # frames between outliers are none themselves
            found |= {before + 1, before + 2}
    for count in (1, 2):
        # the frames after these belong to the path, and of two frames the first does not
        if impossible[count - 1] and not impossible[count : count + 3].any() and not follows(0, 2):
            found |= set(range(count))
        if impossible[-count] and not impossible[-count - 3 : -count].any() and not follows(frames - 3, frames - 1):
            found |= set(range(frames - count, frames))
    return np.array(sorted(found), dtype=np.int64)


def check_demo(demo: Demo, images: bool = True, cameras: Iterable[str] | None = None) -> None:
    """Raise DemoError if the demo violates a convention; demos of all formats are checked here.

    Args:
        demo: the demo that was read.
        images: also decode the first and last frame of each camera and count the frames of a video.
        cameras: cameras whose images are decoded; None: all.
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
    if not RATES_HZ[0] <= demo.fps <= RATES_HZ[1]:
        raise DemoError(
            name, f"fps is {demo.fps:g}; frames per second from {RATES_HZ[0]:g} to {RATES_HZ[1]:g} are read"
        )
    for label in (*demo.arms, *demo.cameras):
        if not isinstance(label, str) or not NAME.fullmatch(label):
            raise DemoError(name, f"{label!r} cannot be the name of an arm or camera: use letters, digits, '_' and '-'")
    steps = np.diff(demo.timestamps)
    if (steps <= 0).any():
        raise DemoError(name, f"time stamps do not increase at frame {int((steps <= 0).argmax()) + 1}")
    for arm, trajectory in demo.arms.items():
        _check_poses(name, arm, "reached", trajectory, frames)
        if trajectory.commanded is not None:
            _check_poses(name, arm, "commanded", trajectory.commanded, frames)
    checked_cameras = None if cameras is None else set(cameras)
    for camera, track in demo.cameras.items():
        _check_camera(name, camera, track, frames)
        if images and (checked_cameras is None or camera in checked_cameras):
            check_images(name, camera, track, frames)


def correct_deviations(poses: ArmTrajectory) -> ArmTrajectory:
    """Return poses that passed the checks, with deviations within the tolerances corrected: unit quaternions, openings
    in [0, 1]."""
    norm = np.linalg.norm(poses.quaternion, axis=-1, keepdims=True)
    quaternion = poses.quaternion if np.abs(norm - 1).max() < 1e-6 else poses.quaternion / norm
    commanded = None if poses.commanded is None else correct_deviations(poses.commanded)
    return replace(poses, quaternion=quaternion, gripper=poses.gripper.clip(0, 1), commanded=commanded)
