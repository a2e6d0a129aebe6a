"""Clients of a policy server in a separate process, without torch: robots of both protocols, a probe and attackers."""

from __future__ import annotations

import asyncio
import http.client
import json
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from keygrip.runtime.client import RemotePolicy
from keygrip.runtime.messagepack import pack, unpack
from keygrip.runtime.wire import CONTENT_TYPE, decode_plan, encode_observation

PATIENCE_S = 60.0
PROBE_EVERY_S = 0.02
FLOOD_NAMES = 200_000  # a message of 13 MB
OUTCOMES = ("sent", "refused", "cut_off", "answered", "not_finite", "unnamed")  # see `attack`
REFUSED = (400, 413, 422, 503)  # statuses of a refusal that names its reason; 503: busy

Answers = list[np.ndarray]  # one client's plans: [T, 8] position, quaternion w x y z, gripper


def http_clients(
    url: str, observations: Sequence[dict[str, Any]], seeds: Sequence[int], requests: int
) -> list[Answers]:
    """Return the plans of several robots with one arm over HTTP, one robot per seed; the robot with seed i starts at
    observation i."""

    def robot(seed: int) -> Answers:
        plans = []
        with RemotePolicy(url, timeout_s=PATIENCE_S, patience_s=PATIENCE_S) as policy:
            policy.reset(seed)
            for request in range(requests):
                plan = policy.plan(observations[(seed + request) % len(observations)])
                plans.append(np.concatenate([plan.position[0], plan.quaternion[0], plan.gripper[0][:, None]], axis=-1))
        return plans

    with ThreadPoolExecutor(len(seeds)) as threads:
        return list(threads.map(robot, seeds))


def openpi_clients(
    url: str, observations: Sequence[dict[str, Any]], seeds: Sequence[int], requests: int
) -> list[Answers]:
    """Like `http_clients`, over openpi's websocket protocol."""
    import aiohttp

    bodies = [pack({name: np.asarray(value) for name, value in observation.items()}) for observation in observations]

    async def robot(session: aiohttp.ClientSession, seed: int) -> Answers:
        plans: Answers = []
        async with session.ws_connect(url, max_msg_size=0) as socket:
            await socket.receive_bytes()
            await socket.send_bytes(pack({"reset": seed}))
            await socket.receive_bytes()
            while len(plans) < requests:
                await socket.send_bytes(bodies[(seed + len(plans)) % len(bodies)])
                answer = await socket.receive()
                if isinstance(answer.data, str) and answer.data.startswith("503: busy"):
                    await asyncio.sleep(0.05)
                    continue
                if not isinstance(answer.data, bytes):
                    raise RuntimeError(f"the server says {answer.data!r}")
                plans.append(np.array(unpack(answer.data)["actions"]))
        return plans

    async def all_robots() -> list[Answers]:
        async with aiohttp.ClientSession() as session:
            return list(await asyncio.gather(*(robot(session, seed) for seed in seeds)))

    return asyncio.run(all_robots())


def probe(url: str, stop: Connection) -> tuple[list[float], list[float]]:
    """Send ``GET /health`` repeatedly until `stop` receives a message. Return the seconds of each request, and how late
    this process was woken before each request: the delay caused by all other processes, not only the server."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE_S)
    seconds, late = [], []
    asleep = time.perf_counter()
    while not stop.poll(PROBE_EVERY_S):
        started = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        seconds.append(time.perf_counter() - started)
        late.append(started - asleep - PROBE_EVERY_S)
        asleep = time.perf_counter()
    return seconds, late


Attack = tuple[Callable[[str, bytes], str], bytes]  # `post_plan` or `send_message`, and what it sends


def prepare_attacks(url: str, observation: dict[str, Any]) -> list[Attack]:
    """Return messages that the server must refuse, in turn over HTTP and a websocket.

    Args:
        observation: a valid one with one camera.
    """
    with RemotePolicy(url, timeout_s=PATIENCE_S) as policy:
        needs = policy.needs
    wild = wild_observations(observation)
    over_http = [*malformed_bodies(), *(encode_observation(seen, needs) for seen in wild)]
    over_websocket = [
        *malformed_messages(),
        *(pack({name: np.asarray(value) for name, value in seen.items()}) for seen in wild),
    ]
    return [
        attack
        for body, message in zip(over_http, over_websocket, strict=True)
        for attack in ((post_plan, body), (send_message, message))
    ]


def attack(url: str, stop: Connection, attacks: Sequence[Attack]) -> Counter[str]:
    """Send attacks one after another, each of them at least once, until `stop` receives a message.

    Returns:
        How many were `sent`, and of these: `refused` with a reason; `cut_off`, the connection closed without an answer;
        `answered` with a finite plan; answered with a plan that is `not_finite`; `unnamed`, any other answer, or none
        within `PATIENCE_S`.
    """
    counts: Counter[str] = Counter()
    while counts["sent"] < len(attacks) or not stop.poll():
        send, body = attacks[counts["sent"] % len(attacks)]
        counts["sent"] += 1
        counts[send(url, body)] += 1
        time.sleep(PROBE_EVERY_S)
    return counts


def wild_observations(observation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return observations that the server must refuse, each a valid one with one camera and one change: a start at 1e20
    m, in millimetres, in centimetres, or not a number; a camera pose that is mirrored or not a number."""
    position, pose = np.asarray(observation["position"], float), np.asarray(observation["world_to_camera"], float)
    changes: list[dict[str, Any]] = [
        {"position": np.array([1e20, 0.0, 0.0])},
        {"position": 1000 * position},
        {"position": 100 * position},
        {"position": np.full(3, np.nan)},
        {"world_to_camera": np.diag([1.0, 1.0, -1.0, 1.0]) @ pose},
        {"world_to_camera": np.full((4, 4), np.nan)},
    ]
    return [observation | change for change in changes]


