"""The one way to a picture inside the server; the HTTP routes and the page both call it.

Enhance the prompt, hand the request to a worker, count what happened. Lives in the ingress and
imports no torch. Knows neither the wire format nor the page.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from serve_app.error_mapping import (
    ModelNotReady,
    RequestKillsWorkers,
    WorkerLost,
    is_the_servers,
    outcome_of,
    unwrap,
)
from serve_app.image_codec import ImageEncoding
from serve_app.live_settings import InForce, LiveSettings, at_start
from serve_app.loading_told import LoadingSeen
from serve_app.logs import REQUESTS, request_id
from serve_app.lost_workers import Losses, RefusedRequests, named_request
from serve_app.metrics import ServerMetrics, merged
from serve_app.model_list import ModelLoadFailed, ModelState, merged_states
from serve_app.openai_schema import is_default_model, refuse_model
from serve_app.prompt_endpoint import PromptEndpoint
from serve_app.queueing import Entry, FairQueue, OnPlace, Outside, QueueFull, Sharing, turn
from serve_app.shared_turns import most_together
from serve_app.tracing import Tracing, current, now
from serve_app.worker_reply import DrawingBegan, Preview, PreviewsWanted, WorkerUnfit
from zimage_engine.errors import DeadlineExceeded, DeviceFailed, InvalidRequest
from zimage_engine.loading.lora_choice import choices_in_prompt, chosen
from zimage_engine.prompts.enhancer import enhance, unchanged
from zimage_engine.prompts.llm_writing import judged, messages_for, notice_of
from zimage_engine.prompts.tokens import PromptTokens, prompt_tokens
from zimage_engine.sampling.plan import SamplingPlan, most_of_size, resolve
from zimage_engine.types import (
    DeviceStatus,
    EnhancedPrompt,
    Enhancer,
    GenerationReport,
    GenerationRequest,
    LoraChoice,
    LoraOffer,
    ModelDescription,
    NotWritten,
    RewriteBudget,
    StepProgress,
    Written,
)

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from serve_app.keys import KeyRing
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
#: Between two looks whether a model is loaded.
LOADING_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Readiness:
    """Whether pictures can be drawn now, and in one sentence why not.

    `former_settings` where the last `user_config` was refused, here or by a worker, and what held before it
    still holds.
    """

    ready: bool
    reason: str
    former_settings: bool = False
    #: While the model is loaded for the first time: the part of its files that is read, 0 to 1, where told.
    loading_part: float | None = None


class _Described:
    """A model of the list, and its tokenizer."""

    def __init__(self, description: ModelDescription) -> None:
        self.description = description
        self._tokens = prompt_tokens(description.tokenizer_json) if description.tokenizer_json else None

    def count_tokens(self, text: str) -> int:
        return 0 if self._tokens is None else self._tokens.count(text)


@dataclass(frozen=True)
class _Watcher:
    """Who hears of a drawing, and how many previews of it are made."""

    on_progress: OnProgress
    on_preview: OnPreview | None
    previews: PreviewsWanted


_NOBODY = _Watcher(lambda progress: None, None, 0)


@dataclass
class _Begun:
    """Whether a worker has begun with what was handed to it; of a reply without a stream nothing is known."""

    is_known_not_to_be: bool = False
    worker: str = ""


class ImageService:
    """Pictures from the workers behind `worker`, which is asked through Ray only."""

    def __init__(
        self,
        worker: DeploymentHandle,
        metrics: ServerMetrics,
        settings: Settings,
        ingresses: DeploymentHandle | None = None,
        tracing: Tracing | None = None,
        keys: KeyRing | None = None,
    ) -> None:
        """`ingresses` reaches every ingress, this one too; None where there is only this one.

        `keys` tell what each caller by key may have; without them all have what the settings say.

        A request that has no trace yet gets one from `tracing`; None: requests are not traced.
        """
        self._worker = worker
        self._streaming_worker = worker.options(stream=True)
        #: Of a model of the list: its name by each of its names.
        self._listed = {name: model.name for model in settings.models for name in model.names}
        self._handles: dict[str, tuple[DeploymentHandle, DeploymentHandle]] = {}
        self._others: dict[str, _Described] = {}
        self._ingresses = ingresses
        self._metrics = metrics
        self._in_force = InForce(at_start(settings))
        self._has_lora_folder = settings.lora_folder is not None
        self._max_batch_size = settings.max_batch_size
        self._offered_enhancers = settings.offered_enhancers
        self._endpoint = _endpoint_of(settings)
        self._tracing = tracing
        self._description: ModelDescription | None = None
        self._tokens: PromptTokens | None = None
        self._count_tokens: Callable[[str], int] | None = None
        self._answered_at = float("-inf")
        self._keys = keys
        self._queue = FairQueue(
            settings.max_queued_requests, settings.max_queue_seconds, entry_of=self._entry_of
        )
        self._queue.set_workers(settings.fewest_workers)
        self._refused = RefusedRequests()
        self._counted_at = float("-inf")
        self._counting: asyncio.Task[bool] | None = None
        self._a_worker_refused_settings = False
        self._loading = LoadingSeen()

    async def generate(
        self,
        request: GenerationRequest,
        encoding: ImageEncoding,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        previews: PreviewsWanted = 0,
        *,
        asked_by: str = "",
        on_place: OnPlace | None = None,
    ) -> WorkerReply:
        """Draw what is asked when its turn is; the report tells the enhancement that was made here.

        `asked_by` has one line in the queue; `on_place` hears of the place in it while there is one.

        `on_progress` is called after each step, and `on_preview` after `previews` of them (EVERY_STEP: after
        all but the last), or after fewer where some cannot be made; after a worker's death both begin again
        with the first step. Cancelling stops the drawing in the worker.
        Raises InvalidRequest, ModelNotReady, QueueFull, CallerLimited, DeadlineExceeded, WorkerLost,
        RequestKillsWorkers or DeviceFailed.
        """
        with self._traced():
            started = time.monotonic()
            watcher = None if on_progress is None else _Watcher(on_progress, on_preview, previews)
            with self.failures_counted():
                # What an operator changes from here on holds for the next request.
                live = self.live
                request = _with_defaults(request, live)
                async with self._in_time(live.request_seconds):
                    description = await self.description_for(request.model)
                    request = replace(request, model=self._listed.get(request.model or ""))
                    request = await self.with_loras_that_are_there(request)
                    # What cannot be drawn is told now, not after a place in the queue has come up.
                    plan = resolve(request, description)
                    enhancing, enhancing_at = time.perf_counter(), now()
                    enhanced = await self._enhanced_here(request, plan, description)
                    enhance_seconds = time.perf_counter() - enhancing
                    asked_at = now()
                    if request.enhance:
                        current().passed("enhance", enhancing_at, asked_at)
                    self._refuse_what_kills(request, plan)
                    work = work_of(plan)
                    self._count_workers_soon()
                    sharing = self.sharing_of(request, plan, description)
                    async with turn(
                        self._queue, asked_by, work, len(plan.seeds), on_place, sharing
                    ) as ticket:
                        ready = _ready_to_draw(request, plan, enhanced, self._budget)
                        reply = await self._drawn(request, ready, plan, encoding, watcher)
                        self._queue.pace.learn(work, reply.report.device_seconds or reply.report.seconds)
                    self._count_workers_soon()
            report = self._with_enhancement(reply.report, enhanced)
            seconds = time.monotonic() - started
            self._metrics.record(
                report, seconds, enhance_seconds, reply.encode_file_seconds, _name_of_request()
            )
            current().drawn(reply, report, asked_at)
            told = {"outcome": "ok", "seconds": round(seconds, 3), "pictures": len(report.pictures)}
            if report.accelerated_by:
                told["accelerated_by"] = " ".join(report.accelerated_by)
            requests.info("request ended", extra=told)
            return replace(reply, report=report, queue_seconds=ticket.waited_seconds)

    def _entry_of(self, asked_by: str) -> Entry:
        """What a caller may: by the settings, and where it carries a key by what the key's line says."""
        of_all = Entry("normal", self.live.pictures_at_once, self.live.requests_a_minute)
        return of_all if self._keys is None else self._keys.entry_of(asked_by, of_all)

    @property
    def live(self) -> LiveSettings:
        """What holds for a request that begins now."""
        return self._in_force.live

    def use(self, in_force: InForce) -> None:
        """From now on `in_force` holds. Who waits in the queue stays, also beyond a smaller bound."""
        self._in_force = in_force
        self._queue.set_bounds(in_force.live.max_queued_requests, in_force.live.max_queue_seconds)

    @property
    def in_force(self) -> InForce:
        """The live settings, and whether the last that were given were refused."""
        return self._in_force

    @property
    def metrics(self) -> ServerMetrics:
        """The numbers of this ingress, for whoever counts beside the service."""
        return self._metrics

    @property
    def workers(self) -> int:
        """Workers that answered when they were asked last; at least 1."""
        return self._queue.workers

    @property
    def drawing(self) -> int:
        """Requests that this ingress has handed to the workers."""
        return self._queue.admitted

    @property
    def waiting(self) -> int:
        """Requests that wait in this ingress' queue."""
        return self._queue.waiting

    def tickets_for_jobs(self) -> int:
        """How many jobs may stand in the queue at once: as many as keep the workers busy, and no more."""
        if self._description is None:
            return self._queue.room
        most = most_together(self._max_batch_size, self._description)
        return self._queue.room_for(Sharing(None, most))

    def sharing_of(
        self, request: GenerationRequest, plan: SamplingPlan, model: ModelDescription
    ) -> Sharing | None:
        """What else could be drawn beside it; None where it is drawn alone."""
        most = most_of_size(plan.width_px, plan.height_px, most_together(self._max_batch_size, model))
        is_written_for = request.enhance and request.enhancer == "model"
        if most < 2 or request.image is not None or is_written_for:
            return None
        kind = (request.model, plan.width_px, plan.height_px, request.loras, request.exact)
        return Sharing(kind, most)

    def check_room(
        self,
        asked_by: str,
        work: float,
        pictures: int,
        ahead: Sequence[Outside],
        sharing: Sharing | None = None,
    ) -> None:
        """Raise what `generate` would of the queue, for one who waits behind those `ahead`, outside of it."""
        self._queue.check(asked_by, work, pictures, ahead, sharing)

    def make_room(
        self, asked_by: str, work: float, ahead: Sequence[Outside], sharing: Sharing | None = None
    ) -> list[tuple[int, QueueFull]]:
        """Refuse those who must go for that one; who of `ahead` has to go is returned, with what to say."""
        return self._queue.displace(asked_by, work, ahead, sharing)

    def seconds_for(self, work: float) -> float | None:
        """How long the workers take for so much, by the last drawings; None before the first."""
        pace = self._queue.pace.seconds_a_unit
        return None if pace is None else work * pace / self._queue.workers

    def rate_headers(self, asked_by: str) -> dict[str, str]:
        """What a caller is told of the requests a minute that are left; nothing where they have no limit."""
        return self._queue.headers_of(asked_by)

    @asynccontextmanager
    async def _in_time(self, seconds: float | None) -> AsyncIterator[None]:
        """Ends what is inside, and the drawing with it, when the request's time is over."""
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

    def count_result_not_kept(self) -> None:
        """A picture that was asked for as url could not be kept, and is answered itself."""
        self._metrics.record_result_not_kept()

    @property
    def names_of_models(self) -> tuple[str, ...]:
        """The names of the operator's list, without the default model and without aliases."""
        return tuple(dict.fromkeys(self._listed.values()))

    def listed_name(self, name: object) -> str | None:
        """The name in the operator's list of what goes by `name`; None for the default model, and none."""
        return self._listed.get(name) if isinstance(name, str) else None

    async def description_for(self, name: str | None) -> ModelDescription:
        """What is known of the model of this name or alias once a worker has had it; None: the default.

        Raises RequestRefused (404) for a name that is none, ModelLoadFailed, ModelNotReady.
        """
        listed = self._listed.get(name or "")
        if listed is not None:
            return _with_live_defaults((await self._described(listed)).description, self.live)
        description = await self.description_when_ready()
        if name is not None and not is_default_model(name, description):
            refuse_model(name, description, self.names_of_models)
        return description

    async def _described(self, model: str) -> _Described:
        """Of a model that was never loaded only loading tells all: that is begun, in one worker."""
        deadline = time.monotonic() + self.live.worker_restart_seconds
        while model not in self._others:
            state = next((each for each in await self.model_states() if each.id == model), None)
            if state is not None and state.description is not None:
                self._others[model] = _Described(state.description)
                break
            if state is None:
                if time.monotonic() >= deadline:
                    raise ModelNotReady(self._reason_not_ready())
            elif state.state == "failed" and state.retry_seconds > 0:
                raise ModelLoadFailed(
                    f"The model {model} cannot be loaded: {state.reason}. It is tried again in "
                    f"{state.retry_seconds:.0f} seconds at the earliest; other models can be drawn with.",
                    state.retry_seconds,
                )
            elif state.state != "loading":
                await self._asked(self._worker, "load_soon", ASK_SECONDS, model, state.worker)
            await asyncio.sleep(LOADING_POLL_SECONDS)
        return self._others[model]

    async def model_states(self) -> list[ModelState]:
        """What the workers tell of each model, the default one first; empty where none answers."""
        return merged_states(state for states in await self._ask_all("model_states") for state in states)

    def with_live_defaults(self, description: ModelDescription | None) -> ModelDescription | None:
        """What is told of a model to callers, with the defaults that hold for the next request."""
        return None if description is None else _with_live_defaults(description, self.live)

    def token_counter(self, model: str) -> Callable[[str], int]:
        """Counts the tokens of a text as that model does; 0 where its tokenizer is not known."""
        other = self._others.get(model)
        return self.count_tokens if other is None else other.count_tokens

    def count_tokens(self, text: str) -> int:
        """The tokens of `text` as the model counts them; 0 where its tokenizer is not known."""
        return self._count_tokens(text) if self._count_tokens is not None else 0

    @property
    def tokens(self) -> PromptTokens | None:
        """The model's tokenizer; None until its description is there, and where it has none to tell."""
        return self._tokens

    async def description(self) -> ModelDescription | None:
        """What the workers loaded; None until the first of them has its model. Asked once, then kept.

        Its defaults of steps and guidance are those of the live settings, where these name any.
        """
        if self._description is None:
            await self._look_for_workers()
        return None if self._description is None else _with_live_defaults(self._description, self.live)

    async def description_when_ready(self) -> ModelDescription:
        """What the workers loaded, as soon as one has its model: a new version's ingress is there first.

        Raises ModelNotReady after the setting `worker_restart_seconds`.
        """
        deadline = time.monotonic() + self.live.worker_restart_seconds
        while (description := await self.description()) is None:
            if time.monotonic() >= deadline:
                raise ModelNotReady(self._reason_not_ready())
            await asyncio.sleep(RESTART_POLL_SECONDS)
        return description

    async def loras_offered(self, model: str | None = None) -> tuple[LoraOffer, ...] | None:
        """The LoRAs that requests for a model (None: the default one) may name; None where no worker that
        answers has it loaded."""
        answers = await self._asked(self._worker, "loras_offered", SCRAPE_SECONDS, model or "")
        return next((offers for offers in answers if offers is not None), None)

    async def loras_there(
        self, wanted: tuple[LoraChoice, ...], model: str | None = None
    ) -> tuple[LoraChoice, ...]:
        """Those of `wanted` that can be had; all where no worker that answers has the model loaded."""
        offers = await self.loras_offered(model)
        if offers is None:
            return wanted
        there = []
        for each in wanted:
            with suppress(InvalidRequest):
                chosen(offers, [each])
                there.append(each)
        return tuple(there)

    async def with_loras_that_are_there(self, request: GenerationRequest) -> GenerationRequest:
        """The request with the LoRAs that its prompt names in tags, which are taken out of it.

        Where there is no folder of LoRAs a prompt is left as it is. Raises InvalidRequest for a LoRA that
        cannot be had, as far as that is known before the model is loaded.
        """
        if self._has_lora_folder:
            prompt, named = choices_in_prompt(request.prompt)
            if named:
                request = replace(request, prompt=prompt, loras=(*(request.loras or ()), *named))
        if request.loras:
            offers = await self.loras_offered(request.model)
            if offers is not None:
                chosen(offers, request.loras)
        return request

    async def readiness(self) -> Readiness:
        """Whether a worker with its model answers at this moment."""
        ready = True
        if time.monotonic() - self._answered_at > READY_CACHE_SECONDS:
            ready, refused = await asyncio.gather(
                self._look_for_workers(), self._ask_all("has_refused_settings")
            )
            self._a_worker_refused_settings = any(refused)
        former_settings = bool(self._in_force.refusal) or self._a_worker_refused_settings
        reason = "ready" if ready else self._reason_not_ready()
        return Readiness(ready, reason, former_settings, None if ready else self.loading_part)

    def worker_is_loading(self, worker: str, part: float) -> None:
        """A worker tells that it has read this part of its model's files, 0 to 1."""
        self._loading.note(worker, part)

    @property
    def loading_part(self) -> float | None:
        """How much of its files the worker has read that is farthest, 0 to 1; None where none told lately."""
        return self._loading.part

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

    def enhancer_for(self, wanted: Enhancer | None) -> Enhancer:
        """Who enhances where a request wants this; None: the operator's choice. Raises InvalidRequest."""
        live = self.live
        if wanted is None:
            return live.enhancer
        offered = ("rules", live.enhancer, *self._offered_enhancers)
        if wanted not in offered:
            named = ", ".join(dict.fromkeys(offered))
            raise InvalidRequest(
                f"enhance {wanted!r} is not offered by this server; take one of: true, false, {named}",
                "enhance",
            )
        return wanted

    async def enhanced(
        self,
        prompt: str,
        negative_prompt: str,
        enhancer: Enhancer,
        description: ModelDescription,
        asked_by: str = "",
        on_text: Callable[[str], None] | None = None,
    ) -> EnhancedPrompt:
        """What a picture would be drawn from; `on_text` hears a language model before its text is judged.

        The model's text encoder is asked when its turn is; where its worker is lost the rules are used.
        Raises QueueFull or CallerLimited.
        """
        if enhancer == "model":
            self._count_workers_soon()
            async with turn(self._queue, asked_by, 0.0, 1):
                made = await self._rewritten_by_a_worker(prompt, negative_prompt, description, on_text)
        elif enhancer == "endpoint":
            made = await self._by_endpoint(prompt, negative_prompt, description, on_text)
        else:
            counter, limit = self._counted(description)
            made = enhance(prompt, negative_prompt, count_tokens=counter, token_limit=limit)
        self._count_rewrite(made)
        return made

    @property
    def _budget(self) -> RewriteBudget:
        return RewriteBudget(self.live.enhancer_seconds, self.live.enhancer_tokens)

    def _counted(self, description: ModelDescription) -> tuple[Callable[[str], int] | None, int | None]:
        """How a model counts a text's tokens, and how many it reads; None where that is not known."""
        other = self._others.get(description.id)
        has_tokenizer = bool(description.tokenizer_json)
        counter = self._count_tokens if other is None else other.count_tokens if has_tokenizer else None
        return counter, description.token_limit if counter else None

    async def _enhanced_here(
        self, request: GenerationRequest, plan: SamplingPlan, description: ModelDescription
    ) -> EnhancedPrompt | None:
        """The prompts to draw; None where the worker's text encoder makes them."""
        if not request.enhance or not plan.prompt:
            return unchanged(plan.prompt, plan.negative_prompt)
        enhancer = self.enhancer_for(request.enhancer)
        if enhancer == "model":
            return None
        return await self.enhanced(plan.prompt, plan.negative_prompt, enhancer, description)

    async def _by_endpoint(
        self,
        prompt: str,
        negative_prompt: str,
        description: ModelDescription,
        on_text: Callable[[str], None] | None,
    ) -> EnhancedPrompt:
        counter, limit = self._counted(description)
        answer: Written | NotWritten
        if self._endpoint is None:
            answer = NotWritten("unavailable", "the server knows of none")
        elif counter is not None and limit is not None and counter(prompt) > limit:
            answer = NotWritten("unavailable", "the prompt is longer than the model reads")
        else:
            budget = self._budget
            answer = await self._endpoint.write(messages_for(prompt, budget), budget, on_text)
        # Off the event loop: judging the longest texts takes as long as a step of a small picture.
        return await asyncio.to_thread(
            judged, prompt, negative_prompt, answer, "endpoint", count_tokens=counter, token_limit=limit
        )

    async def _rewritten_by_a_worker(
        self,
        prompt: str,
        negative_prompt: str,
        description: ModelDescription,
        on_text: Callable[[str], None] | None,
    ) -> EnhancedPrompt:
        _, streaming_worker = self._workers_for(self._listed.get(description.id))
        stream = streaming_worker.rewrite.remote(
            prompt, negative_prompt, self._budget, self._listed.get(description.id)
        )
        try:
            async for item in stream:
                if isinstance(item, EnhancedPrompt):
                    return item
                if on_text is not None:
                    on_text(item)
        except CANCELLED:
            stream.cancel()
            raise
        except Exception as error:
            original = unwrap(error)
            if isinstance(original, (DeadlineExceeded, InvalidRequest)):
                raise original from None
            logger.warning("no worker rewrote a prompt: %s", original)
        counter, limit = self._counted(description)
        lost = NotWritten("failed", "its worker was lost, or had no model")
        return judged(prompt, negative_prompt, lost, "model", count_tokens=counter, token_limit=limit)

    def _with_enhancement(
        self, report: GenerationReport, enhanced: EnhancedPrompt | None
    ) -> GenerationReport:
        """The report with what was done to the prompt here; what the worker did is in it already."""
        if enhanced is None:
            self._count_rewrite(report.enhancement)
            return report
        return replace(report, enhancement=enhanced, warnings=(*report.warnings, *notice_of(enhanced)))

    def _count_rewrite(self, enhanced: EnhancedPrompt) -> None:
        if enhanced.rewrite is not None:
            self._metrics.record_rewrite(enhanced.rewrite)

    async def _drawn(
        self,
        asked: GenerationRequest,
        request: GenerationRequest,
        plan: SamplingPlan,
        encoding: ImageEncoding,
        watcher: _Watcher | None,
    ) -> WorkerReply:
        """Hand over to a worker, or to another where it is lost: the seed is fixed, and so is the picture.

        Two deaths while it was drawn itself end it with RequestKillsWorkers: a third worker is not risked.
        Deaths of a worker that drew something else cost it time alone, so one that waits behind a killer is
        served. Of a request that is not watched the first death counts without being asked about: the one
        stream more that would tell is spent after a death only. What is given up for this: who is killed
        twice by something else, such as a node that runs out of memory, is refused too, and told. `asked` is
        `request` before it was made ready to draw.
        """
        losses = Losses()
        while True:
            begun = _Begun()
            try:
                return await self._asked_of_a_worker(request, encoding, watcher, begun, losses.any)
            except WorkerUnfit:
                losses.handovers += 1
                await asyncio.sleep(RESTART_POLL_SECONDS)
            except DeviceFailed as failed:
                losses.device_failures += 1
                named = named_request(request_id(), plan)
                logger.warning("a worker's device failed while it drew %s: %s", named, failed)
                self._metrics.record_device_failure()
                current().happened("device failed")
                if losses.are_too_many:
                    raise
                self._metrics.record_retry()
            except RayActorError as died:
                is_away = isinstance(died, ActorUnavailableError) and await self._answers(begun.worker)
                if begun.is_known_not_to_be or is_away:
                    losses.handovers += 1
                else:
                    losses.deaths += 1
                if losses.are_its_own_doing:
                    raise self._refusal(asked, plan) from died
                logger.warning("a worker died; the request waits for another")
                self._metrics.record_retry()
                current().happened("worker died")
            if losses.are_too_many:
                raise WorkerLost(
                    "Worker after worker was lost before it could begin with this picture. Send the request "
                    "again later; the server's log says what became of them."
                )
            await self._until_a_worker_answers()
            watcher = watcher or _NOBODY

    def _refusal(self, request: GenerationRequest, plan: SamplingPlan) -> RequestKillsWorkers:
        """What a request is told that two workers died of, now and when it comes again."""
        named = named_request(request_id(), plan)
        self._refused.add(request, plan, named)
        logger.error("two workers died while they drew %s; it is refused for an hour", named)
        return RequestKillsWorkers(
            f"Two workers died while they drew this request ({named}), so it is not tried again, and is "
            "refused for an hour. Ask for a smaller picture, fewer steps or another prompt; the server's log "
            "tells more."
        )

    def _refuse_what_kills(self, request: GenerationRequest, plan: SamplingPlan) -> None:
        """Raise RequestKillsWorkers, before another worker dies, for what two have died of lately."""
        named = self._refused.find(request, plan)
        if named is None:
            return
        raise RequestKillsWorkers(
            f"Two workers died while they drew this within the last hour ({named}), so it is not drawn. Ask "
            "for a smaller picture, fewer steps or another prompt, or send it again in an hour."
        )

    async def _asked_of_a_worker(
        self,
        request: GenerationRequest,
        encoding: ImageEncoding,
        watcher: _Watcher | None,
        begun: _Begun,
        tell_first: bool,
    ) -> WorkerReply:
        traced = {"trace_id": current().id} if current().id else {}
        try:
            worker, streaming_worker = self._workers_for(request.model)
            if watcher is None:
                return await _awaited(worker.generate.remote(request, encoding, **traced))
            begun.is_known_not_to_be = True
            stream = streaming_worker.generate_streaming.remote(
                request, encoding, watcher.previews, tell_first=tell_first, **traced
            )
            return await _followed(stream, watcher, begun)
        except Exception as error:
            original = unwrap(error)
            if original is error:
                raise
            raise original from None

    def _workers_for(self, model: str | None) -> tuple[DeploymentHandle, DeploymentHandle]:
        """Handles, without and with a stream, that prefer a worker with this model in memory."""
        if not self._listed or self._description is None:
            return self._worker, self._streaming_worker
        name = model or self._description.id
        if name not in self._handles:
            plain = self._worker.options(multiplexed_model_id=name)
            self._handles[name] = (plain, plain.options(stream=True))
        return self._handles[name]

    async def _answers(self, worker: str) -> bool:
        """Whether the worker of that name is still there; Ray calls a dead one out of reach at first."""
        return bool(worker) and worker in await self._ask_all("name")

    async def _until_a_worker_answers(self) -> None:
        seconds = self.live.worker_restart_seconds
        deadline = time.monotonic() + seconds
        while not await self._look_for_workers():
            if time.monotonic() >= deadline:
                raise WorkerLost(
                    "The worker died while it drew this picture, and no other came up within "
                    f"{seconds:g} seconds. Send the request again later."
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
                self._tokens = prompt_tokens(description.tokenizer_json)
                self._count_tokens = self._tokens.count
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

    async def _asked(
        self, replicas: DeploymentHandle, method: str, seconds: float, *arguments: str
    ) -> list[Any]:
        try:
            response = replicas.broadcast(method, *arguments)
            answers = await response.results_async(timeout_s=seconds, return_exceptions=True)
        except (TimeoutError, RayServeException):  # Serve's, where no worker runs at the moment
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def _reason_not_ready(self) -> str:
        if self._description is None:
            part = self.loading_part
            read = "" if part is None else f", {part:.0%} of its files are read"
            return f"No worker has its model yet: it is still being loaded{read}. Try again in a few seconds."
        return "No worker answers at the moment; a new one is being started. Try again in a few seconds."


def _endpoint_of(settings: Settings) -> PromptEndpoint | None:
    if settings.enhancer_url is None or settings.enhancer_model is None:
        return None
    key = settings.enhancer_api_key
    return PromptEndpoint(
        settings.enhancer_url, settings.enhancer_model, None if key is None else key.get_secret_value()
    )


def work_of(plan: SamplingPlan) -> float:
    """What drawing it costs, in megapixel-steps; with guidance each step is computed twice."""
    passes = 2 if plan.guidance_scale > 1 else 1
    return plan.width_px * plan.height_px / 1e6 * plan.drawn_steps * passes * len(plan.seeds)


def _with_live_defaults(description: ModelDescription, live: LiveSettings) -> ModelDescription:
    if live.default_steps is None and live.default_guidance_scale is None:
        return description
    steps, guidance = live.default_steps, live.default_guidance_scale
    return replace(
        description,
        default_steps=description.default_steps if steps is None else steps,
        default_guidance_scale=description.default_guidance_scale if guidance is None else guidance,
    )


def _with_defaults(request: GenerationRequest, live: LiveSettings) -> GenerationRequest:
    """The worker knows the model's own defaults alone; what the caller named stays."""
    chosen: dict[str, Any] = {}
    if request.num_inference_steps is None:
        chosen["num_inference_steps"] = live.default_steps
    if request.guidance_scale is None:
        chosen["guidance_scale"] = live.default_guidance_scale
    return replace(request, **chosen)


def _name_of_request() -> dict[str, str]:
    """What its log lines and its trace are found by; a trace only where a collector gets it."""
    trace = current()
    named = {"request_id": request_id(), "trace_id": trace.id if trace.is_sampled else ""}
    return {name: value for name, value in named.items() if value}


def _ready_to_draw(
    request: GenerationRequest, plan: SamplingPlan, enhanced: EnhancedPrompt | None, budget: RewriteBudget
) -> GenerationRequest:
    """The request with finished prompts and a seed of its own, so that it can be sent twice.

    Without prompts that are finished the worker's text encoder makes them, the same each time.
    """
    if enhanced is None:
        return replace(
            request,
            enhancer="model",
            rewrite_budget=budget,
            refine=request.enhance if request.refine is None else request.refine,
            seed=plan.seeds[0],
        )
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


async def _followed(stream: Any, watcher: _Watcher, begun: _Begun) -> WorkerReply:
    try:
        async for item in stream:
            begun.is_known_not_to_be = False  # the first of all items is DrawingBegan
            if isinstance(item, DrawingBegan):
                begun.worker = item.worker
                continue
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
