"""A policy on another machine, with the interface of a local one.

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
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from keygrip.models.policy import Needs, Observation, Plan, UnderWay
from keygrip.runtime.wire import CONTENT_TYPE, SESSION_HEADER, decode_plan, encode_observation

log = logging.getLogger(__name__)

LARGEST_ANSWER = 1 << 26  # bytes; a plan has some thousands
NO_JSON = (ValueError, TypeError, KeyError, RecursionError)  # what text that is not the expected JSON raises


class ServerError(RuntimeError):
    """The server refused or failed. `status` is the HTTP status; the text is the server's own sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"the policy server answers {status}: {message}")
        self.status = status


class RemotePolicy:
    """Asks a server of ``python -m keygrip.serve`` for plans, over one connection that is kept open.

    Not for several threads at once: give each a client of its own.

    A policy that draws by chance draws for each client by a generator of its own, from seed 0 or that of `reset`.
    `continues` says whether the server's policy can continue the plan under way.

    Args:
        url: as the server says when it starts, e.g. ``http://127.0.0.1:8421``.
        timeout_s: of a connection and of a plan. patience_s: how long to ask again while the server is busy.
        token: the server's, where it has one. ca: PEM file of the certificate (or authority) to trust with https;
            None: those that the system trusts.
        renews: a session that the server no longer knows (it was started again, replaced a stuck policy, or was not
            asked for `limits.session_s`) is opened anew with the last seed: an arm drives on, and its plans are no
            longer those of one episode's seed. False: that is a ServerError, so that no episode is of two sequences.

    Raises:
        ValueError: no such address, or no such certificate.
        ConnectionError: nothing answers there, or not with a certificate that is trusted. ServerError: it does not take
            the token, or has no policy at present.
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
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            try:
                context = ssl.create_default_context(cafile=ca)
            except OSError as error:  # also ssl.SSLError
                raise ValueError(f"ca={ca} is no file with a certificate in PEM format ({error})") from error
            self._connection = http.client.HTTPSConnection(
                parts.hostname, parts.port or 443, timeout=timeout_s, context=context
            )
        elif ca is not None:
            raise ValueError(f"ca={ca} has no effect with {url!r}: only https:// is encrypted")
        else:
            self._connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout_s)
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
        """Closes the session and the connection."""
        if self._session is not None:
            with contextlib.suppress(ConnectionError):
                self._ask("DELETE", "/session", session=self._session)
            self._session = None
        self._connection.close()

    def reset(self, seed: int) -> None:
        """Starts an episode: what the policy draws is from here on a function of the seed, as of the local policy.

        Raises:
            ServerError: too many sessions are open, or the policy is stuck. ConnectionError: it is gone.
        """
        if not self._stochastic:
            return
        self._seed = seed
        body = json.dumps({"seed": seed}).encode()
        status, answer = self._ask("POST", "/reset", body, self._session, "application/json")
        if status == 404 and self._session is not None:  # expired between episodes: a new one is as good
            status, answer = self._ask("POST", "/reset", body, None, "application/json")
        if status != 200:
            raise ServerError(status, _sentence(answer))
        try:
            self._session = str(json.loads(answer)["session"])
        except NO_JSON as error:
            raise ServerError(status, "the answer to /reset names no session") from error

    def session(self) -> RemotePolicy:
        """Another client of the same server: a connection and, where the policy draws by chance, a generator of its
        own. Raises as the constructor does."""
        return RemotePolicy(self.url, *self._options)

    def health(self) -> dict[str, Any]:
        """The server's `/health`: state, model, expected observation, limits, counts."""
        status, body = self._ask("GET", "/health")
        said: dict[str, Any] = {}
        with contextlib.suppress(*NO_JSON):
            said = dict(json.loads(body))
        if status not in (200, 503) or "needs" not in said:  # 503 with the usual answer: the policy is stuck
            raise ServerError(status, _sentence(body))
        return said

    def plan(self, observation: Observation) -> Plan:
        """The policy's plan for an observation (see `keygrip.runtime.chunk_execution.Observation`).

        Raises:
            ValueError: the observation does not suit the policy, or the policy finds no plan for it.
            ServerError: the server is too busy for longer than `patience_s`, or has failed.
            ConnectionError: it is gone.
        """
        return self._plan(encode_observation(observation, self.needs))

    def plan_continuing(self, observation: Observation, executing: Plan, delay_s: float) -> Plan:
        """A plan that continues the one under way (real-time chunking), of a server whose policy `continues`.

        Args:
            observation: with `time_s`. executing: a plan with its `time_s`, of the same clock.
            delay_s: until the new plan arrives; so long the one under way is executed in any case.

        Raises:
            As `plan`; ValueError also where the server's policy does not continue plans.
        """
        return self._plan(encode_observation(observation, self.needs, UnderWay(executing, delay_s)))

    def _plan(self, body: bytes) -> Plan:
        if self._session is None:
            self.reset(0)
        began, renews = time.monotonic(), self._renews and self._session is not None
        while True:
            status, answer = self._ask("POST", "/plan", body, self._session)
            if status == 404 and renews:
                log.warning("%s knows this session no longer (%s): a new one is opened", self.url, _sentence(answer))
                self.reset(self._seed)
                renews = False
                continue
            if status != 503 or time.monotonic() - began > self.patience_s:
                break
            time.sleep(0.05)
        if status == 200:
            return decode_plan(answer)
        if status in (400, 413, 422):
            raise ValueError(_sentence(answer))
        raise ServerError(status, _sentence(answer))

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
                # A kept connection may have been closed by the server meanwhile: a plan asked for again is the same.
                if fresh or attempt == 2 or isinstance(error, TimeoutError):
                    raise ConnectionError(
                        f"no policy server answers at {self.url} ({type(error).__name__}: {error}); {_remedy(error)}"
                    ) from error
        raise AssertionError("unreachable")


def _remedy(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return "ca=FILE names a certificate to trust, and the address must be one that it is for"
    if isinstance(error, ssl.SSLError):
        return "a server without tls.cert has an address of http://"
    if isinstance(error, http.client.RemoteDisconnected):
        return "a server with tls.cert has an address of https://; else see the server's log"
    return "start one with python -m keygrip.serve checkpoint=..."


def _sentence(body: bytes) -> str:
    """The server's explanation, or whatever a proxy between says."""
    with contextlib.suppress(*NO_JSON):
        return str(json.loads(body)["error"])
    return body[:200].decode(errors="replace")
