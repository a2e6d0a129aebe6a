"""The messages between a robot and the policy server: named arrays in the safetensors format.

A robot that executes a plan may send this plan, for a policy that continues it (real-time chunking).

The format is a JSON header with names, types and shapes, followed by the raw bytes. Reading it runs no code, and its
lengths are checked before memory is allocated. An instruction is sent as its UTF-8 bytes. Every array of an observation
is checked for type, shape and plausible values before a policy receives it.

Shape legend: A arms, T planned steps, H x W an image, L bytes of an instruction.
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

from keygrip.models.policy import (
    LONGEST_INSTRUCTION,
    Needs,
    Observation,
    Plan,
    UnderWay,
    implausible_because,
    refuse_incomplete,
    views_or_none,
)

CONTENT_TYPE = "application/octet-stream"
SESSION_HEADER = "Keygrip-Session"
SMALLEST_SIDE, LARGEST_SIDE = 16, 4096  # pixels of an image
LONGEST_HEADER = 16384  # bytes of names, types and shapes: sixty cameras
LONGEST_NAME = 128  # characters of an array's name that an error message repeats
LONGEST_PLAN = 1000  # steps of a current plan
WIDEST_STEP = 64  # joints, or controller inputs, of one step of the plan
LARGEST_INPUT = 1e6  # largest absolute value of joints and controller inputs
OLDEST_PLAN_S = 600.0  # if the plan's observation is older, the clocks differ
EARLIEST_S = 1.0  # an observation may precede the plan's by this much: camera images are older than the plan's arrival
LONGEST_DELAY_S = 60.0
UNDER_WAY = "executing/"  # prefix of the arrays of a current plan
OF_SOME = ("uncertainty", "joints", "controller", "held_back")  # parts of a plan that only some policies have
VIEW = ("image", "intrinsics", "world_to_camera")
FLOATS = ("float32", "float64")  # types of numbers that a server accepts


class WireError(ValueError):
    """A message that cannot be used; the text states the error."""


@dataclass(frozen=True)
class Entry:
    """One array of a message.

    Attributes:
        kind: "float" (32 or 64 bit) or "uint8". shape: sizes, or a letter for a size chosen by the sender.
        arms: number of arms in the first dimension (which may be omitted for one arm), 0 if it is no arm dimension.
        optional: the policy does not read it.
    """

    kind: str
    shape: tuple[int | str, ...]
    arms: int = 0
    optional: bool = False

    def describe(self) -> dict[str, Any]:
        """Return the entry as shown in `/health`."""
        said = {"dtype": self.kind if self.kind == "uint8" else list(FLOATS), "shape": list(self.shape)}
        return said | ({"optional": True} if self.optional else {})


def entries_of(needs: Needs) -> dict[str, Entry]:
    """Return the arrays of an observation for a policy."""
    entries = {}
    for camera in needs.cameras or ("",):
        prefix, unread = f"cameras/{camera}/" if camera else "", not needs.calibrated(camera)
        entries[f"{prefix}image"] = Entry("uint8", ("H", "W", 3))
        entries[f"{prefix}intrinsics"] = Entry("float", (3, 3), optional=unread)
        entries[f"{prefix}world_to_camera"] = Entry("float", (4, 4), optional=unread)
    arms = len(needs.arms)
    for name, size in (("position", (3,)), ("quaternion", (4,)), ("gripper", ())):
        entries[name] = Entry("float", (arms, *size), arms)
    if needs.instruction:
        entries["instruction"] = Entry("uint8", ("L",))
    return entries


def under_way_entries(needs: Needs) -> dict[str, Entry]:
    """Return the arrays that describe the current plan to a policy. A request has none of them or all of them; only
    joints and controller inputs may be missing."""
    arms, scalar = len(needs.arms), Entry("float", ())
    arrays = {
        "position": Entry("float", (arms, "T", 3)),
        "quaternion": Entry("float", (arms, "T", 4)),
        "gripper": Entry("float", (arms, "T")),
        "joints": Entry("float", (arms, "T", "J"), optional=True),
        "controller": Entry("float", (arms, "T", "D"), optional=True),
        "step_seconds": scalar,
        "time_s": scalar,
    }
    return {"time_s": scalar, "delay_s": scalar} | {f"{UNDER_WAY}{name}": entry for name, entry in arrays.items()}


def encode_observation(observation: Observation, needs: Needs, under_way: UnderWay | None = None) -> bytes:
    """Encode the parts of an observation that a policy reads, as the body of a request.

    Args:
        under_way: the plan to continue; the observation needs `time_s` then.

    Numbers of other types, such as whole numbers, are sent as float64; images are sent as they are.

    Raises:
        ValueError: The observation lacks parts (the message names all of them), an entry is no array of numbers, or the
            current plan has no time.
    """
    refuse_incomplete(observation, needs)
    entries = entries_of(needs)
    arrays: dict[str, np.ndarray] = {}
    if needs.cameras:
        for camera, view in zip(needs.cameras, views_or_none(observation, needs.cameras), strict=True):
            if view is None:
                raise ValueError(
                    f"camera {camera!r} of the observation is None, and a server is sent every camera that its policy "
                    "reads: give it a black image and its calibration (a policy that masks cameras leaves it out then)"
                )
            parts = VIEW if needs.calibrated(camera) else VIEW[:1]
            arrays |= {f"cameras/{camera}/{name}": np.asarray(view[name]) for name in parts if name in view}
    names = [name for name, entry in entries.items() if name not in arrays and not entry.optional]
    absent = [name for name in names if name not in observation]
    if absent:
        # the entries of a single camera have no prefix then
        alone = len(needs.cameras) == 1 and not observation.get("cameras")
        prefix = f"cameras/{needs.cameras[0]}/" if alone else ""
        listed = ", ".join(repr(name.removeprefix(prefix)) for name in absent)
        raise ValueError(f"the observation lacks {listed}, which the policy reads")
    arrays |= {name: np.asarray(observation[name]) for name in names}
    arrays = {name: _floats(name, value) if entries[name].kind == "float" else value for name, value in arrays.items()}
    if needs.instruction:
        arrays["instruction"] = np.frombuffer(str(observation["instruction"]).encode(), np.uint8)
    if under_way is not None:
        arrays |= _arrays_under_way(observation, under_way)
    return _save(arrays)


def _floats(name: str, value: np.ndarray) -> np.ndarray:
    """Return an array of a type that the server accepts, float32 or float64."""
    if value.dtype.name in FLOATS:
        return value
    try:
        return value.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name!r} of the observation must be numbers: {error}") from error


def _arrays_under_way(observation: Observation, under_way: UnderWay) -> dict[str, np.ndarray]:
    plan = under_way.plan
    if plan.time_s is None or "time_s" not in observation:
        raise ValueError("a plan is continued by its time: the observation and the plan need time_s")
    names = ("position", "quaternion", "gripper", "step_seconds", "time_s", "joints", "controller")
    parts = {f"{UNDER_WAY}{name}": value for name in names if (value := getattr(plan, name)) is not None}
    parts |= {"time_s": observation["time_s"], "delay_s": under_way.delay_s}
    return {name: np.asarray(value, np.float64) for name, value in parts.items()}


def decode_request(body: bytes, needs: Needs, continues: bool = False) -> tuple[dict[str, Any], UnderWay | None]:
    """Decode a request of `encode_observation` from untrusted input: an observation, and the current plan if there is
    one.

    Args:
        continues: whether the policy can continue a plan.

    Raises:
        WireError: The request is not in the format; an array is missing, unknown, of wrong type or shape, or invalid;
            or a current plan is sent to a policy that does not continue it.
    """
    names, plan_entries = _header_names(body), under_way_entries(needs)
    plan_names = [name for name in names if name in plan_entries]
    if plan_names and not continues:
        raise WireError(f"{plan_names[0]!r} is of a plan under way, which this policy does not continue: leave it out")
    _refuse_unknown(names, entries_of(needs) | (plan_entries if continues else {}))
    arrays = _load(body)
    observation = checked_observation(
        {name: array for name, array in arrays.items() if name not in plan_entries}, needs
    )
    if not plan_names:
        return observation, None
    time_s, under_way = _check_under_way(arrays, plan_entries)
    return observation | {"time_s": time_s}, under_way


def _check_under_way(arrays: Mapping[str, np.ndarray], entries: Mapping[str, Entry]) -> tuple[float, UnderWay]:
    """Return the observation's time and the current plan. Raises WireError as `decode_request`."""
    absent = [name for name, entry in entries.items() if name not in arrays and not entry.optional]
    if absent:
        raise WireError(f"a plan under way lacks {absent[0]!r}: {entries[absent[0]].describe()}")
    checked = {name: _check_array(name, arrays[name], entry) for name, entry in entries.items() if name in arrays}
    plan_arrays = {name.removeprefix(UNDER_WAY): value for name, value in checked.items() if name.startswith(UNDER_WAY)}
    steps = plan_arrays["gripper"].shape[1]
    if not 1 <= steps <= LONGEST_PLAN:
        raise WireError(f"'{UNDER_WAY}gripper' has {steps} steps, outside 1 to {LONGEST_PLAN}")
    for name, value in plan_arrays.items():
        if value.ndim > 1 and value.shape[1] != steps:
            raise WireError(f"'{UNDER_WAY}{name}' has {value.shape[1]} steps, '{UNDER_WAY}gripper' {steps}")
    time_s, planned_s = float(checked["time_s"]), float(plan_arrays["time_s"])
    if not -EARLIEST_S <= time_s - planned_s <= OLDEST_PLAN_S:
        raise WireError(
            f"the observation was taken {time_s - planned_s:.4g} s after that of the plan under way, outside "
            f"{-EARLIEST_S:g} to {OLDEST_PLAN_S:g}: 'time_s' and '{UNDER_WAY}time_s' are seconds of one clock"
        )
    plan_fields: dict[str, Any] = plan_arrays | {
        "step_seconds": float(plan_arrays["step_seconds"]),
        "time_s": planned_s,
    }
    return time_s, UnderWay(Plan(**plan_fields), float(checked["delay_s"]))


