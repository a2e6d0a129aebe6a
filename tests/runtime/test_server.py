"""The server with correct, careless and hostile clients."""

from __future__ import annotations

import http.client
import json
import pickle
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.http_exceptions import TransferEncodingError

from keygrip.models.policy import Needs
from keygrip.runtime.chunk_execution import RecedingHorizon
from keygrip.runtime.client import RemotePolicy, ServerError
from keygrip.runtime.wire import CONTENT_TYPE, encode_observation

Observe = Callable[..., dict[str, Any]]
Start = Callable[..., Any]
WEBSOCKET = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}  # without a key


def ask(
    port: int, body: bytes | None, path: str = "/plan", method: str = "POST", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return the status, the JSON of the answer (empty for a plan) and the headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, {"Content-Type": CONTENT_TYPE} if headers is None else headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    said = json.loads(content) if answer.headers["Content-Type"].startswith("application/json") else {}
    return answer.status, said, dict(answer.headers)


def raw(port: int, head: bytes, wait_s: float = 20) -> bytes:
    """Return the bytes that a plain connection receives before the server closes it."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait_s) as connection:
        connection.sendall(head)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


def test_a_remote_policy_moves_the_robot_as_the_local_one(running: Start, toy: Any, observation: Observe) -> None:
    policy = toy()
    server = running(policy)
    local, far = RecedingHorizon(toy(), control_hz=10), RecedingHorizon(RemotePolicy(server.url), control_hz=10)
    for step in range(30):
        seen = observation(step)
        np.testing.assert_array_equal(local.act(seen), far.act(seen))
    assert far.plans == local.plans == len(policy.seen)
    assert policy.seen[0]["instruction"] == "put the red cube into the bowl"
    assert list(policy.seen[0]["cameras"]) == ["over", "front"]
    far.policy.close()


def test_numbers_of_any_type_are_planned_from_as_by_the_local_policy(
    running: Start, toy: Any, observation: Observe
) -> None:
    seen = observation(gripper=[1], position=np.array([0.25, 0, 0.5], np.float16), quaternion=np.array([0, 1, 0, 0]))
    view = seen["cameras"]["over"] | {"intrinsics": [[60, 0, 32], [0, 60, 24], [0, 0, 1]]}
    seen["cameras"]["over"] = view | {"world_to_camera": np.diag([1, -1, -1, 1])}
    policy = toy()
    with RemotePolicy(running(policy).url) as far:
        plan, expected = far.plan(seen), toy().plan(seen)
        with pytest.raises(ValueError, match=r"^'position' of the observation must be numbers: "):
            far.plan(seen | {"position": ["a", "b", "c"]})
        over = view | {"image": view["image"].astype(np.int64)}
        with pytest.raises(ValueError, match="'cameras/over/image' must be uint8, not int64"):
            far.plan(seen | {"cameras": seen["cameras"] | {"over": over}})
    for name in ("position", "quaternion", "gripper"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(expected, name))
    for name, value in policy.seen[0]["cameras"]["over"].items():
        np.testing.assert_array_equal(value, seen["cameras"]["over"][name])


def test_a_robot_need_not_send_the_calibration_that_is_not_read(running: Start, toy: Any, observation: Observe) -> None:
    policy, seen = toy(), observation()
    needs = Needs(("right",), ("over", "front"), instruction=True, calibration=("over",))
    front = {"image": seen["cameras"]["front"]["image"]}
    with RemotePolicy(running(policy, needs).url) as far:
        assert far.needs == needs
        far.plan(seen | {"cameras": seen["cameras"] | {"front": front}})
    assert [list(view) for view in policy.seen[0]["cameras"].values()] == [
        ["image", "intrinsics", "world_to_camera"],
        ["image"],
    ]


def test_health_says_what_is_served_and_what_is_wanted(running: Start, observation: Observe) -> None:
    server = running()
    with RemotePolicy(server.url) as policy:
        assert policy.needs == Needs(arms=("right",), cameras=("over", "front"), instruction=True)
        policy.plan(observation())
        policy.plan(observation())
        health = policy.health()
    assert health["model"] == "Toy"
    assert health["observation"]["cameras/over/image"] == {"dtype": "uint8", "shape": ["H", "W", 3]}
    assert health["observation"]["position"]["shape"] == [1, 3]
    assert health["limits"]["waiting"] == 4
    assert health["answers"]["200"] == 3  # two plans and the client's first request
    assert health["plan_p95_ms"] >= health["plan_p50_ms"] > 0


def test_malformed_requests_are_refused_with_a_sentence(running: Start, observation: Observe, needs: Needs) -> None:
    server, good = running(), encode_observation(observation(), needs)
    status, said, _ = ask(server.port, pickle.dumps({"position": np.zeros(3)}))
    assert status == 400
    assert "not in the safetensors format" in said["error"]
    status, said, _ = ask(server.port, encode_observation(observation(gripper=np.array(7.0)), needs))
    assert (status, said["error"]) == (400, "'gripper' must lie in 0 (closed) to 1 (open)")
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        status, said, _ = ask(server.port, good, headers=headers)
        assert status == 415
        assert CONTENT_TYPE in said["error"]
    zipped = {"Content-Type": CONTENT_TYPE, "Content-Encoding": "gzip"}
    assert ask(server.port, good, headers=zipped)[0] == 415
    status, said, _ = ask(server.port, good, path="/elsewhere")
    assert status == 404
    assert said["error"].startswith("there is POST /plan, POST /reset")
    assert ask(server.port, None, method="GET")[0] == 405
    assert ask(server.port, None, path="/health", method="DELETE")[0] == 405
    for headers, reason in (
        ({"Upgrade": "websocket"}, "No CONNECTION upgrade hdr"),
        ({"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "2"}, "Unsupported version: 2"),
        (WEBSOCKET, "Handshake error: None"),
        (WEBSOCKET | {"Sec-WebSocket-Key": "\xe9"}, "only ASCII"),
    ):
        status, said, _ = ask(server.port, None, "/", "GET", headers)
        assert status == 400
        assert said["error"].startswith("the request is no handshake of a websocket: ")
        assert reason in said["error"]
    assert ask(server.port, None, "/health", "GET")[1]["answers"]["400"] == 6
    assert b"400 Bad Request" in raw(server.port, b"NONSENSE\r\n\r\n")
    assert b"400 Bad Request" in raw(server.port, b"GET /health HTTP/1.1\r\nX: " + b"a" * 20000 + b"\r\n\r\n")
    assert ask(server.port, good)[0] == 200  # the server still works


@pytest.mark.parametrize("error", [TransferEncodingError("zz"), web.RequestPayloadError("zz")], ids=["chunk", "later"])
def test_a_body_that_cannot_be_read_is_refused_and_closes_the_connection(
    error: Exception, running: Start, observation: Observe, needs: Needs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As aiohttp's parser reports broken chunks where its compiled extension is missing."""
    server = running()

    async def broken(request: web.BaseRequest) -> bytes:
        raise error

    monkeypatch.setattr(web.BaseRequest, "read", broken)
    status, said, headers = ask(server.port, encode_observation(observation(), needs))
    assert (status, headers["Connection"]) == (400, "close")
    assert said["error"].startswith(f"the body is not valid HTTP ({type(error).__name__})")
    assert server.server.service.metrics.answers["http", 400] == 1
    assert server.server.service.metrics.disconnects == 0


def test_large_bodies_are_refused_before_they_are_read(running: Start, observation: Observe, needs: Needs) -> None:
    server = running(request_mb=0.1)
    head = f"POST /plan HTTP/1.1\r\nHost: [::1]\r\nContent-Type: {CONTENT_TYPE}\r\n"
    announced = raw(server.port, f"{head}Content-Length: 50000000000\r\n\r\n".encode())  # no byte of it is sent
    assert b"413" in announced.splitlines()[0]
    assert b"larger than 0.1 MB" in announced
    piece = b"10000\r\n" + bytes(0x10000) + b"\r\n"  # chunks without an announced length
    assert b"413" in raw(server.port, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + 3 * piece).splitlines()[0]
    assert ask(server.port, encode_observation(observation(), needs))[0] == 200


def test_a_client_that_never_finishes_is_dropped(running: Start, observation: Observe, needs: Needs) -> None:
    server, body = running(read_s=0.3, idle_s=0.5), encode_observation(observation(), needs)
    head = f"POST /plan HTTP/1.1\r\nHost: [::1]\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = raw(server.port, head.encode() + body[:100])
    assert b"408" in answer.splitlines()[0]
    assert b"did not arrive within 0.3 s" in answer
    assert raw(server.port, b"") == b""  # a connection without data
    assert raw(server.port, head.encode()[:40]) == b""  # half of the headers
    assert ask(server.port, body)[0] == 200


def test_bytes_that_trickle_in_do_not_keep_a_connection(running: Start, observation: Observe, needs: Needs) -> None:
    server, body = running(read_s=0.3, idle_s=0.5), encode_observation(observation(), needs)
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection,
        pytest.raises(ConnectionError),  # the server closes the connection
    ):
        for letter in b"POST /plan HTTP/1.1\r\nHost: " + b"x" * 400:
            connection.sendall(bytes([letter]))
            time.sleep(0.02)
    assert ask(server.port, body)[0] == 200


