"""Where jobs are handed in and asked for; owns what works on them in this process.

The database is opened by the first who needs it, or when the server starts. Where it cannot be, only jobs are
refused, and the log says so once.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from serve_app import openai_schema as schema
from serve_app.error_mapping import SERVER, RequestRefused
from serve_app.jobs import idempotency
from serve_app.jobs.courier import Courier
from serve_app.jobs.runner import JobRunner, remove_files
from serve_app.jobs.store import JOB, Job, JobEvent, JobStore, KeyReused, Limits, NewJob, TooManyJobs
from serve_app.jobs.tables import StoreUnusable, open_database
from serve_app.jobs.webhook import Target, parse_target
from serve_app.replica import replica_name
from serve_app.results import ResultStore
from serve_app.service import ImageService, work_of
from serve_app.settings import Settings
from zimage_engine.sampling.plan import resolve

logger = logging.getLogger(__name__)

#: Calls of the database at once; each blocks a thread.
THREADS = 4
#: Between two tries to open a database that could not be opened.
REOPEN_SECONDS = 10.0
FORGET_SECONDS = 60.0
#: How long after a change in another ingress it is seen here at the latest.
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Asker:
    """Who asks: the key's name, which owns jobs; the line in the queue; whether they see all jobs."""

    owner: str
    line: str
    sees_all: bool = False


