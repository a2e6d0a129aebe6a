"""Poses of the arms of a LeRobot data set, from the values that its calibration file names (see `lerobot_v3`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.data.robot.calibration import ArmCalibration, refuse_unknown_keys
from keygrip.data.robot.formats.lerobot_numbers import numbers
from keygrip.data.robot.formats.poses import opening, quaternions
from keygrip.data.robot.schema import ArmTrajectory
from keygrip.data.robot.transforms import rotations, transform
from keygrip.data.untrusted_files import read_bytes
from keygrip.data.video_index import file_identity
from keygrip.robots.kinematics import ARM_JOINTS, arm_chain, forward_kinematics
from keygrip.robots.xml_text import LARGEST_XML_BYTES

if TYPE_CHECKING:
    from keygrip.robots.model_kinematics import ToolKinematics

_TRACK_KEYS = ("position", "rotation", "joints", "gripper")  # keys of an arm's entry and of its `commanded`
_ROTATIONS = {"quaternion_wxyz": 4, "quaternion_xyzw": 4, "rotation_vector": 3, "matrix": 9, "euler_xyz": 3}
_JOINT_KEYS = ("units", "signs", "zeros")  # further keys of an entry of joints
BEYOND = 0.5  # rad or m by which joints may exceed a model's limits: more means another unit, sign or zero
MOST_TURNS = 2  # largest number of turns of a joint without limits


def arm_of(
    table: dict[str, Any], info: dict[str, Any], arm: str, entry: dict[str, Any], base: ArmCalibration, path: Path
) -> tuple[np.ndarray, ArmTrajectory]:
    """Return world_from_gripper [N, 4, 4] and the trajectory of one arm over the N rows of an episode.

    Args:
        table: columns of the rows. info: meta/info.json. entry: `lerobot.arms.<arm>` of the calibration file.
        base: the arm's own entry in that file. path: that file.

    Raises:
        ValueError: the entry is incomplete, or the data set's values do not fit it.
    """
    where = f"lerobot.arms.{arm}"
    refuse_unknown_keys(path, where, entry, {*_TRACK_KEYS, "commanded", "controller"})
    poses, joints = _read_poses(table, info, where, entry, base, path)
    commanded = None
    if entry.get("commanded"):
        commanded_location = f"{where}.commanded"
        refuse_unknown_keys(path, commanded_location, entry["commanded"], _TRACK_KEYS)
        targets, _ = _read_poses(table, info, commanded_location, entry["commanded"], base, path)
        commanded = _trajectory(targets, _read_opening(table, info, commanded_location, entry["commanded"], path))
    controller_entry = entry.get("controller")
    controller = (
        None if controller_entry is None else numbers(table, info, f"{where}.controller", controller_entry, path)
    )
    return poses, _trajectory(poses, _read_opening(table, info, where, entry, path), joints, commanded, controller)


def _trajectory(
    poses: np.ndarray,
    gripper: np.ndarray,
    joints: np.ndarray | None = None,
    commanded: ArmTrajectory | None = None,
    controller: np.ndarray | None = None,
) -> ArmTrajectory:
    return ArmTrajectory(poses[:, :3, 3], quaternions(poses[:, :3, :3]), gripper, joints, commanded, controller)


def _read_opening(
    table: dict[str, Any], info: dict[str, Any], location: str, entry: dict[str, Any], path: Path
) -> np.ndarray:
    if "gripper" not in entry:
        raise ValueError(f"{path}: {location} needs gripper")
    values = numbers(table, info, f"{location}.gripper", entry["gripper"], path, also=("closed", "open"))
    if values.shape[1] != 1:
        raise ValueError(
            f"{path}: {location}.gripper names {values.shape[1]} numbers of {entry['gripper']['feature']}: the opening "
            "is one, give one index or name"
        )
    closed, opened = float(entry["gripper"].get("closed", 0.0)), float(entry["gripper"].get("open", 1.0))
    return opening(values, f"{location}.gripper", closed, opened)


def _read_poses(
    table: dict[str, Any], info: dict[str, Any], location: str, entry: dict[str, Any], base: ArmCalibration, path: Path
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return world_from_gripper [N, 4, 4], and the joints [N, J] if the file names them."""
    kinematics = None if base.model is None else kinematics_of(base)
    joints = (
        _read_joints(table, info, f"{location}.joints", entry["joints"], kinematics, path)
        if "joints" in entry
        else None
    )
    if "position" in entry and "rotation" in entry:
        position = numbers(table, info, f"{location}.position", entry["position"], path)
        kind = entry["rotation"].get("as") if isinstance(entry["rotation"], dict) else None
        if kind not in _ROTATIONS:
            raise ValueError(f"{path}: {location}.rotation.as must be one of {', '.join(_ROTATIONS)}, not {kind!r}")
        values = numbers(table, info, f"{location}.rotation", entry["rotation"], path, also=("as",))
        if position.shape[1] != 3 or values.shape[1] != _ROTATIONS[kind]:
            raise ValueError(f"{path}: {location} needs 3 numbers of position and {_ROTATIONS[kind]} of rotation")
        return base.world_from_base @ transform(position, _matrices(values, kind, location)), joints
    if joints is None:
        raise ValueError(
            f"{path}: {location} needs position and rotation, or joints: of a YAM, or of another arm whose MJCF or "
            "URDF file is its model below arms (docs/data.md, 'Other formats')"
        )
    if kinematics is not None:
        return base.world_from_base @ kinematics.poses(joints), joints
    if joints.shape[1] != ARM_JOINTS:
        raise ValueError(
            f"{path}: {location}.joints names {joints.shape[1]} numbers, and a YAM has {ARM_JOINTS} joints: another "
            "arm needs model, tool and joints below arms (docs/data.md, 'Other formats')"
        )
    try:
        position, quaternion = forward_kinematics(joints, base.arm, base.gripper)
        limits = arm_chain(base.arm, base.gripper).limits
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; an arm that is no YAM needs model, tool and joints below arms (docs/data.md, 'Other "
            "formats')"
        ) from error
    names = [f"joint{number}" for number in range(1, ARM_JOINTS + 1)]  # as in the model of a YAM
    _refuse_beyond_limits(joints, names, limits, np.ones(ARM_JOINTS, bool), f"{path}: {location}.joints")
    matrices = Rotation.from_quat(quaternion, scalar_first=True).as_matrix()
    return base.world_from_base @ transform(position, matrices), joints


