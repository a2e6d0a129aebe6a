"""Reader of raiden's converted recordings (TRI's data-collection toolkit for YAM arms), `<task>/0000/`.

Content of the files, as raiden's converter writes them (its `metadata.json` differs in places; this reader relies on
the files):

- `rgb/<camera>/%010d.jpg` (or .png), already rotated upright if a camera is mounted upside down (the right wrist's),
  with intrinsics and extrinsics corrected accordingly; `rgb/<camera>/timestamps.npy`, int64 ns.
- `depth/<camera>/%010d.npz`, `depth`: uint16 mm.
- `lowdim/%010d.pkl`: `intrinsics` {camera: K in OpenCV's pixel-centre convention}, `extrinsics` {camera: 4 x 4, camera
  to left-arm base}, `joints` [7 per arm], `action` and `actual_poses` [13 per arm: position 3, rotation 9 row-major,
  gripper 1], commanded and reached, and `action_joints`. The left arm's base is the world. **The right arm's pose is in
  its own base.** raiden computes poses from the joints with I2RT's model, whose tool point is another than that of
  `keygrip.robots.kinematics`: they are computed again (`tool_point.py`).
- `T_left_from_right` converts it to the left base. It is missing if the transform was not calibrated at conversion; the
  right wrist camera's `extrinsics` are then in the right base. `calibration_results.json` may have
  `bimanual_transform.right_base_to_left_base`. Despite this name, raiden computes it as the map from left-base to
  right-base coordinates and inverts it before use. Since forks differ, the direction is checked if the extrinsics are
  in the left base: with the correct direction, the right wrist camera is rigid on its gripper.
- Raiden calls the arm of a one-armed robot left; here it is called "right".

The pickles are read with an unpickler that accepts only numpy arrays and builtin containers. Of a calibration file of
ours (`calibration.py`) only the corrections are used; cameras and arms in it are refused.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from keygrip.data.bad_samples import convert_errors
from keygrip.data.robot.calibration import NAMES, SCHEMA, read_mapping
from keygrip.data.robot.demo_folders import demo_folders, folder_references, read_object
from keygrip.data.robot.formats.poses import increasing
from keygrip.data.robot.formats.raiden_poses import find_bases, has_pose, is_right_wrist, read_arms, stored_transform
from keygrip.data.robot.frames import JpegFrames, NumberedFiles, depth_millimetres
from keygrip.data.robot.reference import DemoReference
from keygrip.data.robot.schema import CameraTrack, Demo, DemoError, FrameSource, words
from keygrip.data.robot.transforms import invert, rigid
from keygrip.data.untrusted_files import open_image, read_bytes, read_npy, read_npz
from keygrip.training.nested_values import size_of

ROWS = "[!.]*.pkl"  # without hidden files
MAX_PICKLE_BYTES = 1 << 26  # limit for one frame's values
MOST_SHARED = 1_000_000  # a pickle with shared containers may expand to its number of bytes plus this many values
NOT_CALIBRATED = "it was not calibrated when the episode was converted"
PLAIN_KINDS = "biufcOUS"  # numpy's letters of the kinds of arrays that are loaded: no records, no times


class _Array:
    """Replaces `numpy.ndarray` in a pickle, where it is only an argument: a call of it could request any size."""


def _make_empty_array(kind: type, shape: object, code: object) -> np.ndarray:
    """numpy's `_reconstruct`: an empty array; the pickle then sets its size, type and values from its own bytes."""
    return np.ndarray((0,), "b")


def _make_dtype(spec: object, align: object = False, copy: object = False) -> np.dtype[Any]:
    """Return a new dtype, because the pickle then sets its byte order in place; the shared one would change too."""
    kind = np.dtype(spec, copy=True) if isinstance(spec, str) else None
    if kind is None or kind.kind not in PLAIN_KINDS:
        raise pickle.UnpicklingError(f"the pickle asks for arrays of {str(spec)[:60]!r}; plain values are loaded")
    return kind


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the pickle asks for the codec {encoding}")
    return text.encode("latin1")


