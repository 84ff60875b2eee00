"""The image worker: one engine, one picture at a time, and always an ear for health checks.

The engine draws in a thread of its own, so that the event loop stays free. Serve frees a replica's
slot as soon as a client goes away, while the thread still draws; so the worker has a lock of its
own, which is let go only when the drawing has really stopped. Knows no HTTP and no prompts.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from serve_app.finishing import Finisher
from serve_app.image_codec import ImageEncoding, encode_preview
from serve_app.live_settings import InForce, at_start
from serve_app.loading_told import tell_ingresses
from serve_app.local_engine import read_ahead
from serve_app.logs import in_trace, log_to_terminal, trace_id_of_request
from serve_app.metrics import MemoryFigures, WorkerMetrics
from serve_app.model_list import DEFAULT_NAMES, ListedModel, ModelState
from serve_app.model_pool import ModelPool, PoolFigures
from serve_app.replica import end_replica, replica_name
from serve_app.settings import Settings
from serve_app.shared_turns import SharedTurns, ToDraw, Turn, until_done
from serve_app.worker_reply import (
    EVERY_STEP,
    DrawingBegan,
    Preview,
    PreviewsWanted,
    WorkerReply,
    WorkerTimes,
    WorkerUnfit,
)
from zimage_engine.cpu import Cores, ThreadPlan, plan_threads, read_cores
from zimage_engine.errors import DeviceFailed
from zimage_engine.loading.collector import collector_at_rest
from zimage_engine.sampling.control import DrawingControl, OnLatents
from zimage_engine.types import (
    DeviceStatus,
    EnhancedPrompt,
    GenerationRequest,
    GenerationResult,
    LoraOffer,
    ModelDescription,
    RewriteBudget,
    StepProgress,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from zimage_engine import Engine
    from zimage_engine.memory.oom import MemoryReport

logger = logging.getLogger(__name__)

#: What it answers is waited for before the drawing begins.
Publish = Callable[[DrawingBegan | StepProgress], Awaitable[None] | None]
#: What hears of the latents that an engine draws.
Shows = Callable[["Engine"], OnLatents]

Made = TypeVar("Made")

#: How long the answers of a worker whose device has failed may take to be on their way, and to arrive.
LEAVE_SECONDS = 5.0
ANSWER_SECONDS = 0.5
#: What sketches of every step are packed into: a page shows each of them for a moment.
SKETCH_ENCODING = ImageEncoding("jpeg", 80)
#: The exit code of a worker whose device has failed.
DEVICE_FAILED = 74


class ImageWorker:
    """One engine on one device. Requests beyond the one being drawn wait for the lock."""

    async def __init__(  # type: ignore[misc]
        self, settings: Settings, load: Callable[[Settings], Engine] | None = None
    ) -> None:
        """Serve awaits it, so the replica answers its controller while the model is being loaded.

        `load` gives another engine than the one that the settings describe.
        """
        log_to_terminal(settings.log_format, replica_name())
        # One thread for all that touches the device: contexts and OpenMP pools belong to a thread.
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="encode")
        self._turn = Turn()
        self._asked = 0
        #: Why this worker draws no more; None while it is well.
        self._failure: str | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._settings = settings
        self._in_force = InForce(at_start(settings))
        loop = asyncio.get_running_loop()
        # First, because it is told at once where a certificate cannot sign, and loading may take minutes.
        self._finisher = await loop.run_in_executor(self._encoders, Finisher.of, settings)
        began = time.perf_counter()
        reading = read_ahead(settings)
        telling = asyncio.create_task(tell_ingresses(reading))
        try:
            engine: Engine = await loop.run_in_executor(self._device_thread, load or _load_engine, settings)
            # What is mapped and not read yet, the first picture would wait for.
            await asyncio.to_thread(reading.wait)
        finally:
            reading.stop()
            telling.cancel()
        loaded_seconds, repairs = time.perf_counter() - began, len(engine.repairs)
        self._description = engine.description
        self._metrics = WorkerMetrics(replica_name(), self._description, loaded_seconds, repairs)
        self._turns = SharedTurns(
            self._turn,
            self._device_thread,
            settings.max_batch_size,
            on_busy=self._metrics.set_busy,
            on_pass=self._metrics.record_pass,
            on_failed=self._look_at,
        )
        self._pool = ModelPool(
            engine,
            settings.models,
            partial(_load_listed, settings),
            self._turn,
            self._device_thread,
            worker=replica_name(),
            most=settings.max_loaded_models,
            on_change=self._models_changed,
            on_device_failure=self._give_up,
        )
        self._tell_serve = _teller(settings)

    def in_device_thread(self, work: Callable[[], Made]) -> Made:
        """What `work` returns or raises, called where pictures are drawn, for who is no event loop."""
        return self._device_thread.submit(work).result()

    async def reconfigure(self, user_config: Any) -> None:
        """Called by Serve with a new `user_config`, also while one is drawn: it holds for the next."""
        self._in_force = self._in_force.after(user_config, self._settings, "ImageWorker")

    async def has_refused_settings(self) -> bool:
        """Whether the last `user_config` could not be used, and what held before it still holds."""
        return bool(self._in_force.refusal)

    async def generate(
        self, request: GenerationRequest, encoding: ImageEncoding, trace_id: str = ""
    ) -> WorkerReply:
        """Draw what is asked and encode it. Cancelling stops the drawing after the current step.

        With the trace that the request belongs to, log lines tell it, and the reply when all was done.
        """
        with in_trace(trace_id):
            return await self._draw(request, encoding, lambda progress: None, None, alone=False)

    async def generate_streaming(
        self,
        request: GenerationRequest,
        encoding: ImageEncoding,
        previews: PreviewsWanted = 0,
        trace_id: str = "",
        tell_first: bool = False,
    ) -> AsyncIterator[DrawingBegan | StepProgress | Preview | WorkerReply]:
        """As `generate`, with a DrawingBegan when its turn is and a StepProgress after each step before it.

        `previews` of the steps are followed by a Preview, with EVERY_STEP all but the last by a small and
        coarse one; by fewer where some cannot be made. With `tell_first` the DrawingBegan has time to arrive
        before anything is drawn: what may end this process.
        """
        told: asyncio.Queue[DrawingBegan | StepProgress | Future[Preview] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def publish(item: DrawingBegan | StepProgress | Future[Preview]) -> Awaitable[None] | None:
            loop.call_soon_threadsafe(told.put_nowait, item)
            return asyncio.sleep(ANSWER_SECONDS) if tell_first and isinstance(item, DrawingBegan) else None

        shows: Shows | None = None
        if previews == EVERY_STEP:
            shows = self._sketching(publish)
        elif previews:
            shows = self._previewing(previews, encoding, publish)
        with in_trace(trace_id):  # which the new task keeps
            drawing = asyncio.ensure_future(self._draw(request, encoding, publish, shows, tell_first))
        drawing.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (item := await told.get()) is not None:
                if isinstance(item, Future):
                    preview: Preview = await asyncio.wrap_future(item)
                    yield preview
                else:
                    yield item
            yield await drawing
        finally:
            if not drawing.done():
                drawing.cancel()
                await until_done(drawing)

    async def rewrite(
        self, prompt: str, negative_prompt: str, budget: RewriteBudget, model: str | None = None
    ) -> AsyncIterator[str | EnhancedPrompt]:
        """What a model's text encoder (None: the default model's) writes, as it comes, and last what of it is
        used. Closing the stream ends it within one token.
        """
        self._must_be_fit()
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[str | None] = asyncio.Queue()
        control = DrawingControl()

        def tell(text: str | None) -> None:
            loop.call_soon_threadsafe(told.put_nowait, text)

        async with self._pool.leased(model) as engine, self._turn:
            self._must_be_fit()
            write = partial(
                contextvars.copy_context().run,
                partial(engine.rewrite, prompt, negative_prompt, budget, control, tell),
            )
            writing = loop.run_in_executor(self._device_thread, write)
            writing.add_done_callback(self._look_for_failure)
            writing.add_done_callback(lambda _: told.put_nowait(None))
            try:
                while (text := await told.get()) is not None:
                    yield text
                yield await writing
            finally:
                control.cancel()
                await until_done(writing)

    async def name(self) -> str:
        """Whom a DrawingBegan names."""
        return replica_name()

    async def describe(self) -> ModelDescription:
        """What this worker loaded. Raises WorkerUnfit where it can draw no more."""
        self._must_be_fit()
        return self._description

    async def model_states(self) -> list[ModelState]:
        """What is to be told of each model that requests can name, the default one first."""
        self._must_be_fit()
        return self._pool.states()

    async def load_soon(self, model: str, worker: str) -> None:
        """Begin to load the model where this is the worker that is meant; returns at once."""
        if worker == replica_name():
            self._must_be_fit()
            self._pool.load_soon(model)

    async def loras_offered(self, model: str = "") -> tuple[LoraOffer, ...] | None:
        """The LoRAs that requests for a model ("": the default one) may name; None where it is not loaded."""
        self._must_be_fit()
        names = {name: state.id for state in self._pool.states() for name in (state.id, *state.aliases)}
        wanted = names.get(model, self._description.id if model in ("", *DEFAULT_NAMES) else model)
        engine = next((each for each in self._pool.engines if each.description.id == wanted), None)
        return None if engine is None else await asyncio.to_thread(engine.loras_offered)

    async def device_status(self) -> DeviceStatus:
        """The device's memory now. Raises DeviceFailed where the device is lost, WorkerUnfit from then on."""
        self._must_be_fit()
        try:
            for engine in self._pool.engines:
                return engine.device_status()
            # Between one that went and one that comes.
            return _status_without_a_model(self._description.device)
        except DeviceFailed as failed:
            self._give_up(failed)
            raise

    async def metrics_text(self) -> str:
        """This worker's metrics in Prometheus' text form."""
        reports = [engine.memory_report() for engine in self._pool.engines]
        figures = _memory_figures(reports, self._pool.figures)
        return self._metrics.text(await self.device_status(), figures, _store_bytes())

    async def check_health(self) -> None:
        """Called by Serve: raises where the device no longer answers, and the worker is replaced."""
        await self.device_status()

    def _must_be_fit(self) -> None:
        if self._failure is not None:
            raise WorkerUnfit(self._failure)

    def _give_up(self, failed: DeviceFailed) -> None:
        """Draw no more, and end this process once what waits here has been sent to another worker."""
        if self._failure is None:
            self._failure = str(failed)
            logger.error("this worker draws no more and is replaced: %s", failed)
            self._leaving = asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        deadline = time.monotonic() + LEAVE_SECONDS
        while self._asked and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await asyncio.sleep(ANSWER_SECONDS)
        end_replica(DEVICE_FAILED)

    def _look_for_failure(self, drawing: asyncio.Future[Any]) -> None:
        """Also where nobody waits for it any more."""
        if not drawing.cancelled() and (error := drawing.exception()) is not None:
            self._look_at(error)

    def _look_at(self, error: BaseException) -> None:
        if isinstance(error, DeviceFailed):
            self._give_up(error)

    def _models_changed(self) -> None:
        """A model has come or gone, or could not be loaded."""
        there = [engine.description for engine in self._pool.engines]
        self._metrics.set_models(there, self._pool.figures.load_seconds)

    def _previewing(
        self, previews: int, encoding: ImageEncoding, publish: Callable[[Future[Preview]], Any]
    ) -> Shows:
        """Publishes a preview after some of the steps; packing it into a file holds up no drawing."""
        from zimage_engine.sampling.preview import preview_steps

        def shows(engine: Engine) -> OnLatents:
            def on_latents(progress: StepProgress, latents: torch.Tensor) -> None:
                if progress.step not in preview_steps(progress.steps, previews):
                    return
                image = engine.preview(latents)
                if image is not None:
                    publish(self._encoders.submit(_packed, progress, image, encoding))

            return on_latents

        return shows

    def _sketching(self, publish: Callable[[Future[Preview]], Any]) -> Shows:
        """Publishes a sketch after every step but the last; none while the one before is not packed yet.

        Of pictures that are drawn at once it follows one to its end, and then the next.
        """

        def shows(engine: Engine) -> OnLatents:
            last: Future[Preview] | None = None
            followed = 0

            def on_latents(progress: StepProgress, latents: torch.Tensor) -> None:
                nonlocal last, followed
                if followed not in (0, progress.picture):
                    return
                followed = 0 if progress.step == progress.steps else progress.picture
                if progress.step == progress.steps or (last is not None and not last.done()):
                    return
                image = engine.sketch(latents)
                if image is not None:
                    last = self._encoders.submit(_packed, progress, image, SKETCH_ENCODING)
                    publish(last)

            return on_latents

        return shows

    async def _draw(
        self,
        request: GenerationRequest,
        encoding: ImageEncoding,
        publish: Publish,
        shows: Shows | None,
        alone: bool,
    ) -> WorkerReply:
        self._asked += 1
        try:
            return await self._draw_in_turn(request, encoding, publish, shows, alone)
        finally:
            self._asked -= 1

    async def _draw_in_turn(
        self,
        request: GenerationRequest,
        encoding: ImageEncoding,
        publish: Publish,
        shows: Shows | None,
        alone: bool,
    ) -> WorkerReply:
        """When its turn is; until then it can be handed to another worker at no cost."""
        self._must_be_fit()
        await self._tell_serve(request.model or self._description.id)
        async with self._pool.leased(request.model) as engine:
            result, began_at, steps = await self._drawn_by(engine, request, publish, shows, alone)
        # What packing takes, the model need not stay for.
        del engine
        reply = await asyncio.get_running_loop().run_in_executor(
            self._encoders, _encoded, self._finisher, result, encoding
        )
        if not trace_id_of_request():
            return reply
        return replace(reply, times=WorkerTimes(replica_name(), began_at, tuple(steps), time.time()))

    async def _drawn_by(
        self, engine: Engine, request: GenerationRequest, publish: Publish, shows: Shows | None, alone: bool
    ) -> tuple[GenerationResult, float, list[tuple[int, int, float]]]:
        """What was drawn, when that began, and each step's end."""
        steps: list[tuple[int, int, float]] = []
        last_at: dict[int, float] = {}
        began_at = time.time()

        def stepped(progress: StepProgress) -> None:
            ended_at = time.time()
            if self._turns.most_for(engine) == 1:
                self._metrics.record_pass(1)
            # Pictures of one request may be drawn at once: its own step before is meant.
            if progress.step > 1 and progress.picture in last_at:
                self._metrics.record_step(ended_at - last_at[progress.picture])
            last_at[progress.picture] = ended_at
            steps.append((progress.picture, progress.step, ended_at))
            publish(progress)

        def begins(engine: Engine) -> None:
            if shows is not None:
                control.show(shows(engine))

        async def on_turn() -> None:
            nonlocal began_at
            self._must_be_fit()
            if (word := publish(DrawingBegan(replica_name()))) is not None:
                await word
            seconds = self._in_force.live.drawing_seconds
            # Where others share the device, as many times as much.
            control.limit(None if seconds is None else seconds * self._turns.most_for(engine))
            began_at = time.time()

        control = DrawingControl(on_step=stepped)
        todo = ToDraw(request, control, begins, alone)
        return await self._turns.draw(engine, todo, on_turn), began_at, steps


