"""The cells of the page's grids: what is drawn, what is kept, and what becomes of a page that goes away."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import URL

from serve_app.history.history import History
from serve_app.history.index import Bounds
from serve_app.queueing import QueueFull
from serve_app.ui.grids import CELL_PATH, routes
from tests.serve_app.conftest import client_of
from tests.serve_app.ui.keeping_service import KeepingService

MANY = Bounds(pictures=100, size_bytes=2**30, seconds=1e9)
CELL = {"prompt": "a red circle", "num_inference_steps": 3, "guidance_scale": 1.5, "seed": 30}


def app_of(service: KeepingService, history: History | None) -> FastAPI:
    app = FastAPI()
    app.include_router(routes(service, history))
    return app


@pytest.fixture
async def history(tmp_path: Path) -> AsyncIterator[History]:
    database = URL.create("sqlite", database=str(tmp_path / "history.sqlite3"))
    history = History(database, tmp_path / "history", MANY)
    yield history
    await history.close()


async def asked_for(service: KeepingService, history: History | None, body: Any) -> httpx.Response:
    async with client_of(app_of(service, history)) as client:
        return await client.post(CELL_PATH, json=body)


async def test_a_cell_is_drawn_once_and_kept_with_what_draws_it_again(history: History) -> None:
    service = KeepingService()
    wanted = CELL | {"n": 4, "output_format": "jpeg", "stream": True, "response_format": "url", "model": None}
    answer = (await asked_for(service, history, wanted)).json()
    assert [(r.seed, r.num_inference_steps, r.guidance_scale, r.n) for r in service.requests] == [
        (30, 3, 1.5, 1)
    ]
    kept = await history.get("", answer["id"])
    assert kept is not None
    assert kept.parameters == answer["parameters"] == CELL
    assert await history.picture("", answer["id"]) == service.replies[0].pictures[0]
    assert answer["url"] == f"/v1/history/{answer['id']}/picture"
    assert "b64_json" not in answer


async def test_a_cell_without_a_seed_tells_the_one_that_it_was_drawn_with(history: History) -> None:
    service = KeepingService()
    answer = (await asked_for(service, history, {"prompt": "a tree"})).json()
    assert answer["parameters"]["seed"] == service.replies[0].report.pictures[0].seed


@pytest.mark.parametrize("full", [False, True], ids=["history off", "disk full"])
async def test_what_cannot_be_kept_is_in_the_answer(history: History, tmp_path: Path, full: bool) -> None:
    service = KeepingService()
    if full:
        (tmp_path / "history").write_text("a file where the folder should be")
    answer = (await asked_for(service, history if full else None, CELL)).json()
    assert answer["id"] is None
    assert base64.b64decode(answer["b64_json"]) == service.replies[0].pictures[0]


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({}, 400, "prompt"),
        (CELL | {"seeds": 4}, 400, "seed"),
        (CELL | {"num_inference_steps": "many"}, 400, "num_inference_steps"),
        ([CELL], 400, "object"),
    ],
    ids=["no prompt", "unknown field", "steps in words", "a list"],
)
async def test_what_cannot_be_used_is_refused_as_by_the_api(body: Any, status: int, word: str) -> None:
    service = KeepingService()
    answer = await asked_for(service, None, body)
    assert answer.status_code == status
    assert word in answer.json()["error"]["message"]
    assert service.requests == []


async def test_a_full_queue_says_when_to_come_again() -> None:
    service = KeepingService(fails_with=QueueFull("Eight wait already.", {"retry-after": "5"}))
    answer = await asked_for(service, None, CELL)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "5"


async def test_a_page_that_goes_away_stops_its_cell(history: History) -> None:
    service = KeepingService(step_seconds=30)
    body = json.dumps(CELL).encode()
    scope = {
        "type": "http", "method": "POST", "path": CELL_PATH, "raw_path": CELL_PATH.encode(),
        "query_string": b"", "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("localhost", 80), "scheme": "http", "http_version": "1.1",
    }  # fmt: skip
    received = asyncio.Queue[dict[str, Any]]()
    received.put_nowait({"type": "http.request", "body": body, "more_body": False})

    async def send(message: Any) -> None:
        pass

    answering = asyncio.create_task(app_of(service, history)(scope, received.get, send))
    while not service.requests:
        await asyncio.sleep(0)
    received.put_nowait({"type": "http.disconnect"})
    await asyncio.wait_for(answering, 10)
    await asyncio.sleep(0)
    assert service.cancelled == 1
    assert (await history.page("", 10))[0] == []
