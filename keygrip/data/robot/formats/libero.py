"""Reader of LIBERO's HDF5 demonstrations (`*_demo.hdf5`, Liu et al. 2023, arXiv 2306.03310).

`data/demo_i/obs` holds `agentview_rgb` and `eye_in_hand_rgb` [N, H, W, 3], `ee_pos` [N, 3] m, `ee_ori` [N, 3] rotation
vectors, `gripper_states` [N, 2] finger positions, `joint_states` [N, 7]; attributes of `data` hold the instruction.
robosuite's conventions:

- Images are stored as OpenGL reads them, bottom row first, unless the attribute `macros_image_convention` is `opencv`;
  they are flipped upright here (rows reversed; a rotation by 180 degrees, which some code uses, would mirror the
  scene).
- The world is MuJoCo's, z up, metres. Fingers are 0.04 m from the middle when open.
- Observations were written after the step of the same row, so `actions[i + 1]` was given at row i. Files without
  `env_args` come from OpenVLA's `regenerate_libero_dataset.py`, which writes the observation before the step and writes
  no attributes: there `actions[i]` was given at row i. Actions are scaled offsets of an operational-space controller,
  whose goal depends on its state. They are not converted to commanded poses, but stored unchanged for
  model.actions.kind=osc.
- Without `problem_info`, the instruction is the file's name without the scene, like LIBERO's own sentences.

Cameras: `agentview` is read from the MuJoCo model stored with each demo (fixed to the world), any other camera from a
calibration file (`calibration.py`, cameras `agentview` and `eye_in_hand`; the latter is `mounted_on: right`). Without
such a file, only models that read no calibration can use `eye_in_hand`. A camera that the file gives as null is not
read.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from keygrip.data.bad_samples import HOSTILE, BadSample, convert_errors, is_of_the_machine, reason_of
from keygrip.data.robot.calibration import NAMES, Calibration, read_calibration
from keygrip.data.robot.formats.frames import HDF5Frames, open_hdf5, own_array, own_dataset, own_group, refuse_unstored
from keygrip.data.robot.formats.poses import opening, quaternions
from keygrip.data.robot.reference import DemoReference
from keygrip.data.robot.schema import ArmTrajectory, CameraTrack, Demo, DemoError, words
from keygrip.data.robot.transforms import invert, transform
from keygrip.data.source_files import files_in
from keygrip.data.untrusted_files import parse_json
from keygrip.robots.xml_text import parse_xml

logger = logging.getLogger(__name__)

FINGER_STROKE_M = 0.04  # stroke of each of the Panda's two fingers
CONTROL_HZ = 20.0  # LIBERO's control_freq; used if the file does not state it
SCENE = re.compile(r"^[A-Z_]+_SCENE\d+_")  # prefix of task names in LIBERO-90 and LIBERO-10
CAMERAS = {"agentview": "agentview_rgb", "eye_in_hand": "eye_in_hand_rgb"}
OPENCV_FROM_OPENGL = np.diag([1.0, -1.0, -1.0])  # MuJoCo's cameras look along -z with y up


def _files(root: Path) -> list[Path]:
    return files_in(root, ".hdf5", ".h5", below=True)


LAYOUT = "*.hdf5"  # files by which a folder of this format is recognised


def detect(root: Path) -> bool:
    """Return whether a file below the folder has `data/demo_*/obs/agentview_rgb`."""
    for path in _files(root):
        # a file that cannot be opened is of another kind or cut off: `find` reports it if the user names the format
        with contextlib.suppress(BadSample), convert_errors(path), open_hdf5(path) as file:
            demos = own_group(file, "data")
            for key in demos:
                with contextlib.suppress(KeyError, ValueError):  # another demo may hold images
                    if "agentview_rgb" in own_group(demos, f"{key}/obs"):
                        return True
    return False


def find(root: Path, calibration: Path | None = None) -> list[DemoReference]:
    """Return the demos of every file below `root`, `<file>/demo_<i>`; an unreadable file counts as one broken demo."""
    if calibration is not None and not calibration.is_file():
        raise FileNotFoundError(f"calibration file {calibration} does not exist")
    path = calibration or next((root / name for name in NAMES if (root / name).is_file()), None)
    parsed_calibration = None if path is None else read_calibration(path)
    references = []
    for path in _files(root):
        stem = path.relative_to(root).with_suffix("").as_posix()
        try:
            with open_hdf5(path) as file:
                keys = sorted(own_group(file, "data"), key=lambda key: (len(key), key))
        except HOSTILE as error:
            if is_of_the_machine(error):
                raise
            references.append(DemoReference(stem, path, "libero", partial(_raise_unreadable, stem, reason_of(error))))
            continue
        references += [
            DemoReference(
                f"{stem}/{key}", path, "libero", partial(read, path, key, f"{stem}/{key}", parsed_calibration)
            )
            for key in keys
        ]
    return references


def _raise_unreadable(name: str, reason: str) -> Demo:
    raise DemoError(name, f"the HDF5 file cannot be read: {reason}")


def read(path: Path, key: str, name: str, calibration: Calibration | None) -> Demo:
    """Read one demo of a file. Raise DemoError if a part is missing or data sets differ in length."""
    with open_hdf5(path) as file:
        data = own_group(file, "data")
        demo, observations = own_group(data, key), own_group(data, f"{key}/obs")
        missing = [part for part in ("ee_pos", "ee_ori", "gripper_states") if part not in observations]
        if missing:
            raise DemoError(name, f"obs/{missing[0]} is missing; it holds {', '.join(observations)}")
        _check_lengths(demo, observations, name)
        array_names = ("obs/ee_pos", "obs/ee_ori", "obs/gripper_states", "obs/joint_states", "actions")
        refuse_unstored(demo, [part for part in array_names if part in demo])
        position, rotation_vector = own_array(observations, "ee_pos"), own_array(observations, "ee_ori")
        fingers = own_array(observations, "gripper_states")
        joints = own_array(observations, "joint_states") if "joint_states" in observations else None
        actions = own_array(demo, "actions") if "actions" in demo else None
        regenerated = "env_args" not in data.attrs
        upside_down = _decode_text(data.attrs.get("macros_image_convention", "opengl")) != "opencv"
        left_out = () if calibration is None else calibration.left_out
        sizes = {
            camera: own_dataset(observations, name).shape
            for camera, name in CAMERAS.items()
            if name in observations and camera not in left_out
        }
        model = _decode_text(demo.attrs.get("model_file", ""))
        instruction, rate, task = _read_task(data, path)
    frames = len(position)
    if actions is not None and not regenerated:
        actions = np.concatenate([actions[1:], actions[-1:]])
    matrices = Rotation.from_rotvec(rotation_vector).as_matrix()
    arm = ArmTrajectory(
        position=position,
        quaternion=quaternions(matrices),
        gripper=opening(
            fingers[:, 0] - fingers[:, 1], "gripper_states (distance of the fingers)", 0.0, 2 * FINGER_STROKE_M
        ),
        joints=joints,
        controller=actions,
    )
    cameras: dict[str, CameraTrack] = {}
    for camera, (_, height, width, _) in sizes.items():
        camera_parameters = _read_camera(
            camera, width, height, frames, model, calibration, {"right": transform(position, matrices)}, name
        )
        images = HDF5Frames(path, f"data/{key}/obs/{CAMERAS[camera]}", frames, upside_down)
        if camera_parameters is None:
            absence = "on the hand is not in the file" if camera == "eye_in_hand" else "is not in the stored model"
            reason = f"its pose {absence}; a calibration file ({NAMES[0]}) adds it"
            cameras[camera] = CameraTrack.without_calibration(width, height, images, frames, reason)
        else:
            cameras[camera] = CameraTrack(width, height, *camera_parameters, images)
    notes = (
        ["images are stored bottom row first (robosuite's opengl convention) and turned upright"] if upside_down else []
    )
    if regenerated and actions is not None:
        notes.append("actions are taken as given at their own row: the file has no env_args, as OpenVLA writes it")
    for note in notes:
        logger.debug("%s: %s", name, note)
    return Demo(
        name=name,
        path=path,
        robot="panda",
        task=task,
        instruction=instruction,
        fps=rate,
        timestamps=(np.arange(frames) * (1e9 / rate)).round().astype(np.int64),
        arms={"right": arm},
        cameras=cameras,
        source={"format": "libero", "file": path.name, "demo": key, "notes": notes},
    )


def _check_lengths(demo: Any, observations: Any, name: str) -> None:
    """Raise DemoError if the demo's data sets differ in their number of rows. No data set is read for this, because a
    few bytes in a file can describe a large one."""
    frames = len(own_dataset(observations, "ee_pos"))
    for part in ("ee_ori", "gripper_states", "joint_states", *CAMERAS.values()):
        if part in observations and (count := len(own_dataset(observations, part))) != frames:
            unit = "images" if part in CAMERAS.values() else "rows"
            raise DemoError(name, f"{part} holds {count} {unit}, the demo {frames} poses")
    if "actions" in demo and (count := len(own_dataset(demo, "actions"))) != frames:
        raise DemoError(name, f"actions holds {count} rows, the demo {frames} poses")


def _decode_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _parse_object(value: Any, origin: str) -> dict[str, Any]:
    content = parse_json(_decode_text(value), origin)
    if not isinstance(content, dict):
        raise ValueError(f"{origin} holds no object")
    return content


def _read_task(data: Any, path: Path) -> tuple[str, float, str]:
    """Return instruction, control rate and task name from the attributes of `data`, otherwise from the file's name."""
    task = path.stem.removesuffix("_demo")
    instruction, rate = SCENE.sub("", task).replace("_", " "), CONTROL_HZ
    if "problem_info" in data.attrs:
        stated_instruction = _parse_object(data.attrs["problem_info"], f"{path.name}: problem_info").get(
            "language_instruction"
        )
        instruction = words(stated_instruction) or instruction
    if "env_args" in data.attrs:
        settings = _parse_object(data.attrs["env_args"], f"{path.name}: env_args").get("env_kwargs") or {}
        rate = float(settings.get("control_freq") or rate)
    return instruction.strip('"'), rate, task


