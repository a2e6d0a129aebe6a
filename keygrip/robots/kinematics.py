"""Forward kinematics of the YAM arms, read from the robot models' XML; requires neither MuJoCo nor a driver.

Frames: the base frame of the arm is the simulator's world frame (z up, x forward). The tool is the gripper's
`grasp_site`: the midpoint of the finger tips, z along the approach, y along the closing axis.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

ARM_JOINTS = 6


def robot_models() -> Path:
    """Folder of the robot models inside the installed package `dreamscale-i2rt`.

    Raises:
        FileNotFoundError: the package is not installed, or another one of the same import name is in its place.
        ImportError: I2RT's package is installed over it.
    """
    try:
        folder = Path(str(resources.files("i2rt"))) / "robot_models"
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "the YAM robot models are missing: `pip install --no-deps dreamscale-i2rt` installs them"
        ) from error
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: reinstall dreamscale-i2rt with `pip install --no-deps`")
    _refuse_i2rt_over_dreamscale()
    if next(folder.glob("arm/*/v1"), None) is None:
        raise FileNotFoundError(
            f"{folder} is not of dreamscale-i2rt, whose arms are in arm/NAME/v1, but of another package that is "
            "imported as i2rt; remove that one from this environment (also from PYTHONPATH) and "
            "`pip install --force-reinstall --no-deps dreamscale-i2rt`"
        )
    return folder


def _refuse_i2rt_over_dreamscale() -> None:
    """Raise ImportError if I2RT's package `i2rt` has put files of its own into the import package.

    pip overwrites file by file: I2RT's grippers on dreamscale-i2rt's arms turn the tool by 180 degrees and move it by
    28 cm. An editable install leaves the files in its own folder.
    """
    try:
        files = metadata.distribution("i2rt").files
    except metadata.PackageNotFoundError:
        return
    if any(file.parts[0] == "i2rt" for file in files or ()):
        raise ImportError(
            "the packages i2rt (of I2RT) and dreamscale-i2rt are installed over each other, so that models of arms "
            "and grippers do not fit together: `pip uninstall i2rt`, then `pip install --force-reinstall --no-deps "
            "dreamscale-i2rt`; programs that need I2RT's own package need another environment"
        )


def _arm_name(family: str, version: int) -> str:
    """Return i2rt's name of an arm: yam_ultra for version 1, yam_ultra_2 for version 2."""
    return family if version == 1 else f"{family}_{version}"


def _arm_files() -> dict[str, Path]:
    """Return the XML files of the known arms, by i2rt's names."""
    files = {}
    for path in sorted(robot_models().glob("arm/*/v*/*.xml")):
        version, family = re.fullmatch(r"v([1-9][0-9]*)", path.parent.name), path.parent.parent.name
        if version is not None and path.stem == family:
            files[_arm_name(family, int(version[1]))] = path
    return files


def arm_file(arm: str = "yam") -> Path:
    """Return the path of an arm's XML. Raises ValueError, with the known arms, if it does not exist."""
    files = _arm_files()
    if arm not in files:
        raise ValueError(f"unknown arm {arm!r}; known: {', '.join(sorted(files))}")
    return files[arm]


def gripper_file(gripper: str = "linear_4310") -> Path:
    """Return the path of a gripper's XML. Raises ValueError, with the known grippers, if it does not exist."""
    path = robot_models() / "gripper" / gripper / f"{gripper}.xml"
    if not path.is_file():
        raise ValueError(f"unknown gripper {gripper!r}; known: {_list_folders(robot_models() / 'gripper')}")
    return path


def _list_folders(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.glob("*") if p.is_dir()))


def _numbers(element: ElementTree.Element, name: str, default: str) -> np.ndarray:
    return np.array([float(x) for x in element.get(name, default).split()])


def _pose(element: ElementTree.Element) -> tuple[np.ndarray, np.ndarray]:
    """Return position [3] and rotation matrix [3, 3] of an XML element in its parent."""
    quaternion = _numbers(element, "quat", "1 0 0 0")
    return _numbers(element, "pos", "0 0 0"), Rotation.from_quat(quaternion, scalar_first=True).as_matrix()


