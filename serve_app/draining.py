"""The end of a server that loses nothing: no new pictures, those under way to their end, within a bound.

Each ingress has a `Draining`, before the routes; whoever ends the server asks all of them at once. Knows
nothing of what is drawn.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.error_mapping import SERVER, ErrorAnswer
from serve_app.routes.answers import refusal

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

#: Where new pictures come from: the API, and the page's queue.
DRAWING = ("/v1/", "/gradio_api/queue/join")
#: A balancer that asks this sends nothing more.
READY = "/readyz"
#: Between two looks whether all is done.
LOOK_SECONDS = 0.1
#: The last bytes are still with a proxy, or with the page's own stream.
LAST_BYTES_SECONDS = 0.5

ENDING = ErrorAnswer(
    503,
    SERVER,
    "server_ending",
    "The server is ending and takes no new requests; send this one again in a moment.",
    headers={"Retry-After": "5", "Connection": "close"},
)


class Draining:
    """Counts what one ingress has under way, and lets nothing new in once it drains."""

    def __init__(self, in_flight: Callable[[], int]) -> None:
        """`in_flight` tells the requests for pictures that are under way whichever way they came."""
        self.is_on = False
        self._in_flight = in_flight
        self._others: list[tuple[Callable[[], None], Callable[[], Awaitable[None]]]] = []
        self._unanswered = 0

    def also(self, at_begin: Callable[[], None], at_end: Callable[[], Awaitable[None]]) -> None:
        """Call these when draining begins, and when it has ended, whatever is left then."""
        self._others.append((at_begin, at_end))

    @property
    def under_way(self) -> int:
        """Requests without their last byte, or pictures, whichever are more: the page's have no request."""
        return max(self._unanswered, self._in_flight())

    async def drain(self, seconds: float) -> int:
        """From now on nothing new; returns when nothing is under way, or how much is after `seconds`."""
        self.is_on = True
        for at_begin, _ in self._others:
            at_begin()
        deadline = time.monotonic() + seconds
        while self.under_way and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_SECONDS)
        await asyncio.sleep(LAST_BYTES_SECONDS)
        left = self.under_way
        for _, at_end in self._others:
            await at_end()
        return left

    def before(self, app: ASGIApp) -> ASGIApp:
        """The app behind this."""

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or not self._concerns(scope):
                await app(scope, receive, send)
            elif self.is_on:
                await refusal(ENDING)(scope, receive, send)
            elif scope["path"] == READY:
                await app(scope, receive, send)
            else:
                await self._counted(app, scope, receive, send)

        return answer

    def _concerns(self, scope: Scope) -> bool:
        asks = scope["method"] == "POST" and scope["path"].startswith(DRAWING)
        return asks or scope["path"] == READY

    async def _counted(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if self.is_on and message["type"] == "http.response.start":
                # Who comes again must find another server, and not this one over a kept connection.
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        self._unanswered += 1
        try:
            await app(scope, receive, told)
        finally:
            self._unanswered -= 1


async def drain_all(ingresses: DeploymentHandle, seconds: float) -> int:
    """From another process: every ingress drains at once; how much is left after `seconds`, mostly 0.

    An ingress that does not answer holds nothing up for longer.
    """
    drained = ingresses.broadcast("drain", seconds)
    longest = seconds + 2 * LAST_BYTES_SECONDS + 1
    with contextlib.suppress(TimeoutError):
        left = await drained.results_async(timeout_s=longest, return_exceptions=True)
        return sum(each for each in left if isinstance(each, int))
    return 0
