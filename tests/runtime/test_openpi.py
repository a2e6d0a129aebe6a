"""openpi's protocol: messages written by hand, and its own client where `make openpi` has installed one."""

from __future__ import annotations

import ast
import asyncio
import json
import math
import os
import re
import struct
import subprocess
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from keygrip.config import compose
from keygrip.models.policy import Needs, Plan
from keygrip.runtime import openpi
from keygrip.runtime.messagepack import MessagePackError, pack, unpack
from keygrip.runtime.openpi import decode_message, encode_plan
from keygrip.runtime.wire import WireError

Observe = Callable[..., dict[str, Any]]
Start = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]
TOKEN = "correct-horse-battery"
# What openpi-client 0.1.2 makes of {"cameras": {"over": {"image": uint8 [1, 2, 3]}}, "position": float32 [3],
# "gripper": numpy.float32(0.5), "n": -300, "big": 70000, "prompt": "pick", "flag": True, "none": None,
# "list": [1, 2.5]}.
RECORDED = bytes.fromhex(
    "89a763616d6572617381a46f76657281a5696d61676584c40b5f5f6e6461727261795f5fc3c40464617461c406000102030405c405647479"
    "7065a37c7531c405736861706593010203a8706f736974696f6e84c40b5f5f6e6461727261795f5fc3c40464617461c40c0000803e000000"
    "00000080bfc4056474797065a33c6634c40573686170659103a76772697070657283c40d5f5f6e7067656e657269635f5fc3c40464617461"
    "cb3fe0000000000000c4056474797065a33c6634a16ed1fed4a3626967ce00011170a670726f6d7074a47069636ba4666c6167c3a46e6f6e"
    "65c0a46c6973749201cb4004000000000000"
)


def text(value: str) -> bytes:
    return struct.pack(">BH", 0xDA, len(value)) + value.encode()


def array(value: np.ndarray) -> bytes:
    """Pack an array as openpi's client does: a map of four entries whose keys are bytes."""
    shape = bytes([0x90 | value.ndim]) + b"".join(struct.pack(">BH", 0xCD, size) for size in value.shape)
    return (
        b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data" + struct.pack(">BI", 0xC6, value.nbytes) + value.tobytes()
        + b"\xc4\x05dtype" + text(value.dtype.str) + b"\xc4\x05shape" + shape
    )  # fmt: skip


def message(observation: dict[str, Any]) -> bytes:
    """Encode an observation with flat names, without the code under test."""
    entries = {name: array(np.asarray(observation[name])) for name in ("position", "quaternion", "gripper")}
    for camera, view in observation["cameras"].items():
        entries |= {f"cameras/{camera}/{name}": array(value) for name, value in view.items()}
    entries["prompt"] = text(observation["instruction"])
    return bytes([0x80 | len(entries)]) + b"".join(text(name) + value for name, value in entries.items())


def test_messages_of_the_real_client_are_read() -> None:
    seen = unpack(RECORDED)
    np.testing.assert_array_equal(seen["cameras"]["over"]["image"], np.arange(6, dtype=np.uint8).reshape(1, 2, 3))
    np.testing.assert_array_equal(seen["position"], np.array([0.25, 0, -1], np.float32))
    assert (seen["gripper"].dtype, float(seen["gripper"])) == (np.float32, 0.5)
    rest = {name: seen[name] for name in ("n", "big", "prompt", "flag", "none", "list")}
    assert rest == {"n": -300, "big": 70000, "prompt": "pick", "flag": True, "none": None, "list": [1, 2.5]}


