"""The server against well-formed but senseless requests, floods of names, strangers and eavesdroppers."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from keygrip.benchmarks import server_clients
from keygrip.models.policy import Needs, Plan
from keygrip.runtime import wire
from keygrip.runtime.client import RemotePolicy, ServerError
from keygrip.runtime.messagepack import pack
from keygrip.runtime.plausibility import Bounds, ImplausibleError, PlausiblePolicy
from keygrip.runtime.wire import CONTENT_TYPE, encode_observation
from keygrip.serve import tls_context

Observe = Callable[..., dict[str, Any]]
Start = Callable[..., Any]
BOX = np.array([[0.1, -0.3, 0.0], [0.5, 0.3, 0.3]])
TOKEN = "correct-horse-battery"


def plan_of(**changes: Any) -> Plan:
    """Two steps from (0.3, 0, 0.1) within the box."""
    plan = Plan(
        position=np.array([[[0.3, 0.0, 0.1], [0.35, 0.0, 0.1]]]),
        quaternion=np.tile([0.0, 1.0, 0.0, 0.0], (1, 2, 1)),
        gripper=np.array([[1.0, 0.0]]),
        step_seconds=0.3,
    )
    return replace(plan, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": np.array([[[0.3, 0.0, np.nan], [0.3, 0.0, 0.1]]])}, "not finite in its position"),
        ({"quaternion": np.full((1, 2, 4), np.inf)}, "not finite in its quaternion"),
        ({"uncertainty": np.array([[0.0, np.nan]])}, "not finite in its uncertainty"),
        ({"quaternion": np.zeros((1, 2, 4))}, "quaternion of norm 0"),
        ({"position": np.array([[[0.3, 0.0, 0.1], [0.3, 0.0, 0.6]]])}, r"reaches \(0\.3, 0, 0\.6\), 0\.3 m outside"),
        ({"position": np.array([[[0.3, 0.0, 0.1], [0.3, 0.0, 0.1], [0.3, 0.0, 0.1]]])}, "malformed: its position"),
        ({"position": np.zeros((1, 0, 3)), "gripper": np.zeros((1, 0))}, "malformed"),
        ({"position": np.array([[[0.12, -0.28, 0.1], [0.48, 0.28, 0.1]]]), "step_seconds": 0.1}, "moves at 6.66 m/s"),
        # from the arm to the first step
        ({"position": np.array([[[0.48, 0.28, 0.1], [0.48, 0.28, 0.1]]]), "step_seconds": 0.1}, r"moves at 3\.33 m/s"),
        ({"gripper": np.array([[1.0, 1.4]])}, "gripper opening outside 0 to 1"),
        ({"step_seconds": 0.0}, "steps of 0.0 s"),
        ({"step_seconds": float("nan")}, "steps of nan s"),
    ],
)
def test_wild_plans_are_named(changes: dict[str, Any], message: str, observation: Observe) -> None:
    seen = observation()
    Bounds().refuse_plan(plan_of(), seen, BOX)
    with pytest.raises(ImplausibleError, match=message):
        Bounds().refuse_plan(plan_of(**changes), seen, BOX)


def test_nothing_far_from_the_training_data_gets_a_plan(running: Start, dice: Any, observation: Observe) -> None:
    server = running(dice(workspace=BOX))
    with RemotePolicy(server.url) as policy:
        policy.plan(observation())
        policy.plan(observation(position=np.array([0.05, -0.35, 0.3])))  # near the box
        for far in ([90.0, 0, 50.0], [0.3, 0.0, -0.3], [0.3, 99.0, 0], [0.0, 0.0, 2.0]):
            with pytest.raises(ValueError, match=r"'position' .* outside the box of the training data"):
                policy.plan(observation(position=np.array(far)))
        for far in ([500.0, 0, 100.0], [1e20, 0, 0], [0.3, 1e300, 0]):  # for example millimetres
            with pytest.raises(ValueError, match=r"'position' lies farther than 100 m .* must be in metres"):
                policy.plan(observation(position=np.array(far)))
        mirrored = observation()
        mirrored["cameras"]["front"]["world_to_camera"] = np.diag([1.0, 1.0, -1.0, 1.0])
        with pytest.raises(ValueError, match=r"rotation is mirrored \(determinant -1\)"):
            policy.plan(mirrored)
        mirrored["cameras"]["front"]["world_to_camera"] = np.eye(4) + np.eye(4, k=3) * 1e20
        with pytest.raises(ValueError, match="farther than 100 m away"):
            policy.plan(mirrored)
        health = policy.health()
    assert health["answers"]["422"] == 4
    assert health["bounds"]["training_box_m"] == BOX.tolist()


def covered(seen: Any, camera: str) -> Any:
    """Return the observation with a covered lens: sensor noise of two levels."""
    image = np.random.default_rng(0).integers(0, 3, seen["cameras"][camera]["image"].shape, dtype=np.uint8)
    return {**seen, "cameras": {**seen["cameras"], camera: {**seen["cameras"][camera], "image": image}}}


def enlarged(seen: Any, camera: str) -> Any:
    """Return the observation with an image of twice the size and the original intrinsics."""
    image = seen["cameras"][camera]["image"].repeat(2, axis=0).repeat(2, axis=1)
    return {**seen, "cameras": {**seen["cameras"], camera: {**seen["cameras"][camera], "image": image}}}


def test_nothing_is_planned_from_a_covered_lens_or_another_resolution(
    running: Start, toy: Any, observation: Observe
) -> None:
    with RemotePolicy(running(toy()).url) as policy:
        for camera in ("over", "front"):
            with pytest.raises(ValueError, match=rf"image of camera '{camera}' shows nothing.*bounds\.image_levels=4"):
                policy.plan(covered(observation(), camera))
            with pytest.raises(ValueError, match=rf"image of camera '{camera}' has 128 x 96 pixels.*resolution"):
                policy.plan(enlarged(observation(), camera))
        assert policy.health()["answers"]["422"] == 4
        policy.plan(observation())


def test_what_is_seen_is_judged_as_the_policy_reads_it(observation: Observe) -> None:
    seen, bounds = observation(), Bounds()
    both, one = Needs(("right",), ("over", "front")), Needs(("right",))
    bounds.refuse_images(covered(seen, "front"), both, masks=True)  # that camera is left out
    with pytest.raises(ImplausibleError, match="camera 'over' shows nothing"):
        bounds.refuse_images(covered(covered(seen, "front"), "over"), both, masks=True)
    bounds.refuse_images(covered(seen, "front"), one)  # the policy does not read that camera
    with pytest.raises(ImplausibleError, match="'image' shows nothing"):
        bounds.refuse_images({**seen, "image": np.full((48, 64, 3), 7, np.uint8)}, one)
    for image, said in ((np.zeros((48, 64)), "not 48 x 64 float64"), (np.full((48, 64, 3), 0.5), "not .* float64")):
        with pytest.raises(ValueError, match=said):  # not the error of a covered lens
            bounds.refuse_images({**seen, "image": image}, one)
    flat = {name: value for name, value in seen.items() if name != "cameras"}  # as sent by clients with one camera
    with pytest.raises(ImplausibleError, match=r"^'image' shows nothing"):
        bounds.refuse_images({**flat, "image": np.full((48, 64, 3), 7, np.uint8)}, Needs(("right",), ("front",)))
    with pytest.raises(ValueError, match=r"^the observation lacks 'image'"):
        bounds.refuse_images({**flat, "image": None}, Needs(("right",), ("front",)))
    with pytest.raises(ValueError, match=r"^camera 'front' of the observation lacks 'image'"):
        bounds.refuse_images({"cameras": {"front": {**flat, "image": None}}}, Needs(("right",), ("front",)))
    absent = {**seen, "cameras": {**seen["cameras"], "front": None}}
    bounds.refuse_images(absent, both, masks=True)
    with pytest.raises(ImplausibleError, match="camera 'over' shows nothing"):
        bounds.refuse_images(covered(absent, "over"), both, masks=True)
    faint = covered(seen, "front")
    faint["cameras"]["front"]["image"] = faint["cameras"]["front"]["image"] * 5  # ten levels: the image is used
    bounds.refuse_images(faint, both, masks=True)
    with pytest.raises(ImplausibleError, match=r"camera 'front' shows nothing.*image_levels=20"):
        replace(bounds, image_levels=20).refuse_images(faint, both, masks=True)
    bounds.refuse_images(enlarged(seen, "over"), replace(both, calibration=False))
    bounds.refuse_images(enlarged(seen, "over"), replace(both, calibration=("front",)))
    with pytest.raises(ImplausibleError, match="camera 'over' has"):
        bounds.refuse_images(enlarged(seen, "over"), replace(both, calibration=("over",)))
    replace(bounds, centre_share=0.3).refuse_images(enlarged(seen, "over"), both)
    replace(bounds, image_levels=0).refuse_images(covered(seen, "over"), both)


def test_a_robot_with_a_policy_of_its_own_is_held_to_the_same(toy: Any, dice: Any, observation: Observe) -> None:
    seen = observation()
    policy = PlausiblePolicy(dice(workspace=BOX), Bounds())
    policy.policy.needs = Needs(("right",), ("over", "front"))
    assert policy.plan(seen).position.shape[-1] == 3
    for bad, message in (
        (observation(position=np.array([500.0, 0, 100.0])), "outside the box of the training data"),
        (covered(seen, "front"), "shows nothing"),
        (enlarged(seen, "over"), "another resolution"),
    ):
        with pytest.raises(ImplausibleError, match=message):
            policy.plan(bad)
    far = plan_of(position=np.array([[[0.3, 0.0, 0.1], [0.65, 0.0, 0.1]]]))
    policy.policy.plan = lambda observation: far
    with pytest.raises(ImplausibleError, match=r"reaches \(0\.65, 0, 0\.1\), 0\.15 m outside.*bounds\.plan_m=0\.1"):
        policy.plan(seen)
    assert replace(policy, bounds=Bounds(plan_m=0.2)).plan(seen) is far


def test_a_plan_that_is_not_finite_never_leaves(running: Start, toy: Any, observation: Observe) -> None:
    class Broken(toy):  # type: ignore[misc]
        def plan(self, seen: Any) -> Plan:
            return replace(super().plan(seen), gripper=np.full((1, 3), np.nan))

    with RemotePolicy(running(Broken()).url) as policy, pytest.raises(ValueError, match="not finite in its gripper"):
        policy.plan(observation())


def post(port: int, body: bytes) -> bytes:
    head = f"POST /plan HTTP/1.1\r\nHost: [::1]\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        return connection.recv(65536)


@pytest.fixture(scope="module")
def malformed() -> tuple[list[bytes], list[bytes]]:
    """Messages with 200 000 names, deeply nested and damaged: for HTTP, and for openpi's websocket."""
    return server_clients.malformed_bodies(), server_clients.malformed_messages()