def malformed_bodies() -> list[bytes]:
    """Return bodies of POST /plan with many names, a deeply nested header and a header that is not text."""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    headers = [
        json.dumps({f"{number:014x}": entry for number in range(FLOOD_NAMES)}, separators=(",", ":")).encode(),
        b'{"a":' * 3000 + b"1" + b"}" * 3000,
        b"\xff" * 10_000,
    ]
    return [struct.pack("<Q", len(header)) + header for header in headers]


def malformed_messages() -> list[bytes]:
    """Return MessagePack messages with many names, deeply nested maps and bytes that are no message."""
    names = b"".join(b"\xd9\x3e%062x\x00" % number for number in range(FLOOD_NAMES))
    return [b"\xdf" + struct.pack(">I", FLOOD_NAMES) + names, b"\x81\xa1a" * 3000 + b"\x01", b"\xff" * 10_000]


def post_plan(url: str, body: bytes) -> str:
    """Send a body to POST /plan; return what became of it, one of the keys of `attack`."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE_S)
    try:
        connection.request("POST", "/plan", body, {"Content-Type": CONTENT_TYPE})
        response = connection.getresponse()
        answer = response.read()
    except TimeoutError:
        return "unnamed"
    except (OSError, http.client.HTTPException):
        return "cut_off"  # for example refused before all of it was sent
    finally:
        connection.close()
    if response.status == 200:
        plan = decode_plan(answer)
        finite = all(np.isfinite(part).all() for part in (plan.position, plan.quaternion, plan.gripper))
        return "answered" if finite else "not_finite"
    try:
        reason = json.loads(answer)["error"]
    except (ValueError, TypeError, KeyError):
        reason = None
    return "refused" if response.status in REFUSED and reason else "unnamed"


def send_message(url: str, body: bytes) -> str:
    """Like `post_plan`, with a message over openpi's websocket protocol."""
    import aiohttp

    async def answer_to_message() -> Any:
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            await socket.receive_bytes(timeout=PATIENCE_S)
            await socket.send_bytes(body)
            return (await socket.receive(timeout=PATIENCE_S)).data

    try:
        answer = asyncio.run(answer_to_message())
    except TimeoutError:
        return "unnamed"
    except (OSError, TypeError, aiohttp.ClientError):  # TypeError: closed before the first message
        return "cut_off"
    if isinstance(answer, bytes):
        return "answered" if np.isfinite(unpack(answer)["actions"]).all() else "not_finite"
    if not isinstance(answer, str):
        return "cut_off"
    status, _, reason = answer.partition(": ")
    return "refused" if status in map(str, REFUSED) and reason else "unnamed"


ROLES = {"http": http_clients, "openpi": openpi_clients, "probe": probe, "attack": attack}


def play(role: str, parent: Connection, url: str, arguments: tuple[Any, ...]) -> None:
    """Run one role in a process: report that it is ready, start when `parent` sends a message, send the result or the
    error to `parent`."""
    try:
        if role == "attack":
            arguments = (prepare_attacks(url, *arguments),)  # takes seconds: before the start
        parent.send(None)
        parent.recv()
        if role in ("probe", "attack"):
            parent.send(ROLES[role](url, parent, *arguments))  # type: ignore[operator]
        else:
            parent.send(ROLES[role](url, *arguments))  # type: ignore[operator]
    except Exception as error:
        parent.send(error)
