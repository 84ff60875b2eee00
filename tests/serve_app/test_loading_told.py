"""How far loading is, from the worker that loads to whoever asks."""

from __future__ import annotations

import asyncio
from pathlib import Path

from serve_app.ingress import build_asgi_app
from serve_app.loading_told import FORGOTTEN_SECONDS, LoadingSeen, tell_ingresses
from serve_app.settings import load_settings
from tests.serve_app.conftest import client_of
from tests.serve_app.test_service import ScriptedWorkers, service_over
from zimage_engine.reading_ahead import ReadingAhead


def test_of_several_workers_the_farthest_is_told_and_of_a_silent_one_nothing() -> None:
    now = [0.0]
    seen = LoadingSeen(lambda: now[0])
    assert seen.part is None
    seen.note("a", 0.5)
    seen.note("b", 0.25)
    assert seen.part == 0.5
    now[0] = FORGOTTEN_SECONDS
    seen.note("b", 0.3)
    assert seen.part == 0.5
    now[0] = FORGOTTEN_SECONDS + 1
    assert seen.part == 0.3
    now[0] = 2 * FORGOTTEN_SECONDS + 1
    assert seen.part is None


async def test_whoever_asks_whether_it_is_ready_hears_how_far_it_is() -> None:
    service = service_over(ScriptedWorkers(alive=0))
    async with client_of(build_asgi_app(service, load_settings(ui=False))) as client:
        before = await client.get("/readyz")
        assert "progress" not in before.json()
        service.worker_is_loading("a", 0.4567)
        told = await client.get("/readyz")
    assert told.status_code == 503
    assert told.json()["progress"] == 0.457
    assert "46% of its files are read" in told.json()["reason"]


async def test_where_there_is_no_ingress_nothing_is_told(tmp_path: Path) -> None:
    """As of a worker in a test, or of a program that loads by itself."""
    await asyncio.wait_for(tell_ingresses(ReadingAhead(lambda: [tmp_path / "none"])), 30)
