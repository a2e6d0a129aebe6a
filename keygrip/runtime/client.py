"""A policy that lives on another machine, used like one that lives here.

::

    policy = RemotePolicy("http://127.0.0.1:8421")
    controller = RecedingHorizon(policy, control_hz=10)
    command = controller.act(observation)
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from keygrip.models.policy import Needs, Observation, Plan
from keygrip.runtime.wire import CONTENT_TYPE, decode_plan, encode_observation


class ServerError(RuntimeError):
    """The server refused or failed. `status` is the HTTP status; the text is the server's own sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"the policy server answers {status}: {message}")
        self.status = status


class RemotePolicy:
    """Asks a server of ``python -m keygrip.serve`` for plans, over one connection that is kept open.

    Not for several threads at once: give each a client of its own.

    Args:
        url: as the server says when it starts, e.g. ``http://127.0.0.1:8421``.
        timeout_s: of a connection and of a plan. patience_s: how long to ask again while the server is busy.

    Raises:
        ConnectionError: nothing answers there.
    """

    def __init__(self, url: str, timeout_s: float = 10.0, patience_s: float = 2.0) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None or parts.path not in ("", "/"):
            raise ValueError(f"the server's address is http://HOST:PORT, not {url!r}")
        self.url, self.patience_s = url.rstrip("/"), patience_s
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_s)
        health = self.health()
        self.needs = Needs(
            arms=tuple(health["needs"]["arms"]),
            cameras=tuple(health["needs"]["cameras"]),
            instruction=bool(health["needs"]["instruction"]),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the connection back."""
        self._connection.close()

    def health(self) -> dict[str, Any]:
        """What the server says of itself: model, expected observation, limits, counts."""
        status, body = self._ask("GET", "/health")
        if status != 200:
            raise ServerError(status, _sentence(body))
        return dict(json.loads(body))

    def plan(self, observation: Observation) -> Plan:
        """The policy's plan for an observation (see `keygrip.runtime.chunk_execution.Observation`).

        Raises:
            ValueError: the observation does not suit the policy, or the policy finds no plan for it.
            ServerError: the server is too busy for longer than `patience_s`, or has failed.
            ConnectionError: it is gone.
        """
        body = encode_observation(observation, self.needs)
        began = time.monotonic()
        while True:
            status, answer = self._ask("POST", "/plan", body)
            if status != 503 or time.monotonic() - began > self.patience_s:
                break
            time.sleep(0.05)
        if status == 200:
            return decode_plan(answer)
        if status in (400, 413, 422):
            raise ValueError(_sentence(answer))
        raise ServerError(status, _sentence(answer))

    def _ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        headers = {"Content-Type": CONTENT_TYPE} if body is not None else {}
        for attempt in (1, 2):
            fresh = self._connection.sock is None
            try:
                self._connection.request(method, path, body, headers)
                answer = self._connection.getresponse()
                return answer.status, answer.read()
            except (http.client.HTTPException, OSError) as error:
                self._connection.close()
                # A kept connection may have been closed by the server meanwhile: a plan asked for again is the same.
                if fresh or attempt == 2 or isinstance(error, TimeoutError):
                    raise ConnectionError(
                        f"no policy server answers at {self.url} ({type(error).__name__}: {error}); start one with "
                        "python -m keygrip.serve checkpoint=..."
                    ) from error
        raise AssertionError("unreachable")


def _sentence(body: bytes) -> str:
    """The server's explanation, or whatever a proxy between says."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(body)["error"])
    return body[:200].decode(errors="replace")
