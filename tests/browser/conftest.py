"""Chromium for the tests of the page, and a server of the page alone, without Ray and model."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, sync_playwright

from serve_app.gates import add_gates
from serve_app.routes import loras, models, prompts, unknown
from serve_app.settings import Settings
from serve_app.ui import mount_page
from tests.serve_app.ui.painting_service import PaintingService

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}

OpenPage = Callable[..., Page]


@dataclass(frozen=True)
class PageServer:
    """The page over a painting service; set the service's fields to have it slow, loading or failing."""

    url: str
    service: PaintingService


# Not for the whole session: playwright's synchronous API keeps an event loop running in the thread, and no
# asynchronous test can run until it is closed.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        complaint = "there is no Chromium; install Debian's packages chromium and fonts-noto-cjk"
        if os.environ.get("CI") == "true":
            pytest.fail(complaint)
        pytest.skip(complaint)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[OpenPage]:
    """Opens an address as `open_page(url, locale=..., viewport=..., phone=...)` and waits for the controls.

    At the end no page may have asked another host for anything, nor have met an error of its own.
    """
    hosts: set[str | None] = set()
    errors: list[str] = []
    contexts = []

    def record(address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("data", "blob"):
            hosts.add(parts.hostname)

    def open_it(url: str, locale: str = "en-US", viewport: Any = DESKTOP, phone: bool = False) -> Page:
        context = chromium.new_context(locale=locale, viewport=viewport, is_mobile=phone, has_touch=phone)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: record(request.url))
        page.on("websocket", lambda socket: record(socket.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
        page.goto(url)
        page.locator("#prompt textarea").wait_for()
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert hosts <= {"127.0.0.1"}
    assert errors == []


@pytest.fixture
def page_server() -> Iterator[PageServer]:
    with running_page(PaintingService(step_seconds=0.05)) as page:
        yield page


@contextmanager
def running_page(service: PaintingService, port: int = 0) -> Iterator[PageServer]:
    """The page over `service` at a port, 0: any that is free; ended in good order with the block."""
    app = FastAPI()
    app.state.service = service
    for routes in (loras, models, prompts, unknown):
        app.include_router(routes.router)
    add_gates(app, Settings())
    with serving(mount_page(app, service, Settings()), port) as url:
        yield PageServer(url, service)


@contextmanager
def serving(app: FastAPI, port: int = 0) -> Iterator[str]:
    """The address where the app answers; ended in good order with the block."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=1)
    )
    started = threading.Event()
    startup = server.startup

    async def startup_and_tell(*arguments: Any, **named: Any) -> None:
        await startup(*arguments, **named)
        started.set()

    server.startup = startup_and_tell  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(60), "the page's server did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
