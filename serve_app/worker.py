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
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from serve_app.image_codec import ImageEncoding, encode, encode_preview, facts_of
from serve_app.live_settings import InForce, at_start
from serve_app.logs import in_trace, log_to_terminal, trace_id_of_request
from serve_app.metrics import MemoryFigures, WorkerMetrics
from serve_app.replica import end_replica, replica_name
from serve_app.settings import Settings
from serve_app.worker_reply import DrawingBegan, Preview, WorkerReply, WorkerTimes, WorkerUnfit
from zimage_engine.cpu import Cores, ThreadPlan, plan_threads, read_cores
from zimage_engine.errors import DeviceFailed
from zimage_engine.sampling.control import DrawingControl, OnLatents
from zimage_engine.types import (
    DeviceStatus,
    GenerationRequest,
    GenerationResult,
    ModelDescription,
    StepProgress,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from zimage_engine import Engine
    from zimage_engine.memory.oom import MemoryReport

logger = logging.getLogger(__name__)

Publish = Callable[[DrawingBegan | StepProgress], Any]

#: How long the answers of a worker whose device has failed may take to be on their way, and to arrive.
LEAVE_SECONDS = 5.0
ANSWER_SECONDS = 0.5
#: The exit code of a worker whose device has failed.
DEVICE_FAILED = 74


class ImageWorker:
    """One engine on one device. Requests beyond the one being drawn wait for the lock."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        """Serve awaits it, so the replica answers its controller while the model is being loaded."""
        log_to_terminal(settings.log_format, replica_name())
        # One thread for all that touches the device: contexts and OpenMP pools belong to a thread.
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="encode")
        self._turn = asyncio.Lock()
        self._asked = 0
        #: Why this worker draws no more; None while it is well.
        self._failure: str | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._settings = settings
        self._in_force = InForce(at_start(settings))
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        self._engine: Engine = await loop.run_in_executor(self._device_thread, _load_engine, settings)
        loaded_seconds, repairs = time.perf_counter() - began, len(self._engine.repairs)
        self._description = self._engine.description
        self._metrics = WorkerMetrics(replica_name(), self._description, loaded_seconds, repairs)

    async def reconfigure(self, user_config: Any) -> None:
        """Called by Serve with a new `user_config`, also while one is drawn: it holds for the next."""
        self._in_force = self._in_force.after(user_config, self._settings, "ImageWorker")

    async def generate(
        self, request: GenerationRequest, encoding: ImageEncoding, trace_id: str = ""
    ) -> WorkerReply:
        """Draw what is asked and encode it. Cancelling stops the drawing after the current step.

        With the trace that the request belongs to, log lines tell it, and the reply when all was done.
        """
        with in_trace(trace_id):
            return await self._draw(request, encoding, lambda progress: None)

    async def generate_streaming(
        self, request: GenerationRequest, encoding: ImageEncoding, previews: int = 0, trace_id: str = ""
    ) -> AsyncIterator[DrawingBegan | StepProgress | Preview | WorkerReply]:
        """As `generate`, with a DrawingBegan when its turn is and a StepProgress after each step before it.

        `previews` of the steps are followed by a Preview; by fewer where some cannot be made.
        """
        told: asyncio.Queue[DrawingBegan | StepProgress | Future[Preview] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def publish(item: DrawingBegan | StepProgress | Future[Preview]) -> None:
            loop.call_soon_threadsafe(told.put_nowait, item)

        on_latents = self._previewing(previews, encoding, publish) if previews else None
        with in_trace(trace_id):  # which the new task keeps
            drawing = asyncio.ensure_future(self._draw(request, encoding, publish, on_latents))
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
                await _until_done(drawing)

    async def describe(self) -> ModelDescription:
        """What this worker loaded. Raises WorkerUnfit where it can draw no more."""
        self._must_be_fit()
        return self._description

    async def device_status(self) -> DeviceStatus:
        """The device's memory now. Raises DeviceFailed where the device is lost, WorkerUnfit from then on."""
        self._must_be_fit()
        try:
            return self._engine.device_status()
        except DeviceFailed as failed:
            self._give_up(failed)
            raise

    async def metrics_text(self) -> str:
        """This worker's metrics in Prometheus' text form."""
        figures = _memory_figures(self._engine.memory_report())
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
        """Also where nobody waits for the drawing any more."""
        failed = None if drawing.cancelled() else drawing.exception()
        if isinstance(failed, DeviceFailed):
            self._give_up(failed)

    def _previewing(
        self, previews: int, encoding: ImageEncoding, publish: Callable[[Future[Preview]], Any]
    ) -> OnLatents:
        """Publishes a preview after some of the steps; packing it into a file holds up no drawing."""
        from zimage_engine.sampling.preview import preview_steps

        def on_latents(progress: StepProgress, latents: torch.Tensor) -> None:
            if progress.step not in preview_steps(progress.steps, previews):
                return
            image = self._engine.preview(latents)
            if image is not None:
                publish(self._encoders.submit(_packed, progress, image, encoding))

        return on_latents

    async def _draw(
        self,
        request: GenerationRequest,
        encoding: ImageEncoding,
        publish: Publish,
        on_latents: OnLatents | None = None,
    ) -> WorkerReply:
        self._asked += 1
        try:
            return await self._draw_alone(request, encoding, publish, on_latents)
        finally:
            self._asked -= 1

    async def _draw_alone(
        self,
        request: GenerationRequest,
        encoding: ImageEncoding,
        publish: Publish,
        on_latents: OnLatents | None,
    ) -> WorkerReply:
        """When its turn is; until then it can be handed to another worker at no cost."""
        loop = asyncio.get_running_loop()
        steps: list[tuple[int, int, float]] = []
        async with self._turn:
            self._must_be_fit()
            publish(DrawingBegan())
            self._metrics.set_busy(True)
            began_at = time.time()

            def stepped(progress: StepProgress) -> None:
                self._metrics.stepped(progress)
                steps.append((progress.picture, progress.step, time.time()))
                publish(progress)

            seconds = self._in_force.live.drawing_seconds
            control = DrawingControl(seconds, on_step=stepped, on_latents=on_latents)
            # With this request's context, so that what the engine logs tells its id.
            draw = partial(contextvars.copy_context().run, self._engine.generate, request, control=control)
            drawing = loop.run_in_executor(self._device_thread, draw)
            drawing.add_done_callback(self._look_for_failure)
            try:
                result = await asyncio.shield(drawing)
            except asyncio.CancelledError:
                control.cancel()
                await _until_done(drawing)
                raise
            finally:
                self._metrics.set_busy(False)
        reply = await loop.run_in_executor(self._encoders, _encoded, result, encoding)
        if not trace_id_of_request():
            return reply
        return replace(reply, times=WorkerTimes(replica_name(), began_at, tuple(steps), time.time()))


async def _until_done(future: asyncio.Future[Any]) -> None:
    """Wait for the end of `future` whatever it is, also while being cancelled again."""
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()


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
        dtype=settings.dtype,
        memory=settings.memory,
        embedding_cache_bytes=settings.embedding_cache,
    )


