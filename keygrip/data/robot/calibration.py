"""The calibration file (YAML or JSON), which a user writes for recordings without camera poses or arm poses.

```yaml
schema: keygrip.calibration/1
conventions: {camera: opencv, pixel: centre, length: m}   # pixel: centre (OpenCV: first pixel's centre is 0, 0), corner
arms:                              # bases in the world (z up); may be left out for one arm: its base is the world then
  left:  {world_from_base: [[...4], [...4], [...4], [...4]], arm: yam, gripper: linear_4310}
  # of another arm, in place of arm and gripper, for poses from joints (LeRobot):
  # model: so100.urdf              MJCF or URDF, beside this file or below
  # tool: gripper_frame            body, link or MJCF site whose pose is the gripper's
  # joints: [pan, lift, ...]       the model's names, in the order of the recorded numbers
cameras:
  top:                             # the recording's own name of the camera
    width: 640                     # resolution that the intrinsics are for; other frames of the same shape are scaled
    height: 480
    intrinsics: {fx: 600, fy: 600, cx: 319.5, cy: 239.5}      # or a 3 x 3 matrix
    world_to_camera: [[...]]       # or camera_to_world
    rotate: 180                    # clockwise degrees by which frames must be turned to look as calibrated (default 0)
  wrist:
    ...
    mounted_on: left               # an arm: the camera moves with its gripper
    camera_to_gripper: [[...]]     # hand-eye calibration
lerobot: ...                       # see lerobot_v3.py
corrections: ...                   # what `prepare step=calibrate` found, see corrections.py
```

Shapes: N frames.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keygrip.data.bad_samples import convert_errors
from keygrip.data.robot.transforms import invert, rigid
from keygrip.data.untrusted_files import read_json, read_text

SCHEMA = "keygrip.calibration/1"
MAX_CALIBRATION_BYTES = 1 << 20
NAMES = ("calibration.yaml", "calibration.yml", "calibration.json")
_CAMERA_KEYS = {
    "width",
    "height",
    "intrinsics",
    "world_to_camera",
    "camera_to_world",
    "mounted_on",
    "camera_to_gripper",
    "rotate",
}
_ARM_KEYS = {"world_from_base", "arm", "gripper", "model", "tool", "joints"}


@dataclass(frozen=True)
class CameraCalibration:
    """One camera: K [3, 3] in the corner convention for `width` x `height`, and its pose.

    Either `world_to_camera` [4, 4] is set (fixed in the world), or `mounted_on` and `camera_to_gripper` [4, 4].
    """

    name: str
    width: int
    height: int
    intrinsics: np.ndarray
    world_to_camera: np.ndarray | None
    mounted_on: str | None
    camera_to_gripper: np.ndarray | None
    rotate: int

    def intrinsics_for(self, width: int, height: int) -> np.ndarray:
        """Return K for frames of another resolution. Raise ValueError if the aspect ratio differs (a crop)."""
        across, down = width / self.width, height / self.height
        if abs(across / down - 1) > 0.01:
            raise ValueError(
                f"camera {self.name!r} is calibrated at {self.width} x {self.height}, its frames are {width} x "
                f"{height}: another shape is a crop, whose intrinsics must be given for it"
            )
        return np.diag([across, down, 1.0]) @ self.intrinsics

    def poses(self, gripper_poses: dict[str, np.ndarray], frames: int) -> np.ndarray:
        """Return `world_to_camera` of every frame, [N, 4, 4]; `gripper_poses` are world_from_gripper [N, 4, 4] by arm.

        Raise ValueError if the camera is mounted on an arm that was not recorded.
        """
        if self.world_to_camera is not None:
            return np.broadcast_to(self.world_to_camera, (frames, 4, 4))
        assert self.mounted_on is not None
        assert self.camera_to_gripper is not None
        if self.mounted_on not in gripper_poses:
            raise ValueError(
                f"camera {self.name!r} is mounted on arm {self.mounted_on!r}; recorded are {', '.join(gripper_poses)}"
            )
        return invert(gripper_poses[self.mounted_on] @ self.camera_to_gripper)


@dataclass(frozen=True)
class ArmCalibration:
    """Pose of an arm's base, world_from_base [4, 4], and the models for its forward kinematics: `arm` and `gripper` of
    a YAM, or the `tool` and `joints` of a `model` file (not loaded yet). `named`: the calibration file names the YAM's
    models; otherwise they are the defaults."""

    world_from_base: np.ndarray = field(default_factory=lambda: np.eye(4))
    arm: str = "yam"
    gripper: str = "linear_4310"
    named: bool = False
    model: Path | None = None
    tool: str = ""
    joints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """The content of a calibration file. `pixel_shift` (0.5 or 0) converts its pixels to the corner convention."""

    path: Path
    cameras: dict[str, CameraCalibration]
    arms: dict[str, ArmCalibration]
    lerobot: dict[str, Any]
    pixel_shift: float
    left_out: tuple[str, ...] = ()  # cameras given as null

    def arm(self, name: str, only: bool, yam: bool = True) -> ArmCalibration:
        """Return the entry of an arm. If the file has none and this is the only arm (`only`), its base is the world.

        Args:
            yam: the arm must be a YAM. Raises ValueError: it is not a YAM, or there is no entry.
        """
        if name in self.arms:
            if yam and self.arms[name].model is not None:
                raise ValueError(
                    f"{self.path}: arms.{name}.model is of another arm, and a YAM is needed here: give arm and gripper"
                )
            return self.arms[name]
        if only and not self.arms:
            return ArmCalibration()
        raise ValueError(f"{self.path} has no arms.{name}.world_from_base: where that arm's base stands in the world")

    def camera(self, name: str) -> CameraCalibration:
        """Return the entry of a camera. Raise ValueError if there is none."""
        if name not in self.cameras:
            raise ValueError(
                f"{self.path} has no camera {name!r}; it has {', '.join(self.cameras) or 'none'}. Add it, or leave it "
                "out by giving null"
            )
        return self.cameras[name]


def find_calibration(root: Path, given: Path | None, format_name: str, needs: str = "") -> Path:
    """Return the file that the user named, otherwise `calibration.yaml` (or .yml, .json) in the data folder.

    Args:
        needs: what recordings of the format lack, if they lack more than cameras.

    Raises:
        FileNotFoundError: neither exists; the message describes what the file must hold.
    """
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"calibration file {given} does not exist")
        return given
    for name in NAMES:
        if (root / name).is_file():
            return root / name
    if needs:
        raise FileNotFoundError(
            f"{root}: {needs}. Write {root / NAMES[0]}, or name a file with {setting('calibration')}"
        )
    raise FileNotFoundError(
        f"{root}: {format_name} recordings lack cameras in the world; write {root / NAMES[0]} (intrinsics and "
        "world_to_camera of each camera, see keygrip/data/robot/calibration.py) or name one with "
        f"{setting('calibration')}"
    )


def setting(name: str, value: str = "PATH") -> str:
    """Return how a data setting is written on the command line, for messages of both training and `keygrip prepare`."""
    return f"data.{name}={value} (of keygrip prepare: {name}={value})"


def read_calibration(path: Path) -> Calibration:
    """Read and check a calibration file.

    Raises:
        ValueError: the schema is another one, or a convention or an entry is missing, misspelt or impossible.
    """
    content = read_mapping(path)
    with convert_errors(path):
        return _parse_calibration(path, content)


def _parse_calibration(path: Path, content: dict[str, Any]) -> Calibration:
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema is {content.get('schema')!r}, {SCHEMA!r} is needed")
    refuse_unknown_keys(
        path, "the file", content, {"schema", "conventions", "arms", "cameras", "lerobot", "corrections"}
    )
    conventions = content.get("conventions") or {}
    refuse_unknown_keys(path, "conventions", conventions, {"camera", "pixel", "length"})
    if conventions.get("camera") != "opencv" or conventions.get("length") != "m":
        raise ValueError(f"{path}: conventions must name camera: opencv (x right, y down, z forward) and length: m")
    pixel = conventions.get("pixel")
    if pixel not in ("centre", "corner"):
        raise ValueError(
            f"{path}: conventions.pixel must be centre (OpenCV and camera drivers: the first pixel's centre is 0, 0) "
            f"or corner (its centre is 0.5, 0.5), not {pixel!r}"
        )
    shift = 0.5 if pixel == "centre" else 0.0
    cameras = {
        str(name): _parse_camera(path, str(name), entry, shift)
        for name, entry in (content.get("cameras") or {}).items()
        if entry is not None
    }
    arms = {str(name): _parse_arm(path, str(name), entry or {}) for name, entry in (content.get("arms") or {}).items()}
    left_out = tuple(str(name) for name, entry in (content.get("cameras") or {}).items() if entry is None)
    return Calibration(path, cameras, arms, dict(content.get("lerobot") or {}), shift, left_out)


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the content of a YAML or JSON file. Raise ValueError if it is not a mapping."""
    if path.suffix == ".json":
        content = read_json(path, MAX_CALIBRATION_BYTES)
    else:
        text = read_text(path, MAX_CALIBRATION_BYTES)
        with convert_errors(path):
            content = _parse_yaml(text)
            _refuse_expanded_aliases(content)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no mapping")
    return content


