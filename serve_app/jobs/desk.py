"""Where jobs are handed in and asked for; owns what works on them in this process.

The database is opened by the first who needs it, or when the server starts. Where it cannot be, only jobs are
refused, and the log says so once.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging
import secrets
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from serve_app.error_mapping import SERVER, RequestRefused
from serve_app.jobs import idempotency, operations
from serve_app.jobs.courier import Courier
from serve_app.jobs.runner import JobRunner, remove_files
from serve_app.jobs.store import (
    ANSWER,
    JOB,
    Job,
    JobEvent,
    JobStore,
    KeyReused,
    Limits,
    NewJob,
    NoRoomForSources,
    TooManyJobs,
)
from serve_app.jobs.tables import GENERATIONS, StoreUnusable, open_database
from serve_app.jobs.webhook import Target, parse_target
from serve_app.queueing import Outside, QueueFull, Sharing
from serve_app.replica import replica_name
from serve_app.results import ResultStore
from serve_app.service import ImageService, work_of
from serve_app.settings import Settings
from zimage_engine.errors import DeadlineExceeded, InvalidRequest
from zimage_engine.sampling.plan import resolve

logger = logging.getLogger(__name__)

#: Calls of the database at once; each blocks a thread.
THREADS = 4
#: Between two tries to open a database that could not be opened.
REOPEN_SECONDS = 10.0
FORGET_SECONDS = 60.0
#: Between two counts of the jobs for their metrics.
COUNT_SECONDS = 5.0
#: How long after a change in another ingress it is seen here at the latest.
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Asker:
    """Who asks: the key's name, which owns jobs; the line in the queue; whether they see all jobs."""

    owner: str
    line: str
    sees_all: bool = False