def checked_observation(arrays: Mapping[str, np.ndarray], needs: Needs) -> dict[str, Any]:
    """Return the observation of named arrays from a client, in any format.

    Raises:
        WireError: An array is missing, unknown, of wrong type or shape, or invalid.
    """
    entries = entries_of(needs)
    _refuse_unknown(arrays, entries)
    absent = [name for name, entry in entries.items() if name not in arrays and not entry.optional]
    if absent:
        raise WireError(
            f"the observation lacks {', '.join(f'{name!r}: {entries[name].describe()}' for name in absent)}"
        )
    observation: dict[str, Any] = {}
    for name, entry in entries.items():
        if name not in arrays:
            continue
        value = _check_array(name, arrays[name], entry)
        *path, last = name.split("/")
        if path:  # cameras/<camera>/<what>
            observation.setdefault("cameras", {}).setdefault("/".join(path[1:]), {})[last] = value
        else:
            observation[last] = value
    if needs.instruction:
        observation["instruction"] = _decode_instruction(observation["instruction"])
    return observation


def _header_names(body: bytes) -> list[str]:
    """Return the names in a message's header, which must be small, because each name costs time and memory later.

    Raises:
        WireError: There is no header, or it is too long.
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
    """Encode a plan as the body of an answer: position [A, T, 3], quaternion [A, T, 4], gripper [A, T], step_seconds []
    and, if the policy has them, uncertainty [A, T], joints [A, T, J], controller [A, T, D] and held_back [A, 3]; all
    float64."""
    arrays = {
        "position": plan.position,
        "quaternion": plan.quaternion,
        "gripper": plan.gripper,
        "step_seconds": np.array(plan.step_seconds),
    }
    arrays |= {name: value for name in OF_SOME if (value := getattr(plan, name)) is not None}
    return _save({name: np.asarray(value, np.float64) for name, value in arrays.items()})


def decode_plan(body: bytes) -> Plan:
    """Decode the body of `encode_plan`. Raises WireError if it is not a plan."""
    arrays = _load(body)
    names = {"position", "quaternion", "gripper", "step_seconds"}
    if not names <= set(arrays) <= names | set(OF_SOME):
        raise WireError(f"the answer is no plan: it holds {', '.join(sorted(arrays))}")
    gripper = arrays["gripper"]
    shapes = dict.fromkeys(("gripper", "uncertainty"), gripper.shape)
    shapes |= {"position": (*gripper.shape, 3), "quaternion": (*gripper.shape, 4), "step_seconds": ()}
    shapes["held_back"] = (*gripper.shape[:1], 3)
    for name, array in arrays.items():
        any_number = (*gripper.shape, *array.shape[-1:])  # for joints and controller inputs
        if array.shape != shapes.get(name, any_number):
            raise WireError(f"the answer is no plan: {name} is {array.shape}, gripper {gripper.shape}")
    parts: dict[str, Any] = arrays | {"step_seconds": float(arrays["step_seconds"])}
    return Plan(**parts)


def _save(arrays: Mapping[str, np.ndarray]) -> bytes:
    # numpy's ascontiguousarray would add a dimension to a scalar
    return bytes(save({name: np.asarray(value, order="C") for name, value in arrays.items()}))


def _load(body: bytes) -> dict[str, np.ndarray]:
    try:
        return dict(load(body))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:  # the type of the error depends on the input
        raise WireError(f"the body is not in the safetensors format: {error}") from error


def _check_array(name: str, value: np.ndarray, entry: Entry) -> np.ndarray:
    """Return the array with all its dimensions, floats as float64."""
    kinds = FLOATS if entry.kind == "float" else (entry.kind,)
    if value.dtype.name not in kinds:
        raise WireError(f"{name!r} must be {' or '.join(kinds)}, not {value.dtype.name}")
    actual = value.shape
    if entry.arms == 1 and value.ndim == len(entry.shape) - 1:
        value = value[None]
    fits = len(value.shape) == len(entry.shape) and all(
        isinstance(expected, str) or expected == actual
        for expected, actual in zip(entry.shape, value.shape, strict=True)
    )
    if not fits:
        expected = " x ".join(map(str, entry.shape)) or "a single number"
        raise WireError(f"{name!r} must be {expected}, not {' x '.join(map(str, actual)) or 'a single number'}")
    if entry.kind == "float":
        value = value.astype(np.float64)
        if not np.isfinite(value).all():
            raise WireError(f"{name!r} holds numbers that are not finite")
    with np.errstate(all="ignore"):  # huge numbers are reported, without numpy warnings
        problem = _find_problem(name.rpartition("/")[2], value)
    if problem:
        raise WireError(f"{name!r} {problem}")
    return value


def _find_problem(kind: str, value: np.ndarray) -> str | None:
    """Return what is wrong with an array of the right type and shape, or None."""
    if kind == "image" and not SMALLEST_SIDE <= min(value.shape[:2]) <= max(value.shape[:2]) <= LARGEST_SIDE:
        return f"has sides of {value.shape[0]} and {value.shape[1]} pixels, outside {SMALLEST_SIDE} to {LARGEST_SIDE}"
    if kind in ("joints", "controller"):
        if not 1 <= value.shape[-1] <= WIDEST_STEP:
            return f"has {value.shape[-1]} numbers per step, outside 1 to {WIDEST_STEP}"
        if np.abs(value).max(initial=0) > LARGEST_INPUT:
            return f"holds numbers above {LARGEST_INPUT:g}"
    if kind == "step_seconds" and not value > 0:
        return "must be above 0 seconds"
    if kind == "delay_s" and not 0 <= value <= LONGEST_DELAY_S:
        return f"must lie in 0 to {LONGEST_DELAY_S:g} seconds"
    if kind == "instruction" and not 1 <= len(value) <= LONGEST_INSTRUCTION:
        return f"must have 1 to {LONGEST_INSTRUCTION} bytes, not {len(value)}"
    return implausible_because(kind, value)


def _decode_instruction(value: np.ndarray) -> str:
    try:
        text = value.tobytes().decode()
    except UnicodeDecodeError as error:
        raise WireError(f"'instruction' is not UTF-8: {error}") from error
    if not text.isprintable():
        raise WireError("'instruction' holds control characters")
    return text