def test_a_crowd_is_served_or_refused_and_nobody_is_left_waiting(
    running: Start, toy: Any, observation: Observe, needs: Needs
) -> None:
    at_once, most, someone_refused = 0, 0, threading.Event()

    def slow() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        someone_refused.wait(20)
        at_once -= 1

    server, body = running(toy(slow), waiting=3, requests=20), encode_observation(observation(), needs)

    def one_of_them(_: int) -> tuple[int, dict[str, Any], dict[str, str]]:
        answer = ask(server.port, body)
        if answer[0] == 503:
            someone_refused.set()
        return answer

    with ThreadPoolExecutor(16) as crowd:
        answers = list(crowd.map(one_of_them, range(64)))
    statuses = Counter(status for status, _, _ in answers)
    assert set(statuses) == {200, 503}
    assert statuses[200] >= 3  # those accepted in time
    assert most == 1  # one plan at a time
    refused = [(said, headers) for status, said, headers in answers if status == 503]
    assert all(said["error"].startswith("busy with 3 plans") for said, _ in refused)
    assert refused[0][1]["Retry-After"] == "1"
    assert ask(server.port, body)[0] == 200
    health = ask(server.port, None, path="/health", method="GET")[1]
    assert health["answers"] == {"200": statuses[200] + 1, "503": statuses[503]}