def _parse_yaml(text: str) -> Any:
    """Parse YAML into plain values. Merge keys are refused: they copy values, so a few lines can fill the memory."""
    import yaml  # not installed in the environment of the Meta-World workers

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    location = f"line {key.start_mark.line + 1} merges another mapping (<<)"
                    raise ValueError(f"{location}, which is not read: write its values there")
            super().flatten_mapping(node)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())}") from error


def _refuse_expanded_aliases(content: Any) -> None:
    """Raise ValueError if YAML aliases, which are short, expand to more values than a file may hold."""
    remaining, open_values = MAX_CALIBRATION_BYTES, [content]
    while open_values:
        value = open_values.pop()
        remaining -= 1
        if remaining < 0:
            raise ValueError("its aliases stand for too many values")
        if isinstance(value, (list, dict)):
            open_values += value.values() if isinstance(value, dict) else value


def refuse_unknown_keys(path: Path, where: str, entry: dict[str, Any], known: Collection[str]) -> None:
    """Raise ValueError if an entry of a calibration file is not a mapping or has an unknown key."""
    import difflib

    if not isinstance(entry, dict):
        raise ValueError(f"{path}: {where} must be a mapping")
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(
                f"{path}: {where} has an unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )


def _parse_matrix(path: Path, label: str, value: Any, shape: tuple[int, int]) -> np.ndarray:
    try:
        matrix = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {label} is not a matrix of numbers") from error
    if matrix.shape != shape:
        raise ValueError(f"{path}: {label} must be {shape[0]} x {shape[1]}, it is {list(matrix.shape)}")
    return matrix


def _parse_camera(path: Path, name: str, entry: dict[str, Any], pixel_shift: float) -> CameraCalibration:
    label = f"cameras.{name}"
    refuse_unknown_keys(path, label, entry, _CAMERA_KEYS)
    for key in ("width", "height", "intrinsics"):
        if key not in entry:
            raise ValueError(f"{path}: {label}.{key} is missing")
    values = entry["intrinsics"]
    if isinstance(values, dict):
        refuse_unknown_keys(path, f"{label}.intrinsics", values, {"fx", "fy", "cx", "cy"})
        if len(values) != 4:
            raise ValueError(f"{path}: {label}.intrinsics needs fx, fy, cx and cy")
        values = [[values["fx"], 0, values["cx"]], [0, values["fy"], values["cy"]], [0, 0, 1]]
    intrinsics = _parse_matrix(path, f"{label}.intrinsics", values, (3, 3))
    if not np.isfinite(intrinsics).all() or (intrinsics.diagonal()[:2] <= 0).any() or list(intrinsics[2]) != [0, 0, 1]:
        raise ValueError(
            f"{path}: {label}.intrinsics must be finite, with focal lengths above 0 and 0 0 1 as the last row; it is "
            f"{intrinsics.tolist()}"
        )
    for side in ("width", "height"):
        if isinstance(entry[side], bool) or not isinstance(entry[side], int) or entry[side] < 1:
            raise ValueError(f"{path}: {label}.{side} is a number of pixels, at least 1, not {entry[side]!r}")
    intrinsics[:2, 2] += pixel_shift
    pose_keys = [key for key in ("world_to_camera", "camera_to_world", "camera_to_gripper") if key in entry]
    if len(pose_keys) != 1 or ("camera_to_gripper" in entry) != ("mounted_on" in entry):
        raise ValueError(
            f"{path}: {label} needs one of world_to_camera, camera_to_world, or mounted_on with camera_to_gripper; it "
            f"has {', '.join(pose_keys) or 'none'}"
        )
    pose = rigid(
        _parse_matrix(path, f"{label}.{pose_keys[0]}", entry[pose_keys[0]], (4, 4)), f"{path}: {label}.{pose_keys[0]}"
    )
    rotate = entry.get("rotate", 0)
    if rotate not in (0, 90, 180, 270):
        raise ValueError(f"{path}: {label}.rotate must be 0, 90, 180 or 270")
    mounted = pose_keys[0] == "camera_to_gripper"
    return CameraCalibration(
        name=name,
        width=entry["width"],
        height=entry["height"],
        intrinsics=intrinsics,
        world_to_camera=None if mounted else invert(pose) if pose_keys[0] == "camera_to_world" else pose,
        mounted_on=str(entry["mounted_on"]) if mounted else None,
        camera_to_gripper=pose if mounted else None,
        rotate=rotate,
    )


def _parse_arm(path: Path, name: str, entry: dict[str, Any]) -> ArmCalibration:
    refuse_unknown_keys(path, f"arms.{name}", entry, _ARM_KEYS)
    defaults = ArmCalibration()
    base = defaults.world_from_base
    if "world_from_base" in entry:
        where = f"arms.{name}.world_from_base"
        base = rigid(_parse_matrix(path, where, entry["world_from_base"], (4, 4)), f"{path}: {where}")
    if entry.keys() & {"model", "tool", "joints"}:
        return _parse_arm_with_model(base, path, f"arms.{name}", entry)
    models = str(entry.get("arm", defaults.arm)), str(entry.get("gripper", defaults.gripper))
    return ArmCalibration(base, *models, named=bool({"arm", "gripper"} & entry.keys()))


def _parse_arm_with_model(world_from_base: np.ndarray, path: Path, label: str, entry: dict[str, Any]) -> ArmCalibration:
    """Return the calibration of an arm with a model file."""
    absent = [key for key in ("model", "tool", "joints") if key not in entry]
    if absent or entry.keys() & {"arm", "gripper"}:
        raise ValueError(
            f"{path}: {label} needs model, tool and joints together, and no arm or gripper, which are of YAMs"
            + (f"; {', '.join(absent)} is missing" if absent else "")
        )
    file, tool, joints = Path(str(entry["model"])), entry["tool"], entry["joints"]
    if file.is_absolute() or ".." in file.parts or "\0" in str(file):
        raise ValueError(
            f"{path}: {label}.model is {str(file)[:200]!r}: the file must lie beside the calibration file or "
            "below, and its path be relative to it; copy it there"
        )
    valid_joints = isinstance(joints, list) and all(isinstance(name, str) for name in joints)
    if not isinstance(tool, str) or not valid_joints or not joints:
        raise ValueError(f"{path}: {label}.tool is a name, {label}.joints a list of names")
    return ArmCalibration(world_from_base, "", "", model=path.parent / file, tool=tool, joints=tuple(joints))
