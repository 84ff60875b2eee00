"""The prompt-enhancer ingress: the HTTP face of the application.

FastAPI with the routes, the gates before them and the page at "/". Prompts are enhanced here, in
front of the workers, so importing this module must never import torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve

from serve_app.draining import Draining
from serve_app.finishing import Finisher
from serve_app.gates import add_gates, keys_of
from serve_app.history.history import History, history_of
from serve_app.jobs.desk import JobDesk
from serve_app.keys import KeyRing
from serve_app.logs import log_to_terminal
from serve_app.metrics import ServerMetrics
from serve_app.replica import own_deployment, replica_name
from serve_app.results import ResultStore
from serve_app.routes import (
    docs,
    edits,
    files,
    history,
    images,
    jobs,
    loras,
    models,
    parameters,
    prompts,
    reproduce,
    status,
    unknown,
)
from serve_app.service import ImageService
from serve_app.settings import Settings
from serve_app.tracing import Tracing, tracing_of

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


def program_version() -> str:
    """The installed version; "unknown" where the program runs from a folder that was never installed."""
    try:
        return version("zimage-turbo")
    except PackageNotFoundError:
        return "unknown"


@asynccontextmanager
async def _jobs_are_drawn(app: FastAPI) -> AsyncIterator[None]:
    """While the app is up; jobs of before it began are gone on with."""
    desk: JobDesk = app.state.jobs
    kept: History | None = app.state.history
    await desk.start()
    if kept is not None:
        await kept.start()
    try:
        yield
    finally:
        await desk.close()
        if kept is not None:
            await kept.close()


def build_asgi_app(
    service: ImageService,
    settings: Settings,
    tracing: Tracing | None = None,
    keys: KeyRing | None = None,
    draining: Draining | None = None,
) -> FastAPI:
    """Everything that answers HTTP, on one app; `keys` are the service's own, None: those of the settings."""
    app = FastAPI(
        title="zimage-turbo",
        version=program_version(),
        description="Text-to-image with OpenAI's images API, on your own hardware.",
        docs_url=None,
        redoc_url=None,
        lifespan=_jobs_are_drawn,
    )
    app.state.service = service
    app.state.results = ResultStore(settings.results_place, settings.result_seconds, settings.result_bytes)
    app.state.jobs = JobDesk(service, settings, app.state.results)
    # The history's files in other formats are made here; what is given out as drawn is signed already.
    app.state.signing = Finisher.of(settings).signing
    app.state.history = history_of(settings, lambda: service.metrics.record_history_not_kept())
    for routes in (
        docs,
        files,
        edits,
        history,
        images,
        jobs,
        loras,
        models,
        parameters,
        prompts,
        reproduce,
        status,
        unknown,
    ):
        app.include_router(routes.router)
    needs_key = settings.api_key is not None or settings.api_keys_file is not None
    docs.describe_gates(app, (*status.OPEN_PATHS, files.FILE_PATH), needs_key)
    if draining is not None:
        draining.also(app.state.jobs.hold, app.state.jobs.close)
        app.add_middleware(draining.before)
    add_gates(app, settings, tracing, keys)
    if settings.ui:
        from serve_app.ui import mount_page

        app = mount_page(app, service, settings, app.state.history)
    return app


@serve.ingress()
class PromptEnhancerIngress:
    """Serve builds the app in each replica: a page cannot be pickled, and handles live only there."""

    def __init__(self, worker: DeploymentHandle, settings: Settings) -> None:
        log_to_terminal(settings.log_format, replica_name())
        self._settings = settings
        self._metrics = ServerMetrics(program_version(), replica_name(), settings.fewest_workers)
        self._tracing = tracing_of(settings, program_version(), replica_name())
        self._keys = keys_of(settings)
        self._draining = Draining(lambda: self._metrics.in_flight)
        self._service = ImageService(
            worker, self._metrics, settings, own_deployment(), self._tracing, self._keys
        )

    async def reconfigure(self, user_config: Any) -> None:
        """Called by Serve with a new `user_config`, also while requests run: it holds for the next ones."""
        former = self._service.in_force
        self._service.use(former.after(user_config, self._settings, "PromptEnhancer"))

    async def metrics_text(self) -> tuple[str, str]:
        """This ingress' name and metrics, for the ingress that is asked for those of all."""
        return self._metrics.named_text()

    async def worker_is_loading(self, worker: str, part: float) -> None:
        """A worker tells that it has read this part of its model's files, 0 to 1."""
        self._service.worker_is_loading(worker, part)

    async def drain(self, seconds: float) -> int:
        """No new requests; returns when those under way are done, or how many are not after `seconds`."""
        return await self._draining.drain(seconds)

    async def send_traces(self) -> None:
        """Send what is left of traces, for whoever is about to end this process without Serve."""
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_asgi_app(self._service, self._settings, self._tracing, self._keys, self._draining)

    def __del__(self) -> None:
        """Called by Serve when this replica is stopped."""
        if self._tracing is not None:
            self._tracing.close()