def test_what_is_written_is_read_again() -> None:
    values = [None, True, 0, -1, 127, 128, -32, -33, 2**63, -(2**63), 1.5, "", "é" * 200, [1] * 40, {"a": {"b": [2]}}]
    again = unpack(pack(values))
    assert again == values
    assert bytes(unpack(pack(bytes(70000)))) == bytes(70000)
    for value in (np.zeros((2, 0), np.uint8), np.array(2.0), np.arange(12.0).reshape(3, 2, 2).T):
        seen = unpack(pack({"x": value}))["x"]
        np.testing.assert_array_equal(seen, value)
        assert seen.dtype == value.dtype
    for bad in ({1: 2}, object(), np.zeros(2, complex), np.array(["x"])):
        with pytest.raises(TypeError):
            pack(bad)
    with pytest.raises(OverflowError):
        pack(2**64)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "ends in the middle"),
        (b"\xc1", "reserved type"),
        (b"\xc7\x01\x01\x00", "extension"),
        (b"\x93\x01", "ends in the middle"),
        (b"\xdd\xff\xff\xff\xff", "more than 512 values"),
        (b"\xdf\xff\xff\xff\xff", "more than 512 values"),
        (b"\xc6\xff\xff\xff\xff", "ends in the middle"),
        (b"\xdb\xff\xff\xff\xff", "string of 4294967295 bytes"),
        (b"\x91" * 5000, "within each other"),
        (b"\xdc\x02\x00" + b"\x90" * 512, "more than 512 values"),
        (b"\x81\x01\x02", "no string"),
        (b"\x82\xa1a\x01\xa1a\x02", "'a' twice"),
        (b"\xa1\xff", "not UTF-8"),
        (b"\x01\x01", "1 bytes follow"),
        (array(np.zeros(2))[:-3] + struct.pack(">BH", 0xCD, 9), "shape .* in 16 bytes"),
        (array(np.zeros(2)).replace(b"<f8", b"|O8"), "type '|O8'"),
        (pack({"__ndarray__": True, "data": b"", "dtype": "|u1", "shape": [2**62, 2**62, 0]}), "no array has"),
        (pack({"__ndarray__": True, "data": b"", "dtype": "|u1", "shape": [2**64 - 1, 0]}), "no array has"),
        (b"\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\xcd\x03\xe8\xc4\x05dtype\xa3|u1", "outside its type"),
        (b"\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\xa1x\xc4\x05dtype\xa3<f4", "no number"),
        (pack({"__ndarray__": True, "data": b"", "dtype": np.zeros(2, np.uint8), "shape": [0]}), "array of type"),
        (pack({"__npgeneric__": True, "data": 1, "dtype": np.zeros(2, np.uint8)}), "array of type"),
        (pack({"__npgeneric__": True, "data": math.nan, "dtype": "<i4"}), "outside its type <i4"),
        (pack({"__npgeneric__": True, "data": math.nan, "dtype": "|u1"}), r"outside its type \|u1"),
    ],
)
def test_what_is_not_in_the_format_or_too_large_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(MessagePackError, match=message):
        unpack(body)


def test_every_damaged_message_is_refused_or_read(observation: Observe, needs: Needs) -> None:
    good, rng = message(observation()), np.random.default_rng(0)
    for _ in range(300):
        body = bytearray(good)
        for place in rng.integers(0, 400, 3):
            body[place] = rng.integers(256)
        try:
            seen = decode_message(bytes(body[: rng.integers(1, 2 * len(body))]), needs)
        except WireError:
            continue
        assert isinstance(seen, int) or set(seen) >= {"position", "cameras"}


def test_an_observation_arrives_in_either_spelling(observation: Observe, needs: Needs) -> None:
    sent = observation()
    flat = decode_message(message(sent), needs)
    nested = {name: sent[name] for name in ("position", "quaternion", "cameras", "instruction")}
    numbers = decode_message(pack(nested | {"position": sent["position"].tolist(), "gripper": 0.5}), needs)
    whole = decode_message(pack(nested | {"gripper": np.array(1, np.int64)}), needs)  # as numpy.int64(1) arrives
    for seen in (flat, numbers, whole):
        assert isinstance(seen, dict)
        assert seen["instruction"] == sent["instruction"]
        np.testing.assert_array_equal(seen["position"], sent["position"][None])
        np.testing.assert_array_equal(seen["cameras"]["front"]["image"], sent["cameras"]["front"]["image"])
    assert decode_message(b"\x81\xa5reset\x07", needs) == 7
    for bad, words in (
        (b"\x93\x01\x02\x03", "a map with string keys"),
        (b"\x81\xa5reset\xa1x", "the seed of the episode"),
        (pack({"prompt": "a", "instruction": "b"}), "'instruction' twice"),
        (pack({"position": ["left"]}), "'position' is no array of numbers"),
        (pack({"observation/state": np.zeros(8)}), "unknown array 'observation/state'"),
        (pack({"image": None}), "'image' must be an array or a string"),
    ):
        with pytest.raises(WireError, match=words):
            decode_message(bad, needs)


def talk(url: str, script: Callable[[aiohttp.ClientWebSocketResponse], Awaitable[Any]], **headers: str) -> Any:
    async def run() -> Any:
        async with aiohttp.ClientSession() as session, session.ws_connect(url, headers=headers) as socket:
            return await script(socket)

    return asyncio.run(run())


def actions_of(plan: Plan) -> np.ndarray:
    """Return the actions [T, 8] of a plan for one arm."""
    return np.concatenate([plan.position[0], plan.quaternion[0], plan.gripper[0][:, None]], axis=-1)


