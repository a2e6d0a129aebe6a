"""Reader of yam-abc episodes (I2RT's YAM-ABC recorder), `<slug>/<date>_<time>_<id>/`.

An episode holds `metadata.json`; `<arm>-joint_pos.npy` (N, 6) rad and `<arm>-gripper_pos.npy` (N, 1), 0 closed to
1 open; `action-<arm>-joint.npy` and `action-<arm>-gripper.npy`, the command given at that tick;
`<role>-images-<key>.mp4` and `<role>-timestamp.npy` (ms) for each camera; `write_complete.flag`, written last. It holds
no poses and no calibration: poses come from the forward kinematics of the YAM model, cameras and bases from the user's
calibration file (`calibration.py`). In that file, a camera is named by its role, followed by the key if a role has
several (`top`, `top_left`).

The arm of a one-armed recording is called "right" here, whatever its name in the recording; `mounted_on` of a camera
may use either name.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.data.robot.calibration import ArmCalibration, Calibration, find_calibration, read_calibration
from keygrip.data.robot.demo_folders import demo_folders, folder_references
from keygrip.data.robot.formats.frames import SelectedFrames
from keygrip.data.robot.formats.poses import increasing, opening, quaternions
from keygrip.data.robot.frames import VideoFrames
from keygrip.data.robot.reference import DemoReference
from keygrip.data.robot.schema import ArmTrajectory, CameraTrack, Demo, DemoError, FrameSource
from keygrip.data.robot.transforms import transform
from keygrip.data.untrusted_files import inside, read_json, read_npy
from keygrip.robots.kinematics import forward_kinematics

FLAG = "write_complete.flag"


class _UnusableStamps(OSError):
    """The time stamps of a camera do not tell which of its images belongs to which tick."""


def _is_episode(folder: Path) -> bool:
    """Return whether a folder is an episode; one that was cut off has one of the two parts and fails on reading."""
    return next(folder.glob("[!.]*-joint_pos.npy"), None) is not None or (folder / FLAG).is_file()


LAYOUT = "<slug>/<stamp>_<id>/*-joint_pos.npy"  # files by which a folder of this format is recognised


def detect(root: Path) -> bool:
    """Return whether the folder holds episodes with `<arm>-joint_pos.npy`."""
    return bool(demo_folders(root, _is_episode))


def find(root: Path, calibration: Path | None = None) -> list[DemoReference]:
    """Return references to the episodes under `root`, sorted by name.

    Raises:
        FileNotFoundError: there is no calibration file. ValueError: it cannot be used.
    """
    parsed_calibration = read_calibration(find_calibration(root, calibration, "yam-abc"))
    return folder_references(
        root, demo_folders(root, _is_episode), "yam_abc", partial(read, calibration=parsed_calibration)
    )


def read(episode: Path, name: str, calibration: Calibration) -> Demo:
    """Read one episode.

    Raises:
        DemoError: the episode was cut off, arrays differ in length, it names no camera, or none can be used.
    """
    if not (episode / FLAG).is_file():
        raise DemoError(name, f"no completion mark ({FLAG} is written last): the recording was cut off")
    metadata: dict[str, Any] = read_json(episode / "metadata.json")
    arm_names = metadata.get("arm_names") or [metadata.get("arm_name", "left")]
    rate = float(metadata.get("control_hz") or 30)
    arms: dict[str, ArmTrajectory] = {}
    gripper_poses: dict[str, np.ndarray] = {}
    models: dict[str, list[str]] = {}
    for source in arm_names:
        base = calibration.arm(source, only=len(arm_names) == 1)
        poses, trajectory = _read_arm(episode, name, source, base)
        arm = "right" if len(arm_names) == 1 else source
        arms[arm], models[arm] = trajectory, [base.arm, base.gripper]
        gripper_poses[source] = poses
        if arm not in calibration.arms:  # else the calibration file has another arm of that name
            gripper_poses[arm] = poses  # step=charuco uses this name
    frames = len(next(iter(arms.values())))
    if any(len(trajectory) != frames for trajectory in arms.values()):
        raise DemoError(name, f"the arms have different lengths: {[len(t) for t in arms.values()]}")

    ticks: np.ndarray | None = None
    cameras: dict[str, CameraTrack] = {}
    left_out: dict[str, str] = {}
    for entry in metadata.get("cameras") or []:
        role, keys = str(entry["role"]), [str(key) for key in entry["image_keys"]]
        stamps = read_npy(inside(episode, f"{role}-timestamp.npy")).reshape(-1)
        if ticks is None:
            if len(stamps) != frames:
                raise DemoError(name, f"{role}-timestamp.npy has {len(stamps)} stamps, the arms have {frames} frames")
            if not np.isfinite(stamps).all():  # no camera to leave out: the arms have no time stamps of their own
                raise DemoError(name, f"{role}-timestamp.npy, the times of all ticks, holds NaN or infinite values")
            ticks = _increasing(stamps, rate)
        for key in keys:
            camera = role if len(keys) == 1 else f"{role}_{key}"
            if camera in calibration.left_out:
                continue
            if camera not in calibration.cameras:
                reason = f"{calibration.path} has no entry for it"
                video = VideoFrames(inside(episode, f"{role}-images-{key}.mp4"))
                try:
                    source, width, height = _nearest_frames(video, entry, stamps, ticks, rate)
                except _UnusableStamps as error:
                    left_out[camera] = str(error)
                    continue
                except OSError:
                    continue  # ignored for a camera that the calibration file does not list
                cameras[camera] = CameraTrack.without_calibration(width, height, source, len(ticks), reason)
                continue
            path = inside(episode, f"{role}-images-{key}.mp4")
            video = VideoFrames(path, rotate=calibration.cameras[camera].rotate)
            try:
                track = _calibrated_camera(video, camera, entry, stamps, ticks, rate, calibration, gripper_poses)
            except _UnusableStamps as error:
                left_out[camera] = str(error)
                continue
            cameras[camera] = track
    if ticks is None:
        raise DemoError(name, "metadata.json names no camera")
    if left_out and not cameras:
        reasons = "; ".join(f"{camera}: {reason}" for camera, reason in left_out.items())
        raise DemoError(name, f"no camera can be used ({reasons})")
    return Demo(
        name=name,
        path=episode,
        robot="yam" if len(arm_names) == 1 else "yam_bimanual",
        task=episode.parent.name,
        instruction=str(metadata.get("task_name") or episode.parent.name.replace("_", " ")),
        fps=rate,
        timestamps=ticks,
        arms=arms,
        cameras=cameras,
        source={
            "format": "yam_abc",
            "arms": [str(arm) for arm in arm_names],
            "calibration": str(calibration.path),
            "models": models,
            **_source_of_left_out(left_out),
        },
    )


def _source_of_left_out(left_out: dict[str, str]) -> dict[str, Any]:
    """Return the entries of a demo's `source` about cameras that were left out, by name with the reason."""
    notes = [f"camera {camera} is left out: {reason}" for camera, reason in left_out.items()]
    return {"notes": notes, "left_out": left_out} if left_out else {}