def test_requests_that_still_arrive_count_too(running: Start, observation: Observe, needs: Needs) -> None:
    server, body = running(requests=2, read_s=20), encode_observation(observation(), needs)
    head = f"POST /plan HTTP/1.1\r\nHost: [::1]\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(2)]
    for connection in held:
        connection.sendall(head.encode())
    deadline = time.monotonic() + 20
    while (status := ask(server.port, body)[0]) == 200 and time.monotonic() < deadline:
        time.sleep(0.01)  # until both headers have been read
    assert status == 503
    for connection in held:
        connection.sendall(body)
        assert b"200 OK" in connection.recv(65536)
        connection.close()
    assert ask(server.port, body)[0] == 200


def test_a_client_waits_a_little_for_a_busy_server(running: Start, toy: Any, observation: Observe) -> None:
    free = threading.Event()
    server = running(toy(lambda: free.wait(20)), waiting=1)
    with (
        RemotePolicy(server.url) as first,
        RemotePolicy(server.url, patience_s=0.1) as second,
        ThreadPoolExecutor(1) as other,
    ):
        planned = other.submit(first.plan, observation())
        while not server.server.service.planner.pending:
            time.sleep(0.01)
        with pytest.raises(ServerError, match="503: busy with 1 plans") as caught:
            second.plan(observation())
        assert caught.value.status == 503
        second.patience_s = 20
        threading.Timer(0.1, free.set).start()
        assert second.plan(observation()).step_seconds == 0.3
        assert planned.result(20).step_seconds == 0.3


def test_what_goes_wrong_in_the_policy_is_told_apart(running: Start, toy: Any, observation: Observe) -> None:
    trouble: list[Exception] = [ValueError("the ray meets no plane"), ZeroDivisionError("oops")]

    def fail() -> None:
        if trouble:
            raise trouble.pop(0)

    server = running(toy(fail))
    with RemotePolicy(server.url) as policy:
        with pytest.raises(ValueError, match=r"^the ray meets no plane$"):  # the same error as from the local policy
            policy.plan(observation())
        with pytest.raises(ServerError, match="500: the policy failed: ZeroDivisionError: oops"):
            policy.plan(observation())
        assert policy.plan(observation()).step_seconds == 0.3


class Panic(BaseException):
    """As in pyo3: a panic of a Rust extension is not an `Exception`."""


