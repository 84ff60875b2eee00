"""Draws jobs: claims as many as the workers can have at hand, through the same queue as everybody's requests.

One runner for each ingress. What it holds is leased and renewed while it lives; where it dies, another claims
the job again and draws the same picture, for the seed was fixed when the job was accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from sqlalchemy.exc import SQLAlchemyError

from serve_app import openai_schema as schema
from serve_app.error_mapping import ModelNotReady, WorkerLost, answer_for
from serve_app.jobs.store import LEASE_SECONDS, Job, JobStore, Seen
from serve_app.queueing import QueueFull
from serve_app.results import ResultNotKept, ResultStore, expires_at
from serve_app.service import CANCELLED, ImageService
from zimage_engine.types import StepProgress

logger = logging.getLogger(__name__)

#: Between two looks for jobs that other ingresses took in, or left behind.
POLL_SECONDS = 1.0
#: How often a step is noted, and looked whether somebody has cancelled what is being drawn.
BEAT_SECONDS = 0.5
#: How long after a failure that passes a job is tried again, and after one of the database.
AGAIN_SECONDS = 5.0
#: Beyond so many callers their turns are forgotten.
TURNS_KEPT = 4096

#: Failures that say nothing about the request: it is drawn later.
_PASSING = (ModelNotReady, QueueFull, BackPressureError, DeploymentUnavailableError, ResultNotKept)
#: Here the request may be the cause, so that they are counted.
_DEATHS = (WorkerLost, RayActorError)

#: Runs a blocking call of the store's in a thread.
InThread = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A picture in the result store: its id there, which becomes an address when somebody asks."""

    url: str
    expires_at: int