def _read_array(episode: Path, name: str, stem: str, width: int) -> np.ndarray:
    path = inside(episode, f"{stem}.npy")
    if not path.is_file():
        raise DemoError(name, f"{path.name} is missing")
    values = read_npy(path)
    if values.dtype.kind not in "fiu":
        raise DemoError(name, f"{path.name} holds {values.dtype}, numbers are needed")
    values = values.astype(np.float64)
    if values.ndim != 2 or values.shape[1] != width:
        raise DemoError(name, f"{path.name} has shape {values.shape}, (frames, {width}) is needed")
    return values


def _read_arm(episode: Path, name: str, source: str, base: ArmCalibration) -> tuple[np.ndarray, ArmTrajectory]:
    """Return world_from_gripper [N, 4, 4] and the trajectory."""
    joints = _read_array(episode, name, f"{source}-joint_pos", 6)
    gripper = _read_array(episode, name, f"{source}-gripper_pos", 1)
    poses = _poses_from_joints(joints, base)
    commanded = None
    if (episode / f"action-{source}-joint.npy").is_file():
        targets = _read_array(episode, name, f"action-{source}-joint", 6)
        gripper_targets = _read_array(episode, name, f"action-{source}-gripper", 1)
        if len(targets) != len(joints) or len(gripper_targets) != len(joints):
            raise DemoError(name, f"arm {source!r} has {len(joints)} states and {len(targets)} commands")
        commanded = _trajectory(_poses_from_joints(targets, base), gripper_targets, f"action-{source}-gripper", None)
    return poses, _trajectory(poses, gripper, f"{source}-gripper_pos", joints, commanded)