def test_a_conversation(running: Start, dice: Any, observation: Observe) -> None:
    local, server = dice(), running(dice())

    async def script(socket: aiohttp.ClientWebSocketResponse) -> list[Any]:
        heard = [unpack(await socket.receive_bytes())]
        for body in (message(observation(1)), message(observation(2)), b"\x81\xa5reset\x05", message(observation(3))):
            await socket.send_bytes(body)
            heard.append(unpack(await socket.receive_bytes()))
        for body in (b"\x81\xa1x\x01", b"\x81\xa5reset\xff", b"\xc1"):
            await socket.send_bytes(body)
            heard.append(await socket.receive_str())
        await socket.send_bytes(message(observation(4)))  # the server still listens
        heard.append(unpack(await socket.receive_bytes()))
        await socket.send_str("hello")
        heard.append((await socket.receive()).type)
        return heard

    first, one, two, reset, three, *refused, four, closed = talk(server.url, script)
    reads = {"arms": ["right"], "cameras": ["over", "front"], "instruction": True, "calibration": True}
    assert first["needs"] == reads | {"plans_joints": False, "camera": None}
    assert first["action_names"][:4] == ["right/x", "right/y", "right/z", "right/qw"]
    assert reset == {"reset": 5}
    expected = [local.plan(observation(1)), local.plan(observation(2))]
    local.reset(5)
    expected += [local.plan(observation(3)), local.plan(observation(4))]
    for answer, plan in zip((one, two, three, four), expected, strict=True):
        np.testing.assert_array_equal(answer["actions"], actions_of(plan))
        assert answer["step_seconds"] == plan.step_seconds
        assert answer["server_timing"]["infer_ms"] > 0
    assert refused[0].startswith("400: 'x' must be an array")
    assert refused[1].startswith("400: a seed is a whole number")
    assert refused[2].startswith("400: the message has an extension")
    assert closed is aiohttp.WSMsgType.CLOSE
    assert server.server.service.metrics.answers["openpi", 400] == 3
    server.stop()
    assert server.server.service.conversations == 0


def test_every_array_of_an_answer_has_the_steps_first() -> None:
    """openpi's ActionChunkBroker takes `[step]` of every array, and leaves lists and numbers as they are."""
    arms, steps = 2, 5
    plan = Plan(
        np.zeros((arms, steps, 3)), np.ones((arms, steps, 4)), np.zeros((arms, steps)), 0.3,
        uncertainty=np.zeros((arms, steps)), joints=np.zeros((arms, steps, 6)), controller=np.zeros((arms, steps, 7)),
        held_back=np.array([[0.0, 0.25, 0.0], [0.5, 0.0, 0.0]]),
    )  # fmt: skip
    answer = unpack(encode_plan(plan, 1.0))
    shapes = {name: value.shape for name, value in answer.items() if isinstance(value, np.ndarray)}
    assert shapes == {"actions": (5, 16), "uncertainty": (5, 2), "joints": (5, 2, 6), "controller": (5, 2, 7)}
    assert answer["held_back"] == [[0.0, 0.25, 0.0], [0.5, 0.0, 0.0]]