def planned_threads(settings: Settings, variable: str | None, cores: Cores) -> ThreadPlan:
    """What a worker computes with, where `variable` is its OMP_NUM_THREADS.

    Ray sets that to the CPUs that it reserves for the worker, one by default, unless a person set it before:
    a picture on a CPU would take as many times longer as there are cores. Ray's own number is passed over.
    """
    from_ray = str(max(1, int(settings.worker_cpus)))
    return plan_threads(
        cores,
        wanted=settings.cpu_threads,
        variable=None if variable == from_ray else variable,
        workers=settings.most_workers,
    )


def _load_engine(settings: Settings) -> Engine:
    """Load the model, computing on as many threads as planned."""
    planned = planned_threads(settings, os.environ.get("OMP_NUM_THREADS"), read_cores())
    # Who has every core of a machine alone need not be told.
    is_all = planned.is_ours and planned.threads == os.cpu_count()
    logger.log(logging.DEBUG if is_all else logging.INFO, "cpu: %s", planned.because)
    os.environ["OMP_NUM_THREADS"] = str(planned.threads)
    # After the last product of a picture OpenMP's threads would go on looking for work for some milliseconds,
    # on cores that the reply needs. Drawing takes as long with this bound as without (1000 would slow it).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with collector_at_rest():
        import torch

        from zimage_engine import Engine

    torch.set_num_threads(planned.threads)
    return Engine.load(
        settings.model,
        settings.device,
        family=settings.family,
        base=settings.base,
        text_encoder=settings.text_encoder,
        vae=settings.vae,
        loras=settings.loras,
        lora_folder=settings.lora_folder,
        dtype=settings.dtype,
        memory=settings.memory,
        embedding_cache_bytes=settings.embedding_cache,
        exact=settings.exact,
    )


