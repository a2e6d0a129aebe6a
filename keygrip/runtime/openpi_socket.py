"""A websocket connection of openpi's policy client: one episode after another, each with its own generator."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from functools import partial
from typing import cast

from aiohttp import WSCloseCode, WSMessage, WSMsgType, web

from keygrip.models.policy import Policy
from keygrip.runtime import openpi
from keygrip.runtime.refusal import Refusal
from keygrip.runtime.service import PolicyService
from keygrip.runtime.sessions import checked_seed

log = logging.getLogger(__name__)


async def converse(service: PolicyService, request: web.Request) -> web.StreamResponse:
    """Answer the messages of one connection until it is closed, or silent for `limits.session_s`.

    Raises:
        Refusal: The request is no handshake of a websocket, or too many sessions are open.
    """
    service.refuse_another_session()
    policy = service.policy(0)
    socket = web.WebSocketResponse(
        max_msg_size=service.limits.request_bytes, compress=False, timeout=service.limits.read_s, autoping=True
    )
    try:
        await socket.prepare(request)
    except (web.HTTPBadRequest, ValueError) as error:  # ValueError: a key that is not ASCII
        reason = error.text if isinstance(error, web.HTTPBadRequest) else error
        raise Refusal(400, f"the request is no handshake of a websocket: {reason}") from error
    service.conversations += 1
    try:
        await _send(service, socket, openpi.metadata(service.about, service.needs))
        await _answer_all(service, socket, policy)
    except (ConnectionError, TimeoutError) as error:
        service.metrics.disconnects += 1
        log.info("%s went away (%s)", request.remote, type(error).__name__)
    finally:
        service.conversations -= 1
    return socket


async def _answer_all(service: PolicyService, socket: web.WebSocketResponse, policy: Policy) -> None:
    replaced = service.planner.replaced
    while True:
        message = await _receive_message(service, socket)
        if message is None or message.type is not WSMsgType.BINARY:
            if message is not None and message.type is WSMsgType.TEXT:
                await socket.close(code=WSCloseCode.UNSUPPORTED_DATA, message=b"messages are binary (MessagePack)")
            return
        if service.planner.replaced != replaced:
            await socket.close(code=WSCloseCode.TRY_AGAIN_LATER, message=b"the policy was replaced")
            return
        status = 200
        try:
            began = time.perf_counter()
            body: bytes = message.data
            decoded = await service.read(partial(openpi.decode_message, body, service.needs))
            if isinstance(decoded, int):
                policy = service.policy(checked_seed(decoded))
                answer: bytes | str = openpi.encode_reset(decoded)
            else:
                plan = await service.plan(decoded, policy)
                answer = openpi.encode_plan(plan, 1e3 * (time.perf_counter() - began))
        except Refusal as refusal:
            status, answer = refusal.status, f"{refusal.status}: {refusal.sentence}"
        except Exception as error:  # as with HTTP, the connection stays open
            log.error("a message could not be answered", exc_info=error)
            status, answer = 500, f"500: the server failed: {type(error).__name__}"
        service.metrics.answers["openpi", status] += 1
        await _send(service, socket, answer)


async def _receive_message(service: PolicyService, socket: web.WebSocketResponse) -> WSMessage | None:
    """Return the next message. Return None and close the socket after too long a wait or when the server ends."""
    waits = [asyncio.ensure_future(socket.receive()), asyncio.ensure_future(service.ending.wait())]
    try:
        await asyncio.wait(waits, timeout=service.limits.session_s, return_when=asyncio.FIRST_COMPLETED)
        if waits[0].done():
            return cast(WSMessage, waits[0].result())
    finally:
        for wait in waits:
            wait.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waits[0]  # a socket cannot be closed while a read is pending
    reason = b"the server ends" if service.ending.is_set() else b"no message for too long"
    await socket.close(code=WSCloseCode.GOING_AWAY, message=reason)
    return None


async def _send(service: PolicyService, socket: web.WebSocketResponse, answer: bytes | str) -> None:
    """Send an answer; a client that does not read it in time is disconnected."""
    async with asyncio.timeout(service.limits.read_s):
        if isinstance(answer, str):
            await socket.send_str(answer)
        else:
            await socket.send_bytes(answer)
