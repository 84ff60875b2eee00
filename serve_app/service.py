"""The one way to a picture inside the server; the HTTP routes and the page both call it.

Enhance the prompt, hand the request to a worker, count what happened. Lives in the ingress and
imports no torch. Knows neither the wire format nor the page.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from serve_app.error_mapping import ModelNotReady, WorkerLost, is_the_servers, outcome_of, unwrap
from serve_app.image_codec import ImageEncoding
from serve_app.logs import REQUESTS, request_id
from serve_app.metrics import ServerMetrics, merged
from serve_app.queueing import Entry, FairQueue, OnPlace, turn
from serve_app.tracing import Tracing, current, now
from serve_app.worker_reply import Preview
from zimage_engine.errors import DeadlineExceeded
from zimage_engine.prompts.enhancer import enhance, unchanged
from zimage_engine.prompts.tokens import token_counter
from zimage_engine.sampling.plan import SamplingPlan, resolve
from zimage_engine.types import (
    DeviceStatus,
    EnhancedPrompt,
    GenerationRequest,
    ModelDescription,
    StepProgress,
)

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from serve_app.settings import Settings
    from serve_app.worker_reply import WorkerReply

logger = logging.getLogger(__name__)
requests = logging.getLogger(REQUESTS)

OnProgress = Callable[[StepProgress], Awaitable[None] | None]
OnPreview = Callable[[Preview], None]

#: What waiting for a worker raises when the one who waits is cancelled; Serve makes the second of the first.
CANCELLED = (asyncio.CancelledError, RequestCancelledError)
#: A worker answers these from its event loop, which drawing does not hold up.
ASK_SECONDS = 3.0
#: The same for a scrape, within Prometheus' own ten: one that is late would take all others' series away.
SCRAPE_SECONDS = 8.0
#: A worker that answered this recently is still there.
READY_CACHE_SECONDS = 0.5
#: How old the number of workers that the queue goes by may be while pictures are asked for.
COUNT_CACHE_SECONDS = 5.0
#: Between two looks whether a new worker has come up.
RESTART_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Readiness:
    """Whether pictures can be drawn now, and in one sentence why not."""

    ready: bool
    reason: str


@dataclass(frozen=True)
class _Watcher:
    """Who hears of a drawing, and how many previews of it are made."""

    on_progress: OnProgress
    on_preview: OnPreview | None
    previews: int


class ImageService:
    """Pictures from the workers behind `worker`, which is asked through Ray only."""

    def __init__(
        self,
        worker: DeploymentHandle,
        metrics: ServerMetrics,
        settings: Settings,
        ingresses: DeploymentHandle | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`ingresses` reaches every ingress, this one too; None where there is only this one.

        A request that has no trace yet gets one from `tracing`; None: requests are not traced.
        """
        self._worker = worker
        self._streaming_worker = worker.options(stream=True)
        self._ingresses = ingresses
        self._metrics = metrics
        self._settings = settings
        self._tracing = tracing
        self._description: ModelDescription | None = None
        self._count_tokens: Callable[[str], int] | None = None
        self._answered_at = float("-inf")
        entry = Entry("normal", settings.pictures_at_once, settings.requests_a_minute)
        self._queue = FairQueue(
            settings.max_queued_requests, settings.max_queue_seconds, entry_of=lambda name: entry
        )
        self._queue.set_workers(settings.num_replicas)
        self._counted_at = float("-inf")
        self._counting: asyncio.Task[bool] | None = None

    async def generate(
        self,
        request: GenerationRequest,
        encoding: ImageEncoding,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        previews: int = 0,
        *,
        asked_by: str = "",
        on_place: OnPlace | None = None,
    ) -> WorkerReply:
        """Draw what is asked when its turn is; the report tells the enhancement that was made here.

        `asked_by` has one line in the queue; `on_place` hears of the place in it while there is one.

        `on_progress` is called after each step, and `on_preview` after `previews` of them, or after fewer
        where some cannot be made; after a worker's death both begin again with the first step. Cancelling
        stops the drawing in the worker.
        Raises InvalidRequest, ModelNotReady, QueueFull, CallerLimited, DeadlineExceeded or WorkerLost.
        """
        with self._traced():
            started = time.monotonic()
            watcher = None if on_progress is None else _Watcher(on_progress, on_preview, previews)
            with self.failures_counted():
                async with self._in_time():
                    description = await self.description_when_ready()
                    # What cannot be drawn is told now, not after a place in the queue has come up.
                    plan = resolve(request, description)
                    enhancing, enhancing_at = time.perf_counter(), now()
                    enhanced = self._enhanced(plan, request.enhance, description)
                    enhance_seconds = time.perf_counter() - enhancing
                    asked_at = now()
                    if request.enhance:
                        current().passed("enhance", enhancing_at, asked_at)
                    work = work_of(plan)
                    self._count_workers_soon()
                    async with turn(self._queue, asked_by, work, len(plan.seeds), on_place):
                        reply = await self._drawn(_ready_to_draw(request, plan, enhanced), encoding, watcher)
                        self._queue.pace.learn(work, reply.report.seconds)
                    self._count_workers_soon()
            report = replace(reply.report, enhancement=enhanced)
            seconds = time.monotonic() - started
            self._metrics.record(
                report, seconds, enhance_seconds, reply.encode_file_seconds, _name_of_request()
            )
            current().drawn(reply, report, asked_at)
            told = {"outcome": "ok", "seconds": round(seconds, 3), "pictures": len(report.pictures)}
            requests.info("request ended", extra=told)
            return replace(reply, report=report)

    def rate_headers(self, asked_by: str) -> dict[str, str]:
        """What a caller is told of the requests a minute that are left; nothing where they have no limit."""
        return self._queue.headers_of(asked_by)

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Ends what is inside, and the drawing with it, when the request's time is over."""
        seconds = self._settings.request_seconds
        try:
            async with asyncio.timeout(seconds) as limit:
                yield
        except (TimeoutError, RequestCancelledError) as error:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                f"The request was not done within {seconds:g} seconds, the wait for a worker included; "
                "ask for fewer steps or a smaller picture, or send it again when less is to be done."
            ) from error

    def _traced(self) -> AbstractContextManager[Any]:
        """A trace for what came over no traced route, as the page's requests."""
        if self._tracing is None or current().id:
            return nullcontext()
        return self._tracing.request("generate")

    @contextmanager
    def failures_counted(self) -> Iterator[None]:
        """A request is under way inside; how it fails there is counted and logged, and raised on."""
        self._metrics.started()
        try:
            yield
        except (Exception, asyncio.CancelledError) as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            outcome = "cancelled" if cancelled else outcome_of(error)
            trips = getattr(error, "trips", ())
            self._metrics.record_failure(outcome, trips)
            current().failed(outcome, trips, is_error=not cancelled and is_the_servers(error))
            requests.info("request ended", extra={"outcome": outcome})
            raise
        finally:
            self._metrics.ended()

    def count_tokens(self, text: str) -> int:
        """The tokens of `text` as the model counts them; 0 where its tokenizer is not known."""
        return self._count_tokens(text) if self._count_tokens is not None else 0

    async def description(self) -> ModelDescription | None:
        """What the workers loaded; None until the first of them has its model. Asked once, then kept."""
        if self._description is None:
            await self._look_for_workers()
        return self._description

    async def description_when_ready(self) -> ModelDescription:
        """What the workers loaded, as soon as one has its model: a new version's ingress is there first.

        Raises ModelNotReady after the setting `worker_restart_seconds`.
        """
        deadline = time.monotonic() + self._settings.worker_restart_seconds
        while (description := await self.description()) is None:
            if time.monotonic() >= deadline:
                raise ModelNotReady(self._reason_not_ready())
            await asyncio.sleep(RESTART_POLL_SECONDS)
        return description

    async def readiness(self) -> Readiness:
        """Whether a worker with its model answers at this moment."""
        if time.monotonic() - self._answered_at > READY_CACHE_SECONDS and not await self._look_for_workers():
            return Readiness(False, self._reason_not_ready())
        return Readiness(True, "ready")

    async def device_status(self) -> DeviceStatus | None:
        """The device of one worker; None where no worker answers."""
        statuses = await self._ask_all("device_status")
        return statuses[0] if statuses else None

    async def metrics_text(self, with_exemplars: bool = False) -> str:
        """The metrics of every ingress and of every worker that answers, as one text; as `merged` tells."""
        others, workers = await asyncio.gather(
            self._ask_ingresses("metrics_text"), self._ask_all("metrics_text", SCRAPE_SECONDS)
        )
        return merged([*others, self._metrics.named_text()], workers, with_exemplars)

    def _enhanced(self, plan: SamplingPlan, wanted: bool, description: ModelDescription) -> EnhancedPrompt:
        if not wanted:
            return unchanged(plan.prompt, plan.negative_prompt)
        return enhance(
            plan.prompt,
            plan.negative_prompt,
            count_tokens=self._count_tokens,
            token_limit=description.token_limit if self._count_tokens else None,
        )

    async def _drawn(
        self, request: GenerationRequest, encoding: ImageEncoding, watcher: _Watcher | None
    ) -> WorkerReply:
        """Hand over to a worker; once more, should it die. The seed is fixed, so the picture is the same."""
        try:
            return await self._asked_of_a_worker(request, encoding, watcher)
        except RayActorError:
            logger.warning("a worker died while it drew; the request waits for another")
        self._metrics.record_retry()
        current().happened("worker died")
        await self._until_a_worker_answers()
        try:
            return await self._asked_of_a_worker(request, encoding, watcher)
        except RayActorError as error:
            raise WorkerLost(
                "The worker died while it drew this picture, and so did the one that tried again. "
                "If it is a large picture, ask for a smaller one; otherwise send the request again."
            ) from error

    async def _asked_of_a_worker(
        self, request: GenerationRequest, encoding: ImageEncoding, watcher: _Watcher | None
    ) -> WorkerReply:
        traced = {"trace_id": current().id} if current().id else {}
        try:
            if watcher is None:
                return await _awaited(self._worker.generate.remote(request, encoding, **traced))
            stream = self._streaming_worker.generate_streaming.remote(
                request, encoding, watcher.previews, **traced
            )
            return await _followed(stream, watcher)
        except Exception as error:
            original = unwrap(error)
            if original is error:
                raise
            raise original from None

    async def _until_a_worker_answers(self) -> None:
        deadline = time.monotonic() + self._settings.worker_restart_seconds
        while not await self._look_for_workers():
            if time.monotonic() >= deadline:
                raise WorkerLost(
                    "The worker died while it drew this picture, and no other came up within "
                    f"{self._settings.worker_restart_seconds:g} seconds. Send the request again later."
                )
            await asyncio.sleep(RESTART_POLL_SECONDS)

    async def _look_for_workers(self) -> bool:
        descriptions = await self._ask_all("describe")
        if not descriptions:
            return False
        self._answered_at = self._counted_at = time.monotonic()
        self._queue.set_workers(len(descriptions))
        if self._description is None:
            description: ModelDescription = descriptions[0]
            if description.tokenizer_json:
                self._count_tokens = token_counter(description.tokenizer_json)
            self._description = description
        return True

    def _count_workers_soon(self) -> None:
        """Workers come and go; the queue hears of it while there is something to do for them."""
        is_counting = self._counting is not None and not self._counting.done()
        if not is_counting and time.monotonic() - self._counted_at > COUNT_CACHE_SECONDS:
            self._counted_at = time.monotonic()
            self._counting = asyncio.create_task(self._look_for_workers())

    async def _ask_all(self, method: str, seconds: float = ASK_SECONDS) -> list[Any]:
        """What each worker answers, past the queue of pictures; those that do not answer are left out."""
        return await self._asked(self._worker, method, seconds)

    async def _ask_ingresses(self, method: str) -> list[Any]:
        if self._ingresses is None:
            return []
        return await self._asked(self._ingresses, method, SCRAPE_SECONDS)

    async def _asked(self, replicas: DeploymentHandle, method: str, seconds: float) -> list[Any]:
        try:
            response = replicas.broadcast(method)
            answers = await response.results_async(timeout_s=seconds, return_exceptions=True)
        except (TimeoutError, RayServeException):  # Serve's, where no worker runs at the moment
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def _reason_not_ready(self) -> str:
        if self._description is None:
            return "No worker has its model yet: it is still being loaded. Try again in a few seconds."
        return "No worker answers at the moment; a new one is being started. Try again in a few seconds."


