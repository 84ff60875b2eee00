"""An image worker in this process, without Ray or HTTP, and many who ask it at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

from serve_app.image_codec import ImageEncoding
from serve_app.settings import Settings
from serve_app.worker import ImageWorker
from zimage_engine.bench.measuring import Crowd
from zimage_engine.engine import Engine
from zimage_engine.types import GenerationRequest

Made = TypeVar("Made")


class LoadedWorker:
    """Draws with the engine that `load` gives, which is called in the thread that draws. To be used from one
    thread, as a context."""

    def __init__(self, load: Callable[[], Engine], settings: Settings) -> None:
        self._load = load
        self._settings = settings
        self._runner = asyncio.Runner()
        self._worker = ImageWorker.__new__(ImageWorker)

    def __enter__(self) -> LoadedWorker:
        self._runner.run(_made(self._worker, self._settings, self._load))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.close()

    def draw_at_once(self, requests: Sequence[GenerationRequest], at_once: int) -> Crowd:
        """`at_once` clients share the requests: each sends its next one when it has its PNG."""
        return self._runner.run(self._drawn(list(requests), at_once))

    def in_thread(self, work: Callable[[], Made]) -> Made:
        """What `work` returns or raises, called in the thread that draws."""
        return self._worker.in_device_thread(work)

    async def _drawn(self, requests: list[GenerationRequest], at_once: int) -> Crowd:
        waiting, waits = iter(requests), []
        encoding = ImageEncoding("png")

        async def client() -> None:
            for request in waiting:
                sent = time.perf_counter()
                await self._worker.generate(request, encoding)
                waits.append(time.perf_counter() - sent)

        began = time.perf_counter()
        async with asyncio.TaskGroup() as clients:
            for _ in range(at_once):
                clients.create_task(client())
        return Crowd(time.perf_counter() - began, tuple(waits))


async def _made(worker: ImageWorker, settings: Settings, load: Callable[[], Engine]) -> None:
    """As Serve makes one: it awaits what is usually not awaited."""
    await worker.__init__(settings, lambda _: load())  # type: ignore[misc]
