"""Which observations a server accepts, and which errors it returns for others."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from keygrip.models.policy import Needs, Plan
from keygrip.runtime.wire import (
    WireError,
    decode_plan,
    decode_request,
    encode_observation,
    encode_plan,
    entries_of,
)

Observe = Callable[..., dict[str, Any]]


def changed(body: bytes, **changes: np.ndarray | None) -> bytes:
    """Return the body with arrays replaced or (None) removed; "__" in a name stands for "/"."""
    arrays = load(body)
    for key, value in changes.items():
        name = key.replace("__", "/")
        arrays.pop(name, None)
        if value is not None:
            arrays[name] = value
    return bytes(save(arrays))


def test_an_observation_arrives_as_it_was(observation: Observe, needs: Needs) -> None:
    sent = observation()
    seen, under_way = decode_request(encode_observation(sent, needs), needs)
    assert under_way is None
    assert set(seen) == {"cameras", "position", "quaternion", "gripper", "instruction"}  # joints are not sent
    assert list(seen["cameras"]) == ["over", "front"]
    for camera, view in seen["cameras"].items():
        for name, value in view.items():
            np.testing.assert_array_equal(value, sent["cameras"][camera][name])
    assert seen["instruction"] == sent["instruction"]
    np.testing.assert_array_equal(seen["position"], sent["position"][None])
    assert seen["gripper"].shape == (1,)


def test_a_policy_of_one_camera_is_sent_one_image(observation: Observe) -> None:
    needs = Needs(arms=("left", "right"))
    two = {"position": np.zeros((2, 3)), "quaternion": np.tile([1.0, 0, 0, 0], (2, 1)), "gripper": np.ones(2)}
    seen, _ = decode_request(encode_observation(observation(**two), needs), needs)
    assert set(seen) == {"image", "intrinsics", "world_to_camera", "position", "quaternion", "gripper"}
    assert seen["position"].shape == (2, 3)


def test_a_camera_whose_calibration_is_not_read_comes_without(observation: Observe, needs: Needs) -> None:
    some, sent = replace(needs, calibration=("over",)), observation()
    body = encode_observation(sent, some)
    assert set(load(body)) == set(load(encode_observation(sent, needs))) - {
        "cameras/front/intrinsics",
        "cameras/front/world_to_camera",
    }
    seen, _ = decode_request(body, some)
    assert list(seen["cameras"]["front"]) == ["image"]
    np.testing.assert_array_equal(seen["cameras"]["over"]["intrinsics"], sent["cameras"]["over"]["intrinsics"])
    decode_request(encode_observation(sent, needs), some)  # a client that sends all of them is accepted too
    with pytest.raises(WireError, match="lacks 'cameras/over/intrinsics'"):
        decode_request(changed(body, cameras__over__intrinsics=None), some)
    optional = {name for name, entry in entries_of(some).items() if entry.optional}
    assert optional == {"cameras/front/intrinsics", "cameras/front/world_to_camera"}


def test_single_precision_is_taken(observation: Observe, needs: Needs) -> None:
    body = changed(encode_observation(observation(), needs), position=np.array([0.25, 0, 0.5], np.float32))
    np.testing.assert_array_equal(decode_request(body, needs)[0]["position"], [[0.25, 0, 0.5]])


def test_a_camera_that_gives_nothing_is_to_be_sent_black(observation: Observe, needs: Needs) -> None:
    """The message used to say that the policy needs all cameras, which is wrong for a policy that masks missing
    ones."""
    sent = observation()
    with pytest.raises(ValueError, match=r"camera 'front' of the observation is None.*give it a black image"):
        encode_observation(sent | {"cameras": sent["cameras"] | {"front": None}}, needs)


def test_what_the_robot_lacks_is_said_before_anything_is_sent(observation: Observe, needs: Needs) -> None:
    sent = observation()
    del sent["cameras"]["front"]
    with pytest.raises(ValueError, match=r"lacks camera 'front'.*it has over"):
        encode_observation(sent, needs)
    sent = observation()
    del sent["cameras"]["front"]["intrinsics"]
    with pytest.raises(ValueError, match="lacks 'cameras/front/intrinsics', which the policy reads"):
        encode_observation(sent, needs)
    one_camera = replace(needs, cameras=("front",))
    alone = {**sent, "image": sent["cameras"]["front"]["image"]}
    del alone["cameras"], alone["intrinsics"]
    with pytest.raises(ValueError, match="lacks 'intrinsics', which the policy reads"):
        encode_observation(alone, one_camera)
    sent = observation()
    del sent["instruction"]
    with pytest.raises(ValueError, match="lacks 'instruction'"):
        encode_observation(sent, needs)


def test_all_that_is_missing_is_named_in_one_error(observation: Observe, needs: Needs) -> None:
    sent = observation()
    body = encode_observation(sent, needs)
    del sent["cameras"]["over"]["intrinsics"], sent["cameras"]["front"], sent["position"], sent["gripper"]
    listed = [r"'cameras/over/intrinsics' \(3 x 3", "camera 'front' in 'cameras'", r"'position' \(", r"'gripper' \("]
    with pytest.raises(ValueError, match=f"^the observation lacks {'.*, '.join(listed)}"):
        encode_observation(sent, needs)
    unnamed = {name: observation()[name] for name in ("cameras", "position", "quaternion", "gripper")}
    with pytest.raises(ValueError, match=r"lacks 'image', 'intrinsics', 'world_to_camera', which the policy reads$"):
        encode_observation(unnamed, replace(needs, cameras=(), instruction=False))
    with pytest.raises(WireError, match=r"lacks 'cameras/over/intrinsics': \{.*\}, 'position': \{.*\}, 'gripper': \{"):
        decode_request(changed(body, cameras__over__intrinsics=None, position=None, gripper=None), needs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": None}, "lacks 'position'"),
        ({"positon": np.zeros(3)}, "unknown array 'positon'; did you mean 'position'"),
        ({"position": np.zeros(4)}, "'position' must be 1 x 3, not 4"),
        ({"position": np.zeros((2, 3))}, "'position' must be 1 x 3, not 2 x 3"),
        ({"position": np.zeros(3, np.int64)}, "'position' must be float32 or float64, not int64"),
        ({"position": np.array([0.3, np.nan, 0.1])}, "'position' holds numbers that are not finite"),
        ({"gripper": np.array(3.0)}, r"'gripper' must lie in 0 \(closed\) to 1"),
        ({"gripper": np.zeros((1, 1))}, "'gripper' must be 1, not 1 x 1"),
        ({"quaternion": np.zeros(4)}, "'quaternion' is no unit quaternion"),
        (
            {"cameras__over__image": np.zeros((48, 64, 3), np.float32)},
            "'cameras/over/image' must be uint8, not float32",
        ),
        ({"cameras__over__image": np.zeros((48, 64), np.uint8)}, "'cameras/over/image' must be H x W x 3, not 48 x 64"),
        ({"cameras__over__image": np.zeros((48, 64, 4), np.uint8)}, "must be H x W x 3, not 48 x 64 x 4"),
        ({"cameras__over__image": np.zeros((0, 64, 3), np.uint8)}, "sides of 0 and 64 pixels"),
        ({"cameras__over__image": np.zeros((16, 9000, 3), np.uint8)}, "sides of 16 and 9000 pixels"),
        ({"cameras__front__intrinsics": np.zeros((3, 3))}, "'cameras/front/intrinsics' is no camera matrix"),
        (
            {"cameras__front__world_to_camera": np.zeros((4, 4))},
            "world_to_camera' is no rigid transform",
        ),
        ({"cameras__wrist__image": np.zeros((48, 64, 3), np.uint8)}, "unknown array 'cameras/wrist/image'"),
        ({"instruction": np.zeros(0, np.uint8)}, "'instruction' must have 1 to 1000 bytes"),
        ({"instruction": np.full(2000, 97, np.uint8)}, "must have 1 to 1000 bytes, not 2000"),
        ({"instruction": np.array([255, 254], np.uint8)}, "'instruction' is not UTF-8"),
        ({"instruction": np.frombuffer(b"put\x00it", np.uint8)}, "'instruction' holds control characters"),
    ],
)
def test_what_makes_no_sense_is_named(
    observation: Observe, needs: Needs, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(WireError, match=message):
        decode_request(changed(encode_observation(observation(), needs), **changes), needs)


def with_header(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class Exploding:
    """Would leave a file if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"hello, robot",
        pickle.dumps(Exploding()),
        pickle.dumps({"position": np.zeros(3)}),
        struct.pack("<Q", 1 << 60) + b"{}",  # a header longer than any body
        with_header({"position": {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]}}, b"short"),
        with_header({"position": {"dtype": "F64", "shape": [1 << 40], "data_offsets": [0, 24]}}, bytes(24)),
        with_header({"position": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        with_header({"position": {"dtype": "F64", "shape": [-1], "data_offsets": [0, 8]}}, bytes(8)),
        with_header({"position": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}, bytes(6)),
        with_header({"position": 3}, b""),
        bytes(save({"position": np.zeros(3)}))[:-3],
        bytes(save({"position": np.zeros(3)})) + b"more",
    ],
    ids=[
        "empty", "braces", "words", "pickle", "pickle of arrays", "huge header", "short", "huge shape", "object",
        "negative shape", "unknown type", "no entry", "cut off", "too long",
    ],
)  # fmt: skip
def test_what_is_not_in_the_format_is_refused(body: bytes, needs: Needs) -> None:
    with pytest.raises(WireError):
        decode_request(body, needs)