def _read_buffer(content: object, kind: object) -> np.ndarray:
    """Return an array over bytes. An array in their place is refused: through the result, the pickle could overwrite
    the addresses in an array of objects."""
    if not isinstance(content, bytes | bytearray) or not isinstance(kind, np.dtype):
        raise pickle.UnpicklingError("the pickle asks for an array that is not made of its bytes")
    return np.frombuffer(content, kind)  # refuses objects


def _read_scalar(kind: object, content: object) -> Any:
    return _read_buffer(content, kind)[0]


def _array_from_buffer(buffer: object, kind: object, shape: Any, order: Any = "C") -> np.ndarray:
    return _read_buffer(buffer, kind).reshape(shape, order=order)


def _make_bytearray(content: bytes) -> bytearray:
    if not isinstance(content, bytes):
        raise pickle.UnpicklingError("the pickle asks for a bytearray that is not made of its bytes")
    return bytearray(content)


_CORES = ("numpy.core", "numpy._core")
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _make_dtype,
    ("_codecs", "encode"): _encode_latin1,  # how pickle protocol 2 stores an array's bytes
    ("builtins", "bytearray"): _make_bytearray,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{(f"{core}.multiarray", "_reconstruct"): _make_empty_array for core in _CORES},
    **{(f"{core}.multiarray", "scalar"): _read_scalar for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): _array_from_buffer for core in _CORES},
}