def test_what_the_server_did_not_expect_is_an_answer(
    running: Start, dice: Any, observation: Observe, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, decode = running(dice()), openpi.decode_message

    def failing(body: bytes, needs: Needs) -> dict[str, Any] | int:
        if body == b"\x80":
            raise MemoryError
        return decode(body, needs)

    monkeypatch.setattr(openpi, "decode_message", failing)

    async def script(socket: aiohttp.ClientWebSocketResponse) -> tuple[str, Any]:
        await socket.receive_bytes()
        await socket.send_bytes(b"\x80")
        said = await socket.receive_str()
        await socket.send_bytes(message(observation()))
        return said, unpack(await socket.receive_bytes())

    said, answer = talk(server.url, script)
    assert said == "500: the server failed: MemoryError"
    assert "actions" in answer
    assert server.server.service.metrics.answers["openpi", 500] == 1


def test_a_server_that_ends_and_a_silent_client_close_the_conversation(
    running: Start, toy: Any, observation: Observe
) -> None:
    begun, free = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        free.wait(20)

    server = running(toy(wait))

    async def busy(socket: aiohttp.ClientWebSocketResponse) -> list[Any]:
        async with aiohttp.ClientSession() as other, other.ws_connect(server.url) as idle:
            await idle.receive_bytes()
            await socket.receive_bytes()
            await socket.send_bytes(message(observation()))
            assert await asyncio.to_thread(begun.wait, 20)
            stopping = asyncio.create_task(asyncio.to_thread(server.stop))
            closed = await idle.receive()  # at once; the busy connection is answered first
            free.set()
            answer = unpack(await socket.receive_bytes())
            last = await socket.receive()
            await stopping
        return [closed.data, last.data, answer["actions"].shape]

    away = aiohttp.WSCloseCode.GOING_AWAY
    assert talk(server.url, busy) == [away, away, (3, 8)]

    async def silent(socket: aiohttp.ClientWebSocketResponse) -> Any:
        await socket.receive_bytes()
        return (await socket.receive()).data

    assert talk(running(session_s=0.2).url, silent) == away


def test_who_may_not_converse(running: Start, observation: Observe) -> None:
    server = running(more={"token": TOKEN}, request_mb=0.1, sessions=1)

    async def nothing(socket: aiohttp.ClientWebSocketResponse) -> Any:
        await socket.receive_bytes()
        with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
            async with aiohttp.ClientSession() as other:
                await other.ws_connect(server.url, headers={"Authorization": f"Bearer {TOKEN}"})
        await socket.send_bytes(bytes(200_000))
        return await socket.receive()

    for headers, status in (
        ({}, "401"),
        ({"Authorization": "Api-Key wrong"}, "401"),
        ({"Authorization": f"Api-Key {TOKEN}", "Origin": "http://elsewhere"}, "403"),
    ):
        with pytest.raises(aiohttp.WSServerHandshakeError, match=status):
            talk(server.url, nothing, **headers)
    last = talk(server.url, nothing, Authorization=f"Api-Key {TOKEN}")
    assert (last.type, last.data) == (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.MESSAGE_TOO_BIG)


def test_sessions_and_websockets_are_counted_together(running: Start) -> None:
    server = running(sessions=2)

    async def reset_twice(socket: aiohttp.ClientWebSocketResponse) -> Any:
        await socket.receive_bytes()
        async with aiohttp.ClientSession() as other:
            answers = [await other.post(f"{server.url}/reset", json={"seed": 0}) for _ in range(2)]
            return [answer.status for answer in answers], answers[1].headers, await answers[1].json()

    statuses, headers, said = talk(server.url, reset_twice)
    assert statuses == [200, 503]  # the websocket is one of the two
    assert headers["Retry-After"] == "1"
    assert said["error"].startswith("2 sessions are open, websocket connections included")


@pytest.mark.openpi
def test_the_real_client(running: Start, dice: Any, observation: Observe, tmp_path: Path) -> None:
    python = os.environ.get("OPENPI_PYTHON")
    if not python:
        pytest.fail("OPENPI_PYTHON names no interpreter with openpi-client: make openpi")

    class HeldBack(dice):  # type: ignore[misc]
        def plan_batch(self, observations: Any, sessions: Any) -> list[Plan]:
            plans = super().plan_batch(observations, sessions)
            return [replace(plan, held_back=np.array([[0.0, 0.25, 0.0]])) for plan in plans]

    server, local, sent = running(HeldBack(), more={"token": TOKEN}), dice(), observation()
    flat = {name: sent[name] for name in ("position", "quaternion", "gripper", "instruction")}
    for camera, view in sent["cameras"].items():
        flat |= {f"cameras/{camera}/{name}": value for name, value in view.items()}
    np.savez(tmp_path / "observation.npz", **flat)
    robot = ROOT / "tests/support/openpi_robot.py"
    done = subprocess.run(
        [python, robot, "127.0.0.1", str(server.port), tmp_path / "observation.npz", TOKEN],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["metadata"]["model"] == "Toy"
    assert said["answer"] == ["actions", "held_back", "server_timing", "step_seconds"]
    for actions in said["actions"]:
        np.testing.assert_array_equal(actions, actions_of(local.plan(sent)))
    local.reset(5)
    for actions in said["seeded"]:
        np.testing.assert_array_equal(actions, actions_of(local.plan(sent)))
    assert "400: the observation lacks 'cameras/over/image'" in said["refused"]
    np.testing.assert_array_equal([step["actions"] for step in said["steps"]], actions_of(local.plan(sent))[:2])
    assert [step["held_back"] for step in said["steps"]] == [[[0.0, 0.25, 0.0]]] * 2


def test_the_documents_example_is_an_observation_of_the_policy_that_they_serve() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    cfg = compose("train", ["experiment=vla_yam_language"])
    served = re.search(r"checkpoint=runs/(\w+)/", page)
    assert served is not None
    assert served[1] == "geometry_vla_yam_language"
    needs = Needs(arms=tuple(cfg.data.arms), cameras=tuple(cfg.data.cameras), instruction=True)
    (block,) = re.findall(r"(?s)```python\n(from openpi_client.*?)```", page)
    (sent,) = [
        node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Dict) and "prompt" in ast.unparse(node)
    ][:1]
    camera = {
        "image": np.zeros((48, 64, 3), np.uint8),
        "intrinsics": np.diag([40.0, 40, 1]),
        "world_to_camera": np.eye(4),
    }
    values = {"image": camera["image"], "k": camera["intrinsics"], "camera": camera["world_to_camera"]}
    values |= {f"{name}_2": value for name, value in values.items()}
    values |= {"p": np.zeros(3), "q": np.array([1.0, 0, 0, 0]), "g": np.array(1.0)}
    seen = decode_message(pack(eval(compile(ast.Expression(sent), "serving.md", "eval"), values)), needs)
    assert isinstance(seen, dict)
    assert set(seen["cameras"]) == set(needs.cameras)
    assert seen["instruction"] == "put the red cube into the bowl"