@pytest.mark.parametrize("end", [Panic("index out of bounds"), SystemExit(3), StopIteration("no more")])
def test_a_policy_that_panics_does_not_take_its_thread_with_it(
    end: BaseException, running: Start, toy: Any, observation: Observe
) -> None:
    ends = [end]

    def fail() -> None:
        if ends:
            raise ends.pop()

    server = running(toy(fail), plan_s=5.0)
    with RemotePolicy(server.url) as policy:
        with pytest.raises(ServerError, match=f"500: the policy failed: .*{type(end).__name__}: {end}"):
            policy.plan(observation())
        assert policy.plan(observation()).step_seconds == 0.3


def test_a_batch_that_panics_is_planned_one_by_one(running: Start, dice: Any, observation: Observe) -> None:
    free, batches = threading.Event(), []

    class Panicking(dice):  # type: ignore[misc]
        def plan_batch(self, observations: Any, sessions: Any) -> Any:
            batches.append(len(observations))
            if len(observations) > 1:
                raise Panic("of the batch")
            return super().plan_batch(observations, sessions)

    server = running(Panicking(lambda: free.wait(60)), batch=4, waiting=8, plan_s=60.0)

    def one(_: int) -> float:
        with RemotePolicy(server.url) as policy:
            return policy.plan(observation()).step_seconds

    with ThreadPoolExecutor(4) as pool:
        plans = [pool.submit(one, number) for number in range(4)]
        deadline = time.monotonic() + 60
        while server.server.service.planner.pending < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        free.set()
        assert [plan.result(60) for plan in plans] == [0.3] * 4
    assert max(batches) > 1


def test_what_is_no_plan_is_refused_at_once(running: Start, toy: Any, observation: Observe) -> None:
    class Empty(toy):  # type: ignore[misc]
        def plan(self, observation: Any) -> None:
            return None

    server = running(Empty(), plan_s=5.0)
    with (
        RemotePolicy(server.url) as policy,
        pytest.raises(ServerError, match="500: the policy failed: TypeError: Empty gave NoneType in place of a Plan"),
    ):
        policy.plan(observation())


def test_a_plan_that_takes_too_long_is_given_up_but_not_forgotten(
    running: Start, toy: Any, observation: Observe
) -> None:
    free = threading.Event()
    server = running(toy(lambda: free.wait(20)), waiting=1, plan_s=0.2)
    with RemotePolicy(server.url, patience_s=0) as policy:
        with pytest.raises(ServerError, match=r"504: the plan took longer than 0\.2 s"):
            policy.plan(observation())
        with pytest.raises(ServerError, match="503"):  # the thread is still computing it
            policy.plan(observation())
        free.set()
        policy.patience_s = 20
        assert policy.plan(observation()).step_seconds == 0.3


def test_it_listens_at_its_address_alone(running: Start) -> None:
    server = running()
    assert ask(server.port, None, path="/health", method="GET")[0] == 200
    other = "127.0.0.2"  # also this machine, but not the given address
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((other, server.port), timeout=5)
    there = running(host=other)
    assert there.url.startswith(f"http://{other}:")
    with RemotePolicy(there.url) as policy:
        assert policy.health()["model"] == "Toy"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", there.port), timeout=5)


def test_an_address_of_another_machine_is_refused_in_one_line(running: Start) -> None:
    with pytest.raises(OSError, match=r"cannot listen at 192\.0\.2\.1, port 0: ") as caught:
        running(host="192.0.2.1")  # an address reserved for documentation
    assert "\n" not in str(caught.value)


def test_a_kept_connection_that_the_server_closed_is_opened_again(running: Start, observation: Observe) -> None:
    server = running(idle_s=0.2)
    with RemotePolicy(server.url) as policy:
        policy.plan(observation())
        time.sleep(0.6)
        assert policy.plan(observation()).step_seconds == 0.3


def test_a_stopped_server_finishes_what_it_began_and_is_gone(running: Start, toy: Any, observation: Observe) -> None:
    begun, free = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        free.wait(20)

    server = running(toy(wait))
    policy = RemotePolicy(server.url)
    with ThreadPoolExecutor(1) as other:
        planned = other.submit(policy.plan, observation())
        assert begun.wait(20)
        threading.Timer(0.2, free.set).start()
        server.stop()
        assert planned.result(20).step_seconds == 0.3
    with pytest.raises(ConnectionError, match=r"no policy server answers at http://127.*python -m keygrip\.serve"):
        policy.plan(observation())


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://127.0.0.1:80", "http://127.0.0.1:80/plan"])
def test_a_bad_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        RemotePolicy(url)
