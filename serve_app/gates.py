"""What every request passes before a route sees it: where it comes from, the key, the size, the record of it.

Plain ASGI middleware, because the page streams its events and a buffering wrapper would hold them
back. Each gate does one thing; `add_gates` gives their order.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import time

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.error_mapping import INVALID, ErrorAnswer
from serve_app.forwarded import ForwardedFor
from serve_app.keys import ADMIN, DRAW, READ, SCOPES, KeyRing, caller
from serve_app.origins import SAFE_METHODS, Sites, sites_of
from serve_app.routes.files import OPEN_BELOW
from serve_app.routes.status import OPEN_PATHS
from serve_app.settings import Settings, proxy_secret
from serve_app.tracing import Tracing

#: With these a caller could tell Serve when to give a request up; Serve's own, not for the outside.
SERVE_HEADERS = frozenset({b"x-request-timeout-seconds", b"x-request-disconnect-disabled"})

#: Where pictures are asked for. A span is named by them, so there are no others.
TRACED = frozenset(
    {
        ("POST", "/v1/images/generations"),
        ("POST", "/v1/images/edits"),
        ("POST", "/v1/images/variations"),
    }
)
#: Where files of pictures are sent.
UPLOADS = ("/v1/images/edits", "/v1/images/variations", "/v1/images/reproduce", "/v1/images/parameters")

#: How much of a body that nobody wants is read before the answer goes out, and for how long.
DRAINED_BYTES = 32 * 2**20
DRAIN_SECONDS = 5.0

#: The paths for which a key with the scope to read is enough, and those below the ones that end in a slash.
READ_PATHS = ("/metrics", "/docs", "/openapi.json", "/v1/models", "/v1/loras")
READ_BELOW = ("/v1/models/",)
ADMIN_BELOW = "/-/"

#: What the page asks of Gradio; the rest of Gradio's routes, such as uploads and proxies, is not answered.
GRADIO = "/gradio_api/"
GRADIO_OF_THE_PAGE = (
    "app_id",
    "cancel",
    "heartbeat/",
    "info",
    "queue/data",
    "queue/join",
    "queue/status",
    "reset",
    "startup-events",
    "theme.css",
)
GRADIO_FILES = "/gradio_api/file="

#: What a page elsewhere may read of an answer, beside what browsers let it read anyway.
EXPOSED_HEADERS = (
    "idempotent-replayed, location, retry-after, "
    "x-engine-seconds, x-queue-position, x-queue-seconds, x-queue-wait, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, x-request-id"
)

audit = logging.getLogger("serve_app.audit")


def keys_of(settings: Settings) -> KeyRing:
    """The keys that callers must carry, none where the settings name none.

    Raises KeyFileWrong where the settings name a file of keys that cannot be used.
    """
    api_key = None if settings.api_key is None else settings.api_key.get_secret_value()
    return KeyRing(api_key, settings.api_keys_file)


def add_gates(
    app: FastAPI, settings: Settings, tracing: Tracing | None = None, keys: KeyRing | None = None
) -> None:
    """Put the gates before the app; a request passes them from the last line here to the first.

    Without `keys` they are `keys_of` the settings.
    """
    keys = keys_of(settings) if keys is None else keys
    if tracing is not None:
        app.add_middleware(TracePictures, tracing=tracing)
    app.add_middleware(
        BodyLimit,
        limit_bytes=settings.max_body_bytes,
        upload_bytes=settings.max_image_bytes,
        seconds=settings.body_seconds,
    )
    app.add_middleware(OnlyThePagesGradio)
    app.add_middleware(KeyCheck, keys=keys, metrics_without_key=settings.metrics_without_key)
    app.add_middleware(SiteCheck, sites=sites_of(settings, bool(keys)))
    if bool(keys) if settings.audit_log is None else settings.audit_log:
        app.add_middleware(Audit)
    app.add_middleware(ForwardedFor, trusted=settings.trusted_proxies, secret=proxy_secret())
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


class Audit:
    """A line in the log for each request that changes something or is refused: who, what, what came of it.

    Who is the key's name, else the address. Neither bodies nor queries are told, so no prompt is.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        status, began, token = 0, time.monotonic(), caller.set("")

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            method, seconds = scope.get("method", "WEBSOCKET"), time.monotonic() - began
            if method not in SAFE_METHODS or status >= 400 or status == 0:
                _write_audit(scope, method, status, seconds)
            caller.reset(token)


def _write_audit(scope: Scope, method: str, status: int, seconds: float) -> None:
    address = (scope.get("client") or ("unknown",))[0]
    path, outcome = scope["path"][:200], str(status) if status else "no answer"
    audit.info(
        "%s from %s: %s %s -> %s",
        caller.get() or "no key",
        address,
        method,
        path,
        outcome,
        extra={
            "caller": caller.get() or None,
            "address": address,
            "route": f"{method} {path}",
            "status": status or None,
            "seconds": round(seconds, 3),
        },
    )


