"""Clients of a policy server in a separate process, without torch: robots of both protocols, a probe and attackers."""

from __future__ import annotations

import asyncio
import http.client
import json
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from keygrip.runtime.client import RemotePolicy
from keygrip.runtime.messagepack import pack, unpack
from keygrip.runtime.wire import CONTENT_TYPE

PATIENCE_S = 60.0
PROBE_EVERY_S = 0.02
FLOOD_NAMES = 100_000

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


def attack(url: str, stop: Connection) -> int:
    """Send bodies with many names, deeply nested headers and damaged messages until `stop` receives a message; return
    how many were answered with a plan."""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    headers = [
        json.dumps({f"{number:032x}": entry for number in range(FLOOD_NAMES)}).encode(),
        b'{"a":' * 3000 + b"1" + b"}" * 3000,
        b"\xff" * 10_000,
    ]
    bodies = [struct.pack("<Q", len(header)) + header for header in headers]
    parts, plans, turn = urlsplit(url), 0, 0
    assert parts.hostname is not None
    while not stop.poll(PROBE_EVERY_S):
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE_S)
        try:
            connection.request("POST", "/plan", bodies[turn % len(bodies)], {"Content-Type": CONTENT_TYPE})
            plans += connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            pass  # refused before all of it was sent
        finally:
            connection.close()
        turn += 1
    return plans


ROLES = {"http": http_clients, "openpi": openpi_clients, "probe": probe, "attack": attack}


def play(role: str, parent: Connection, url: str, arguments: tuple[Any, ...]) -> None:
    """Run one role in a process: report that it is ready, start when `parent` sends a message, send the result or the
    error to `parent`."""
    parent.send(None)
    parent.recv()
    try:
        if role in ("probe", "attack"):
            parent.send(ROLES[role](url, parent))  # type: ignore[operator]
        else:
            parent.send(ROLES[role](url, *arguments))  # type: ignore[operator]
    except Exception as error:
        parent.send(error)