def kinematics_of(base: ArmCalibration) -> ToolKinematics:
    """Return the kinematics of the model file that an arm's entry names.

    Raises:
        BadSample: the file cannot be read. ValueError: it is not MJCF or URDF, or lacks the tool or a joint.
    """
    assert base.model is not None
    if not base.model.is_file():
        raise FileNotFoundError(f"{base.model}, the model of an arm in the calibration file, is missing: copy it there")
    return _load_kinematics(base.model, file_identity(base.model), base.tool, base.joints)


@functools.lru_cache(maxsize=8)
def _load_kinematics(model: Path, identity: str, tool: str, joints: tuple[str, ...]) -> ToolKinematics:
    from keygrip.robots.model_kinematics import ToolKinematics  # imports MuJoCo, which most data sets do not need

    return ToolKinematics(read_bytes(model, LARGEST_XML_BYTES), str(model), tool, joints)


def _read_joints(
    table: dict[str, Any],
    info: dict[str, Any],
    location: str,
    entry: Any,
    kinematics: ToolKinematics | None,
    path: Path,
) -> np.ndarray:
    """Return the recorded joints [N, J], rad (slides: m), with the directions and zero positions of the arm's model."""
    values = numbers(table, info, location, entry, path, also=_JOINT_KEYS)
    units = entry.get("units", "radians" if kinematics is None else None)  # for a YAM the default is rad
    if units not in ("degrees", "radians"):
        raise ValueError(
            f"{path}: {location}.units is {units!r}: say degrees or radians. Shares of a joint's range (from -100 to "
            "100, of an SO-100 without use_degrees=true) are no angles: convert them by the robot's calibration file"
        )
    count = values.shape[1]
    signs, zeros = (
        _parse_number_list(entry.get(key), count, default, f"{path}: {location}.{key}")
        for key, default in (("signs", 1), ("zeros", 0))
    )
    if not np.isin(signs, (-1, 1)).all():
        raise ValueError(f"{path}: {location}.signs are 1, or -1 of joints that were counted the other way")
    values = signs * (values - zeros)
    if kinematics is None:
        return np.radians(values) if units == "degrees" else values
    if count != len(kinematics.joints):
        raise ValueError(
            f"{path}: {location} names {count} numbers, and the arm's joints below arms are {len(kinematics.joints)} "
            f"({', '.join(kinematics.joints)}): one number for each (the gripper has an entry of its own)"
        )
    if units == "degrees":
        values = np.where(kinematics.hinges, np.radians(values), values)
    _refuse_beyond_limits(values, kinematics.joints, kinematics.limits, kinematics.hinges, f"{path}: {location}")
    return values


def _parse_number_list(stated: Any, count: int, default: float, location: str) -> np.ndarray:
    try:
        values = np.full(count, float(default)) if stated is None else np.asarray(stated, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{location} must be a list of numbers") from error
    if values.shape != (count,) or not np.isfinite(values).all():
        raise ValueError(f"{location} must be a list of {count} numbers, one of each joint")
    return values


def _refuse_beyond_limits(
    joints: np.ndarray, names: Sequence[str], limits: np.ndarray, hinges: np.ndarray, location: str
) -> None:
    """Raise ValueError if joints [N, J] have values that the arm cannot have.

    Args:
        names, limits, hinges: of its model's joints: names, [J, 2] lowest and highest values, and bool [J].
    """
    unlimited = np.where(hinges, 2 * np.pi * MOST_TURNS, np.inf)
    low = np.where(np.isfinite(limits[:, 0]), limits[:, 0] - BEYOND, -unlimited)
    high = np.where(np.isfinite(limits[:, 1]), limits[:, 1] + BEYOND, unlimited)
    for index, name in enumerate(names):
        least, most = float(joints[:, index].min()), float(joints[:, index].max())
        if not (least >= low[index] and most <= high[index]):
            unit = "rad" if hinges[index] else "m"
            raise ValueError(
                f"{location}: joint {name!r} runs from {least:.3g} to {most:.3g} {unit}, and its model allows "
                f"{low[index] + BEYOND:.3g} to {high[index] - BEYOND:.3g}: other units, signs, zeros or order?"
                if np.isfinite(limits[index]).all()
                else f"{location}: joint {name!r} runs from {least:.3g} to {most:.3g} {unit}: other units?"
            )


def _matrices(values: np.ndarray, kind: str, location: str) -> np.ndarray:
    if kind.startswith("quaternion"):
        norm = np.linalg.norm(values, axis=1)
        if np.abs(norm - 1).max() > 1e-2:
            raise ValueError(f"{location}.rotation: quaternions with norms from {norm.min():.3f} to {norm.max():.3f}")
        return Rotation.from_quat(values, scalar_first=kind == "quaternion_wxyz").as_matrix()
    if kind == "rotation_vector":
        return Rotation.from_rotvec(values).as_matrix()
    if kind == "euler_xyz":
        return Rotation.from_euler("xyz", values).as_matrix()
    return rotations(values.reshape(-1, 3, 3), f"{location}.rotation")