@dataclass(frozen=True)
class ArmChain:
    """The serial chain from the base to the grasp site. J = 6 joints."""

    offsets: np.ndarray  # [J, 3] of each joint frame in the previous one
    rotations: np.ndarray  # [J, 3, 3]
    axes: np.ndarray  # [J, 3] in the joint frame
    limits: np.ndarray  # [J, 2] rad
    tool_offset: np.ndarray  # [3] of the grasp site in the last joint's frame
    tool_rotation: np.ndarray  # [3, 3]

    def frames(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return tool position [3] and rotation [3, 3], and each joint's origin [J, 3] and axis [J, 3], in the base."""
        position, rotation = np.zeros(3), np.eye(3)
        origins, axes = np.empty((ARM_JOINTS, 3)), np.empty((ARM_JOINTS, 3))
        for i in range(ARM_JOINTS):
            position = position + rotation @ self.offsets[i]
            rotation = rotation @ self.rotations[i]
            origins[i], axes[i] = position, rotation @ self.axes[i]
            rotation = rotation @ axis_rotation(self.axes[i], joints[i])
        return position + rotation @ self.tool_offset, rotation @ self.tool_rotation, origins, axes


def axis_rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """Return the [3, 3] rotation by an angle, rad, about a unit axis [3]: Rodrigues' formula."""
    x, y, z = axis
    c, s = np.cos(angle), np.sin(angle)
    k = 1 - c
    return np.array(
        [
            [c + x * x * k, x * y * k - z * s, x * z * k + y * s],
            [y * x * k + z * s, c + y * y * k, y * z * k - x * s],
            [z * x * k - y * s, z * y * k + x * s, c + z * z * k],
        ]
    )


@lru_cache(maxsize=8)
def arm_chain(arm: str = "yam", gripper: str = "linear_4310") -> ArmChain:
    """Read the chain of an arm with a gripper from the robot models."""
    body = ElementTree.parse(arm_file(arm)).getroot().find("worldbody/body")
    assert body is not None
    offsets, rotations, axes, limits = [], [], [], []
    pending = _pose(body)
    while True:
        joint = body.find("joint")
        if joint is not None:
            offsets.append(pending[0])
            rotations.append(pending[1])
            axes.append(_numbers(joint, "axis", "0 0 1"))
            limits.append(_numbers(joint, "range", "-3.14159 3.14159"))
            pending = (np.zeros(3), np.eye(3))
        child = body.find("body")
        if child is None:
            break
        offset, rotation = _pose(child)
        pending = (pending[0] + pending[1] @ offset, pending[1] @ rotation)
        body = child
    mount = ElementTree.parse(gripper_file(gripper)).getroot().find("worldbody/body")
    assert mount is not None
    assert len(offsets) == ARM_JOINTS
    site = next((s for s in mount.iter("site") if s.get("name") == "grasp_site"), None)
    if site is None:
        raise ValueError(f"gripper {gripper!r} has no grasp_site")
    mount_offset, mount_rotation = _pose(mount)
    site_offset, site_rotation = _pose(site)
    return ArmChain(
        offsets=np.stack(offsets),
        rotations=np.stack(rotations),
        axes=np.stack(axes),
        limits=np.stack(limits),
        tool_offset=pending[0] + pending[1] @ (mount_offset + mount_rotation @ site_offset),
        tool_rotation=pending[1] @ mount_rotation @ site_rotation,
    )


def quaternion_from_matrix(rotation: np.ndarray) -> np.ndarray:
    """Return the unit quaternion wxyz [..., 4] of [..., 3, 3], on the hemisphere of a gripper that points down.

    Pointing down is a rotation by 180 degrees about a horizontal axis. There the usual convention "w >= 0" changes sign
    with every small motion; the reference (0, 1, 0, 0) keeps a recording continuous.
    """
    flat = np.asarray(rotation, float).reshape(-1, 3, 3)
    quaternion = Rotation.from_matrix(flat).as_quat(scalar_first=True)
    quaternion = np.where(quaternion[:, 1:2] < 0, -quaternion, quaternion)
    return quaternion.reshape(*np.shape(rotation)[:-2], 4)


def matrix_from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    """Return the rotation matrix [..., 3, 3] of a quaternion wxyz [..., 4] (normalised here)."""
    flat = np.asarray(quaternion, float).reshape(-1, 4)
    return Rotation.from_quat(flat, scalar_first=True).as_matrix().reshape(*np.shape(quaternion)[:-1], 3, 3)


def forward_kinematics(
    joints: np.ndarray, arm: str = "yam", gripper: str = "linear_4310"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pose of the grasp site in the arm's base frame.

    Args:
        joints: [..., 6] joint angles, rad.

    Returns:
        position [..., 3] m and quaternion [..., 4] wxyz.

    Raises:
        ValueError: The last axis is not 6, or the arm or gripper is unknown.
    """
    joints = np.asarray(joints, float)
    if joints.ndim == 0 or joints.shape[-1] != ARM_JOINTS:
        raise ValueError(f"joints must be [..., {ARM_JOINTS}] angles in rad, got shape {joints.shape}")
    chain = arm_chain(arm, gripper)
    flat = joints.reshape(-1, ARM_JOINTS)
    position, rotation = np.zeros((len(flat), 3)), np.broadcast_to(np.eye(3), (len(flat), 3, 3))
    for i in range(ARM_JOINTS):
        position = position + rotation @ chain.offsets[i]
        turn = Rotation.from_rotvec(flat[:, i : i + 1] * chain.axes[i]).as_matrix()
        rotation = rotation @ chain.rotations[i] @ turn
    position = position + rotation @ chain.tool_offset
    quaternion = quaternion_from_matrix(rotation @ chain.tool_rotation)
    return position.reshape(*joints.shape[:-1], 3), quaternion.reshape(*joints.shape[:-1], 4)