class JobRunner:
    """The jobs that this process draws; `changed` is called after each change that somebody may wait for."""

    def __init__(
        self,
        service: ImageService,
        store: JobStore,
        results: ResultStore,
        in_thread: InThread,
        owner: str,
        changed: Callable[[], None],
        lease: float = LEASE_SECONDS,
    ) -> None:
        self._service = service
        self._store = store
        self._results = results
        self._in_thread = in_thread
        self._owner = owner
        self._changed = changed
        self._lease = lease
        self._held: dict[str, tuple[Seen, asyncio.Task[None]]] = {}
        self._turns: dict[str, int] = {}
        self._turn = itertools.count(1)
        self._wake = asyncio.Event()
        self._closing = False

    def look(self) -> None:
        """There is a new job."""
        self._wake.set()

    def stop_drawing(self, id: str) -> None:
        """The job was cancelled."""
        if id in self._held:
            self._held[id][1].cancel()

    async def run(self) -> None:
        """Draw until cancelled; then what is being drawn goes back into the queue at once."""
        beating = asyncio.create_task(self._beat_for_ever())
        try:
            while True:
                self._wake.clear()
                try:
                    await self._claim()
                except SQLAlchemyError:
                    logger.exception("the database of jobs does not answer; trying again")
                    await asyncio.sleep(AGAIN_SECONDS)
                # Not wait_for, which in Python 3.11 loses a cancel that comes together with the event.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._wake.wait()
        finally:
            self._closing = True
            tasks = [beating, *(task for _, task in self._held.values())]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _claim(self) -> None:
        free = self._service.tickets_for_jobs() - len(self._held)
        if free <= 0:
            return
        description = await self._service.description()
        if description is None:
            return
        for job in await self._in_thread(
            self._store.claim, self._owner, description.id, free, self._turns, self._lease
        ):
            if len(self._turns) > TURNS_KEPT:
                self._turns.clear()
            self._turns[job.asked_by] = next(self._turn)
            task = asyncio.create_task(self._draw_and_note(job))
            self._held[job.id] = (Seen(job.id, job.attempt), task)
            task.add_done_callback(functools.partial(self._let_loose, job.id))
            self._changed()

    def _let_loose(self, id: str, _task: asyncio.Task[None]) -> None:
        self._held.pop(id, None)
        self._wake.set()

    # --- one job -----------------------------------------------------------------------------------------

    async def _draw_and_note(self, job: Job) -> None:
        try:
            result = await self._drawn(job)
        except CANCELLED:
            # By a caller, and the store knows; or this process ends, and another may go on.
            if self._closing:
                await asyncio.shield(self._in_thread(self._store.let_go, job.id, job.attempt))
            return
        except _PASSING as passing:
            wait = float(getattr(passing, "headers", {}).get("Retry-After", AGAIN_SECONDS))
            await self._note(self._store.let_go, job.id, job.attempt, wait)
        except _DEATHS:
            logger.warning("a worker died while it drew job %s; it is drawn again", job.id)
            await self._note(self._store.let_go, job.id, job.attempt, AGAIN_SECONDS, True)
        except Exception as error:
            answer = answer_for(error)
            told = {**answer.body()["error"], "status": answer.status}
            await self._note(self._store.fail, job.id, job.attempt, told)
        else:
            if not await self._note(self._store.finish, job.id, job.attempt, json.dumps(result)):
                # Somebody else draws it, or it was cancelled: these files are nobody's.
                await remove_files(self._results, result)
        self._changed()

    async def _drawn(self, job: Job) -> dict[str, Any]:
        """What `ImagesResponse` says, with the id of each kept file as its url."""
        wire = schema.parse(json.loads(job.request))
        encoding = schema.to_encoding(wire)

        def stepped(progress: StepProgress) -> None:
            seen, task = self._held[job.id]
            steps = progress.pictures * progress.steps
            step = (progress.picture - 1) * progress.steps + progress.step
            self._held[job.id] = (replace(seen, step=step, steps=steps), task)

        reply = await self._service.generate(schema.to_engine(wire), encoding, stepped, asked_by=job.asked_by)
        kept: list[str] = []
        try:
            for picture in reply.pictures:
                kept.append(await self._results.put(picture, f"image/{encoding.format}"))
        except BaseException:
            for id in kept:
                await self._results.remove(id)
            raise
        links = [KeptFile(id, expires_at(id)) for id in kept]
        return schema.to_response(
            wire, encoding, reply.pictures, reply.report, links, count_tokens=self._service.count_tokens
        )

    async def _note(self, change: Callable[..., bool], *arguments: Any) -> bool:
        """Write it down; again while the database does not answer, for as long as the job is ours."""
        give_up_at = time.monotonic() + self._lease
        while True:
            try:
                return bool(await self._in_thread(change, *arguments))
            except SQLAlchemyError:
                if time.monotonic() > give_up_at:
                    logger.exception("the end of job %s could not be noted; it is drawn again", arguments[0])
                    return False
                await asyncio.sleep(1.0)

    # --- leases ------------------------------------------------------------------------------------------

    async def _beat_for_ever(self) -> None:
        renewed_at = time.monotonic()
        noted: dict[str, Seen] = {}
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            seen = [each for each, _ in self._held.values()]
            if not seen:
                continue
            is_due = time.monotonic() - renewed_at > self._lease / 4
            stepped = [each for each in seen if noted.get(each.id) != each]
            try:
                if is_due or stepped:
                    gone = await self._in_thread(
                        self._store.renew, self._owner, seen if is_due else stepped, self._lease
                    )
                    renewed_at = time.monotonic() if is_due else renewed_at
                    noted = {each.id: each for each in seen}
                else:
                    gone = set()
                mine = await self._in_thread(self._store.still_mine, seen)
            except SQLAlchemyError:
                logger.warning("the leases of jobs could not be renewed; trying again")
                continue
            for each in seen:
                if each.id in gone or each.id not in mine:
                    self._stop_attempt(each)
            if stepped:
                self._changed()

    def _stop_attempt(self, seen: Seen) -> None:
        held = self._held.get(seen.id)
        if held is not None and held[0].attempt == seen.attempt:
            held[1].cancel()


async def remove_files(results: ResultStore, result: dict[str, Any]) -> None:
    """Remove the pictures of a result that nobody will ask for."""
    for picture in result["data"]:
        await results.remove(picture["url"])
