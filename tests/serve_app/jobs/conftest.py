"""A server with jobs in this process: a tiny model, a database and results in the test's own folder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from ray import serve
from sqlalchemy import URL

from serve_app.ingress import build_asgi_app
from serve_app.jobs.store import JobStore
from serve_app.jobs.tables import open_database
from serve_app.metrics import ServerMetrics
from serve_app.service import ImageService
from serve_app.settings import Settings
from tests.serve_app.conftest import client_of

SMALL = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 2}


def file_of(folder: Path) -> URL:
    return URL.create("sqlite", database=str(folder / "jobs.sqlite3"))


@pytest.fixture
def jobs_settings(settings: Settings, tmp_path: Path) -> Settings:
    """One after another, so that it is known how many are at work when others wait."""
    own = {"data_dir": tmp_path, "webhook_private_addresses": True, "max_batch_size": 1}
    return settings.model_copy(update=own)


@pytest.fixture
def jobs_service(worker_handle: serve.handle.DeploymentHandle, jobs_settings: Settings) -> ImageService:
    return ImageService(worker_handle, ServerMetrics("test"), jobs_settings)


@pytest.fixture
async def jobs_app(jobs_service: ImageService, jobs_settings: Settings) -> AsyncIterator[FastAPI]:
    app = build_asgi_app(jobs_service, jobs_settings)
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
async def jobs_client(jobs_app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(jobs_app) as client:
        yield client


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    """The database that `jobs_app` has too, where a test uses both."""
    store = JobStore(open_database(file_of(tmp_path)))
    yield store
    store.close()