class JobDesk:
    """The jobs as one ingress sees them. Without a database all that is asked raises RequestRefused (503)."""

    def __init__(self, service: ImageService, settings: Settings, results: ResultStore) -> None:
        self._service = service
        self._settings = settings
        self._results = results
        self._limits = Limits(settings.max_jobs_of_caller, settings.max_jobs)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="jobs")
        self._opening = asyncio.Lock()
        self._store: JobStore | None = None
        self._runner: JobRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._tried_at = float("-inf")
        self._refused: str | None = None
        self._change = asyncio.Event()

    # --- life --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to draw what is there. Does not raise: who asks is told why there are no jobs."""
        try:
            await self._opened()
        except RequestRefused:
            return

    async def close(self) -> None:
        """Stop drawing; what was being drawn is there for whoever comes next."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = []
        if self._store is not None:
            self._store.close()
            self._store = None
        self._threads.shutdown(wait=False)
        # An app can be started once more.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="jobs")
        self._tried_at = float("-inf")

    async def _opened(self) -> JobStore:
        async with self._opening:
            if self._store is None:
                if time.monotonic() - self._tried_at > REOPEN_SECONDS:
                    self._tried_at = time.monotonic()
                    await self._open()
                if self._store is None:
                    raise RequestRefused(
                        f"Jobs are not available: {self._refused} Pictures are drawn all the same by a plain "
                        "POST /v1/images/generations.",
                        None,
                        "jobs_unavailable",
                        503,
                        SERVER,
                        {"Retry-After": "60"},
                    )
            return self._store

    async def _open(self) -> None:
        try:
            self._store = await self._in_thread(self._open_store)
        except StoreUnusable as error:
            refused = f"{str(error).rstrip('.')}."
        except (OSError, SQLAlchemyError) as error:
            refused = "the database of jobs cannot be opened; the server's log says why."
            if self._refused != refused:
                logger.error(
                    "jobs are refused, for their database cannot be opened (settings data_dir, jobs_url): %s",
                    getattr(error, "orig", None) or error,
                )
            self._refused = refused
            return
        else:
            self._refused = None
            assert self._store is not None
            self._begin(self._store)
            return
        if self._refused != refused:
            logger.error("jobs are refused: %s", refused)
        self._refused = refused

    def _open_store(self) -> JobStore:
        url = self._settings.jobs_url
        if url is not None:
            return JobStore(open_database(url.get_secret_value()))
        file = self._settings.data_dir / "jobs.sqlite3"
        return JobStore(open_database(URL.create("sqlite", database=str(file))))

    def _begin(self, store: JobStore) -> None:
        owner = f"{replica_name()}-{secrets.token_hex(4)}"
        self._runner = JobRunner(
            self._service, store, self._results, self._in_thread, owner, self._has_changed
        )
        courier = Courier(store, self._in_thread, self._settings.webhook_private_addresses)
        # Each in a context of its own: Serve ends with a request whatever was begun in its context.
        self._tasks = [
            asyncio.create_task(work, context=contextvars.Context())
            for work in (self._runner.run(), courier.run(), self._forget_for_ever(store))
        ]

    async def _forget_for_ever(self, store: JobStore) -> None:
        while True:
            try:
                for result in await self._in_thread(store.forget, self._settings.job_seconds):
                    await remove_files(self._results, json.loads(result))
            except SQLAlchemyError:
                logger.warning("old jobs could not be removed; trying again")
            await asyncio.sleep(FORGET_SECONDS)

    async def _in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    async def _asked(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """A call of the store's for somebody who waits; where it fails they are told without its details."""
        try:
            return await self._in_thread(call, *arguments)
        except SQLAlchemyError as error:
            logger.error("the database of jobs failed: %s", getattr(error, "orig", None) or error)
            raise RequestRefused(
                "Jobs are not available: their database does not answer at the moment. Try again later.",
                None,
                "jobs_unavailable",
                503,
                SERVER,
                {"Retry-After": "10"},
            ) from None

    def _has_changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    async def changed(self, seconds: float = LOOK_SECONDS) -> None:
        """Returns when a job may have changed, at the latest after `seconds`."""
        try:
            # Not wait_for, which in Python 3.11 loses a cancel that comes together with the event.
            async with asyncio.timeout(seconds):
                await self._change.wait()
        except TimeoutError:
            return

    # --- callers -----------------------------------------------------------------------------------------

    async def accept(
        self, payload: Mapping[str, Any], asker: Asker, key: str | None, kind: str = JOB
    ) -> tuple[Job, bool]:
        """The job of this body, on disk, and whether it is new. Raises what a plain request for it would."""
        store = await self._opened()
        fields = dict(payload)
        webhook = self._webhook_of(fields) if kind == JOB else None
        wire = schema.parse(fields)
        if wire.stream:
            raise RequestRefused(
                "stream cannot be true with a job or an Idempotency-Key; leave it out, and follow a job's "
                "events at its address.",
                "stream",
            )
        description = await self._service.description_when_ready()
        schema.check_model(wire, description)
        asked = schema.to_engine(wire, self._service.live.default_enhance)
        plan = resolve(asked, description)
        # Whoever draws it, and whatever the defaults are then: it is the same picture.
        fixed: dict[str, Any] = {"seed": plan.seeds[0], "enhance": asked.enhance}
        if asked.num_inference_steps is None:
            fixed["num_inference_steps"] = plan.steps
        if asked.guidance_scale is None:
            fixed["guidance_scale"] = plan.guidance_scale
        new = NewJob(
            owner=asker.owner,
            asked_by=asker.line,
            model=description.id,
            request=json.dumps({**fields, **fixed}),
            work=work_of(plan),
            kind=kind,
            webhook_url=None if webhook is None else webhook.url,
            webhook_secret=None if webhook is None else webhook.secret,
        )
        fingerprint = idempotency.fingerprint_of(payload)
        try:
            job, is_new = await self._asked(store.accept, new, self._limits, key, fingerprint)
        except KeyReused:
            raise idempotency.reused() from None
        except TooManyJobs as error:
            whose = "You have" if error.of_caller else "The server has"
            raise RequestRefused(
                f"{whose} {error.waiting} jobs that are not done yet, and may have no more; wait for some.",
                None,
                "too_many_jobs",
                429,
                "rate_limit_error",
                {"Retry-After": "30"},
            ) from None
        if is_new and self._runner is not None:
            self._runner.look()
        self._has_changed()
        return job, is_new

    def _webhook_of(self, fields: dict[str, Any]) -> Target | None:
        given = fields.pop("webhook", None)
        if given is not None:
            return parse_target(given, self._settings.webhook_private_addresses)
        if self._settings.webhook_url is None:
            return None
        secret = self._settings.webhook_secret
        return Target(self._settings.webhook_url, None if secret is None else secret.get_secret_value())

    async def job(self, id: str, asker: Asker) -> Job:
        """Raises RequestRefused (404) where the asker has no such job."""
        store = await self._opened()
        job: Job | None = await self._asked(store.get, id)
        if job is None or job.kind != JOB or not (asker.sees_all or job.owner == asker.owner):
            raise RequestRefused(
                "There is no job of this id, or it is another caller's.", None, "job_not_found", 404
            )
        return job

    async def page(
        self, asker: Asker, status: str | None, after: str | None, limit: int
    ) -> tuple[list[Job], bool]:
        """The asker's jobs, newest first, and whether there are more behind."""
        store = await self._opened()
        try:
            found: tuple[list[Job], bool] = await self._asked(
                store.page, None if asker.sees_all else asker.owner, status, after, limit
            )
        except KeyError:
            raise RequestRefused(
                "after must be the id of a job of yours, the last of the page before.", "after"
            ) from None
        return found

    async def place_of(self, job: Job) -> tuple[int, float | None]:
        """Where a queued job stands, and in how many seconds it is done; None while nobody can know."""
        store = await self._opened()
        position, work = await self._asked(store.place_of, job)
        return position, self._service.seconds_for(work + job.work)

    async def cancel(self, id: str, asker: Asker) -> Job:
        """The job, which is not drawn any further; one that has ended stays as it is."""
        job = await self.job(id, asker)
        store = await self._opened()
        cancelled: Job = await self._asked(store.cancel, job.id) or job
        if self._runner is not None:
            self._runner.stop_drawing(job.id)
        self._has_changed()
        return cancelled

    async def events_after(self, job: Job, number: int) -> list[JobEvent]:
        store = await self._opened()
        found: list[JobEvent] = await self._asked(store.events_after, job.id, number)
        return found

    async def ended(self, job: Job) -> Job:
        """The job when it has ended."""
        store = await self._opened()
        while not job.has_ended:
            await self.changed()
            now = await self._asked(store.get, job.id)
            if now is None:
                break
            job = now
        return job