def _poses_from_joints(joints: np.ndarray, base: ArmCalibration) -> np.ndarray:
    position, quaternion = forward_kinematics(joints, base.arm, base.gripper)
    return base.world_from_base @ transform(position, Rotation.from_quat(quaternion, scalar_first=True).as_matrix())


def _trajectory(
    poses: np.ndarray,
    gripper: np.ndarray,
    label: str,
    joints: np.ndarray | None,
    commanded: ArmTrajectory | None = None,
) -> ArmTrajectory:
    if len(gripper) != len(poses):
        raise ValueError(f"{label} has {len(gripper)} rows, the joints {len(poses)}")
    return ArmTrajectory(
        position=poses[:, :3, 3],
        quaternion=quaternions(poses[:, :3, :3]),
        gripper=opening(gripper, label),
        joints=joints,
        commanded=commanded,
    )


def _calibrated_camera(
    video: VideoFrames,
    camera: str,
    entry: dict[str, Any],
    stamps: np.ndarray,
    ticks: np.ndarray,
    rate: float,
    calibration: Calibration,
    gripper_poses: dict[str, np.ndarray],
) -> CameraTrack:
    frames, width, height = _nearest_frames(video, entry, stamps, ticks, rate)
    calibrated = calibration.camera(camera)
    return CameraTrack(
        width,
        height,
        CameraTrack.broadcast(calibrated.intrinsics_for(width, height), len(ticks)),
        calibrated.poses(gripper_poses, len(ticks)),
        frames,
    )


def _nearest_frames(
    video: VideoFrames, entry: dict[str, Any], stamps: np.ndarray, ticks: np.ndarray, rate: float
) -> tuple[FrameSource, int, int]:
    """Return frames of which frame i is the image of tick i, and their width and height.

    This is image i if the camera has as many images as ticks, each at most half a tick away from its own. Otherwise it
    is the image nearest in time: images are dropped or repeated.

    Args:
        stamps: ms, of the images. ticks: ns, the times of the demo. rate: ticks per second.

    Raises:
        OSError: the video is cut off. _UnusableStamps: the stamps are not times of the ticks' clock.
    """
    frame_count = video.frames_in_file()
    if frame_count != len(stamps):
        raise OSError(
            f"{video.path.name} holds {frame_count} frames, its time stamps are {len(stamps)}: the video is cut off"
        )
    frames: FrameSource = VideoFrames(video.path, frame_count, rotate=video.rotate)
    if not np.isfinite(stamps).all():
        raise _UnusableStamps(f"{video.path.name}: its time stamps hold NaN or infinite values")
    # stamps are repeated where the image of a slower camera was stored at two ticks: compared without repetitions
    if len(stamps) != len(ticks) or np.abs(_increasing(stamps, rate) - ticks).max() > 5e8 / rate:
        if (np.diff(stamps) < 0).any():
            raise _UnusableStamps(
                f"{video.path.name}: its time stamps decrease, so that images cannot be assigned to ticks"
            )
        taken = _nanoseconds(stamps)
        if taken[-1] < ticks[0] or taken[0] > ticks[-1]:
            raise _UnusableStamps(
                f"{video.path.name}: its time stamps begin {(int(taken[0]) - int(ticks[0])) / 1e9:+.6g} s from those "
                "of the first camera and none lies among them, so that no image belongs to a tick: correct the stamps "
                "(ms, of one clock)"
            )
        nearest = np.searchsorted(taken[:-1] + np.diff(taken) // 2, ticks)  # of two equally near images the earlier
        frames = SelectedFrames(frames, tuple(int(index) for index in nearest))
    entry_size = (int(entry["width"]), int(entry["height"]))
    width, height = entry_size if video.rotate in (0, 180) else entry_size[::-1]
    return frames, width, height


def _increasing(stamps: np.ndarray, rate: float) -> np.ndarray:
    """Return time stamps in ms as ns, repeated ones spread out (see `increasing`)."""
    return increasing(_nanoseconds(stamps), round(1e9 / rate))


def _nanoseconds(stamps: np.ndarray) -> np.ndarray:
    """Return time stamps in ms as whole ns."""
    return (stamps * 1e6).round().astype(np.int64)
