"""A history in the test's own folder, and pictures as they are drawn here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image
from ray import serve
from sqlalchemy import URL

from serve_app.history.history import History
from serve_app.history.index import Bounds
from serve_app.image_codec import ImageEncoding, PictureFacts, encode
from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.service import ImageService
from serve_app.settings import Settings
from tests.serve_app.conftest import client_of

MANY = Bounds(pictures=1000, size_bytes=2**30, seconds=1e9)
ASKED = {"prompt": "a red circle", "size": "64x48", "num_inference_steps": 8, "seed": 7}


class Clock:
    """Seconds since 1970 that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def database_of(folder: Path) -> URL:
    return URL.create("sqlite", database=str(folder / "history.sqlite3"))


def picture(
    prompt: str = "a red circle, sharp", colour: str = "red", size: tuple[int, int] = (64, 48)
) -> bytes:
    facts = PictureFacts(
        prompt=prompt,
        negative_prompt="blurry, text",
        seed=7,
        steps=8,
        guidance_scale=1.8,
        width=size[0],
        height=size[1],
        model="disc-painter",
        scheduler="none",
        receipt={"receipt": 1, "prompt": prompt},
    )
    return encode(Image.new("RGB", size, colour), ImageEncoding("png"), facts)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def history(tmp_path: Path, clock: Clock) -> AsyncIterator[History]:
    history = History(database_of(tmp_path), tmp_path / "history", MANY, now=clock)
    yield history
    await history.close()


@pytest.fixture
def history_settings(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"data_dir": tmp_path})


@pytest.fixture
def history_service(worker_handle: serve.handle.DeploymentHandle, history_settings: Settings) -> ImageService:
    return ImageService(worker_handle, ServerMetrics("test"), history_settings)


@pytest.fixture
async def history_app(history_service: ImageService, history_settings: Settings) -> AsyncIterator[FastAPI]:
    app = build_asgi_app(history_service, history_settings)
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
async def history_client(history_app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(history_app) as client:
        yield client
