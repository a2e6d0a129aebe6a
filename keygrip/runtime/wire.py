"""The messages between a robot and the policy server: named arrays in the safetensors format.

The format is a JSON header with names, types and shapes, then the raw bytes: reading it runs no code, and its lengths
are checked before anything is allocated. A sentence travels as its UTF-8 bytes. Every array of an observation is
checked for type, shape and sense before a policy sees it.

Shape legend: A arms, T planned steps, H x W an image, L bytes of a sentence.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from keygrip.models.policy import Needs, Observation, Plan, views_of

CONTENT_TYPE = "application/octet-stream"
SESSION_HEADER = "Keygrip-Session"
SMALLEST_SIDE, LARGEST_SIDE = 16, 4096  # pixels of an image
LONGEST_INSTRUCTION = 1000  # bytes
LONGEST_HEADER = 16384  # bytes of names, types and shapes: sixty cameras
LONGEST_NAME = 128  # characters of an array's name that a refusal repeats
FARTHEST_CAMERA_M = 100.0  # from the world's origin
FOCAL_LENGTHS = (1.0, 1e6)  # pixels
OF_SOME = ("uncertainty", "joints", "controller")  # parts of a plan that some policies give
VIEW = ("image", "intrinsics", "world_to_camera")
SLACK = 0.02  # tolerance for unit quaternions and rotation matrices after float32 and JSON


class WireError(ValueError):
    """A message that cannot be used; the text says what is wrong with it."""


@dataclass(frozen=True)
class Entry:
    """One array of a message.

    Attributes:
        kind: "float" (32 or 64 bit) or "uint8". shape: numbers, or a letter where the size is the sender's.
        arms: how many arms the first dimension counts (it may be left out with one), 0 where it does not.
        optional: the policy does not read it.
    """

    kind: str
    shape: tuple[int | str, ...]
    arms: int = 0
    optional: bool = False

    def describe(self) -> dict[str, Any]:
        """As `/health` shows it."""
        said = {"dtype": self.kind if self.kind == "uint8" else ["float32", "float64"], "shape": list(self.shape)}
        return said | ({"optional": True} if self.optional else {})


def entries_of(needs: Needs) -> dict[str, Entry]:
    """The arrays that make up an observation for a policy."""
    views = [f"cameras/{name}/" for name in needs.cameras] or [""]
    view = {
        "image": Entry("uint8", ("H", "W", 3)),
        "intrinsics": Entry("float", (3, 3), optional=not needs.calibration),
        "world_to_camera": Entry("float", (4, 4), optional=not needs.calibration),
    }
    entries = {f"{prefix}{name}": view[name] for prefix in views for name in VIEW}
    arms = len(needs.arms)
    for name, size in (("position", (3,)), ("quaternion", (4,)), ("gripper", ())):
        entries[name] = Entry("float", (arms, *size), arms)
    if needs.instruction:
        entries["instruction"] = Entry("uint8", ("L",))
    return entries


def encode_observation(observation: Observation, needs: Needs) -> bytes:
    """The parts of an observation that a policy reads, as the body of a request.

    Raises:
        ValueError: the observation lacks one of them.
    """
    arrays: dict[str, np.ndarray] = {}
    if needs.cameras:
        for camera, view in zip(needs.cameras, views_of(observation, needs.cameras), strict=True):
            arrays |= {f"cameras/{camera}/{name}": np.asarray(view[name]) for name in _view_parts(needs)}
    names = [
        name
        for name, entry in entries_of(needs).items()
        if name not in arrays and name != "instruction" and not entry.optional
    ]
    absent = [name for name in (*names, *(["instruction"] if needs.instruction else [])) if name not in observation]
    if absent:
        raise ValueError(f"the observation lacks {absent[0]!r}, which the policy reads")
    arrays |= {name: np.asarray(observation[name]) for name in names}
    if needs.instruction:
        arrays["instruction"] = np.frombuffer(str(observation["instruction"]).encode(), np.uint8)
    return _save(arrays)


def _view_parts(needs: Needs) -> tuple[str, ...]:
    """What of a camera a policy reads."""
    return VIEW if needs.calibration else VIEW[:1]


def decode_observation(body: bytes, needs: Needs) -> dict[str, Any]:
    """The inverse of `encode_observation`, for untrusted input.

    Raises:
        WireError: not in the format; an array is missing, unknown, of another type or shape, or makes no sense.
    """
    _refuse_unknown(_names(body), entries_of(needs))
    return checked_observation(_load(body), needs)


def checked_observation(arrays: Mapping[str, np.ndarray], needs: Needs) -> dict[str, Any]:
    """The observation of named arrays from a client, in any format.

    Raises:
        WireError: an array is missing, unknown, of another type or shape, or makes no sense.
    """
    entries = entries_of(needs)
    _refuse_unknown(arrays, entries)
    observation: dict[str, Any] = {}
    for name, entry in entries.items():
        if name not in arrays and entry.optional:
            continue
        if name not in arrays:
            raise WireError(f"the observation lacks {name!r}: {entry.describe()}")
        value = _checked(name, arrays[name], entry)
        *path, last = name.split("/")
        if path:  # cameras/<camera>/<what>
            observation.setdefault("cameras", {}).setdefault("/".join(path[1:]), {})[last] = value
        else:
            observation[last] = value
    if needs.instruction:
        observation["instruction"] = _sentence(observation["instruction"])
    return observation


def _names(body: bytes) -> list[str]:
    """The names in a message's header, which must be small: what follows it costs time and memory by name.

    Raises:
        WireError: no header, or a long one.
    """
    length = int.from_bytes(body[:8], "little")
    if length > LONGEST_HEADER:
        raise WireError(
            f"the body is not in the safetensors format, or its header of {length} bytes is longer than "
            f"{LONGEST_HEADER}"
        )
    try:
        header = json.loads(body[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise WireError(f"the body is not in the safetensors format: its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise WireError("the body is not in the safetensors format: its header is no JSON object")
    return [name for name in header if name != "__metadata__"]


def _refuse_unknown(names: Iterable[str], entries: Mapping[str, Entry]) -> None:
    for name in names:
        if name not in entries:
            name = name[:LONGEST_NAME]
            near = difflib.get_close_matches(name, entries, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(entries)}"
            raise WireError(f"the observation has an unknown array {name!r}{hint}")


def encode_plan(plan: Plan) -> bytes:
    """A plan as the body of an answer: position [A, T, 3], quaternion [A, T, 4], gripper [A, T], step_seconds [] and,
    where the policy has them, uncertainty [A, T], joints [A, T, J] and controller [A, T, D]; all float64."""
    arrays = {
        "position": plan.position,
        "quaternion": plan.quaternion,
        "gripper": plan.gripper,
        "step_seconds": np.array(plan.step_seconds),
    }
    arrays |= {name: value for name in OF_SOME if (value := getattr(plan, name)) is not None}
    return _save({name: np.asarray(value, np.float64) for name, value in arrays.items()})


def decode_plan(body: bytes) -> Plan:
    """The inverse of `encode_plan`. Raises WireError where it is none."""
    arrays = _load(body)
    names = {"position", "quaternion", "gripper", "step_seconds"}
    if not names <= set(arrays) <= names | set(OF_SOME):
        raise WireError(f"the answer is no plan: it holds {', '.join(sorted(arrays))}")
    gripper = arrays["gripper"]
    shapes = {
        "position": (*gripper.shape, 3),
        "quaternion": (*gripper.shape, 4),
        "step_seconds": (),
        "uncertainty": gripper.shape,
    }
    for name, shape in shapes.items():
        if name in arrays and arrays[name].shape != shape:
            raise WireError(f"the answer is no plan: {name} is {arrays[name].shape}, gripper {gripper.shape}")
    for name in ("joints", "controller"):
        if name in arrays and arrays[name].shape[:-1] != gripper.shape:
            raise WireError(f"the answer is no plan: {name} is {arrays[name].shape}, gripper {gripper.shape}")
    return Plan(
        position=arrays["position"],
        quaternion=arrays["quaternion"],
        gripper=gripper,
        step_seconds=float(arrays["step_seconds"]),
        uncertainty=arrays.get("uncertainty"),
        joints=arrays.get("joints"),
        controller=arrays.get("controller"),
    )


def _save(arrays: Mapping[str, np.ndarray]) -> bytes:
    # numpy's ascontiguousarray would give a single number a dimension
    return bytes(save({name: np.asarray(value, order="C") for name, value in arrays.items()}))


def _load(body: bytes) -> dict[str, np.ndarray]:
    try:
        return dict(load(body))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:  # what it raises depends on what is wrong
        raise WireError(f"the body is not in the safetensors format: {error}") from error


def _checked(name: str, value: np.ndarray, entry: Entry) -> np.ndarray:
    """The array with all its dimensions, floats as float64."""
    kinds = ("float32", "float64") if entry.kind == "float" else (entry.kind,)
    if value.dtype.name not in kinds:
        raise WireError(f"{name!r} must be {' or '.join(kinds)}, not {value.dtype.name}")
    given = value.shape
    if entry.arms == 1 and value.ndim == len(entry.shape) - 1:
        value = value[None]
    fits = len(value.shape) == len(entry.shape) and all(
        isinstance(wanted, str) or wanted == given for wanted, given in zip(entry.shape, value.shape, strict=True)
    )
    if not fits:
        wanted = " x ".join(str(size) for size in entry.shape)
        raise WireError(f"{name!r} must be {wanted}, not {' x '.join(map(str, given)) or 'a single number'}")
    if entry.kind == "float":
        value = value.astype(np.float64)
        if not np.isfinite(value).all():
            raise WireError(f"{name!r} holds numbers that are not finite")
    with np.errstate(all="ignore"):  # huge numbers are named, not warned about
        problem = _nonsense(name.rpartition("/")[2], value)
    if problem:
        raise WireError(f"{name!r} {problem}")
    return value


def _nonsense(kind: str, value: np.ndarray) -> str | None:
    """What is wrong with an array of the right type and shape."""
    if kind == "image" and not SMALLEST_SIDE <= min(value.shape[:2]) <= max(value.shape[:2]) <= LARGEST_SIDE:
        return f"has sides of {value.shape[0]} and {value.shape[1]} pixels, outside {SMALLEST_SIDE} to {LARGEST_SIDE}"
    if kind == "intrinsics":
        focal = (value[0, 0], value[1, 1])
        if min(focal) < FOCAL_LENGTHS[0] or not np.allclose(value[2], [0, 0, 1]):
            return "is no camera matrix: its focal lengths must be positive (pixels), its last row 0 0 1"
        if np.abs(value).max() > FOCAL_LENGTHS[1]:
            return f"is no camera matrix: it holds numbers above {FOCAL_LENGTHS[1]:g} pixels"
    if kind == "world_to_camera":
        turn = value[:3, :3]
        if not np.allclose(turn @ turn.T, np.eye(3), atol=SLACK) or not np.allclose(value[3], [0, 0, 0, 1]):
            return "is no rigid transform: a rotation, a translation in metres, last row 0 0 0 1"
        if np.linalg.det(turn) < 0:
            return "is no rigid transform: its rotation is mirrored (determinant -1); one of its axes points backwards"
        if np.abs(value[:3, 3]).max() > FARTHEST_CAMERA_M:
            return f"puts the camera farther than {FARTHEST_CAMERA_M:g} m away: its translation is in metres"
    if kind == "quaternion" and (abs(np.linalg.norm(value, axis=-1) - 1) > SLACK).any():
        return "is no unit quaternion (w x y z)"
    if kind == "gripper" and ((value < -0.1) | (value > 1.1)).any():
        return "must lie in 0 (closed) to 1 (open)"
    if kind == "instruction" and not 1 <= len(value) <= LONGEST_INSTRUCTION:
        return f"must have 1 to {LONGEST_INSTRUCTION} bytes, not {len(value)}"
    return None


def _sentence(value: np.ndarray) -> str:
    try:
        text = value.tobytes().decode()
    except UnicodeDecodeError as error:
        raise WireError(f"'instruction' is not UTF-8: {error}") from error
    if not text.isprintable():
        raise WireError("'instruction' holds control characters")
    return text
