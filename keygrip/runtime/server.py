"""The HTTP server: ``POST /plan`` takes an observation and answers with a plan, ``GET /health`` says what it takes.

One thread computes, one plan after the other; requests that wait for it are few, and those beyond are refused at once:
a plan for a picture of some seconds ago moves a robot to where things were. Whoever connects is believed nothing: sizes
are limited before bytes are read, reading has a time limit, bodies are arrays and never objects (see `wire`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

from aiohttp import web

from keygrip.models.policy import Needs, Plan, Policy
from keygrip.runtime.wire import CONTENT_TYPE, WireError, decode_observation, encode_plan, entries_of

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
PLANS_REMEMBERED = 1000  # for the times in /health
LINGER_S = 1.0  # how long a refused body may still flow, so that the sender reads why


@dataclass(frozen=True)
class Limits:
    """What a server puts up with.

    Args:
        request_mb: size of a request's body. requests: in progress at once, those still arriving included.
        waiting: plans that wait or are computed at once; more are refused with 503.
        read_s: time in which a body must have arrived. idle_s: time in which a connection must send a request's head.
        plan_s: time for a plan, waiting included; then the answer is 504.
    """

    request_mb: float = 16.0
    requests: int = 32
    waiting: int = 4
    read_s: float = 5.0
    idle_s: float = 15.0
    plan_s: float = 30.0

    def __post_init__(self) -> None:
        for limit in fields(self):
            if getattr(self, limit.name) <= 0:
                raise ValueError(f"limits.{limit.name} must be above 0, not {getattr(self, limit.name)}")


class PolicyServer:
    """A policy and the requests for it.

    Args:
        policy: plans; called from one thread. needs: what it reads.
        about: what `/health` says of the model, plain values. limits: see there.
    """

    def __init__(self, policy: Policy, needs: Needs, about: dict[str, Any], limits: Limits | None = None) -> None:
        self.policy, self.needs, self.about, self.limits = policy, needs, about, limits or Limits()
        self._thread = ThreadPoolExecutor(1, "policy")
        self._in_progress = self._planning = 0
        self._answers: Counter[int] = Counter()
        self._seconds: deque[float] = deque(maxlen=PLANS_REMEMBERED)

    # ---- running ---------------------------------------------------------------------------------------------------

    async def serve(self, host: str, port: int, stop: asyncio.Event, ready: Callable[[str], None]) -> None:
        """Answers at one address until `stop` is set, then finishes what it has begun.

        Args:
            host: the address to listen on, and no other. port: 0 takes a free one. ready: called with the URL.

        Raises:
            OSError: the address is not this machine's, or the port is taken.
        """
        application = web.Application(client_max_size=self._most_bytes, middlewares=[self._refuse_crowds])
        application.router.add_get("/health", self._health, allow_head=False)
        application.router.add_post("/plan", self._plan)
        runner = web.AppRunner(
            application,
            access_log=None,
            handle_signals=False,
            keepalive_timeout=self.limits.idle_s,
            lingering_time=LINGER_S,
            auto_decompress=False,  # a small body may not become a large one
            shutdown_timeout=self.limits.plan_s,
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port)
            try:
                await site.start()
            except OSError as error:
                raise OSError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from error
            bound = runner.addresses[0]
            name = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
            ready(f"http://{name}:{bound[1]}")
            await stop.wait()
        finally:
            await runner.cleanup()
            self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def _most_bytes(self) -> int:
        return int(self.limits.request_mb * 1e6)

    # ---- requests --------------------------------------------------------------------------------------------------

    @web.middleware
    async def _refuse_crowds(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Counts, limits how many are served at once, and gives every refusal a sentence."""
        self._in_progress += 1
        response: web.StreamResponse
        try:
            if self._in_progress > self.limits.requests:
                response = _refusal(503, f"more than {self.limits.requests} requests at once: ask again in a moment")
            else:
                try:
                    response = await handler(request)
                except web.HTTPRequestEntityTooLarge:
                    response = self._too_large()
                except web.HTTPNotFound:
                    response = _refusal(404, "there is POST /plan and GET /health")
                except web.HTTPMethodNotAllowed:
                    response = _refusal(405, "there is POST /plan and GET /health")
        finally:
            self._in_progress -= 1
        self._answers[response.status] += 1
        return response

    async def _health(self, request: web.Request) -> web.StreamResponse:
        seconds = sorted(self._seconds)
        times = {}
        if len(seconds) > 1:
            cuts = statistics.quantiles(seconds, n=20, method="inclusive")
            times = {"plan_p50_ms": round(1e3 * cuts[9], 3), "plan_p95_ms": round(1e3 * cuts[18], 3)}
        return web.json_response(
            {
                **self.about,
                "needs": asdict(self.needs),
                "observation": {name: entry.describe() for name, entry in entries_of(self.needs).items()},
                "limits": asdict(self.limits),
                "answers": {str(status): count for status, count in sorted(self._answers.items())},
                **times,
            }
        )

    async def _plan(self, request: web.Request) -> web.StreamResponse:
        refusal, body = await self._body(request)
        if refusal is not None:
            return refusal
        if self._planning >= self.limits.waiting:
            response = _refusal(503, f"busy with {self._planning} plans: ask again in a moment")
            response.headers["Retry-After"] = "1"
            return response
        try:
            observation = decode_observation(body, self.needs)
        except WireError as error:
            return _refusal(400, str(error))
        self._planning += 1  # until the thread is done with it, whether or not anyone still waits
        future = asyncio.get_running_loop().run_in_executor(self._thread, self._compute, observation)
        future.add_done_callback(self._planned)
        try:
            async with asyncio.timeout(self.limits.plan_s):
                plan = await asyncio.shield(future)
        except TimeoutError:
            return _refusal(504, f"the plan took longer than {self.limits.plan_s:g} s")
        except ValueError as error:  # the policy finds no plan: a ray that meets no plane, ...
            return _refusal(422, str(error))
        except Exception as error:
            log.exception("the policy failed")
            return _refusal(500, f"the policy failed: {type(error).__name__}: {error}")
        return web.Response(body=encode_plan(plan), content_type=CONTENT_TYPE)

    async def _body(self, request: web.Request) -> tuple[web.Response | None, bytes]:
        """The request's body, or why it is not read."""
        if request.headers.get("Content-Type") != CONTENT_TYPE:
            # Browsers send other types, or none, to any address that a web page names; for this one they ask first.
            return _refusal(415, f"the header Content-Type must say {CONTENT_TYPE}"), b""
        if "Content-Encoding" in request.headers:
            return _refusal(415, "compressed bodies are not taken"), b""
        if request.content_length is not None and request.content_length > self._most_bytes:
            return self._too_large(), b""
        try:
            async with asyncio.timeout(self.limits.read_s):
                return None, await request.read()
        except TimeoutError:
            refusal = _refusal(408, f"the body did not arrive within {self.limits.read_s:g} s")
            refusal.force_close()
            return refusal, b""

    def _too_large(self) -> web.Response:
        refusal = _refusal(413, f"the body is larger than {self.limits.request_mb:g} MB: send smaller pictures")
        refusal.force_close()
        return refusal

    def _compute(self, observation: dict[str, Any]) -> Plan:
        started = time.perf_counter()
        plan = self.policy.plan(observation)
        self._seconds.append(time.perf_counter() - started)
        return plan

    def _planned(self, future: asyncio.Future[Plan]) -> None:
        self._planning -= 1
        with contextlib.suppress(asyncio.CancelledError):
            future.exception()  # nobody may have waited for it


def _refusal(status: int, sentence: str) -> web.Response:
    return web.Response(status=status, text=json.dumps({"error": sentence}), content_type="application/json")
