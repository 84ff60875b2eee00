"""What every request passes before a route sees it: header stripping, the key, the size limit.

Plain ASGI middleware, because the page streams its events and a buffering wrapper would hold them
back. Each gate does one thing; `add_gates` gives their order.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.error_mapping import INVALID, ErrorAnswer
from serve_app.routes.status import OPEN_PATHS
from serve_app.settings import Settings
from serve_app.tracing import Tracing

#: With these a caller could tell Serve when to give a request up; Serve's own, not for the outside.
SERVE_HEADERS = frozenset({b"x-request-timeout-seconds", b"x-request-disconnect-disabled"})

#: Where pictures are asked for. A span is named by them, so there are no others.
TRACED = frozenset({("POST", "/v1/images/generations")})

#: How much of a body that nobody wants is read before the answer goes out, and for how long.
DRAINED_BYTES = 32 * 2**20
DRAIN_SECONDS = 5.0


def add_gates(app: FastAPI, settings: Settings, tracing: Tracing | None = None) -> None:
    """Put the gates before the app: the body read whole, headers, the key, the size, and the trace."""
    if tracing is not None:
        app.add_middleware(TracePictures, tracing=tracing)
    app.add_middleware(BodyLimit, limit_bytes=settings.max_body_bytes)
    if settings.api_key is not None:
        app.add_middleware(KeyCheck, api_key=settings.api_key.get_secret_value())
    app.add_middleware(StripServeHeaders)
    app.add_middleware(DrainBody)


class DrainBody:
    """Reads the rest of a body before an early answer goes out.

    A server that answers and closes while the other side still writes loses its answer: the connection
    is reset, and a proxy may hand the closed connection to the next request. What is larger or slower
    than the bounds is cut off, with `Connection: close`; who waits for "100 Continue" has sent nothing.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        body = _WatchedBody(receive, asks_first=headers.get("expect", "").lower() == "100-continue")

        async def send_after_body(message: Message) -> None:
            if message["type"] == "http.response.start" and not await body.drained():
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        await self._app(scope, body.receive, send_after_body)


class _WatchedBody:
    """One request's channel, which knows whether the body has been read to its end."""

    def __init__(self, receive: Receive, asks_first: bool) -> None:
        self._receive = receive
        self._unsent = asks_first
        self._ended = False
        self._read_bytes = 0

    async def receive(self) -> Message:
        self._unsent = False
        message = await self._receive()
        self._read_bytes += len(message.get("body", b""))
        self._ended = self._ended or not message.get("more_body", False)
        return message

    async def drained(self) -> bool:
        """Reads what is left, within the bounds; whether the body's end has been seen."""
        if self._unsent:
            return False
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._ended and self._read_bytes <= DRAINED_BYTES:
                    await self.receive()
        except TimeoutError:
            pass
        return self._ended


class StripServeHeaders:
    """Takes Serve's own control headers out of what comes from outside."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            kept = [(name, value) for name, value in scope["headers"] if name.lower() not in SERVE_HEADERS]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)


class KeyCheck:
    """Lets through who carries the key: as a bearer token, or as the password that a browser asks for."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        given = key_in(Headers(scope=scope).get("authorization", ""))
        if given is not None and secrets.compare_digest(given, self._key):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = ErrorAnswer(
            401,
            INVALID,
            "invalid_api_key",
            "This server needs its key: send the header 'Authorization: Bearer KEY'; in a browser the key "
            "is the password. "
            + ("No key was sent." if given is None else "The key sent is not the right one."),
            headers={"WWW-Authenticate": _challenge(scope["path"])},
        )
        await _send(answer, scope, receive, send)


def _challenge(path: str) -> str:
    """Browsers ask for a password on Basic only; API clients know Bearer."""
    return "Bearer" if path.startswith("/v1/") else 'Basic realm="zimage-turbo", charset="UTF-8"'


def key_in(authorization: str) -> bytes | None:
    """The key in an Authorization header, whose bytes stand as latin-1; None where none can be read."""
    scheme, _, credentials = authorization.strip(" ").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip(" ").encode("latin-1") or None
    if scheme.lower() == "basic":
        try:
            _, colon, password = base64.b64decode(credentials, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return None
        return password if colon else None
    return None


class BodyLimit:
    """Answers 413 to a body above the limit, announced or not, whatever route it goes to."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > self._limit_bytes:
            await _send(self._too_large(), scope, receive, send)
            return
        counted = _CountedBody(receive, send, self._limit_bytes)
        await self._app(scope, counted.receive, counted.send)
        if counted.exceeded and not counted.started:
            await _send(self._too_large(), scope, receive, send)

    def _too_large(self) -> ErrorAnswer:
        return ErrorAnswer(
            413,
            INVALID,
            "body_too_large",
            f"The body may have at most {self._limit_bytes:,} bytes; shorten the prompt.",
        )


class TracePictures:
    """A span for each request for pictures, from here to the last byte of its answer.

    What the gates before this turn away is no request for a picture.
    """

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) not in TRACED:
            await self._app(scope, receive, send)
            return
        with self._tracing.request(f"{scope['method']} {scope['path']}", Headers(scope=scope)) as trace:

            async def send_and_tell(message: Message) -> None:
                if message["type"] == "http.response.start":
                    trace.answered(message["status"])
                await send(message)

            await self._app(scope, receive, send_and_tell)


class _CountedBody:
    """One request's channel: cut off at the limit, and from then on deaf to what the app answers."""

    def __init__(self, receive: Receive, send: Send, limit_bytes: int) -> None:
        self._receive = receive
        self._send = send
        self._left_bytes = limit_bytes
        self.exceeded = False
        self.started = False

    async def receive(self) -> Message:
        message = {"type": "http.disconnect"} if self.exceeded else await self._receive()
        self._left_bytes -= len(message.get("body", b""))
        if self._left_bytes < 0:
            self.exceeded = True
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        if self.exceeded and not self.started:
            return
        self.started = True
        await self._send(message)


async def _send(answer: ErrorAnswer, scope: Scope, receive: Receive, send: Send) -> None:
    response = JSONResponse(answer.body(), status_code=answer.status, headers=dict(answer.headers))
    await response(scope, receive, send)
