"""Clients of one server do not disturb each other: sessions, batches, and a policy that is stuck."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from keygrip.evaluation.remote_rollouts import served
from keygrip.models.policy import Needs
from keygrip.runtime.client import RemotePolicy, ServerError
from keygrip.runtime.service import Limits
from keygrip.runtime.wire import CONTENT_TYPE, SESSION_HEADER, encode_observation

Observe = Callable[..., dict[str, Any]]
Start = Callable[..., Any]


def say(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if content.startswith(b"{") else {}


def test_each_client_draws_by_its_own_seed(running: Start, dice: Any, observation: Observe) -> None:
    server, local = running(dice(), batch=4, waiting=8), {seed: dice() for seed in range(6)}
    assert RemotePolicy(server.url).health()["stochastic"] is True

    def episode(seed: int) -> list[np.ndarray]:
        with RemotePolicy(server.url) as policy:
            policy.reset(seed)
            return [policy.plan(observation(step)).position for step in range(8)]

    with ThreadPoolExecutor(6) as crowd:
        drawn = list(crowd.map(episode, local))
    for seed, policy in local.items():
        policy.reset(seed)
        for step in range(8):
            np.testing.assert_array_equal(drawn[seed][step], policy.plan(observation(step)).position)
    assert not np.array_equal(drawn[0][0], drawn[1][0])
    with RemotePolicy(server.url) as policy:  # without reset: like a fresh local policy
        np.testing.assert_array_equal(policy.plan(observation()).position, drawn[0][0])
        assert len(server.server.service.sessions) == 1
    assert len(server.server.service.sessions) == 0
    with RemotePolicy(server.url) as policy, policy.session() as other:  # each samples with its own seed, in any order
        other.reset(1)
        for step in range(2):
            np.testing.assert_array_equal(policy.plan(observation(step)).position, drawn[0][step])
            np.testing.assert_array_equal(other.plan(observation(step)).position, drawn[1][step])


def test_sessions_are_few_expire_and_cannot_be_guessed(
    running: Start, dice: Any, observation: Observe, needs: Any
) -> None:
    server, body = running(dice(), sessions=2, session_s=0.4), encode_observation(observation(), needs)
    json_type = {"Content_Type": "application/json"}
    status, said = say(server.port, "POST", "/reset", b'{"seed": 7}', **json_type)
    assert (status, said["seed"]) == (200, 7)
    assert len(said["session"]) >= 20
    headers = {SESSION_HEADER.replace("-", "_"): said["session"]}
    assert say(server.port, "POST", "/plan", body, Content_Type=CONTENT_TYPE, **headers)[0] == 200
    assert say(server.port, "POST", "/reset", b"{}", **json_type)[0] == 200
    assert say(server.port, "POST", "/reset", b"{}", **json_type)[0] == 503
    time.sleep(0.6)
    status, said = say(server.port, "POST", "/plan", body, Content_Type=CONTENT_TYPE, **headers)
    assert status == 404
    assert "not used for 0.4 s" in said["error"]
    assert say(server.port, "DELETE", "/session")[0] == 404
    for bad in (b'{"seed": -1}', b'{"seed": 1.5}', b'{"seed": true}', b'{"sede": 1}', b"[]", b"{", b"[" * 900):
        assert say(server.port, "POST", "/reset", bad, **json_type)[0] == 400
    assert say(server.port, "POST", "/reset", b"{}", Content_Type="text/plain")[0] == 415


def test_a_session_ends_while_a_plan_is_awaited(running: Start, dice: Any, observation: Observe) -> None:
    server = running(dice())
    policy = RemotePolicy(server.url, renews=True)
    policy.reset(5)
    policy.plan(observation())
    sock = policy._connection.sock
    policy.end_session()
    assert len(server.server.service.sessions) == 0
    assert policy._connection.sock is sock  # the connection on which another thread may wait is not used
    policy.end_session()  # nothing is left to end
    policy.close()


def test_an_arm_drives_on_where_the_server_no_longer_knows_its_session(
    running: Start, dice: Any, observation: Observe
) -> None:
    server, anew = running(dice()), dice()
    anew.reset(5)
    with RemotePolicy(server.url, renews=True) as policy:
        policy.reset(5)
        first = policy.plan(observation())
        server.server.service.sessions.clear()  # as after a restart of the server
        np.testing.assert_array_equal(policy.plan(observation()).position, first.position)
        np.testing.assert_array_equal(first.position, anew.plan(observation()).position)
        np.testing.assert_array_equal(policy.plan(observation()).position, anew.plan(observation()).position)
        assert len(server.server.service.sessions) == 1


def test_waiting_requests_are_computed_together_and_one_bad_one_fails_alone(
    running: Start, dice: Any, observation: Observe
) -> None:
    first, free = threading.Event(), threading.Event()

    def wait() -> None:
        first.set()
        free.wait(20)

    class Reading(dice):  # type: ignore[misc]
        def plan_batch(self, observations: Any, sessions: Any) -> Any:
            self.batches.append(len(observations))
            if any(not seen["instruction"].strip() for seen in observations):
                raise ValueError("the instruction is empty")
            self.batches.pop()
            return super().plan_batch(observations, sessions)

    policy = Reading(wait)
    server = running(policy, batch=8, waiting=8)

    def ask(step: int) -> Any:
        words = {"instruction": " "} if step == 3 else {}
        with RemotePolicy(server.url) as client:
            try:
                return client.plan(observation(step, **words))
            except ValueError as error:
                return error

    with ThreadPoolExecutor(6) as crowd:
        head = crowd.submit(ask, 0)
        assert first.wait(20)
        rest = [crowd.submit(ask, step) for step in range(1, 6)]
        while server.server.service.planner.pending < 6:
            time.sleep(0.01)
        free.set()
        plans = [future.result(20) for future in (head, *rest)]
    assert policy.batches == [1, 5, 1, 1, 1, 1, 1]
    assert "the instruction is empty" in str(plans.pop(3))
    for step, plan in zip((0, 1, 2, 4, 5), plans, strict=True):
        np.testing.assert_array_equal(plan.position, dice().plan(observation(step)).position)


def test_a_stuck_policy_shows_and_is_replaced(running: Start, dice: Any, observation: Observe) -> None:
    stuck, made = threading.Event(), threading.Event()

    def make() -> Any:
        assert made.wait(20)
        return dice()

    server = running(dice(lambda: stuck.wait(60)), more={"make": make}, plan_s=0.5, stuck_s=1.0)
    try:
        with RemotePolicy(server.url, patience_s=0) as policy:
            assert say(server.port, "GET", "/health")[0] == 200
            with pytest.raises(ServerError, match="504"):
                policy.plan(observation())
            deadline = time.monotonic() + 20
            while say(server.port, "GET", "/health")[0] == 200:
                assert time.monotonic() < deadline
            while "loaded again" not in (state := say(server.port, "GET", "/health")[1]["state"]):
                assert time.monotonic() < deadline, state
                time.sleep(0.02)
            assert say(server.port, "GET", "/healthz")[0] == 503
            with pytest.raises(ServerError, match="503: the policy was stuck and is being loaded again"):
                policy.plan(observation())
            made.set()
            while say(server.port, "GET", "/health")[0] != 200:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            with pytest.raises(ServerError, match="404: no such session"):  # never a plan of another sequence
                policy.plan(observation())
            policy.reset(3)
            expected = dice()
            expected.reset(3)
            np.testing.assert_array_equal(policy.plan(observation()).position, expected.plan(observation()).position)
            assert policy.health()["replaced"] == 1
    finally:
        stuck.set()


def test_a_policy_that_is_stuck_again_and_again_ends_the_server(running: Start, toy: Any, observation: Observe) -> None:
    stuck = threading.Event()
    policy = lambda: toy(lambda: stuck.wait(60))  # noqa: E731
    server = running(policy(), more={"make": policy}, plan_s=0.1, stuck_s=0.2, replacements=1)
    try:
        with RemotePolicy(server.url, patience_s=20) as client, pytest.raises(ConnectionError):
            while True:
                with contextlib.suppress(ServerError):
                    client.plan(observation())
        assert "stuck 2 times" in str(server.ended())
    finally:
        stuck.set()


def test_a_policy_of_chance_that_cannot_be_shared_is_refused(running: Start, toy: Any) -> None:
    class Loaded(toy):  # type: ignore[misc]
        def reset(self, seed: int) -> None: ...

    with pytest.raises(ValueError, match=r"Loaded draws by chance \(it has reset\) and has no session\(\)"):
        running(Loaded())


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"limits\.stuck_s=10 must not be below limits\.plan_s=30"):
        Limits(stuck_s=10)
    with pytest.raises(ValueError, match=r"limits\.batch must be above 0"):
        dataclasses.replace(Limits(), batch=0)
    with pytest.raises(ValueError, match=r"limits\.batch=16 is above limits\.waiting=4.*raise limits\.waiting too"):
        Limits(batch=16)
    assert Limits(batch=4).batch == 4


def test_every_worker_of_rollouts_elsewhere_has_a_session_and_one_that_died_again(dice: Any, needs: Needs) -> None:
    policy = dice()
    policy.needs = needs
    with served(policy, 66, 4) as url, contextlib.ExitStack() as left:
        for seed in range(70):
            client = RemotePolicy(url)
            left.callback(client._connection.close)
            client.reset(seed)


def test_a_served_policy_plans_for_images_of_any_size_as_one_in_the_process(toy: Any, observation: Observe) -> None:
    image = np.zeros((2400, 2400, 3), np.uint8)
    seen = observation(image=image, intrinsics=np.array([[2e3, 0, 1200], [0, 2e3, 1200], [0, 0, 1]]), cameras={})
    policy = toy()
    policy.needs = Needs(("arm",))
    assert len(encode_observation(seen, policy.needs)) > 16e6
    with served(policy, 1, 1) as url, RemotePolicy(url) as client:
        assert client.plan(seen).position.shape == policy.plan(seen).position.shape