@pytest.mark.parametrize(("uncertainty", "held_back"), [(None, None), (np.full((2, 5), 0.25), np.full((2, 3), 0.1))])
def test_a_plan_arrives_as_it_was(uncertainty: np.ndarray | None, held_back: np.ndarray | None) -> None:
    rng = np.random.default_rng(0)
    poses = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5, 4)), rng.random((2, 5))
    plan = Plan(*poses, 0.3, uncertainty, held_back=held_back)
    seen = decode_plan(encode_plan(plan))
    assert seen.step_seconds == 0.3
    for name in ("position", "quaternion", "gripper", "uncertainty", "held_back"):
        np.testing.assert_array_equal(getattr(seen, name), getattr(plan, name))


def test_an_answer_that_is_no_plan_is_refused() -> None:
    body = encode_plan(Plan(np.zeros((1, 5, 3)), np.zeros((1, 5, 4)), np.zeros((1, 5)), 0.3))
    with pytest.raises(WireError, match="it holds gripper, position, quaternion"):
        decode_plan(changed(body, step_seconds=None))
    with pytest.raises(WireError, match="position is"):
        decode_plan(changed(body, position=np.zeros((1, 4, 3))))
    with pytest.raises(WireError, match="held_back is"):
        decode_plan(changed(body, held_back=np.zeros((1, 5, 3))))


def test_the_robots_side_needs_no_torch() -> None:
    """The robot's computer is small: the client depends only on numpy, scipy and safetensors."""
    look = (
        "import sys; import keygrip.runtime.client; print(sorted({'torch', 'aiohttp', 'lightning'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run([sys.executable, "-c", look], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
