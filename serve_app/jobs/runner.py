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
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from sqlalchemy.exc import SQLAlchemyError

from serve_app import openai_schema as schema
from serve_app.error_mapping import SERVER, ModelNotReady, RequestRefused, WorkerLost, answer_for
from serve_app.jobs import operations
from serve_app.jobs.store import LEASE_SECONDS, Job, JobStore, Seen
from serve_app.jobs.tables import GENERATIONS
from serve_app.logs import context_of_request
from serve_app.model_list import ModelLoadFailed
from serve_app.queueing import CallerLimited, QueueFull
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
#: A picture that cannot be kept is tried again after these; it is not drawn again for that.
KEEP_AGAIN_SECONDS = (1.0, 5.0, 15.0)
#: Beyond so many callers their turns are forgotten.
TURNS_KEPT = 4096

#: Failures that say nothing about the request: it is drawn later.
_PASSING = (
    ModelNotReady,
    ModelLoadFailed,
    QueueFull,
    BackPressureError,
    DeploymentUnavailableError,
)
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
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` is the one that leases are judged by, which may jump."""
        self._service = service
        self._store = store
        self._results = results
        self._in_thread = in_thread
        self._owner = owner
        self._changed = changed
        self._lease = lease
        self._clock = clock
        #: What is drawn here, by job and attempt.
        self._held: dict[tuple[str, int], tuple[Seen, asyncio.Task[None]]] = {}
        #: Until when, by the monotonic clock, nothing is claimed: of a caller, of a model, and at all.
        self._callers_off: dict[str, float] = {}
        self._models_off: dict[str, float] = {}
        self._all_off = float("-inf")
        self._renewed_at = (time.monotonic(), clock())
        self._turns: dict[str, int] = {}
        self._turn = itertools.count(1)
        self._wake = asyncio.Event()
        self._closing = False
        self._is_holding = False

    def hold(self) -> None:
        """Claim nothing more; what is being drawn is drawn to its end."""
        self._is_holding = True

    def holds(self, id: str) -> bool:
        """Whether the job is being drawn here."""
        return any(held == id for held, _ in self._held)

    def look(self) -> None:
        """There is a new job."""
        self._wake.set()

    def stop_drawing(self, id: str) -> None:
        """The job was cancelled."""
        for (held, _), (_, task) in self._held.items():
            if held == id:
                task.cancel()

    async def run(self) -> None:
        """Draw until cancelled; then what is being drawn goes back into the queue at once."""
        beating = asyncio.create_task(self._beat_for_ever())
        try:
            while True:
                self._wake.clear()
                try:
                    await self._claim()
                except Exception:  # whatever it is, the next jobs are not to wait for ever
                    logger.exception("jobs could not be claimed; trying again")
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
        if not self._may_claim():
            return
        description = await self._service.description()
        if description is None:
            return
        if self._late_by() > self._lease / 2:
            # The clock has jumped: others' leases look as lost as one's own, until they have renewed them.
            await asyncio.sleep(2 * BEAT_SECONDS)
        # One whose model has left the list waits, as one of another default model does.
        models = (description.id, *self._service.names_of_models)
        # One a call, so that each is drawn as soon as it is claimed.
        while self._may_claim() and await self._claim_one(models):
            pass

    def _may_claim(self) -> bool:
        is_free = len(self._held) < self._service.tickets_for_jobs()
        return is_free and not self._is_holding and time.monotonic() >= self._all_off

    async def _claim_one(self, models: Sequence[str]) -> bool:
        now = time.monotonic()
        self._callers_off = {caller: until for caller, until in self._callers_off.items() if until > now}
        models = [model for model in models if now >= self._models_off.get(model, now)]
        claim = functools.partial(
            self._store.claim,
            besides={id for id, _ in self._held},
            not_of=frozenset(self._callers_off),
        )
        claiming = asyncio.ensure_future(
            self._in_thread(claim, self._owner, models, 1, dict(self._turns), self._lease)
        )
        try:
            claimed: list[Job] = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # The thread goes on: what it claims nobody would draw before the lease is over.
            with contextlib.suppress(Exception):
                for job in await claiming:
                    await self._in_thread(self._store.let_go, job.id, job.attempt)
            raise
        for job in claimed:
            self._begin(job)
        return bool(claimed)

    def _begin(self, job: Job) -> None:
        if len(self._turns) > TURNS_KEPT:
            self._turns.clear()
        self._turns[job.asked_by] = next(self._turn)
        # An attempt that others have ended, which has not heard of it yet.
        self.stop_drawing(job.id)
        # So that each line that is logged about it tells its id, those of the workers too.
        task = asyncio.create_task(self._draw_and_note(job), context=context_of_request(job.id))
        self._held[job.id, job.attempt] = (Seen(job.id, job.attempt), task)
        task.add_done_callback(functools.partial(self._let_loose, job.id, job.attempt))
        self._changed()

    def _let_loose(self, id: str, attempt: int, _task: asyncio.Task[None]) -> None:
        self._held.pop((id, attempt), None)
        self._wake.set()

    def _hold_off(self, job: Job, passing: Exception, seconds: float) -> None:
        """The next would fail as this one did: wait as long with them too."""
        until = time.monotonic() + seconds
        if isinstance(passing, CallerLimited):
            self._callers_off[job.asked_by] = until
        elif isinstance(passing, ModelLoadFailed):
            self._models_off[job.model] = until
        else:
            self._all_off = until

    # --- one job -----------------------------------------------------------------------------------------

    async def _draw_and_note(self, job: Job) -> None:
        try:
            result = await self._drawn(job)
        except CANCELLED:
            # By a caller, and the store knows, so that there is nothing to let go; or this process ends, or
            # Serve gave the drawing up, and another may go on.
            wait = 0.0 if self._closing else AGAIN_SECONDS
            await self._note(self._store.let_go, job.id, job.attempt, wait)
            self._changed()
            return
        except _PASSING as passing:
            wait = float(getattr(passing, "headers", {}).get("Retry-After", AGAIN_SECONDS))
            self._hold_off(job, passing, wait)
            # Of a caller who has had its part nothing new is to be told.
            is_told = not isinstance(passing, QueueFull)
            await self._note(self._store.let_go, job.id, job.attempt, wait, False, is_told)
        except _DEATHS:
            logger.warning("a worker died while it drew job %s; it is drawn again", job.id)
            await self._note(self._store.let_go, job.id, job.attempt, AGAIN_SECONDS, True)
        except Exception as error:
            answer = answer_for(error)
            told = {**answer.body()["error"], "status": answer.status}
            logger.warning("job %s failed: %s", job.id, told["code"])
            await self._note(self._store.fail, job.id, job.attempt, told)
        else:
            if not await self._note(self._store.finish, job.id, job.attempt, json.dumps(result)):
                # Somebody else draws it, or it was cancelled: these files are nobody's.
                await remove_files(self._results, result)
            else:
                logger.info("job %s is done, at attempt %d", job.id, job.attempt)
        self._changed()

    async def _drawn(self, job: Job) -> dict[str, Any]:
        """What `ImagesResponse` says, with the id of each kept file as its url, and what else is told."""
        wire = operations.wire_of(job.operation, json.loads(job.request))
        files: operations.Files = {}
        if job.operation != GENERATIONS:
            files = await self._in_thread(self._store.files_of, job.id)
            if not files and operations.OPERATIONS[job.operation].needs_files:
                if await self._in_thread(self._store.still_mine, [Seen(job.id, job.attempt)]):
                    raise RuntimeError(f"the files that job {job.id} is drawn from are not there")
                # They go with the end of a job: it was cancelled in this moment, and the store knows.
                raise asyncio.CancelledError
        description = await self._service.description_for(wire.model)
        asked = await operations.request_of(job.operation, wire, files, description)
        asked = await operations.with_loras_left(job.operation, asked, self._service.loras_there)
        encoding = schema.to_encoding(wire)

        def stepped(progress: StepProgress) -> None:
            held = self._held.get((job.id, job.attempt))
            if held is None:
                return
            seen, task = held
            steps = progress.pictures * progress.steps
            self._held[job.id, job.attempt] = (replace(seen, step=progress.steps_ended, steps=steps), task)

        reply = await self._service.generate(asked, encoding, stepped, asked_by=job.asked_by)
        told = await operations.told_of(job.operation, wire, files, reply.pictures[0])
        kept: list[str] = []
        try:
            for picture in reply.pictures:
                kept.append(await self._kept(picture, f"image/{encoding.format}"))
        except BaseException:
            for id in kept:
                await self._results.remove(id)
            raise
        links = [KeptFile(id, expires_at(id)) for id in kept]
        return told | schema.to_response(
            wire,
            encoding,
            reply.pictures,
            reply.report,
            links,
            count_tokens=self._service.token_counter(reply.report.model),
        )

    async def _kept(self, picture: bytes, media_type: str) -> str:
        for seconds in KEEP_AGAIN_SECONDS:
            with contextlib.suppress(ResultNotKept):
                return await self._results.put(picture, media_type)
            await asyncio.sleep(seconds)
        try:
            return await self._results.put(picture, media_type)
        except ResultNotKept as error:
            raise RequestRefused(
                "This was drawn, and the picture could not be kept on the server (its log says why). Send it "
                "again later, or as a plain request, whose answer holds the picture itself.",
                None,
                "result_not_kept",
                503,
                SERVER,
            ) from error

    async def _note(self, change: Callable[..., bool], *arguments: Any) -> bool:
        """Write it down to the end, also where this is cancelled meanwhile; what it says of the change."""
        noting = asyncio.ensure_future(self._noted(change, *arguments))
        try:
            return await asyncio.shield(noting)
        except asyncio.CancelledError:
            if noting.cancelled():
                raise
            # Once only: what comes of it is as good, and whoever cancelled waits for this task.
            return await noting

    async def _noted(self, change: Callable[..., bool], *arguments: Any) -> bool:
        """Again while the database does not answer, for as long as the job is ours."""
        give_up_at = time.monotonic() + self._lease
        while True:
            try:
                return bool(await self._in_thread(change, *arguments))
            except SQLAlchemyError:
                if time.monotonic() > give_up_at or self._closing:
                    logger.exception("the end of job %s could not be noted; it is drawn again", arguments[0])
                    return False
                await asyncio.sleep(1.0)

    # --- leases ------------------------------------------------------------------------------------------

    def _late_by(self) -> float:
        """The seconds since the leases were renewed, by the clock that says more.

        The one that leases are judged by may jump, and goes on while the machine sleeps.
        """
        monotonic, told = self._renewed_at
        return max(time.monotonic() - monotonic, abs(self._clock() - told))

    async def _beat_for_ever(self) -> None:
        noted: dict[tuple[str, int], Seen] = {}
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                noted = await self._beat(noted)
            except Exception:  # whatever it is, the leases must go on being renewed
                logger.warning("the leases of jobs could not be renewed; trying again", exc_info=True)

    async def _beat(self, noted: dict[tuple[str, int], Seen]) -> dict[tuple[str, int], Seen]:
        """Renew what is due and tell the steps; what was told so far is `noted`, and returned."""
        now = (time.monotonic(), self._clock())
        seen = {attempt: each for attempt, (each, _) in self._held.items()}
        if not seen:
            self._renewed_at = now
            return {}
        is_due = self._late_by() > self._lease / 4
        stepped = [each for attempt, each in seen.items() if noted.get(attempt) != each]
        if is_due or stepped:
            renewed = list(seen.values()) if is_due else stepped
            await self._in_thread(self._store.renew, self._owner, renewed, self._lease)
            self._renewed_at = now if is_due else self._renewed_at
        mine = await self._in_thread(self._store.still_mine, list(seen.values()))
        for attempt in seen:
            held = self._held.get(attempt)
            # Once: whoever was cancelled may have something to clear up.
            if attempt not in mine and held is not None and not held[1].cancelling():
                held[1].cancel()
        if stepped:
            self._changed()
        return seen


async def remove_files(results: ResultStore, result: dict[str, Any]) -> None:
    """Remove the pictures of a result that nobody will ask for."""
    for picture in result["data"]:
        await results.remove(picture["url"])
