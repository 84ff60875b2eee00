"""The end of a server: what is under way goes on, what comes is sent elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from serve_app.draining import ENDING, LAST_BYTES_SECONDS, Draining
from serve_app.metrics import ServerMetrics
from serve_app.service import ImageService
from serve_app.settings import Settings
from tests.serve_app.conftest import client_of

URL = "/v1/images/generations"
SLOW = {"prompt": "a red circle", "num_inference_steps": 40, "size": "64x64", "seed": 1}


@pytest.fixture
def draining(service: ImageService) -> Draining:
    return Draining(lambda: 0)


@pytest.fixture
def app(app: FastAPI, draining: Draining) -> FastAPI:
    app.add_middleware(draining.before)
    return app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client


async def until_under_way(draining: Draining, asked: asyncio.Task[httpx.Response]) -> None:
    while not draining.under_way:
        assert not asked.done(), asked.result().text
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("fields", [{}, {"stream": True, "partial_images": 1}])
async def test_what_is_under_way_is_finished_and_what_comes_is_refused(
    client: httpx.AsyncClient, draining: Draining, fields: dict[str, object]
) -> None:
    asked = asyncio.create_task(client.post(URL, json=SLOW | fields))
    await until_under_way(draining, asked)
    ended = asyncio.create_task(draining.drain(60))
    await asyncio.sleep(0)
    refused = await client.post(URL, json=SLOW)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, ENDING.code)
    assert refused.headers["retry-after"] and refused.headers["connection"] == "close"
    answer = await asked
    assert answer.status_code == 200 and "b64_json" in answer.text
    assert await ended == 0


async def test_a_server_that_ends_is_not_ready_and_still_tells_its_metrics(
    client: httpx.AsyncClient, draining: Draining
) -> None:
    assert (await client.get("/readyz")).status_code == 200
    assert await draining.drain(0) == 0
    assert (await client.get("/readyz")).status_code == 503
    assert [(await client.get(path)).status_code for path in ("/metrics", "/healthz")] == [200, 200]


async def test_what_takes_longer_than_the_bound_is_told(
    draining: Draining, client: httpx.AsyncClient
) -> None:
    long = {"num_inference_steps": 100, "size": "128x128", "n": 10}
    asked = asyncio.create_task(client.post(URL, json=SLOW | long))
    await until_under_way(draining, asked)
    began = time.monotonic()
    assert await draining.drain(0.2) == 1
    assert time.monotonic() - began < 0.2 + LAST_BYTES_SECONDS + 2
    asked.cancel()


async def test_others_hear_of_the_begin_and_of_the_end(draining: Draining) -> None:
    heard: list[str] = []

    async def ended() -> None:
        heard.append("end")

    draining.also(lambda: heard.append("begin"), ended)
    draining._unanswered = 1
    drained = asyncio.create_task(draining.drain(0.3))
    await asyncio.sleep(0.1)
    assert heard == ["begin"]
    assert await drained == 1
    assert heard == ["begin", "end"]


async def test_pictures_of_the_page_are_waited_for_too(settings: Settings) -> None:
    metrics = ServerMetrics("test")
    draining = Draining(lambda: metrics.in_flight)
    metrics.started()
    assert await draining.drain(0) == 1
    metrics.ended()
    assert await draining.drain(0) == 0
