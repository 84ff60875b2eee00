"""A page's drawing ends when its page says so, whatever it waits for, and no other page's does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

import httpx
import pytest
from fastapi import FastAPI

from serve_app.ui.stopping import LONGEST_NAME, Stops, page_of, stop_routes, until_stopped


class Counting:
    """Numbers, one when `more` is set each time; tells whether it was closed."""

    def __init__(self, last: int = 100) -> None:
        self.closed = False
        self.waits = asyncio.Event()
        self.more = asyncio.Event()
        self._last = last

    async def numbers(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self._last):
                yield number
                self.waits.set()
                await self.more.wait()
        finally:
            self.closed = True


async def test_what_is_waited_for_is_given_up_at_once() -> None:
    counting, stop = Counting(), asyncio.Event()
    told = []
    async with aclosing(until_stopped(counting.numbers(), stop)) as moments:
        async for number in moments:
            told.append(number)
            asyncio.get_running_loop().call_later(0.01, stop.set)
    assert told == [0] and counting.closed


async def test_all_is_told_where_nobody_stops() -> None:
    counting = Counting(3)
    counting.more.set()
    assert [number async for number in until_stopped(counting.numbers(), asyncio.Event())] == [0, 1, 2]
    assert counting.closed


async def test_a_failure_comes_through() -> None:
    async def failing() -> AsyncGenerator[int, None]:
        yield 1
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        async for _ in until_stopped(failing(), asyncio.Event()):
            pass


async def test_a_listener_that_is_cancelled_closes_what_it_listens_to() -> None:
    counting = Counting()

    async def listen() -> None:
        async for _ in until_stopped(counting.numbers(), asyncio.Event()):
            pass

    listening = asyncio.create_task(listen())
    await counting.waits.wait()
    listening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await listening
    assert counting.closed
    assert len(asyncio.all_tasks()) == 1


async def test_a_page_is_stopped_by_its_own_name_alone() -> None:
    stops = Stops()
    app = FastAPI()
    app.include_router(stop_routes(stops))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://page") as client:

        async def stopped(page: object) -> tuple[int, object]:
            answer = await client.post("/page/stop", json={"page": page})
            return answer.status_code, answer.json().get("stopped")

        with stops.of("one") as one, stops.of("two") as two, stops.of("") as nameless:
            assert await stopped("three") == (200, False)
            assert await stopped("") == (200, False)
            assert await stopped("one") == (200, True)
            assert one.is_set() and not two.is_set() and not nameless.is_set()
            assert (await stopped("x" * (LONGEST_NAME + 1)))[0] == 422
            assert (await stopped(7))[0] == 422
        assert await stopped("two") == (200, False)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (json.dumps({"n": 1, "page": "abc"}), "abc"),
        (json.dumps({"n": 1}), ""),
        (json.dumps({"page": 7}), ""),
        (json.dumps({"page": "x" * (LONGEST_NAME + 1)}), ""),
        ("[1]", ""),
        ("", ""),
        ("no JSON", ""),
    ],
)
def test_a_pages_name_is_read_from_what_its_scripts_hold(more: str, name: str) -> None:
    assert page_of(more) == name