def test_floods_of_names_are_refused_unread(
    running: Start, malformed: tuple[list[bytes], list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A valid body of 13 MB with 200 000 names took 2.5 s to decode, and no client was answered meanwhile. Now no long
    header is parsed, and no array is made from such a body."""
    parsed: list[int] = []
    loaded: list[bytes] = []

    def parse(text: bytes) -> Any:
        parsed.append(len(text))
        return json.loads(text)

    monkeypatch.setattr(wire, "json", SimpleNamespace(loads=parse))
    monkeypatch.setattr(wire, "load", loaded.append)
    long_name = json.dumps({"x" * 10_000: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    server = running()
    many, deep, _ = malformed[0]
    bodies = [many, deep, struct.pack("<Q", len(long_name)) + long_name]
    assert 12.5e6 < len(bodies[0]) < 16e6  # is read, and not refused for its size
    with ThreadPoolExecutor(4) as crowd:
        answers = list(crowd.map(lambda body: post(server.port, body), bodies * 4))
    assert all(b"400 Bad Request" in answer or b"503 " in answer for answer in answers)
    alone = [post(server.port, body) for body in bodies]
    assert all(b"400 Bad Request" in answer for answer in alone)
    assert all(len(answer) < 1000 for answer in [*answers, *alone])  # a refusal does not repeat the request
    assert set(parsed) == {len(long_name)}
    assert not loaded


def one_camera(seen: dict[str, Any]) -> dict[str, Any]:
    """Return an observation without the parts that a policy with one camera and no instruction does not read."""
    names = ("image", "intrinsics", "world_to_camera", "position", "quaternion", "gripper")
    return {name: seen[name] for name in names}


def test_every_attack_of_the_load_benchmark_is_refused_with_a_reason(
    running: Start,
    dice: Any,
    observation: Observe,
    malformed: tuple[list[bytes], list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_clients, "malformed_bodies", lambda: malformed[0])
    monkeypatch.setattr(server_clients, "malformed_messages", lambda: malformed[1])
    needs, seen = Needs(("right",)), one_camera(observation())
    server = running(dice(workspace=BOX), needs=needs)
    attacks = server_clients.prepare_attacks(server.url, seen)
    assert len(attacks) == 18
    assert all(12.5e6 < len(flood) < 16e6 for _, flood in attacks[:2])
    at_once = SimpleNamespace(poll=lambda: True)  # each is sent once all the same
    assert server_clients.attack(server.url, at_once, attacks) == {"sent": 18, "refused": 18}
    answers = server.server.service.metrics.answers
    assert [answers[protocol, 400] + answers[protocol, 422] for protocol in ("http", "openpi")] == [9, 9]
    assert server_clients.post_plan(server.url, encode_observation(seen, needs)) == "answered"
    assert server_clients.send_message(server.url, pack(seen)) == "answered"


def test_the_load_benchmark_tells_plans_that_are_not_finite_and_failures(
    running: Start, toy: Any, observation: Observe, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(toy):  # type: ignore[misc]
        fails = False

        def plan(self, seen: Any) -> Plan:
            if self.fails:
                raise RuntimeError("out of memory")
            return replace(super().plan(seen), gripper=np.full((1, 3), np.nan))

    needs, seen, policy = Needs(("right",)), one_camera(observation()), Broken()
    monkeypatch.setattr(Bounds, "refuse_plan", lambda *_: None)
    server = running(policy, needs=needs)
    attacks = ((server_clients.post_plan, encode_observation(seen, needs)), (server_clients.send_message, pack(seen)))
    assert [send(server.url, body) for send, body in attacks] == ["not_finite"] * 2
    policy.fails = True
    assert [send(server.url, body) for send, body in attacks] == ["unnamed"] * 2
    server.stop()
    assert [send(server.url, body) for send, body in attacks] == ["cut_off"] * 2


def test_a_web_page_gets_no_answer(running: Start) -> None:
    """This includes a page whose domain name resolves to this machine: its requests are not cross-site, and GETs have
    no Origin."""

    def status(server: Any, method: str, path: str, **headers: str) -> int:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, "{}", {"Content-Type": "application/json", **headers})
            return connection.getresponse().status

    local, open_to_all, with_token = running(), running(host="0.0.0.0"), running(more={"token": TOKEN})
    for path in ("/plan", "/reset"):
        for server in (local, open_to_all):
            assert status(server, "POST", path, Origin="http://evil:8421", Host="evil:8421") == 403
    for host in ("evil:8421", "localhost.evil", "127.0.0.1.evil:80", "[::1].evil", ""):
        assert status(local, "GET", "/health", Host=host) == 403
    for host in ("localhost:8421", "LocalHost", "127.0.0.1:1", "[::1]:8421", "192.168.1.5"):
        assert status(local, "POST", "/reset", Host=host) == 200
    assert status(open_to_all, "POST", "/reset", Host="robot.lan") == 200
    assert status(with_token, "POST", "/reset", Host="robot.lan", Authorization=f"Bearer {TOKEN}") == 200


def test_without_the_token_nothing_is_answered(running: Start, observation: Observe, needs: Any) -> None:
    server = running(more={"token": TOKEN})
    for token in (None, "wrong", TOKEN + "x", "ünicode"):
        with pytest.raises(ServerError, match="401: the header Authorization"):
            RemotePolicy(server.url, token=token)
    with RemotePolicy(server.url, token=TOKEN) as policy:
        assert policy.plan(observation()).step_seconds == 0.3
    assert b"401" in post(server.port, encode_observation(observation(), needs)).splitlines()[0]
    for path, status in (("/metrics", b"401"), ("/", b"401"), ("/healthz", b"200"), ("/elsewhere", b"401")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert status in connection.recv(65536).splitlines()[0]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def test_tls_encrypts_and_says_who_answers(
    running: Start, observation: Observe, certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    server = running(more={"tls": tls_context(str(cert), str(key)), "token": TOKEN})
    assert server.url.startswith("https://127.0.0.1:")
    with RemotePolicy(server.url, token=TOKEN, ca=str(cert)) as policy:
        assert policy.plan(observation()).step_seconds == 0.3
    with pytest.raises(ConnectionError, match=r"CERTIFICATE_VERIFY_FAILED.*ca=FILE names a certificate to trust"):
        RemotePolicy(server.url, token=TOKEN)  # no trusted authority has signed its certificate
    with pytest.raises(ConnectionError, match=r"mismatch.*the address must be one that it is for"):
        RemotePolicy(server.url.replace("127.0.0.1", "localhost"), token=TOKEN, ca=str(cert))
    with pytest.raises(ConnectionError, match=r"no policy server answers.*has an address of https://"):
        RemotePolicy(server.url.replace("https", "http"), token=TOKEN)
    with pytest.raises(ConnectionError, match=r"no policy server answers.*has an address of http://"):
        RemotePolicy(running().url.replace("http", "https"), token=TOKEN)
    with pytest.raises(ValueError, match="has no effect"):
        RemotePolicy("http://127.0.0.1:1", ca=str(cert))
    for no_certificate in (str(key), str(cert) + ".gone"):
        with pytest.raises(ValueError, match="no file with a certificate in PEM format"):
            RemotePolicy(server.url, ca=no_certificate)


def test_bad_certificates_are_refused_in_a_sentence(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = map(str, certificate)
    assert tls_context(None, None) is None
    assert isinstance(tls_context(cert, key), ssl.SSLContext)
    with pytest.raises(ValueError, match="given together"):
        tls_context(cert, None)
    with pytest.raises(FileNotFoundError, match=r"tls\.key=.*there is no such file"):
        tls_context(cert, str(tmp_path / "none.pem"))
    with pytest.raises(ValueError, match="are not a certificate"):
        tls_context(key, cert)


def test_a_client_that_hangs_up_leaves_one_line(
    running: Start, observation: Observe, needs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server, body = running(), encode_observation(observation(), needs)
    head = f"POST /plan HTTP/1.1\r\nHost: [::1]\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
    with caplog.at_level(logging.INFO):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(head.encode() + body[:1000])
        deadline = time.monotonic() + 20
        while not server.server.service.metrics.disconnects and time.monotonic() < deadline:
            time.sleep(0.01)
        server.stop()
    lines = [record for record in caplog.records if "went away" in record.getMessage()]
    assert len(lines) == 1
    assert [record for record in caplog.records if record.exc_info] == []


def test_what_is_no_http_leaves_one_line_each_and_no_trace(running: Start, caplog: pytest.LogCaptureFixture) -> None:
    """A stranger needs no token to send it."""
    sent = (
        b"GET /\x01 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
        b"POST /plan HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x00" * 50,
    )
    server = running()
    answers = []
    with caplog.at_level(logging.INFO):
        for request in (*sent, b"GET /health HTTP/1.1\r\nHost: localhost\r\nExpect: \xff\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
                connection.sendall(request)
                answers.append(connection.recv(65536).split(b"\r\n")[0].split()[1])
        server.stop()
    assert answers == [b"400"] * len(sent) + [b"417"]
    assert [record for record in caplog.records if record.exc_info or record.levelno > logging.WARNING] == []
    assert len([record for record in caplog.records if "Error handling request" in record.getMessage()]) <= len(sent)


def test_a_client_that_waits_for_100_continue_gets_its_answer(running: Start, observation: Observe, needs: Any) -> None:
    server, body = running(), encode_observation(observation(), needs)
    head = f"POST /plan HTTP/1.1\r\nHost: [::1]\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")


def test_metrics_can_be_scraped(running: Start, observation: Observe) -> None:
    server = running()
    with RemotePolicy(server.url) as policy:
        for _ in range(3):
            policy.plan(observation())
        status, body = policy._ask("GET", "/metrics")
    lines = body.decode().splitlines()
    assert status == 200
    assert 'keygrip_answers_total{protocol="http",status="200"} 4' in lines
    assert "keygrip_plans_total 3" in lines
    assert 'keygrip_compute_seconds_bucket{le="+Inf"} 3' in lines
    assert "keygrip_up 1" in lines
    for line in lines:
        assert line.startswith("# ") or len(line.rsplit(" ", 1)) == 2
