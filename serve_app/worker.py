"""The image worker: one engine, one picture at a time, and always an ear for health checks.

The engine draws in a thread of its own, so that the event loop stays free. Serve frees a replica's
slot as soon as a client goes away, while the thread still draws; so the worker has a lock of its
own, which is let go only when the drawing has really stopped. Knows no HTTP and no prompts.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from serve_app.image_codec import ImageEncoding, PictureFacts, encode
from serve_app.logs import log_to_terminal
from serve_app.metrics import MemoryFigures, WorkerMetrics
from serve_app.replica import replica_name
from serve_app.settings import Settings
from serve_app.worker_reply import WorkerReply
from zimage_engine.sampling.control import DrawingControl
from zimage_engine.types import (
    DeviceStatus,
    GenerationRequest,
    GenerationResult,
    ModelDescription,
    StepProgress,
)

if TYPE_CHECKING:
    from zimage_engine import Engine
    from zimage_engine.memory.oom import MemoryReport

Publish = Callable[[StepProgress], Any]


class ImageWorker:
    """One engine on one device. Requests beyond the one being drawn wait for the lock."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]
        """Serve awaits it, so the replica answers its controller while the model is being loaded."""
        log_to_terminal(settings.log_format, replica_name())
        # One thread for all that touches the device: contexts and OpenMP pools belong to a thread.
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="encode")
        self._turn = asyncio.Lock()
        self._drawing_seconds = settings.drawing_seconds
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        self._engine: Engine = await loop.run_in_executor(self._device_thread, _load_engine, settings)
        loaded_seconds, repairs = time.perf_counter() - began, len(self._engine.repairs)
        self._description = self._engine.description
        self._metrics = WorkerMetrics(replica_name(), self._description, loaded_seconds, repairs)

    async def generate(self, request: GenerationRequest, encoding: ImageEncoding) -> WorkerReply:
        """Draw what is asked and encode it. Cancelling stops the drawing after the current step."""
        return await self._draw(request, encoding, lambda progress: None)

    async def generate_streaming(
        self, request: GenerationRequest, encoding: ImageEncoding
    ) -> AsyncIterator[StepProgress | WorkerReply]:
        """As `generate`, with a StepProgress after each step before the reply."""
        steps: asyncio.Queue[StepProgress | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def publish(progress: StepProgress) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, progress)

        drawing = asyncio.ensure_future(self._draw(request, encoding, publish))
        drawing.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            while (progress := await steps.get()) is not None:
                yield progress
            yield await drawing
        finally:
            if not drawing.done():
                drawing.cancel()
                await _until_done(drawing)

    async def describe(self) -> ModelDescription:
        """What this worker loaded."""
        return self._description

    async def device_status(self) -> DeviceStatus:
        """The device's memory now."""
        return self._engine.device_status()

    async def metrics_text(self) -> str:
        """This worker's metrics in Prometheus' text form."""
        figures = _memory_figures(self._engine.memory_report())
        return self._metrics.text(self._engine.device_status(), figures, _store_bytes())

    async def check_health(self) -> None:
        """Called by Serve: raises where the device no longer answers, and the worker is replaced."""
        self._engine.device_status()

    async def _draw(
        self, request: GenerationRequest, encoding: ImageEncoding, publish: Publish
    ) -> WorkerReply:
        loop = asyncio.get_running_loop()
        async with self._turn:
            self._metrics.set_busy(True)

            def stepped(progress: StepProgress) -> None:
                self._metrics.stepped(progress)
                publish(progress)

            control = DrawingControl(self._drawing_seconds, on_step=stepped)
            # With this request's context, so that what the engine logs tells its id.
            draw = partial(contextvars.copy_context().run, self._engine.generate, request, control=control)
            drawing = loop.run_in_executor(self._device_thread, draw)
            try:
                result = await asyncio.shield(drawing)
            except asyncio.CancelledError:
                control.cancel()
                await _until_done(drawing)
                raise
            finally:
                self._metrics.set_busy(False)
        return await loop.run_in_executor(self._encoders, _encoded, result, encoding)


async def _until_done(future: asyncio.Future[Any]) -> None:
    """Wait for the end of `future` whatever it is, also while being cancelled again."""
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()


def _load_engine(settings: Settings) -> Engine:
    """Load the model, computing on as many threads as the settings say.

    Ray sets OMP_NUM_THREADS from the CPUs that it reserves, which is one: a picture on a CPU would
    take as many times longer as there are cores.
    """
    threads = settings.cpu_threads or max(1, (os.cpu_count() or 1) // settings.num_replicas)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # After the last product of a picture OpenMP's threads would go on looking for work for some milliseconds,
    # on cores that the reply needs. Drawing takes as long with this bound as without (1000 would slow it).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    import torch

    from zimage_engine import Engine

    torch.set_num_threads(threads)
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
    )


def _memory_figures(report: MemoryReport) -> MemoryFigures:
    """What is counted of the engine's memory; what the device does not tell is left out."""
    seen = report.snapshot
    sizes = {
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


def _encoded(result: GenerationResult, encoding: ImageEncoding) -> WorkerReply:
    report = result.report
    began = time.perf_counter()
    pictures = tuple(
        encode(
            image,
            encoding,
            PictureFacts(
                prompt=report.prompt,
                negative_prompt=report.negative_prompt,
                seed=picture.seed,
                steps=report.num_inference_steps,
                guidance_scale=report.guidance_scale,
                width=report.width,
                height=report.height,
                model=report.model,
                scheduler=report.scheduler,
                loras=report.loras,
                refined=picture.refine_seconds > 0,
            ),
        )
        for image, picture in zip(result.images, report.pictures, strict=True)
    )
    return WorkerReply(pictures, report, time.perf_counter() - began)
