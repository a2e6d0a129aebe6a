"""The policy server: time of a request over the local network interface, and requests per second."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import ClassVar

import numpy as np

from keygrip.benchmarks.deadline import deadlines
from keygrip.benchmarks.inference import looking_down, untrained
from keygrip.benchmarks.measuring import MIN_REPETITIONS, milliseconds
from keygrip.config import compose
from keygrip.runtime.client import RemotePolicy
from keygrip.runtime.server import PolicyServer
from keygrip.runtime.service import Limits

START_S = 300.0  # time limit for the start of the server on a busy machine


@dataclass(frozen=True)
class Server:
    """Time of ``RemotePolicy.plan`` with a server in a separate process. Weights are random.

    Args:
        overrides: overrides of ``keygrip.train`` that select the volume-query policy.
        clients: robots that send requests at the same time, for `requests_per_s`; the server's queue holds that many.
        requests, quick_requests: requests of one robot alone, and the same number of all robots together; fewer, but
            at least ``MIN_REPETITIONS``, if the requests of one robot take longer than ``limit_s`` or
            ``quick_limit_s``, or after the `deadline`. warm_up: requests before them.
        device: device of the server.
    """

    in_other_processes: ClassVar = True  # what is set in this process has no effect there
    overrides: Sequence[str]
    clients: int
    requests: int
    quick_requests: int
    warm_up: int
    limit_s: float
    quick_limit_s: float
    device: str = "cpu"

    def run(self, quick: bool) -> dict[str, float]:
        """`p50_ms` and `p95_ms` of one robot's requests, `plan_p50_ms` of the policy within these requests,
        `requests_per_s` and `crowd_p95_ms` of `clients` robots, and `batched_requests_per_s` of `clients` robots whose
        plans are computed as one batch (`limits.batch`)."""
        context = multiprocessing.get_context("spawn")
        parent_end, child_end = context.Pipe()
        process = context.Process(
            target=_serve, args=(list(self.overrides), self.device, self.clients, child_end), daemon=True
        )
        process.start()
        child_end.close()
        try:
            if not parent_end.poll(START_S):
                raise TimeoutError(f"the server has not started within {START_S:g} s")
            one_by_one, batching = parent_end.recv(), parent_end.recv()
            return self._measure(one_by_one, batching, quick)
        except EOFError as error:
            raise ChildProcessError("the server's process has died") from error
        finally:
            parent_end.close()  # this stops the server
            process.join(30)
            if process.is_alive():
                process.kill()

    def _measure(self, url: str, batching: str, quick: bool) -> dict[str, float]:
        requests, limit_s = (self.quick_requests, self.quick_limit_s) if quick else (self.requests, self.limit_s)
        observation = looking_down(compose("train", self.overrides).data.record.image_size)

        def ask(url: str, count: int) -> list[float]:
            """Return the seconds of each request of one robot."""
            seconds: list[float] = []
            with RemotePolicy(url, timeout_s=60) as policy:
                for request in range(-self.warm_up, count):
                    started = time.perf_counter()
                    policy.plan(observation)
                    if request >= 0:
                        seconds.append(time.perf_counter() - started)
                    late = sum(seconds) > limit_s or time.perf_counter() > min(deadlines, default=math.inf)
                    if late and len(seconds) >= MIN_REPETITIONS:
                        break
            return seconds

        def crowd_at(url: str) -> tuple[list[list[float]], float]:
            """Return the seconds of each request of all robots, by robot, and requests per second with warm-up."""
            began = time.perf_counter()
            with ThreadPoolExecutor(self.clients) as crowd:
                crowd_seconds = list(crowd.map(partial(ask, url), [requests // self.clients] * self.clients))
            request_count = sum(len(seconds) + self.warm_up for seconds in crowd_seconds)
            return crowd_seconds, round(request_count / (time.perf_counter() - began), 2)

        alone = np.array(ask(url, requests))
        with RemotePolicy(url) as policy:
            plan_p50_ms = policy.health()["plan_p50_ms"]
        crowd_seconds, requests_per_s = crowd_at(url)
        _, batched_requests_per_s = crowd_at(batching)
        return {
            "p50_ms": milliseconds(alone),
            "p95_ms": milliseconds(alone, 95),
            "plan_p50_ms": plan_p50_ms,
            "requests_per_s": requests_per_s,
            "crowd_p95_ms": milliseconds(np.concatenate([np.array(seconds) for seconds in crowd_seconds]), 95),
            "batched_requests_per_s": batched_requests_per_s,
            "clients": self.clients,
        }


def closed_event(parent: Connection) -> asyncio.Event:
    """Return an event that is set when the other end of a connection is closed. The other end must send no messages;
    call this in an event loop."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()

    def wait() -> None:
        parent.poll(None)
        loop.call_soon_threadsafe(event.set)

    threading.Thread(target=wait, daemon=True).start()
    return event


def _serve(overrides: list[str], device: str, clients: int, parent: Connection) -> None:
    """Run two servers of one policy until the other end of `parent` is closed: one computes plans one by one, the other
    in batches."""
    policy = untrained(compose("train", overrides)).to(device).policy()
    about = {"model": type(policy.module).__name__}

    async def until_closed() -> None:
        stop = closed_event(parent)
        listening = []
        for batch in (1, clients):
            server = PolicyServer(policy, policy.needs, about, Limits(waiting=clients, batch=batch))
            bound = asyncio.Event()

            def ready(url: str, bound: asyncio.Event = bound) -> None:
                parent.send(url)
                bound.set()

            listening.append(asyncio.create_task(server.serve("127.0.0.1", 0, stop, ready)))
            await bound.wait()
        await asyncio.gather(*listening)

    asyncio.run(until_closed())
