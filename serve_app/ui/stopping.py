"""`/page/stop`: a person at an open page ends what is being drawn there.

Gradio's own way leaves the page's last steps to come after the word that it has stopped, so the drawing
itself is told, and says last that it was. Knows nothing of how a drawing looks.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Body

from serve_app.ui.assets import PREFIX

Moment = TypeVar("Moment")

#: A page's name is some random letters; what is longer is none.
LONGEST_NAME = 64


class Stops:
    """Which pages are drawing. A page is known by a name of its own, which nobody else can guess."""

    def __init__(self) -> None:
        self._drawing: dict[str, asyncio.Event] = {}

    @contextmanager
    def of(self, page: str) -> Iterator[asyncio.Event]:
        """Set when the page's drawing shall end; of a page without a name never."""
        stop = asyncio.Event()
        if page:
            self._drawing[page] = stop
        try:
            yield stop
        finally:
            if self._drawing.get(page) is stop:
                del self._drawing[page]

    def stop(self, page: str) -> bool:
        """End what the page draws; False where it draws nothing."""
        stop = self._drawing.get(page)
        if stop is not None:
            stop.set()
        return stop is not None


async def until_stopped(
    moments: AsyncGenerator[Moment, None], stop: asyncio.Event
) -> AsyncGenerator[Moment, None]:
    """The moments until `stop` is set; `moments` is closed then, and at the latest with this generator."""
    stopped = asyncio.create_task(stop.wait())
    coming: asyncio.Task[Moment] | None = None
    try:
        while not stop.is_set():
            coming = asyncio.create_task(_next(moments))
            await asyncio.wait({coming, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                return
            try:
                moment = coming.result()
            except StopAsyncIteration:
                return
            yield moment
    finally:
        stopped.cancel()
        if coming is not None and not coming.done():
            coming.cancel()
            await asyncio.wait({coming})
        await moments.aclose()


async def _next(moments: AsyncGenerator[Moment, None]) -> Moment:
    return await anext(moments)


def page_of(more: str) -> str:
    """The page's name in what its scripts hold, "" where there is none."""
    try:
        fields = json.loads(more)
    except ValueError:
        return ""
    name = fields.get("page") if isinstance(fields, dict) else None
    return name if isinstance(name, str) and len(name) <= LONGEST_NAME else ""


def stop_routes(stops: Stops) -> APIRouter:
    """The route, for the app that the page is mounted on."""
    router = APIRouter(include_in_schema=False)

    @router.post(f"{PREFIX}/stop")
    async def stop(page: Annotated[str, Body(embed=True, max_length=LONGEST_NAME)]) -> dict[str, Any]:
        return {"stopped": stops.stop(page)}

    return router