def work_of(plan: SamplingPlan) -> float:
    """What drawing it costs, in megapixel-steps; with guidance each step is computed twice."""
    passes = 2 if plan.guidance_scale > 1 else 1
    return plan.width_px * plan.height_px / 1e6 * plan.steps * passes * len(plan.seeds)


def _name_of_request() -> dict[str, str]:
    """What its log lines and its trace are found by; a trace only where a collector gets it."""
    trace = current()
    named = {"request_id": request_id(), "trace_id": trace.id if trace.is_sampled else ""}
    return {name: value for name, value in named.items() if value}


def _ready_to_draw(
    request: GenerationRequest, plan: SamplingPlan, enhanced: EnhancedPrompt
) -> GenerationRequest:
    """The request with finished prompts and a seed of its own, so that it can be sent twice."""
    return replace(
        request,
        prompt=enhanced.prompt,
        negative_prompt=enhanced.negative_prompt,
        enhance=False,
        refine=request.enhance if request.refine is None else request.refine,
        seed=plan.seeds[0],
    )


async def _awaited(response: Any) -> WorkerReply:
    try:
        return await response
    except CANCELLED:
        response.cancel()
        raise


async def _followed(stream: Any, watcher: _Watcher) -> WorkerReply:
    try:
        async for item in stream:
            if isinstance(item, StepProgress):
                called = watcher.on_progress(item)
                if inspect.isawaitable(called):
                    await called
            elif isinstance(item, Preview):
                if watcher.on_preview is not None:
                    watcher.on_preview(item)
            else:
                return item
    except CANCELLED:
        stream.cancel()
        raise
    raise WorkerLost("The worker ended the stream without a picture; send the request again.")