@dataclass(eq=False)
class _Waiting:
    """One who waits for the job behind an Idempotency-Key; `size` is caller, work and pictures."""

    key: tuple[str, str]
    size: Outside | None = None
    sharing: Sharing | None = None
    job: str = ""
    #: Why it had to go for another.
    refusal: QueueFull | None = None


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
        self._is_holding = self._is_closed = False
        self._waiting: list[_Waiting] = []
        #: Set when a job that somebody waits for may have ended; forgotten with the last who waits.
        self._ends: weakref.WeakValueDictionary[str, asyncio.Event] = weakref.WeakValueDictionary()
        self._watching: asyncio.Task[None] | None = None

    # --- life --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to draw what is there, as soon as the database can be opened.

        Does not raise: who asks is told why there are no jobs.
        """
        self._is_holding = self._is_closed = False
        try:
            await self._opened()
        except RequestRefused:
            reopening = asyncio.create_task(self._open_at_last(), context=contextvars.Context())
            self._tasks.append(reopening)

    async def _open_at_last(self) -> None:
        while self._store is None:
            await asyncio.sleep(REOPEN_SECONDS)
            try:
                await self._opened()
            except RequestRefused:
                continue
            except Exception:  # as in `_forget_for_ever`
                logger.exception("the database of jobs could not be opened; trying again")

    def hold(self) -> None:
        """Begin with no job any more; those that are being drawn are drawn to their end.

        Who waits for one that nobody draws is told to come again.
        """
        self._is_holding = True
        if self._runner is not None:
            self._runner.hold()
        self._wake_those_who_wait()

    async def close(self) -> None:
        """Stop drawing; what was being drawn is there for whoever comes next."""
        self.hold()
        tasks = [*self._tasks, *([] if self._watching is None else [self._watching])]
        pending = set(tasks)
        while pending:
            # Again and again: what waits for Ray may take one for its own.
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=1.0)
        self._tasks, self._watching = [], None
        self._is_closed = True
        self._wake_those_who_wait()
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
        operators = self._operators_webhook()
        told = None if operators is None else (operators.url, operators.secret)
        url = self._settings.jobs_url
        if url is not None:
            return JobStore(open_database(url.get_secret_value()), webhook_of_all=told)
        file = self._settings.data_dir / "jobs.sqlite3"
        return JobStore(open_database(URL.create("sqlite", database=str(file))), webhook_of_all=told)

    def _begin(self, store: JobStore) -> None:
        owner = f"{replica_name()}-{secrets.token_hex(4)}"
        self._runner = JobRunner(
            self._service, store, self._results, self._in_thread, owner, self._has_changed
        )
        if self._is_holding:
            self._runner.hold()
        courier = Courier(
            store,
            self._in_thread,
            self._settings.webhook_private_addresses,
            tell=self._service.metrics.record_delivery,
            operators=self._operators_webhook(),
        )
        # Each in a context of its own: Serve ends with a request whatever was begun in its context.
        self._tasks += [
            asyncio.create_task(work, context=contextvars.Context())
            for work in (
                self._runner.run(),
                courier.run(),
                self._forget_for_ever(store),
                self._count_for_ever(store),
            )
        ]

    async def _forget_for_ever(self, store: JobStore) -> None:
        while True:
            try:
                for result in await self._in_thread(store.forget, self._settings.job_seconds):
                    await remove_files(self._results, json.loads(result))
            except Exception:  # whatever it is, the next are not to stay for ever
                logger.warning("old jobs could not be removed; trying again", exc_info=True)
            await asyncio.sleep(FORGET_SECONDS)

    async def _count_for_ever(self, store: JobStore) -> None:
        while True:
            with contextlib.suppress(Exception):
                self._service.metrics.show_jobs(*await self._in_thread(store.census))
            await asyncio.sleep(COUNT_SECONDS)

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
        self,
        payload: Mapping[str, Any],
        asker: Asker,
        key: str | None,
        kind: str = JOB,
        operation: str = GENERATIONS,
        files: operations.Files = MappingProxyType({}),
    ) -> tuple[Job, bool]:
        """The job of this body, on disk, and whether it is new. Raises what a plain request for it would.

        `operation` is one of OPERATIONS, and `files` are what it is drawn from.
        """
        return await self._accepted(payload, asker, key, kind, operation, files, None)

    async def answered(
        self,
        payload: Mapping[str, Any],
        asker: Asker,
        key: str,
        operation: str = GENERATIONS,
        files: operations.Files = MappingProxyType({}),
    ) -> tuple[Job, bool]:
        """The same for one who waits for the job's end, and has it then.

        The bounds of the queue hold for a new one, and the time that a request may take: raises what a plain
        request would, and RequestRefused (503) where this server ends before.
        """
        seconds = self._service.live.request_seconds
        waiting = _Waiting((asker.owner, key))
        self._waiting.append(waiting)
        try:
            async with asyncio.timeout(seconds) as limit:
                job, is_new = await self._accepted(payload, asker, key, ANSWER, operation, files, waiting)
                waiting.job = job.id
                if is_new:
                    await self._make_room_for(waiting)
                job = await self.ended(job)
                if waiting.refusal is not None and job.status == "cancelled":
                    raise waiting.refusal
                return job, is_new
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                f"The request was not done within {seconds:g} seconds, the wait for a worker included; send "
                "it again with the same Idempotency-Key, for it may be drawn by then."
            ) from error
        finally:
            self._waiting.remove(waiting)

    def _ahead_of(self, waiting: _Waiting) -> dict[tuple[str, str], _Waiting]:
        """Who else waits here for a job that is not in the queue yet, one for each key."""
        return {
            each.key: each
            for each in self._waiting
            if each.key != waiting.key
            and each.size is not None
            and not (self._runner is not None and self._runner.holds(each.job))
        }

    def _refusal_of(self, waiting: _Waiting) -> Exception | None:
        """What the queue would refuse one with who waits for a job; those who wait already come first."""
        assert waiting.size is not None
        ahead = [each.size for each in self._ahead_of(waiting).values() if each.size is not None]
        try:
            self._service.check_room(*waiting.size, ahead, waiting.sharing)
        except (QueueFull, InvalidRequest) as refusal:
            return refusal
        return None

    async def _make_room_for(self, waiting: _Waiting) -> None:
        """In a full queue who has most loses the youngest request, whether it is in the queue yet or not."""
        assert waiting.size is not None
        caller, work, _ = waiting.size
        ahead = list(self._ahead_of(waiting).values())
        sizes = [each.size for each in ahead if each.size is not None]
        store = await self._opened()
        for number, refusal in self._service.make_room(caller, work, sizes, waiting.sharing):
            going = ahead[number]
            if not going.job:
                continue  # it is being accepted in this moment: one more than may waits for once
            for each in self._waiting:
                if each.key == going.key:
                    each.refusal = refusal
            await self._asked(store.cancel_waiting, going.job)
            self._has_changed()

    async def _accepted(
        self,
        payload: Mapping[str, Any],
        asker: Asker,
        key: str | None,
        kind: str,
        operation: str,
        files: operations.Files,
        waiting: _Waiting | None,
    ) -> tuple[Job, bool]:
        store = await self._opened()
        fields = dict(payload)
        webhook = self._webhook_of(fields) if kind == JOB else None
        wire = operations.wire_of(operation, fields)
        if wire.stream:
            raise RequestRefused(
                "stream cannot be true with a job or an Idempotency-Key; leave it out, and follow a job's "
                "events at its address.",
                "stream",
            )
        named = operations.OPERATIONS[operation].model_of(wire, self._service.listed_name)
        wire = wire.model_copy(update={"model": named})
        description = await self._service.description_for(named)
        asked = await operations.request_of(
            operation, wire, files, description, self._service.live.default_enhance
        )
        asked = await operations.with_loras_left(operation, asked, self._service.loras_there)
        asked = await self._service.with_loras_that_are_there(asked)
        self._service.enhancer_for(asked.enhancer)
        plan = resolve(asked, description)
        # Whoever draws it, and whatever the defaults are then: it is the same picture.
        fixed: dict[str, Any] = {"seed": plan.seeds[0], "enhance": asked.enhance and (asked.enhancer or True)}
        if description.id in self._service.names_of_models:
            fixed["model"] = description.id
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
            operation=operation,
            files=files,
        )
        refusal = None
        if waiting is not None:
            waiting.size = (asker.line, new.work, len(plan.seeds))
            waiting.sharing = self._service.sharing_of(asked, plan, description)
            refusal = self._refusal_of(waiting)
        fingerprint = idempotency.fingerprint_of(payload, operation, files)
        try:
            job, is_new = await self._asked(store.accept, new, self._limits, key, fingerprint, refusal)
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
        except NoRoomForSources:
            raise RequestRefused(
                "The pictures that jobs are to be drawn from are as many as this server keeps; wait for some "
                "jobs, or send this one without Prefer and Idempotency-Key.",
                None,
                "too_many_jobs",
                429,
                "rate_limit_error",
                {"Retry-After": "30"},
            ) from None
        if is_new:
            logger.info("job %s is accepted: %s, by %s", job.id, operation, asker.owner or "anybody")
            if self._runner is not None:
                self._runner.look()
        self._has_changed()
        return job, is_new

    def _webhook_of(self, fields: dict[str, Any]) -> Target | None:
        given = fields.pop("webhook", None)
        if given is not None:
            return parse_target(given, self._settings.webhook_private_addresses)
        return None

    def _operators_webhook(self) -> Target | None:
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
                "after must be the id of a job of yours, the last of the page before.",
                "after",
                "job_not_found",
                404,
            ) from None
        return found

    async def places_of(self, found: Sequence[Job]) -> dict[str, tuple[int, float | None]]:
        """Where each queued job stands, by id, and in how many seconds it is done; None: nobody can know."""
        queued = [job for job in found if job.status == "queued"]
        if not queued:
            return {}
        store = await self._opened()
        places = await self._asked(store.places_of, queued)
        return {
            job.id: (places[job.id][0], self._service.seconds_for(places[job.id][1] + job.work))
            for job in queued
        }

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

    async def forget_key(self, asker: Asker, key: str, job: Job) -> None:
        """Whoever comes with this key asks for something new."""
        store = await self._opened()
        await self._asked(store.drop_key, asker.owner, key, job.id)

    async def ended(self, job: Job) -> Job:
        """The job when it has ended. Raises RequestRefused (503) where this server ends before."""
        store = await self._opened()
        while not job.has_ended:
            if self._is_closed or (self._is_holding and job.status == "queued"):
                raise RequestRefused(
                    "The server is ending and begins with no more pictures; send this again in a moment, "
                    "with the same Idempotency-Key.",
                    None,
                    "server_ending",
                    503,
                    SERVER,
                    {"Retry-After": "5"},
                )
            end = self._ends.setdefault(job.id, asyncio.Event())
            if self._watching is None or self._watching.done():
                self._watching = asyncio.create_task(self._watch(store), context=contextvars.Context())
            await end.wait()
            now = await self._asked(store.get, job.id)
            if now is None:
                break
            job = now
        return job

    async def _watch(self, store: JobStore) -> None:
        """One look at the database for all who wait for jobs."""
        while self._ends:
            end: asyncio.Event | None = None
            change, ids = self._change, list(self._ends)
            try:
                going_on = await self._in_thread(
                    store.among, ids, ("running",) if self._is_holding else ("queued", "running")
                )
            except Exception:  # each who waits asks for itself, and tells what comes of it
                logger.exception("the jobs that are waited for could not be looked at")
                going_on = set()
            for id in ids:
                end = self._ends.get(id)
                if end is not None and id not in going_on:
                    del self._ends[id]
                    end.set()
            # Held on to here, it would never be forgotten.
            end = None
            # Not wait_for, which in Python 3.11 loses a cancel that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await change.wait()

    def _wake_those_who_wait(self) -> None:
        for id, end in list(self._ends.items()):
            del self._ends[id]
            end.set()
