"""The page over a painting service with the real history and the real routes beside it, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from fastapi import FastAPI
from sqlalchemy import URL

from serve_app.gates import add_gates
from serve_app.history.history import History
from serve_app.history.index import Bounds
from serve_app.routes import history as history_routes
from serve_app.routes import images, loras, parameters, prompts
from serve_app.settings import Settings
from serve_app.ui import mount_page
from tests.browser.conftest import PageServer, serving
from tests.serve_app.ui.keeping_service import KeepingService

MANY = Bounds(pictures=1000, size_bytes=2**30, seconds=1e9)


@contextmanager
def keeping_page(folder: Path | None, service: KeepingService, port: int = 0) -> Iterator[PageServer]:
    """The page whose pictures are kept below `folder`; None: nothing is kept."""
    database = URL.create("sqlite", database=str(folder and folder / "history.sqlite3"))
    history = None if folder is None else History(database, folder / "history", MANY)

    @asynccontextmanager
    async def closed_at_the_end(app: FastAPI) -> AsyncIterator[None]:
        yield
        if history is not None:
            await history.close()

    app = FastAPI(lifespan=closed_at_the_end)
    app.state.service, app.state.history, app.state.signing = service, history, None
    for routes in (images, parameters, history_routes, loras, prompts):
        app.include_router(routes.router)
    settings = Settings()
    add_gates(app, settings)
    with serving(mount_page(app, service, settings, history), port) as url:
        yield PageServer(url, service)