def _load_listed(settings: Settings, model: ListedModel) -> Engine:
    """Load one of the operator's list, or the default model again, under its name in the list."""
    from zimage_engine import Engine

    if not model.path:
        return _load_engine(settings)
    engine = Engine.load(
        model.path,
        settings.device,
        family=model.family,
        base=model.base,
        lora_folder=settings.lora_folder,
        dtype=model.dtype or settings.dtype,
        memory=settings.memory,
        embedding_cache_bytes=settings.embedding_cache,
        exact=settings.exact,
        may_compile=False,  # others' requests wait while it is loaded
    )
    engine.description = replace(engine.description, id=model.name)
    return engine


def _teller(settings: Settings) -> Callable[[str], Awaitable[str]]:
    """Tells Serve which models are here, so that it hands requests for one to a worker that has it.

    Serve keeps the last that were asked for, as many as may be in memory; which are there in truth, the pool
    decides, which knows what is being drawn with.
    """

    async def noted(model: str) -> str:
        return model

    if not settings.models or replica_name() == "local":
        return noted
    from ray import serve

    most = settings.max_loaded_models or len(settings.models) + 1
    told: Callable[[str], Awaitable[str]] = serve.multiplexed(noted, max_num_models_per_replica=most)
    return told


def _status_without_a_model(device: str) -> DeviceStatus:
    from zimage_engine.memory.snapshot import device_status
    from zimage_engine.sampling.device_failure import device_failures_named

    with device_failures_named(device):
        return device_status(device)