class SiteCheck:
    """Turns away what a foreign web page makes a browser send, and lets in pages that the settings name.

    No answer lets another site read it, whatever the app behind says of CORS, unless the settings do.
    """

    def __init__(self, app: ASGIApp, sites: Sites) -> None:
        self._app = app
        self._sites = sites

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        method = scope.get("method", "WEBSOCKET")
        refusal = self._refusal(method, headers)
        if refusal is not None:
            await _refuse(refusal, scope, receive, send)
            return
        origin = headers.get("origin", "")
        named = origin if self._sites.is_foreign(origin) else None
        if named and method == "OPTIONS" and "access-control-request-method" in headers:
            await Response(status_code=204, headers=_preflight(named))(scope, receive, send)
            return

        async def send_to_site(message: Message) -> None:
            if message["type"] == "http.response.start" and origin:
                message = {**message, "headers": list(message.get("headers", ()))}
                _tell_site(MutableHeaders(raw=message["headers"]), named)
            await send(message)

        await self._app(scope, receive, send_to_site)

    def _refusal(self, method: str, headers: Headers) -> ErrorAnswer | None:
        hosts = headers.getlist("host")
        if len(hosts) > 1 or not self._sites.is_host("".join(hosts)):
            return ErrorAnswer(
                421,
                INVALID,
                "unknown_host",
                "This server does not go by the name in the header Host. Call it as 127.0.0.1 or localhost; "
                "where a proxy gives it a name, set ZIMAGE_ALLOWED_HOSTS to that.",
            )
        origin = headers.get("origin")
        if origin is None:
            is_foreign = method not in SAFE_METHODS and headers.get("sec-fetch-site", "") in (
                "cross-site",
                "same-site",
            )
        else:
            is_foreign = not self._sites.is_foreign(origin) and not self._sites.is_own(origin, "".join(hosts))
        if not is_foreign:
            return None
        return ErrorAnswer(
            403,
            INVALID,
            "cross_origin",
            "This came from a web page of another site, which may not call this server. Set "
            "ZIMAGE_CORS_ORIGINS to the page's origin to let it; where a proxy stands before the server, set "
            "ZIMAGE_ALLOWED_HOSTS to the name that people use.",
        )


def _preflight(origin: str) -> dict[str, str]:
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": "DELETE, GET, POST",
        "Access-Control-Allow-Headers": "authorization, content-type, idempotency-key, last-event-id, "
        "prefer, x-request-id",
        "Access-Control-Max-Age": "600",
        "Vary": "Origin",
    }


def _tell_site(headers: MutableHeaders, origin: str | None) -> None:
    """Gradio lets every site read what it answers, with the browser's password; only we say who may."""
    for name in [name for name in headers if name.startswith("access-control-")]:
        del headers[name]
    headers.add_vary_header("Origin")
    if origin is not None:
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS


class KeyCheck:
    """Lets through who carries a key: as a bearer token, or as the password that a browser asks for.

    A server without keys lets everybody through, but not to what changes it. `caller` has the key's name from
    here on.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, metrics_without_key: bool = False) -> None:
        self._app = app
        self._keys = keys
        self._open = {*OPEN_PATHS, *(("/metrics",) if metrics_without_key else ())}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The unguessable address of a kept file is permission enough.
        is_file = scope.get("method") in SAFE_METHODS and scope["path"].startswith(OPEN_BELOW)
        if scope["type"] not in ("http", "websocket") or scope["path"] in self._open or is_file:
            await self._app(scope, receive, send)
            return
        caller.set("")
        needed = needed_scope(scope.get("method", "WEBSOCKET"), scope["path"])
        if not self._keys and needed != ADMIN:
            await self._app(scope, receive, send)
            return
        given = key_in(Headers(scope=scope).get("authorization", ""))
        owner = self._keys.owner_of(given) if given is not None else None
        if owner is None:
            await _refuse(_no_key(bool(self._keys), given is not None, scope["path"]), scope, receive, send)
            return
        caller.set(owner.name)
        # For what runs outside of the request's own task, such as the queue behind the page.
        scope = {**scope, "state": {**scope.get("state", {}), "caller": owner.name, "scopes": owner.scopes}}
        if needed not in owner.scopes:
            answer = ErrorAnswer(
                403,
                INVALID,
                "insufficient_scope",
                f"The key {owner.name} may {' and '.join(sorted(owner.scopes))}; this needs the scope "
                f"{needed}: {SCOPES[needed]}. Ask whoever runs the server for a key that has it.",
            )
            await _refuse(answer, scope, receive, send)
            return
        await self._app(scope, receive, send)


def needed_scope(method: str, path: str) -> str:
    """What a key must allow for this request; whatever is not told apart draws."""
    if path.startswith(ADMIN_BELOW):
        return READ if method in SAFE_METHODS else ADMIN
    return READ if path in READ_PATHS or path.startswith(READ_BELOW) else DRAW


def _no_key(there_are_keys: bool, was_given: bool, path: str) -> ErrorAnswer:
    if not there_are_keys:
        message = (
            "This changes the server and needs a key, and the server has none: start it with ZIMAGE_API_KEY "
            "or ZIMAGE_API_KEYS_FILE set."
        )
    else:
        message = (
            "This server needs its key: send the header 'Authorization: Bearer KEY'; in a browser the key "
            "is the password. " + ("The key sent is not the right one." if was_given else "No key was sent.")
        )
    return ErrorAnswer(
        401, INVALID, "invalid_api_key", message, headers={"WWW-Authenticate": _challenge(path)}
    )


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


class OnlyThePagesGradio:
    """Answers 404 to the routes of Gradio's that the page does not use, and 415 where it sends no JSON."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(GRADIO):
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if not is_of_the_page(scope["path"]):
            answer = ErrorAnswer(
                404, INVALID, "unknown_url", "There is nothing here; the API is described at /docs."
            )
        elif scope["method"] == "POST" and announced != "application/json":
            answer = ErrorAnswer(
                415, INVALID, "unsupported_media_type", "Content-Type must be application/json; send JSON."
            )
        else:
            await self._app(scope, receive, send)
            return
        await _send(answer, scope, receive, send)


