"""The policy server: time of a request over the machine's own network, and how many a second it answers."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from keygrip.benchmarks.inference import looking_down, untrained
from keygrip.benchmarks.measuring import milliseconds
from keygrip.config import compose
from keygrip.runtime.client import RemotePolicy
from keygrip.runtime.server import Limits, PolicyServer

START_S = 300.0  # for the server's process, on a machine that is busy


@dataclass(frozen=True)
class Server:
    """``RemotePolicy.plan`` against a server in a process of its own. Weights are random.

    Args:
        overrides: of ``keygrip.train``, which say what volume-query policy.
        clients: robots that ask at once, for `requests_per_s`; the server is told to let so many wait.
        requests, quick_requests: of one robot alone, and as many of the crowd together; fewer where they take longer
            than ``limit_s`` or ``quick_limit_s`` each. warm_up: before those.
        device: that the server computes on.
    """

    overrides: Sequence[str]
    clients: int
    requests: int
    quick_requests: int
    warm_up: int
    limit_s: float
    quick_limit_s: float
    device: str = "cpu"

    def run(self, quick: bool) -> dict[str, float]:
        """`p50_ms` and `p95_ms` of one robot's requests, `plan_p50_ms` of the policy inside of them, `requests_per_s`
        and `crowd_p95_ms` of `clients` robots."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(list(self.overrides), self.device, self.clients, theirs), daemon=True
        )
        process.start()
        theirs.close()
        try:
            if not ours.poll(START_S):
                raise RuntimeError(f"the server has not started within {START_S:g} s")
            url = ours.recv()
            return self._measure(url, quick)
        except EOFError as error:
            raise RuntimeError("the server's process has died") from error
        finally:
            ours.close()  # tells it to stop
            process.join(30)
            if process.is_alive():
                process.kill()

    def _measure(self, url: str, quick: bool) -> dict[str, float]:

        requests, limit_s = (self.quick_requests, self.quick_limit_s) if quick else (self.requests, self.limit_s)
        observation = looking_down(compose("train", self.overrides).data.record.image_size)

        def ask(count: int) -> list[float]:
            """Seconds of each of one robot's requests."""
            seconds: list[float] = []
            with RemotePolicy(url, timeout_s=60) as policy:
                for request in range(-self.warm_up, count):
                    started = time.perf_counter()
                    policy.plan(observation)
                    if request >= 0:
                        seconds.append(time.perf_counter() - started)
                    if sum(seconds) > limit_s:
                        break
            return seconds

        alone = np.array(ask(requests))
        with RemotePolicy(url) as policy:
            plan_p50_ms = policy.health()["plan_p50_ms"]
        began = time.perf_counter()
        with ThreadPoolExecutor(self.clients) as crowd:
            together = list(crowd.map(ask, [requests // self.clients] * self.clients))
        wall_s = time.perf_counter() - began
        asked = sum(len(seconds) + self.warm_up for seconds in together)
        return {
            "p50_ms": milliseconds(alone),
            "p95_ms": milliseconds(alone, 95),
            "plan_p50_ms": plan_p50_ms,
            "requests_per_s": round(asked / wall_s, 2),
            "crowd_p95_ms": milliseconds(np.concatenate([np.array(seconds) for seconds in together]), 95),
            "clients": self.clients,
        }


def _serve(overrides: list[str], device: str, clients: int, parent: Connection) -> None:
    """A server until the other end of `parent` is closed."""

    policy = untrained(compose("train", overrides)).to(device).policy()
    server = PolicyServer(policy, policy.needs, {"model": type(policy.module).__name__}, Limits(waiting=clients))

    async def until_closed() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def watch() -> None:
            parent.poll(None)  # there is never a message: it ends when the other end is closed
            loop.call_soon_threadsafe(stop.set)

        threading.Thread(target=watch, daemon=True).start()
        await server.serve("127.0.0.1", 0, stop, parent.send)

    asyncio.run(until_closed())