def _memory_figures(reports: list[MemoryReport], gone: PoolFigures) -> MemoryFigures:
    """What is counted of the engines' memory, and the plan of the last used; what the device does not tell is
    left out, and so is all of it for the moment in which no model is there.
    """
    counted = PoolFigures(loads=gone.loads, unloads=gone.unloads)
    counted.defrags, counted.ooms = gone.defrags.copy(), gone.ooms.copy()
    counted.defrag_seconds = gone.defrag_seconds
    for report in reports:
        counted.remember(report)
    figures = MemoryFigures(
        defrags=counted.defrags,
        defrag_seconds=counted.defrag_seconds,
        ooms=counted.ooms,
        model_loads=gone.loads,
        model_unloads=gone.unloads,
    )
    if not reports:
        return figures
    seen, plan = reports[0].snapshot, reports[0].plan
    sizes = {
        "free": seen.free_bytes,
        "allocated": seen.allocated_bytes,
        "reserved": seen.reserved_bytes,
        "peak": seen.peak_allocated_bytes,
    }
    return replace(
        figures,
        bytes_by_kind={kind: size for kind, size in sizes.items() if size is not None},
        fragmentation_ratio=seen.fragmentation_ratio,
        offload_mode=None if plan is None else plan.residency.value,
    )


def _store_bytes() -> tuple[int, int]:
    """Free and total bytes of the disk that the cache folder is on, or would be made on."""
    from zimage_engine.loading.view import default_cache_folder

    wanted = default_cache_folder()
    store = shutil.disk_usage(next(folder for folder in (wanted, *wanted.parents) if folder.exists()))
    return store.free, store.total


def _packed(progress: StepProgress, image: Image, encoding: ImageEncoding) -> Preview:
    return Preview(progress, encode_preview(image, encoding), image.width, image.height)


def _encoded(finisher: Finisher, result: GenerationResult, encoding: ImageEncoding) -> WorkerReply:
    began = time.perf_counter()
    pictures, report = finisher.finished(result, encoding)
    return WorkerReply(pictures, report, time.perf_counter() - began)