class RestrictedUnpickler(pickle._Unpickler):
    """Loads numpy arrays and builtin containers; any other name in the pickle raises `pickle.UnpicklingError`.

    It is the unpickler in Python, whose operation BUILD can be replaced. BUILD gives an object a state from the pickle,
    and a dtype takes any: one of objects that says that it is not of objects lets the bytes of an array count as
    addresses of objects. So a dtype takes only its byte order from the pickle.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return the allowed object of a name. Raise pickle.UnpicklingError if it is not allowed."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"the pickle asks for {module}.{name}; only numpy arrays and builtin containers are loaded"
            )
        return _ALLOWED[module, name]

    def load_build(self) -> None:
        """Give a dtype its byte order, or an array its shape and values. Raise pickle.UnpicklingError for others."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.dtype):
            # in place, as later arrays of the pickle refer to this dtype; the state is numpy's own
            target.__setstate__(target.newbyteorder(state[1]).__reduce__()[2])  # type: ignore[attr-defined]
        elif isinstance(target, np.ndarray):
            target.__setstate__(state)  # compares the bytes with shape and dtype; every dtype here is plain
        else:
            raise pickle.UnpicklingError(f"the pickle asks for attributes of a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build


def safe_load(path: Path) -> Any:
    """Return the content of a pickle of arrays and containers. Raise ValueError for other objects and damaged files."""
    content = read_bytes(path, MAX_PICKLE_BYTES)
    with convert_errors(f"{path.parent.name}/{path.name}"):
        try:
            loaded = RestrictedUnpickler(io.BytesIO(content)).load()
        except pickle.PickleError as error:
            raise ValueError(str(error)) from error
        if size_of(loaded) > len(content) + MOST_SHARED:
            raise ValueError(f"its {len(content)} bytes stand for too many values, or for a container inside itself")
        return loaded


@dataclass(frozen=True)
class NpzDepth(NumberedFiles):
    """One `.npz` file per frame with an array `depth`, [H, W] uint16 mm."""

    def read(self, index: int) -> np.ndarray:
        path = self.path(index)
        depth = read_npz(path, {"depth"})["depth"]
        try:
            return depth_millimetres(depth)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


# ---------------------------------------------------------------------- finding


def _is_episode(folder: Path) -> bool:
    """Return whether a folder is an episode; one that was cut off has one of the two parts and fails on reading."""
    native = (folder / "trajectory.npz").is_file()
    return (folder / "lowdim").is_dir() or ((folder / "rgb").is_dir() and not native)


LAYOUT = "<task>/0000/lowdim"  # files by which a folder of this format is recognised


def detect(root: Path) -> bool:
    """Return whether the folder holds `<...>/lowdim/*.pkl`."""
    episodes = demo_folders(root, _is_episode)
    return any(next((episode / "lowdim").glob(ROWS), None) is not None for episode in episodes)


def find(root: Path, calibration: Path | None = None) -> list[DemoReference]:
    """Return references to the episodes under `root`, sorted by name; `calibration`: a `calibration_results.json` to
    use instead of the folder's own.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it holds nothing that is used, or it or the folder's `calibration.yaml` lists cameras or arms.
    """
    if calibration is not None and not calibration.is_file():
        raise FileNotFoundError(f"calibration file {calibration} does not exist")
    path = calibration or next((root / name for name in NAMES if (root / name).is_file()), None)
    if path is not None:
        _refuse_unused(path, is_named=calibration is not None)
    return folder_references(root, demo_folders(root, _is_episode), "raiden", partial(read, calibration=calibration))


def _refuse_unused(path: Path, is_named: bool) -> None:
    """Raise ValueError if entries of a calibration file would have no effect.

    Args:
        is_named: the user named the file for its transform between the bases; otherwise it may hold only corrections.
    """
    content = read_mapping(path)
    reason = "raiden's recordings hold their own cameras and poses"
    # raiden's own file may have entries of the same names
    for key in ("cameras", "arms", "lerobot") if content.get("schema") == SCHEMA else ():
        if content.get(key):
            raise ValueError(f"{path}: {key} has no effect, as {reason}; remove it from the file")
    if is_named and stored_transform(content) is None:
        raise ValueError(
            f"{path} has no effect: it has no bimanual_transform.right_base_to_left_base, and {reason}; leave it out"
        )


# ---------------------------------------------------------------------- reading


def read(episode: Path, name: str, calibration: Path | None = None) -> Demo:
    """Read one episode.

    Raises:
        DemoError: the conversion was cut off, frames are missing, or a two-armed recording lacks the transform between
            the bases.
    """
    metadata = _read_metadata(episode, name)
    rows = _read_rows(episode, name)
    frames = len(rows)
    try:
        values = np.stack([np.asarray(row["actual_poses"], dtype=np.float64) for row in rows])
    except KeyError as error:
        raise DemoError(
            name, f"the lowdim files have no {error}: converted by an old raiden? Run `rd convert` again"
        ) from error
    if values.ndim != 2 or values.shape[1] not in (13, 26):
        raise DemoError(name, f"actual_poses has shape {values.shape}, [{frames}, 13 per arm] is needed")
    notes: list[str] = []
    left_from_right, wrist_to_left = np.eye(4), None
    if values.shape[1] == 26:
        left_from_right, wrist_to_left = find_bases(episode, name, rows, values, calibration, notes)
    trajectories, models = read_arms(episode.parent, rows, values, left_from_right, notes)
    cameras = {
        camera: _read_camera(episode, name, camera, rows, wrist_to_left if is_right_wrist(camera) else None)
        for camera in sorted(rows[0]["intrinsics"])
    }
    if not cameras:
        raise DemoError(name, "the lowdim files name no camera")
    rate = float(metadata.get("framerate") or 30)
    language = metadata.get("language") or {}
    prompts = language.get("prompt") or ""
    prompt = prompts if isinstance(prompts, str) else words(prompts[0])
    spoken = np.asarray(rows[0].get("language_prompt"), dtype=object).tolist()  # an array of one text
    prompt = words(spoken) or prompt or words(language.get("task"))
    return Demo(
        name=name,
        path=episode,
        robot="yam" if len(trajectories) == 1 else "yam_bimanual",
        task=str(language.get("task") or episode.parent.name),
        instruction=prompt,
        fps=rate,
        timestamps=_read_times(episode, name, list(cameras), frames, rate),
        arms=trajectories,
        cameras=cameras,
        source={"format": "raiden", "notes": notes, **({"models": models} if models else {})},
    )


def _read_metadata(episode: Path, name: str) -> dict[str, Any]:
    path = episode / "metadata.json"
    if not path.is_file():
        raise DemoError(
            name, "no metadata.json, which raiden writes last: the conversion was cut off; run `rd convert` again"
        )
    return read_object(path, name)


def _read_rows(episode: Path, name: str) -> list[dict[str, Any]]:
    paths = sorted((episode / "lowdim").glob(ROWS))
    if not (episode / "rgb").is_dir():
        raise DemoError(name, "it has no images (rgb/): the conversion was cut off; run `rd convert` again")
    for index, path in enumerate(paths):
        if path.name != f"{index:010d}.pkl":
            raise DemoError(name, f"lowdim file {index:010d}.pkl is missing")
    rows = [safe_load(path) for path in paths]
    if not all(isinstance(row, dict) and {"intrinsics", "extrinsics"} <= row.keys() for row in rows):
        raise DemoError(name, "a lowdim file has no intrinsics or extrinsics")
    if not rows:
        raise DemoError(name, "it has no lowdim files")
    return rows


def _read_camera(
    episode: Path, name: str, camera: str, rows: list[dict[str, Any]], to_left: np.ndarray | None
) -> CameraTrack:
    """Read one camera; `to_left` [4, 4]: from the frame of its stored poses to the left base, None if that is it."""
    folder = episode / "rgb" / camera
    suffixes = [suffix for suffix in (".jpg", ".png", ".jpeg") if (folder / f"{0:010d}{suffix}").is_file()]
    if not suffixes:
        raise DemoError(name, f"camera {camera!r} has no images in rgb/{camera}")
    file_names = {path.name for path in folder.iterdir()}
    missing = [index for index in range(len(rows)) if f"{index:010d}{suffixes[0]}" not in file_names]
    if missing:
        raise DemoError(
            name, f"camera {camera!r}: {len(missing)} of {len(rows)} images are missing, first number {missing[0]}"
        )
    with open_image(folder / f"{0:010d}{suffixes[0]}") as image:
        width, height = image.size
    depth_folder = episode / "depth" / camera
    depth: FrameSource | None = None
    if (depth_folder / f"{len(rows) - 1:010d}.npz").is_file():
        depth = NpzDepth(depth_folder, "%010d.npz", len(rows))
    frames = JpegFrames(folder, f"%010d{suffixes[0]}", len(rows))
    if not has_pose(rows, camera):
        reason = f"its extrinsics are absent, NaN or zero in all frames: {NOT_CALIBRATED}"
        return CameraTrack.without_calibration(width, height, frames, len(rows), reason, depth)
    try:
        intrinsics = np.stack([np.asarray(row["intrinsics"][camera], dtype=np.float64) for row in rows])
        extrinsics = rigid(np.stack([row["extrinsics"][camera] for row in rows]), f"extrinsics of camera {camera!r}")
    except KeyError as error:
        raise DemoError(name, f"camera {camera!r} has no intrinsics or extrinsics in some frames") from error
    intrinsics[:, :2, 2] += 0.5  # drivers count from the first pixel's centre, we from its corner
    if (intrinsics == intrinsics[0]).all():
        intrinsics = CameraTrack.broadcast(intrinsics[0], len(rows))
    uncalibrated = f"its pose is the identity: {NOT_CALIBRATED}" if (extrinsics == np.eye(4)).all() else ""
    world_to_camera = invert(extrinsics if to_left is None or uncalibrated else to_left @ extrinsics)
    if (extrinsics == extrinsics[0]).all():
        world_to_camera = CameraTrack.broadcast(world_to_camera[0], len(rows))
    return CameraTrack(width, height, intrinsics, world_to_camera, frames, depth, uncalibrated)


def _read_times(episode: Path, name: str, cameras: list[str], frames: int, rate: float) -> np.ndarray:
    """Return int64 ns of the first camera that is not on a wrist (the converter's reference), else of the first one."""
    for camera in sorted(cameras, key=lambda key: ("wrist" in key, key)):
        path = episode / "rgb" / camera / "timestamps.npy"
        if not path.is_file():
            continue
        times = read_npy(path)
        if times.shape != (frames,):
            raise DemoError(name, f"rgb/{camera}/timestamps.npy has shape {times.shape}, the episode {frames} frames")
        return increasing(times, round(1e9 / rate))
    raise DemoError(name, "no camera has timestamps.npy")
