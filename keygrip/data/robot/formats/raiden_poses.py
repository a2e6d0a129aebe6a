"""Poses of the arms in raiden's recordings, and the transform between the arms' bases. Legend: N frames."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.data.robot.calibration import read_mapping, setting
from keygrip.data.robot.formats.poses import opening, quaternions
from keygrip.data.robot.formats.tool_point import poses_from_joints
from keygrip.data.robot.schema import ArmTrajectory, DemoError
from keygrip.data.robot.transforms import invert, rigid, rotations, transform

log = logging.getLogger(__name__)

MODEL = ("yam", "linear_4310")  # the arm and the gripper that raiden supports, by which its converter computes poses
RIGID_WRIST_SPREAD_M = 0.02  # with the wrong transform a hand-mounted camera moves by decimetres on its gripper
NOTED_OFFSET_M = 0.001
SAME_BASE_M = 1e-3  # largest entry of a transform's difference from the identity, m or without unit

Row = dict[str, Any]


# ---------------------------------------------------------------------- arms


def read_arms(
    task: Path, rows: list[Row], values: np.ndarray, left_from_right: np.ndarray, notes: list[str]
) -> tuple[dict[str, ArmTrajectory], dict[str, list[str]]]:
    """Return the arms' trajectories in the world, and the models by which their poses were computed from joints.

    Args:
        task: the folder of the episode, for the warning that poses cannot be computed from joints.
        values: `actual_poses`, [N, 13 per arm].
    """
    arms = ["left", "right"] if values.shape[1] == 26 else ["right"]
    commands = _stack_values(rows, "action", values.shape)
    joints = _stack_values(rows, "joints", (len(rows), 7 * len(arms)))
    targets = _stack_values(rows, "action_joints", (len(rows), 7 * len(arms)))
    absent = "joints" if joints is None else "action_joints" if commands is not None and targets is None else ""
    if absent:
        reason = f"the lowdim files have no {absent}: poses stay at the recorder's tool point"
        notes.append(reason)
        _warn_of_tool_point(task, reason)
    trajectories = {}
    for index, arm in enumerate(arms):
        columns, axes = slice(13 * index, 13 * index + 13), slice(7 * index, 7 * index + 6)
        own_joints = None if joints is None else joints[:, axes]
        base = left_from_right if len(arms) == 2 and arm == "right" else np.eye(4)
        label, command_label = f"actual_poses of arm {arm}", f"action of arm {arm}"
        poses = _stored_poses(values[:, columns], label)
        if own_joints is not None and not absent:
            poses, offset = poses_from_joints(own_joints, poses, *MODEL, f"{label} and joints")
            distance = float(np.linalg.norm(offset))
            if distance > NOTED_OFFSET_M:
                notes.append(
                    f"arm {arm}: poses are computed from its joints, because the recorder's tool point is "
                    f"{distance * 1e3:.0f} mm from the grasp site by which runs command an arm"
                )
        commanded = None
        if commands is not None:
            targeted = _stored_poses(commands[:, columns], command_label)
            if targets is not None and not absent:
                compared = f"{command_label} and action_joints"
                targeted, _ = poses_from_joints(targets[:, axes], targeted, *MODEL, compared)
            commanded = _trajectory(base @ targeted, commands[:, columns], command_label)
        trajectories[arm] = _trajectory(base @ poses, values[:, columns], label, own_joints, commanded)
    return trajectories, {} if absent else {arm: list(MODEL) for arm in arms}


@lru_cache(maxsize=1024)  # one warning for the episodes of a task
def _warn_of_tool_point(task: Path, reason: str) -> None:
    log.warning(
        "%s: %s, up to several centimetres from the grasp site of the arm's model by which runs command the arm "
        "(I2RT's is 10 mm nearer to the wrist)",
        task,
        reason,
    )


def _stack_values(rows: list[Row], key: str, shape: tuple[int, ...]) -> np.ndarray | None:
    if not all(key in row for row in rows):
        return None
    values = np.stack([np.asarray(row[key], dtype=np.float64) for row in rows])
    if values.shape != shape:
        raise ValueError(f"{key} has shape {values.shape}, {shape} is needed")
    return values


def _stored_poses(values: np.ndarray, label: str) -> np.ndarray:
    """[N, 13] -> [N, 4, 4] in the arm's base."""
    return transform(values[:, :3], rotations(values[:, 3:12].reshape(-1, 3, 3), label))


def _trajectory(
    poses: np.ndarray,
    values: np.ndarray,
    label: str,
    joints: np.ndarray | None = None,
    commanded: ArmTrajectory | None = None,
) -> ArmTrajectory:
    """Poses [N, 4, 4] in the world, and [N, 13] with the gripper in the last column, -> a trajectory."""
    return ArmTrajectory(
        position=poses[:, :3, 3],
        quaternion=quaternions(poses[:, :3, :3]),
        gripper=opening(values[:, 12], f"gripper in {label}"),
        joints=joints,
        commanded=commanded,
    )


# ---------------------------------------------------------------------- bases


def stored_transform(content: dict[str, Any]) -> Any:
    """Return the matrix between the bases in the content of a `calibration_results.json`; None if there is none."""
    return (content.get("bimanual_transform") or {}).get("right_base_to_left_base")


