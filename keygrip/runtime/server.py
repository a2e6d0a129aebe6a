"""The policy server: HTTP, and openpi's websocket protocol at the same address.

``POST /plan`` receives an observation and returns a plan, ``POST /reset`` opens a session or starts its next episode,
``DELETE /session`` closes it; ``GET /health``, ``/healthz`` and ``/metrics`` report the server's state. A websocket at
``/`` uses openpi's protocol (`openpi_socket`).

All client input is untrusted: sizes are limited before bytes are read, reading has a time limit, bodies are
arrays and never objects (see `wire` and `messagepack`), and without the token no request is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hmac
import ipaddress
import json
import logging
import re
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from aiohttp import ClientConnectionError, HttpVersion11, web
from aiohttp.http_exceptions import BadHttpMessage, HttpProcessingError

from keygrip.models.policy import Needs, Policy
from keygrip.runtime import metrics
from keygrip.runtime.openpi_socket import converse
from keygrip.runtime.plausibility import Bounds
from keygrip.runtime.refusal import Refusal
from keygrip.runtime.service import Limits, PolicyService
from keygrip.runtime.sessions import checked_seed
from keygrip.runtime.wire import CONTENT_TYPE, SESSION_HEADER, decode_request, encode_plan

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LINGER_S = 1.0  # a refused body is still read for this time, so that the client receives the answer
LONGEST_RESET = 1000  # bytes of the body of POST /reset
PLACES = "there is POST /plan, POST /reset, DELETE /session, GET /health, /healthz and /metrics, and a websocket at /"


class _InOneLine(logging.Filter):
    """Reduce the traces of requests that are no HTTP to one line: any stranger can send them, without the token."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        odd_expect = isinstance(error, UnicodeEncodeError) and "Expect" in error.object  # on a path without a route
        if odd_expect or isinstance(error, HttpProcessingError):
            reason = " ".join(getattr(error, "message", "bytes in the header Expect").split())[:200]
            record.msg, record.args = f"{record.getMessage()}: {type(error).__name__}: {reason}", ()
            record.exc_info = record.exc_text = None
            record.levelno, record.levelname = logging.INFO, "INFO"
        return True


async def _answer_expect(request: web.Request) -> None:
    """Answer the header Expect as aiohttp does, which fails to name an expectation with bytes above 127."""
    if request.headers["Expect"].lower() != "100-continue":
        raise web.HTTPExpectationFailed(text="the only Expect is 100-continue")
    if request.version == HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer itself has not begun


http_log = logging.getLogger(f"{__name__}.http")
http_log.addFilter(_InOneLine())