def _read_camera(
    camera: str,
    width: int,
    height: int,
    frames: int,
    model: str,
    calibration: Calibration | None,
    gripper_poses: dict[str, np.ndarray],
    name: str,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return intrinsics and world_to_camera [N, ...] of a camera, from the calibration file or the stored model; None:
    unknown."""
    if calibration is not None and camera in calibration.cameras:
        entry = calibration.cameras[camera]
        if entry.rotate:
            raise DemoError(
                name, f"{calibration.path}: rotate of {camera} is not used; LIBERO's images are turned upright here"
            )
        intrinsics = entry.intrinsics_for(width, height)
        return CameraTrack.broadcast(intrinsics, frames), entry.poses(gripper_poses, frames)
    if camera != "agentview" or not model:
        return None
    return _camera_from_model(model, camera, width, height, frames, name)


def _camera_from_model(
    model: str, camera: str, width: int, height: int, frames: int, name: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Read a camera of the MuJoCo model that is fixed to the world: position, wxyz quaternion, vertical field of view.
    Return its intrinsics and world_to_camera [N, ...]; None: the model has no such camera."""
    try:
        world = parse_xml(model).find("worldbody")
    except ValueError as error:
        raise DemoError(name, f"the model stored with the demo {error}") from error
    element = None if world is None else next((c for c in world.findall("camera") if c.get("name") == camera), None)
    if element is None or element.get("mode", "fixed") != "fixed" or element.get("quat") is None:
        return None
    position = np.array([float(x) for x in element.get("pos", "0 0 0").split()])
    quaternion = np.array([float(x) for x in element.get("quat", "1 0 0 0").split()])
    pose = transform(position, Rotation.from_quat(quaternion, scalar_first=True).as_matrix() @ OPENCV_FROM_OPENGL)
    focal = 0.5 * height / math.tan(math.radians(float(element.get("fovy", "45"))) / 2)
    intrinsics = np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])
    return CameraTrack.broadcast(intrinsics, frames), CameraTrack.broadcast(invert(pose), frames)