def _memory_figures(report: MemoryReport) -> MemoryFigures:
    """What is counted of the engine's memory; what the device does not tell is left out."""
    seen = report.snapshot
    sizes = {
        "free": seen.free_bytes,
        "allocated": seen.allocated_bytes,
        "reserved": seen.reserved_bytes,
        "peak": seen.peak_allocated_bytes,
    }
    return MemoryFigures(
        bytes_by_kind={kind: size for kind, size in sizes.items() if size is not None},
        fragmentation_ratio=seen.fragmentation_ratio,
        offload_mode=None if report.plan is None else report.plan.residency.value,
        defrags=report.defrags,
        defrag_seconds=report.defrag_seconds,
        ooms={(str(stage), str(rung)): events for (stage, rung), events in report.ooms.items()},
    )


def _store_bytes() -> tuple[int, int]:
    """Free and total bytes of the disk that the cache folder is on, or would be made on."""
    from zimage_engine.loading.view import default_cache_folder

    wanted = default_cache_folder()
    store = shutil.disk_usage(next(folder for folder in (wanted, *wanted.parents) if folder.exists()))
    return store.free, store.total


def _packed(progress: StepProgress, image: Image, encoding: ImageEncoding) -> Preview:
    return Preview(progress, encode_preview(image, encoding), image.width, image.height)


def _encoded(result: GenerationResult, encoding: ImageEncoding) -> WorkerReply:
    report = result.report
    began = time.perf_counter()
    pictures = tuple(
        encode(image, encoding, facts_of(report, index)) for index, image in enumerate(result.images)
    )
    return WorkerReply(pictures, report, time.perf_counter() - began)
