"""The client of a policy server trusts the server's answers no more than the server trusts its clients."""

from __future__ import annotations

import http.server
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from keygrip.runtime import client
from keygrip.runtime.client import RemotePolicy, ServerError

HEALTH = b'{"stochastic": true, "needs": {"arms": ["right"], "cameras": [], "instruction": false}}'


@contextmanager
def answering(**answers: bytes | threading.Event) -> Iterator[str]:
    """Serve the same answer to every request of a kind, or none, and close the connection at an event; yield the
    URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = answers.get(self.path.strip("/"), b"{}")
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if isinstance(body, threading.Event):
                body.wait(20)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, *arguments: object) -> None:
            """Log nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # how often it checks for the shutdown
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "health", [b"", b"hello", b"[" * 100_000, b"[1]", b"{}", b'{"needs": 3}', b'{"stochastic": 1, "needs": {}}']
)
def test_what_is_no_policy_server_is_said(health: bytes) -> None:
    with answering(health=health) as url, pytest.raises(ServerError):
        RemotePolicy(url)


@pytest.mark.parametrize("reset", [b"", b"[" * 100_000, b"[]", b'{"sessions": 3}'])
def test_a_reset_that_names_no_session_is_said(reset: bytes) -> None:
    with (
        answering(health=HEALTH, reset=reset) as url,
        RemotePolicy(url) as policy,
        pytest.raises(ServerError, match="the answer to /reset names no session"),
    ):
        policy.reset(3)


def test_an_error_of_the_server_reaches_another_process() -> None:
    error = pickle.loads(pickle.dumps(ServerError(503, "the policy is stuck")))
    assert (str(error), error.status) == ("the policy server answers 503: the policy is stuck", 503)


def test_a_plan_slower_than_the_timeout_is_not_reported_as_a_missing_server() -> None:
    ended = threading.Event()
    with answering(health=HEALTH, reset=ended) as url, RemotePolicy(url, timeout_s=30) as policy:
        policy._connection.timeout = 0.05  # of the next connection, on which no answer comes
        try:
            with pytest.raises(
                ConnectionError, match=r"^the policy server at http.* did not answer in time"
            ) as refused:
                policy.reset(3)
        finally:
            ended.set()
    said = str(refused.value)
    assert "(timeout_s=30)" in said
    assert "plan_p95_ms" in said
    assert "start one" not in said


def test_an_answer_of_any_size_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LARGEST_ANSWER", 50)
    with answering(health=HEALTH) as url, pytest.raises(ConnectionError, match="its answer is larger than 50 bytes"):
        RemotePolicy(url)
