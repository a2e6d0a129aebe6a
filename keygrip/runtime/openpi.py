"""Observations and plans in the messages of openpi's policy client (`openpi_client.websocket_client_policy`).

After a client connects, the server sends one message of metadata. Then the client sends an observation and receives a
map with `actions`, or a text frame with an error message, which its client raises as an error. Messages are MessagePack
with numpy arrays (`keygrip.runtime.messagepack`).

Keys of an observation are those of the HTTP protocol, nested (``{"cameras": {"over": {"image": ...}}}``) or with
slashes (``"cameras/over/image"``). The instruction is a string under `prompt` or `instruction`. A message
``{"reset": seed}`` starts an episode.

Shape legend: A arms, T planned steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from keygrip.models.policy import Needs, Plan
from keygrip.runtime.messagepack import MessagePackError, pack, unpack
from keygrip.runtime.wire import WireError, checked_observation, entries_of, under_way_entries

POSE = ("x", "y", "z", "qw", "qx", "qy", "qz", "gripper")


def metadata(about: Mapping[str, Any], needs: Needs) -> bytes:
    """Return the first message of a connection: the model, its inputs, and the columns of `actions`."""
    observation = {name: entry.describe() for name, entry in entries_of(needs).items()}
    names = [f"{arm}/{part}" for arm in needs.arms for part in POSE]
    return pack({**about, "needs": asdict(needs), "observation": observation, "action_names": names})


def decode_message(body: bytes, needs: Needs) -> dict[str, Any] | int:
    """Decode an observation, or the seed of a reset.

    Raises:
        WireError: The message is not in the format, or an array is missing, unknown, of wrong type or shape, or
            invalid.
    """
    try:
        message = unpack(body)
    except MessagePackError as error:
        raise WireError(str(error)) from error
    if not isinstance(message, dict):
        raise WireError("a message is a map with string keys")
    if set(message) == {"reset"}:
        seed = message["reset"]
        if isinstance(seed, np.ndarray) and seed.ndim == 0:
            seed = seed.item()
        if type(seed) is not int:
            raise WireError("'reset' is a whole number, the seed of the episode")
        return seed
    entries = entries_of(needs)
    arrays, elsewhere = {}, under_way_entries(needs)
    for name, value in _flatten(message, ""):
        if name in elsewhere:
            raise WireError(f"{name!r} is of a plan under way, which this protocol does not carry: use POST /plan")
        name = "instruction" if name == "prompt" else name
        if name in arrays:
            raise WireError(f"the observation has {name!r} twice")
        arrays[name] = _convert_array(name, value, entries[name].kind if name in entries else "")
    return checked_observation(arrays, needs)


def encode_plan(plan: Plan, infer_ms: float) -> bytes:
    """Encode a plan: `actions` [T, 8 A], for each arm position (metres), quaternion w x y z and gripper opening;
    `step_seconds` and `server_timing`; and, if the policy has them, `uncertainty` [T, A], `joints` [T, A, J],
    `controller` [T, A, D] and `held_back`, a list of A lists of 3 numbers.

    Every array has the steps as its first dimension, because openpi's `ActionChunkBroker` takes the current step of
    every array, and leaves everything else as it is."""
    poses = np.concatenate([plan.position, plan.quaternion, plan.gripper[..., None]], axis=-1)  # [A, T, 8]
    actions = poses.transpose(1, 0, 2).reshape(poses.shape[1], -1).astype(np.float64)
    answer: dict[str, Any] = {
        "actions": actions,
        "step_seconds": float(plan.step_seconds),
        "server_timing": {"infer_ms": float(infer_ms)},
    }
    if plan.uncertainty is not None:
        answer["uncertainty"] = np.asarray(plan.uncertainty, np.float64).T
    for name in ("joints", "controller"):
        if (values := getattr(plan, name)) is not None:
            answer[name] = np.asarray(values, np.float64).transpose(1, 0, 2)
    if plan.held_back is not None:
        answer["held_back"] = np.asarray(plan.held_back, np.float64).tolist()
    return pack(answer)


def encode_reset(seed: int) -> bytes:
    """Encode the answer to a reset."""
    return pack({"reset": seed})


def _flatten(message: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    entries: list[tuple[str, Any]] = []
    for name, value in message.items():
        entries += _flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return entries


def _convert_array(name: str, value: Any, kind: str) -> np.ndarray:
    """Convert a value of a message to the array that the HTTP protocol would contain."""
    if kind == "float" and isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()  # numpy.int64(1) is treated as the number 1
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, str):
        return np.frombuffer(value.encode(), np.uint8)
    if kind == "float" and isinstance(value, int | float | list):
        try:
            return np.array(value, np.float64)
        except (ValueError, TypeError, OverflowError) as error:
            raise WireError(f"{name!r} is no array of numbers") from error
    raise WireError(f"{name[:100]!r} must be an array or a string, not {type(value).__name__}")