class PolicyServer:
    """Serve a policy at an address.

    Args:
        policy: computes plans; called from one thread. needs: its inputs.
        about: what `/health` reports about the model, plain values. limits, bounds: see `Limits` and `Bounds`.
        make: creates an equal policy to replace a stuck one; None: the server ends instead.
        token: required in every request except `/healthz`; None: every client is answered.
        tls: certificate and key; None: no encryption.
    """

    def __init__(
        self,
        policy: Policy,
        needs: Needs,
        about: dict[str, Any],
        limits: Limits | None = None,
        bounds: Bounds | None = None,
        make: Callable[[], Policy] | None = None,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.service = PolicyService(policy, needs, about, self.limits, bounds or Bounds(), make)
        self._token, self._tls = token, tls
        self._in_progress = 0
        self._names: set[str] | None = None  # allowed in the Host header, in addition to IP addresses; None: any

    # ---- running ---------------------------------------------------------------------------------------------------

    async def serve(self, host: str, port: int, stop: asyncio.Event, ready: Callable[[str], None]) -> None:
        """Serve at one address until `stop` is set, then finish the requests in progress.

        Args:
            host: the only address to listen on. port: 0 selects a free one. ready: called with the URL.

        Raises:
            OSError: The address does not belong to this machine, or the port is in use.
            RuntimeError: The policy was stuck more often than it may be replaced.
        """
        application = web.Application(client_max_size=self.limits.request_bytes, middlewares=[self._answer])
        for method, path, handler in (
            ("GET", "/", self._socket),
            ("GET", "/health", self._health),
            ("GET", "/healthz", self._alive),
            ("GET", "/metrics", self._metrics),
            ("POST", "/plan", self._plan),
            ("POST", "/reset", self._reset),
            ("DELETE", "/session", self._end),
        ):
            application.router.add_route(method, path, handler, expect_handler=_answer_expect)
        application.on_shutdown.append(self._ending)
        runner = web.AppRunner(
            application,
            access_log=None,
            logger=http_log,
            handle_signals=False,
            keepalive_timeout=self.limits.idle_s,
            lingering_time=LINGER_S,
            auto_decompress=False,  # otherwise a small body could expand to a large one
            shutdown_timeout=self.limits.plan_s,
        )
        await runner.setup()
        # A full garbage collection over the objects of torch and the policy blocks all threads for 0.1 s or longer.
        gc.collect()
        gc.freeze()
        watch = asyncio.create_task(self.service.planner.watch())
        ends = [asyncio.create_task(event.wait()) for event in (stop, self.service.planner.failed)]
        try:
            site = web.TCPSite(runner, host, port, ssl_context=self._tls)
            try:
                await site.start()
            except OSError as error:
                raise OSError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from error
            if self._token is None and all(ipaddress.ip_address(each[0]).is_loopback for each in runner.addresses):
                self._names = {"localhost", host.lower()}
            bound = runner.addresses[0]
            name = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
            ready(f"{'http' if self._tls is None else 'https'}://{name}:{bound[1]}")
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (watch, *ends):
                task.cancel()
            await runner.cleanup()
            self.service.close()
            gc.unfreeze()
        if self.service.planner.failed.is_set():
            raise RuntimeError(f"{self.service.planner.trouble()}; see the log, and start it again")

    async def _ending(self, application: web.Application) -> None:
        self.service.ending.set()

    # ---- requests --------------------------------------------------------------------------------------------------

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer every refusal with a message, and count the answers."""
        conversation = request.path == "/"  # a websocket may last long, and counts its answers itself
        self._in_progress += not conversation
        try:
            response = await self._response(request, handler)
        finally:
            self._in_progress -= not conversation
        if not isinstance(response, web.WebSocketResponse):
            self.service.metrics.answers["http", response.status] += 1
        return response

    async def _response(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        unreadable = False
        try:
            self._admit(request)
            return await handler(request)
        except Refusal as refusal:
            refused = refusal
        except web.HTTPNotFound:
            refused = Refusal(404, PLACES)
        except web.HTTPMethodNotAllowed:
            refused = Refusal(405, PLACES)
        except (BadHttpMessage, web.RequestPayloadError) as error:  # aiohttp's parser without its compiled extension
            unreadable = True
            refused = Refusal(400, f"the body is not valid HTTP ({type(error).__name__}): its chunks cannot be read")
        except (ConnectionError, ClientConnectionError) as error:
            self.service.metrics.disconnects += 1
            log.info("%s went away before its request had arrived (%s)", request.remote, type(error).__name__)
            gone = web.Response(status=400)
            gone.force_close()
            return gone
        response = web.json_response({"error": refused.sentence}, status=refused.status)
        if refused.again:
            response.headers["Retry-After"] = "1"
        if unreadable or refused.status in (408, 413) or (refused.status == 401 and request.can_read_body):
            response.force_close()  # the rest of the body is not read
        return response

    def _admit(self, request: web.Request) -> None:
        """Raise Refusal if the request comes from a web page, has no token, or too many requests are in progress."""
        # browsers let any web page post to any address, and mark such requests with Origin
        if "Origin" in request.headers:
            raise Refusal(403, "no answers for web pages (the request has an Origin)")
        if self._names is not None and not _is_one_of(self._names, request.headers.get("Host", "localhost")):
            # DNS rebinding: a web page's own name can point to this machine; its requests then need not have an Origin.
            raise Refusal(
                403, "the server answers this machine alone: ask for localhost or 127.0.0.1, or start it with a token"
            )
        if self._token is not None and request.path != "/healthz":
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            # openpi's client sends its api_key as "Api-Key"
            if scheme.lower() not in ("bearer", "api-key") or not hmac.compare_digest(
                token.encode(errors="surrogateescape"), self._token.encode()
            ):
                raise Refusal(401, "the header Authorization must say: Bearer, and the server's token")
        if self._in_progress > self.limits.requests and request.path != "/":
            message = f"more than {self.limits.requests} requests at once: ask again in a moment"
            raise Refusal(503, message, again=True)

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() != "websocket":
            raise Refusal(404, PLACES)
        return await converse(self.service, request)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        trouble = self.service.planner.trouble()
        return web.json_response(self.service.health(), status=200 if trouble is None else 503)

    async def _alive(self, request: web.Request) -> web.StreamResponse:
        trouble = self.service.planner.trouble()
        return web.Response(status=200 if trouble is None else 503, text="OK\n" if trouble is None else "stuck\n")

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text=self.service.metrics_text(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _plan(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request, CONTENT_TYPE)
        name = request.headers.get(SESSION_HEADER)
        if name is not None:
            self.service.sessions.find(name)
        decode = partial(decode_request, body, self.service.needs, self.service.continues)
        observation, under_way = await self.service.read(decode)
        policy = self.service.policy() if name is None else self.service.sessions.find(name).policy
        plan = await self.service.plan(observation, policy, under_way)
        return web.Response(body=encode_plan(plan), content_type=CONTENT_TYPE)

    async def _reset(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request, "application/json")
        try:
            content = json.loads(body) if len(body) <= LONGEST_RESET else None
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or not set(content) <= {"seed"}:
            raise Refusal(400, 'the body of /reset is JSON: {"seed": 0}')
        seed, name = checked_seed(content.get("seed", 0)), request.headers.get(SESSION_HEADER)
        if name is None:
            self.service.refuse_another_session()
            name = self.service.sessions.start(self.service.policy(), seed)
        else:
            self.service.sessions.restart(name, self.service.policy(), seed)
        return web.json_response({"session": name, "seed": seed})

    async def _end(self, request: web.Request) -> web.StreamResponse:
        self.service.sessions.end(request.headers.get(SESSION_HEADER, ""))
        return web.json_response({"closed": True})

    async def _body(self, request: web.Request, kind: str) -> bytes:
        """Return the request's body. Raises Refusal if it is not accepted."""
        if request.headers.get("Content-Type") != kind:
            # Browsers send other types, or none, to any address on behalf of a web page; for this type they ask the
            # server first.
            raise Refusal(415, f"the header Content-Type must say {kind}")
        if "Content-Encoding" in request.headers:
            raise Refusal(415, "compressed bodies are not taken")
        large = Refusal(413, f"the body is larger than {self.limits.request_mb:g} MB: send smaller images")
        if request.content_length is not None and request.content_length > self.limits.request_bytes:
            raise large
        try:
            async with asyncio.timeout(self.limits.read_s):
                return await request.read()
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self.limits.read_s:g} s") from None
        except web.HTTPRequestEntityTooLarge:  # a body without a stated length
            raise large from None


def _is_one_of(names: set[str], host: str) -> bool:
    """Return whether a Host header is one of these names or an IP address, which no web page's name can imitate."""
    name = re.sub(r":\d*$", "", host).removeprefix("[").removesuffix("]")
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name.lower().removesuffix(".") in names