def is_right_wrist(camera: str) -> bool:
    """Return whether a camera is mounted on the right arm's hand."""
    return "right" in camera and "wrist" in camera


def has_pose(rows: list[Row], camera: str) -> bool:
    """Return whether any frame has a pose of the camera; NaN and zeros are none."""
    for row in rows:
        if camera in row["extrinsics"]:
            pose = np.asarray(row["extrinsics"][camera], dtype=np.float64)
            if np.isfinite(pose).all() and pose.any():
                return True
    return False


def find_bases(
    episode: Path, name: str, rows: list[Row], values: np.ndarray, calibration: Path | None, notes: list[str]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return transforms [4, 4] to the left arm's base: from the right arm's base, and from the frame of the right wrist
    camera's stored poses (None: these are in the left arm's base).

    The converter stores the poses of this camera in the left arm's base if it knows the transform, which is then in the
    rows, and otherwise in the right arm's.
    """
    in_rows = rows[0].get("T_left_from_right")
    stored = None if in_rows is None else rigid(in_rows, "T_left_from_right")
    if calibration is None and stored is not None:
        return _with_direction(rows, values, stored, notes), None
    candidate = _from_file(episode, name, calibration)
    camera = next((key for key in rows[0]["extrinsics"] if is_right_wrist(key)), "the right wrist camera")
    if stored is not None:
        left_from_right = _with_direction(rows, values, candidate, notes)
        correction = left_from_right @ invert(_with_direction(rows, values, stored, []))
        if np.abs(correction - np.eye(4)).max() < SAME_BASE_M:
            return left_from_right, None
        moved = f"the right arm and {camera} are" if _is_calibrated(rows, camera) else "the right arm is"
        notes.append(f"{moved} moved to where the named calibration has the right arm's base")
        return left_from_right, correction
    spread = _wrist_spread(rows, values, np.eye(4))
    in_left = [_wrist_spread(rows, values, each) for each in (candidate, invert(candidate))]
    nearest = min((each for each in in_left if each is not None), default=None)
    if spread is not None and nearest is not None and nearest < spread and spread > RIGID_WRIST_SPREAD_M:
        return _with_direction(rows, values, candidate, notes), None
    if _is_calibrated(rows, camera):
        notes.append(f"{camera} is moved with its arm from the right arm's base to the left one")
    return candidate, candidate


def _from_file(episode: Path, name: str, calibration: Path | None) -> np.ndarray:
    """Return the transform from the right arm's base to the left one, of a `calibration_results.json`."""
    candidates = (
        [calibration]
        if calibration
        else [episode / "calibration_results.json", episode.parent / "calibration_results.json"]
    )
    path = next((file for file in candidates if file.is_file()), None)
    matrix = None if path is None else stored_transform(read_mapping(path))
    if matrix is None:
        raise DemoError(
            name,
            "two arms, but no calibration_results.json with bimanual_transform.right_base_to_left_base beside or "
            "above the episode: calibrate both wrist cameras together (`rd calibrate`) or name the file with "
            f"{setting('calibration')}",
        )
    return invert(rigid(np.asarray(matrix), f"{path}: right_base_to_left_base"))


def _with_direction(rows: list[Row], values: np.ndarray, candidate: np.ndarray, notes: list[str]) -> np.ndarray:
    """Return the transform to the left base, or its inverse if only so the right wrist camera is rigid on its
    gripper."""
    spread, swapped_spread = _wrist_spread(rows, values, candidate), _wrist_spread(rows, values, invert(candidate))
    if spread is not None and swapped_spread is not None and swapped_spread < RIGID_WRIST_SPREAD_M < spread:
        notes.append(
            "the transform between the arms' bases is used the other way round: only so is the right wrist camera "
            f"rigid on its gripper ({swapped_spread * 1e3:.0f} mm against {spread * 1e3:.0f} mm)"
        )
        return invert(candidate)
    return candidate


def _wrist_spread(rows: list[Row], values: np.ndarray, to_left: np.ndarray) -> float | None:
    """Return how far the right wrist camera moves relative to its gripper, m; None without such a camera or motion."""
    camera = next((key for key in rows[0]["extrinsics"] if is_right_wrist(key)), None)
    if camera is None or not has_pose(rows, camera):
        return None
    if not all(camera in row["extrinsics"] for row in rows):
        return None  # `raiden.read` reports it
    extrinsics = np.stack([np.asarray(row["extrinsics"][camera], dtype=np.float64) for row in rows])
    gripper = to_left @ transform(values[:, 13:16], values[:, 16:25].reshape(-1, 3, 3))
    if np.ptp(extrinsics[:, :3, 3], axis=0).max() < 2 * RIGID_WRIST_SPREAD_M:
        return None
    return float(np.ptp((invert(gripper) @ extrinsics)[:, :3, 3], axis=0).max())


def _is_calibrated(rows: list[Row], camera: str) -> bool:
    """Return whether a camera has a pose that is not the identity, which stands for none."""
    return has_pose(rows, camera) and not all(
        np.array_equal(row["extrinsics"].get(camera, np.eye(4)), np.eye(4)) for row in rows
    )
