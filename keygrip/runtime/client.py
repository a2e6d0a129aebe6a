"""A policy on another machine, with the same interface as a local policy.

::

    policy = RemotePolicy("http://127.0.0.1:8421")
    controller = RecedingHorizon(policy, control_hz=10)
    command = controller.act(observation)
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import ssl
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from keygrip.models.policy import Needs, Observation, Plan, UnderWay
from keygrip.runtime.wire import CONTENT_TYPE, SESSION_HEADER, decode_plan, encode_observation

log = logging.getLogger(__name__)

LARGEST_ANSWER = 1 << 26  # bytes; a plan has a few thousand
NO_JSON = (ValueError, TypeError, KeyError, RecursionError)  # errors raised by text that is not the expected JSON


class ServerError(RuntimeError):
    """The server refused or failed. `status` is the HTTP status; the text is the server's message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)  # the arguments, with which another process can unpickle it
        self.status, self.message = status, message

    def __str__(self) -> str:
        return f"the policy server answers {self.status}: {self.message}"


class RemotePolicy:
    """Request plans from a server of ``python -m keygrip.serve``, over one persistent connection.

    Not thread-safe: give each thread its own client.

    A stochastic policy samples for each client with a separate generator, from seed 0 or that of `reset`.
    `continues` is True if the server's policy can continue the current plan.

    Args:
        url: as the server prints it at the start, e.g. ``http://127.0.0.1:8421``.
        timeout_s: of a connection and of a plan. patience_s: how long to repeat a request while the server is busy.
        token: the server's token, if it has one. ca: PEM file of the certificate (or authority) to trust with https;
            None: those that the system trusts.
        renews: if the server no longer has the session (it was restarted, replaced a stuck policy, or received no
            request for `limits.session_s`), a new session is opened with the last seed. The arm continues to move, but
            its plans no longer follow from the episode's seed alone. False: this raises ServerError, so that no
            episode mixes two random sequences.

    Raises:
        ValueError: The address is not valid, or the certificate does not exist.
        ConnectionError: No server responds, or its certificate is not trusted. ServerError: The server refuses the
            token, or has no policy at present.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float = 10.0,
        patience_s: float = 2.0,
        token: str | None = None,
        ca: str | None = None,
        renews: bool = False,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None or parts.path not in ("", "/"):
            raise ValueError(f"the server's address is http://HOST:PORT or https://HOST:PORT, not {url!r}")
        self.url, self.patience_s = url.rstrip("/"), patience_s
        connect: Callable[[], http.client.HTTPConnection]
        if parts.scheme == "https":
            try:
                context = ssl.create_default_context(cafile=ca)
            except OSError as error:  # also ssl.SSLError
                raise ValueError(f"ca={ca} is no file with a certificate in PEM format ({error})") from error
            address = (parts.hostname, parts.port or 443)
            connect = partial(http.client.HTTPSConnection, *address, timeout=timeout_s, context=context)
        elif ca is not None:
            raise ValueError(f"ca={ca} has no effect with {url!r}: only https:// is encrypted")
        else:
            connect = partial(http.client.HTTPConnection, parts.hostname, parts.port or 80, timeout=timeout_s)
        self._connect, self._connection = connect, connect()
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._options = (timeout_s, patience_s, token, ca, renews)
        self._session: str | None = None
        self._renews, self._seed = renews, 0
        health = self.health()
        try:
            calibration, camera = health["needs"].get("calibration", True), health["needs"].get("camera")
            self._stochastic = bool(health["stochastic"])
            self.continues = bool(health.get("continues", False))
            self.needs = Needs(
                arms=tuple(map(str, health["needs"]["arms"])),
                cameras=tuple(map(str, health["needs"]["cameras"])),
                instruction=bool(health["needs"]["instruction"]),
                calibration=tuple(map(str, calibration)) if isinstance(calibration, list) else bool(calibration),
                plans_joints=bool(health["needs"].get("plans_joints", False)),
                camera=None if camera is None else str(camera),
            )
        except (KeyError, TypeError, AttributeError) as error:
            self._connection.close()
            raise ServerError(200, f"what answers at {self.url} is no policy server of keygrip's version") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the session and the connection."""
        if self._session is not None:
            with contextlib.suppress(ConnectionError):
                self._ask("DELETE", "/session", session=self._session)
            self._session = None
        self._connection.close()

    def end_session(self) -> None:
        """Close the session over a new connection: another thread may still wait for a plan over this client's own."""
        session, self._session, self._renews = self._session, None, False
        if session is None:
            return
        connection = self._connect()
        try:
            with contextlib.suppress(http.client.HTTPException, OSError):
                connection.request("DELETE", "/session", headers=self._headers | {SESSION_HEADER: session})
                connection.getresponse().read(LARGEST_ANSWER)
        finally:
            connection.close()

    def reset(self, seed: int) -> None:
        """Start an episode. From here on, the policy's samples are a function of the seed, as with the local policy.

        Raises:
            ServerError: Too many sessions are open, or the policy is stuck. ConnectionError: The server is gone.
        """
        if not self._stochastic:
            return
        self._seed = seed
        body = json.dumps({"seed": seed}).encode()
        status, answer = self._ask("POST", "/reset", body, self._session, "application/json")
        if status == 404 and self._session is not None:  # expired between episodes: a new session is equivalent
            status, answer = self._ask("POST", "/reset", body, None, "application/json")
        if status != 200:
            raise ServerError(status, _error_message(answer))
        try:
            self._session = str(json.loads(answer)["session"])
        except NO_JSON as error:
            raise ServerError(status, "the answer to /reset names no session") from error

    def session(self) -> RemotePolicy:
        """Return another client of the same server, with its own connection and, if the policy is stochastic, its own
        generator. Raises the same errors as the constructor."""
        return RemotePolicy(self.url, *self._options)

    def health(self) -> dict[str, Any]:
        """Return the server's `/health`: state, model, expected observation, limits, counts."""
        status, body = self._ask("GET", "/health")
        content: dict[str, Any] = {}
        with contextlib.suppress(*NO_JSON):
            content = dict(json.loads(body))
        if status not in (200, 503) or "needs" not in content:  # 503 with the usual content: the policy is stuck
            raise ServerError(status, _error_message(body))
        return content

    def plan(self, observation: Observation) -> Plan:
        """Return the policy's plan for an observation (see `keygrip.runtime.chunk_execution.Observation`).

        Raises:
            ValueError: The observation does not fit the policy, or the policy finds no plan for it.
            ServerError: The server is busy for longer than `patience_s`, or has failed.
            ConnectionError: The server is gone.
        """
        return self._plan(encode_observation(observation, self.needs))

    def plan_continuing(self, observation: Observation, executing: Plan, delay_s: float) -> Plan:
        """Return a plan that continues the current one (real-time chunking). The server's policy must have `continues`.

        Args:
            observation: with `time_s`. executing: a plan with `time_s` of the same clock.
            delay_s: time until the new plan arrives; the current plan is executed at least that long.

        Raises:
            As `plan`; also ValueError if the server's policy does not continue plans.
        """
        return self._plan(encode_observation(observation, self.needs, UnderWay(executing, delay_s)))

    def _plan(self, body: bytes) -> Plan:
        if self._session is None:
            self.reset(0)
        began, renews = time.monotonic(), self._renews and self._session is not None
        while True:
            status, answer = self._ask("POST", "/plan", body, self._session)
            if status == 404 and renews:
                log.warning("%s no longer has this session (%s): a new one is opened", self.url, _error_message(answer))
                self.reset(self._seed)
                renews = False
                continue
            if status != 503 or time.monotonic() - began > self.patience_s:
                break
            time.sleep(0.05)
        if status == 200:
            return decode_plan(answer)
        if status in (400, 413, 422):
            raise ValueError(_error_message(answer))
        raise ServerError(status, _error_message(answer))

    def _ask(
        self, method: str, path: str, body: bytes | None = None, session: str | None = None, kind: str = CONTENT_TYPE
    ) -> tuple[int, bytes]:
        headers = self._headers | ({"Content-Type": kind} if body is not None else {})
        if session is not None:
            headers |= {SESSION_HEADER: session}
        for attempt in (1, 2):
            fresh = self._connection.sock is None
            try:
                self._connection.request(method, path, body, headers)
                answer = self._connection.getresponse()
                content = answer.read(LARGEST_ANSWER + 1)
                if len(content) > LARGEST_ANSWER:
                    raise http.client.HTTPException(f"its answer is larger than {LARGEST_ANSWER} bytes")
                return answer.status, content
            except (http.client.HTTPException, OSError) as error:
                self._connection.close()
                # The server may have closed a persistent connection in the meantime. Repeating a plan request is safe.
                if fresh or attempt == 2 or isinstance(error, TimeoutError):
                    raise ConnectionError(self._failure(error)) from error
        raise AssertionError("unreachable")

    def _failure(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return (
                f"the policy server at {self.url} did not answer in time (timeout_s={self._options[0]:g}): its plans "
                "take longer (plan_p95_ms in its /health; give RemotePolicy a larger timeout_s), or the server or the "
                "network is down"
            )
        return f"no policy server answers at {self.url} ({type(error).__name__}: {error}); {_remedy(error)}"


def _remedy(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return "ca=FILE names a certificate to trust, and the address must be one that it is for"
    if isinstance(error, ssl.SSLError):
        return "a server without tls.cert has an address of http://"
    if isinstance(error, http.client.RemoteDisconnected):
        return "a server with tls.cert has an address of https://; else see the server's log"
    return "start one with python -m keygrip.serve checkpoint=..."


def _error_message(body: bytes) -> str:
    """Return the server's error message, or the text of a proxy in between."""
    with contextlib.suppress(*NO_JSON):
        return str(json.loads(body)["error"])
    return body[:200].decode(errors="replace")
