"""How far the workers are with loading: told by each to the ingresses, and kept there for the page.

A worker that loads answers nobody yet, so it tells by itself. Nothing is left behind by one that dies: what
it told last is forgotten after some seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from serve_app.replica import own_ingresses, replica_name
from zimage_engine.reading_ahead import ReadingAhead

logger = logging.getLogger(__name__)

TOLD_EVERY_SECONDS = 0.5
#: Of a worker that told nothing for so long nothing is known.
FORGOTTEN_SECONDS = 10.0
#: An ingress that does not answer in this time is told again with the next.
ANSWER_SECONDS = 5.0


async def tell_ingresses(reading: ReadingAhead) -> None:
    """Tell the ingresses of this replica's application how much is read, until this is cancelled.

    Loading must not fail for want of someone to tell: what keeps from telling is logged, once.
    """
    from ray.serve.exceptions import RayServeException

    try:
        ingresses = await asyncio.to_thread(own_ingresses)
        while ingresses is not None:
            part = reading.progress.ratio
            if part is not None:
                # Serve's, where no ingress is up yet.
                with contextlib.suppress(TimeoutError, RayServeException):
                    told = ingresses.broadcast("worker_is_loading", replica_name(), part)
                    await told.results_async(timeout_s=ANSWER_SECONDS, return_exceptions=True)
            await asyncio.sleep(TOLD_EVERY_SECONDS)
    except Exception as error:
        logger.warning("the page is not told how far loading is: %s", error)


class LoadingSeen:
    """What an ingress heard of the workers that load."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[str, tuple[float, float]] = {}

    def note(self, worker: str, part: float) -> None:
        """A worker has read this part of its files, 0 to 1."""
        self._told[worker] = (part, self._clock())

    @property
    def part(self) -> float | None:
        """What the worker that is farthest has read, 0 to 1; None where none told lately."""
        now = self._clock()
        self._told = {
            worker: told for worker, told in self._told.items() if now - told[1] <= FORGOTTEN_SECONDS
        }
        return max((part for part, _ in self._told.values()), default=None)
