"""The server's parts in this process, on a tiny model: no Ray cluster, no port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from ray import serve

from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.service import ImageService
from serve_app.settings import Settings, load_settings
from serve_app.worker import ImageWorker


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Z-Image folder with random weights: it loads at once, and draws noise."""
    from tests.zimage_engine.tiny_models import write_tiny_z_image

    return write_tiny_z_image(tmp_path_factory.mktemp("models") / "tiny-z-image")


@pytest.fixture(scope="session")
def settings(tiny_model: Path) -> Settings:
    return load_settings(model=str(tiny_model), device="cpu", cpu_threads=1, ui=False)


@pytest.fixture(scope="session")
def worker_handle(settings: Settings) -> Iterator[serve.handle.DeploymentHandle]:
    """A real image worker behind a handle that needs no cluster."""
    deployment = serve.deployment(ImageWorker, name="ImageWorker").bind(settings)
    yield serve.run(deployment, _local_testing_mode=True)


@pytest.fixture
def service(worker_handle: serve.handle.DeploymentHandle, settings: Settings) -> ImageService:
    return ImageService(worker_handle, ServerMetrics("test"), settings)


@pytest.fixture
def app(service: ImageService, settings: Settings) -> FastAPI:
    return build_asgi_app(service, settings)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client


def client_of(app: FastAPI) -> httpx.AsyncClient:
    """An HTTP client that talks to the app without a socket, and waits for slow machines."""
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False),
        base_url="http://localhost",
        timeout=300,
    )


async def loaded_worker(settings: Settings) -> ImageWorker:
    """A worker as Serve makes one: its constructor is awaited."""
    worker = ImageWorker.__new__(ImageWorker)
    await asyncio.ensure_future(worker.__init__(settings))  # type: ignore[misc, func-returns-value]
    return worker
