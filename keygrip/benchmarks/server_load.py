"""The policy server under load: compare every plan of many clients with the policy's own, and time `/health`."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import numpy as np
import torch

from keygrip.benchmarks import server_clients
from keygrip.benchmarks.inference import looking_down, untrained
from keygrip.benchmarks.measuring import milliseconds
from keygrip.benchmarks.server import START_S, closed_event
from keygrip.config import compose
from keygrip.models.policy import Policy
from keygrip.runtime.server import PolicyServer
from keygrip.runtime.service import Limits
from keygrip.runtime.sessions import seeded

log = logging.getLogger(__name__)

DONE_S = 3600.0


@dataclass(frozen=True)
class ServerLoad:
    """Robots of both protocols at the same time, half of them per protocol, each with its own seed, during attacks.
    Weights are random. The policy samples its plans, so a session that another client disturbs returns different plans.

    Args:
        overrides: overrides of ``keygrip.train`` that select the volume-query policy.
        clients: number of robots; the robots of one protocol are threads or tasks of one process. requests,
            quick_requests: number of requests of all robots together.
        batch: batch size of the server (`limits.batch`). observations: number of different observations, which each
            robot sends in turn.
        attackers: number of processes that send messages which must be refused (`server_clients.attack`), over both
            protocols: 200 000 names, deep nesting, bytes that are no message, and observations that are not plausible.
    """

    in_other_processes: ClassVar = True  # what is set in this process has no effect there
    overrides: Sequence[str]
    clients: int
    requests: int
    quick_requests: int
    batch: int = 1
    observations: int = 32
    attackers: int = 4

    def run(self, quick: bool) -> dict[str, float]:
        """`different`: number of plans that are not bitwise equal to the policy's own; `not_finite`;
        `largest_difference_m`; `attacks_*`, what became of the attackers' messages (`server_clients.attack`);
        `health_p50_ms`, `health_p99_ms` and `health_max_ms`, and for comparison `probe_late_*`, how late the machine
        wakes a process that only sleeps; `requests_per_s`."""
        requests_per_client = max(1, (self.quick_requests if quick else self.requests) // self.clients)
        context = multiprocessing.get_context("spawn")
        stop, server_end = context.Pipe()
        server = context.Process(target=_serve, args=(list(self.overrides), self.clients, self.batch, server_end))
        server.daemon = True
        server.start()
        server_end.close()
        players: list[tuple[Any, Connection]] = []
        try:
            url = _receive_message(stop, START_S)
            observations = _observations(self.overrides, self.observations)
            half = self.clients // 2
            roles: list[tuple[str, tuple[Any, ...]]] = [
                ("http", (observations, range(half), requests_per_client)),
                ("openpi", (observations, range(half, self.clients), requests_per_client)),
                ("probe", ()),
                *[("attack", (observations[0],))] * self.attackers,
            ]
            for role, arguments in roles:
                parent_end, end = context.Pipe()
                player = context.Process(target=server_clients.play, args=(role, end, url, arguments), daemon=True)
                player.start()
                end.close()
                players.append((player, parent_end))
            for _, connection in players:
                _receive_message(connection, START_S)
            began = time.perf_counter()
            for _, connection in players:
                connection.send(None)
            answers = [
                each_answers for _, connection in players[:2] for each_answers in _receive_message(connection, DONE_S)
            ]
            wall_s = time.perf_counter() - began
            for _, connection in players[2:]:
                connection.send(None)  # stops it
            (health, late), *attacked = [_receive_message(connection, START_S) for _, connection in players[2:]]
        finally:
            stop.close()
            for process in (server, *(player for player, _ in players)):
                process.join(30)
                if process.is_alive():
                    process.kill()
        outcomes = {name: sum(counts[name] for counts in attacked) for name in server_clients.OUTCOMES}
        return self._compare_plans(answers, observations) | {
            "requests_per_s": round(self.clients * requests_per_client / wall_s, 2),
            "health_p50_ms": milliseconds(np.array(health)),
            "health_p99_ms": milliseconds(np.array(health), 99),
            "health_max_ms": milliseconds(np.array(health), 100),
            "health_requests": len(health),
            "probe_late_p99_ms": milliseconds(np.array(late), 99),
            "probe_late_max_ms": milliseconds(np.array(late), 100),
            **{f"attacks_{name}": count for name, count in outcomes.items()},
            "attackers": self.attackers,
            "clients": self.clients,
            "batch": self.batch,
        }

    def _compare_plans(
        self, answers: list[server_clients.Answers], observations: list[dict[str, Any]]
    ) -> dict[str, float]:
        """Compare the plans of all clients with the plans of the policy in this process."""
        policy, different, not_finite, largest = _policy(self.overrides), 0, 0, 0.0
        for seed, plans in enumerate(answers):
            session = seeded(policy, seed)
            for request, received in enumerate(plans):
                plan = session.plan(observations[(seed + request) % len(observations)])
                expected = np.concatenate([plan.position[0], plan.quaternion[0], plan.gripper[0][:, None]], axis=-1)
                different += not np.array_equal(received, expected)
                not_finite += not np.isfinite(received).all()
                largest = max(largest, float(np.abs(received - expected)[:, :3].max()))
        return {
            "requests": sum(map(len, answers)),
            "different": different,
            "not_finite": not_finite,
            "largest_difference_m": largest,
        }


def _observations(overrides: Sequence[str], count: int) -> list[dict[str, Any]]:
    """Return observations with noise images and different arm positions."""
    base, rng = looking_down(compose("train", overrides).data.record.image_size), np.random.default_rng(0)
    return [
        base
        | {
            "image": rng.integers(0, 256, base["image"].shape, dtype=np.uint8),
            "position": rng.uniform([0.15, -0.25, 0.05], [0.45, 0.25, 0.25]),
            "gripper": np.array(rng.uniform()),
        }
        for _ in range(count)
    ]


def _policy(overrides: Sequence[str]) -> Policy:
    """Return the policy with random weights, which are equal in every process; it samples its plans."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # an untrained policy may sample any position: kept inside the box, so that the server refuses no plan
    policy: Policy = replace(untrained(compose("train", overrides)).policy(), decoder="sample", margin_m=0.01)
    return policy


def _receive_message(connection: Connection, seconds: float) -> Any:
    """Return the next message of a process. Raises TimeoutError: no message within that time; ChildProcessError: the
    process died; RuntimeError: a client failed, with its error."""
    try:
        if not connection.poll(seconds):
            raise TimeoutError(f"a process of the measurement has said nothing for {seconds:g} s")
        message = connection.recv()
    except EOFError as error:
        raise ChildProcessError("a process of the measurement has died") from error
    if isinstance(message, Exception):
        raise RuntimeError(f"a client failed: {type(message).__name__}: {message}") from message
    return message


def _serve(overrides: list[str], clients: int, batch: int, parent: Connection) -> None:
    """Run a server until the other end of `parent` is closed."""
    policy: Any = _policy(overrides)
    limits = Limits(waiting=2 * clients, batch=batch, requests=4 * clients)
    server = PolicyServer(policy, policy.needs, {"model": type(policy.module).__name__}, limits)

    async def until_closed() -> None:
        await server.serve("127.0.0.1", 0, closed_event(parent), parent.send)

    asyncio.run(until_closed())