def is_of_the_page(path: str) -> bool:
    """Whether the page asks for this one of Gradio's routes."""
    if path.startswith(GRADIO_FILES):
        # Gradio fetches addresses for whoever asks; files of the page are paths of its own folder.
        return path.startswith(f"{GRADIO_FILES}/")
    return path.removeprefix(GRADIO).startswith(GRADIO_OF_THE_PAGE)


class BodyLimit:
    """Answers 413 to a body above the limit, announced or not, and 408 to one that takes too long.

    The limit is `upload_bytes` where files are sent; None: the same.
    """

    def __init__(
        self, app: ASGIApp, limit_bytes: int, seconds: float, upload_bytes: int | None = None
    ) -> None:
        self._app = app
        self._limit_bytes = limit_bytes
        self._upload_bytes = limit_bytes if upload_bytes is None else upload_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit_bytes = self._upload_bytes if scope["path"] in UPLOADS else self._limit_bytes
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > limit_bytes:
            await _send(_too_large(scope["path"], limit_bytes), scope, receive, send)
            return
        counted = _CountedBody(receive, send, limit_bytes, self._seconds)
        try:
            await self._app(scope, counted.receive, counted.send)
        except ClientDisconnect:
            if not counted.exceeded:
                raise
        if counted.exceeded and not counted.started:
            answer = self._too_slow() if counted.too_slow else _too_large(scope["path"], limit_bytes)
            await _send(answer, scope, receive, send)

    def _too_slow(self) -> ErrorAnswer:
        return ErrorAnswer(
            408,
            INVALID,
            "body_too_slow",
            f"The body had not arrived within {self._seconds:g} seconds; send the request again.",
        )


def _too_large(path: str, limit_bytes: int) -> ErrorAnswer:
    what_to_do = "send smaller pictures" if path in UPLOADS else "shorten the prompt"
    return ErrorAnswer(
        413, INVALID, "body_too_large", f"The body may have at most {limit_bytes:,} bytes; {what_to_do}."
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
    """One request's channel: cut off at either limit, and from then on deaf to what the app answers."""

    def __init__(self, receive: Receive, send: Send, limit_bytes: int, seconds: float) -> None:
        self._receive = receive
        self._send = send
        self._left_bytes = limit_bytes
        self._give_up_at = time.monotonic() + seconds
        self._ended = False
        self.exceeded = False
        self.too_slow = False
        self.started = False

    async def receive(self) -> Message:
        if self.exceeded:
            return {"type": "http.disconnect"}
        try:
            message = await self._next()
        except TimeoutError:
            self.exceeded = self.too_slow = True
            return {"type": "http.disconnect"}
        self._ended = self._ended or not message.get("more_body", False)
        self._left_bytes -= len(message.get("body", b""))
        if self._left_bytes < 0:
            self.exceeded = True
            return {"type": "http.disconnect"}
        return message

    async def _next(self) -> Message:
        """What arrives next; raises TimeoutError for a body. Behind its end a caller may listen for ever."""
        if self._ended:
            return await self._receive()
        async with asyncio.timeout(self._give_up_at - time.monotonic()):
            return await self._receive()

    async def send(self, message: Message) -> None:
        if self.exceeded and not self.started:
            return
        self.started = True
        await self._send(message)


async def _send(answer: ErrorAnswer, scope: Scope, receive: Receive, send: Send) -> None:
    response = JSONResponse(answer.body(), status_code=answer.status, headers=dict(answer.headers))
    await response(scope, receive, send)


async def _refuse(answer: ErrorAnswer, scope: Scope, receive: Receive, send: Send) -> None:
    """The answer, or for a websocket, which there is none of here, its close."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await _send(answer, scope, receive, send)
