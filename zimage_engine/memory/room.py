"""The device's memory for one request after another: a plan before, a way on after each out-of-memory.

Joins the planner and the keeper; knows no sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from zimage_engine.errors import InvalidRequest
from zimage_engine.families import ModelFamily
from zimage_engine.memory.footprint import footprint_of_pipeline
from zimage_engine.memory.oom import MemoryKeeper, Stage
from zimage_engine.memory.options import PlannedOptions
from zimage_engine.memory.planner import CONTEXT_BYTES, PlanOptions
from zimage_engine.memory.quantize import check_quantisation
from zimage_engine.memory.residency import MemoryWishes, Residency
from zimage_engine.types import MemoryUse

logger = logging.getLogger(__name__)

Made = TypeVar("Made")


def keeper_for(pipeline: Any, family: ModelFamily, device: str, wishes: MemoryWishes) -> MemoryKeeper:
    """The keeper of a pipeline that is on the host, planning as `wishes` say.

    Raises InvalidRequest for wishes that mean nothing on a device without memory of its own, and for a
    quantisation that cannot be done here.
    """
    check_quantisation(wishes.quantize, device, getattr(pipeline, family.denoiser).dtype)
    shares_host_memory = torch.device(device).type != "cuda"
    if shares_host_memory:
        _refuse_in_vain(wishes, device)
    footprint = footprint_of_pipeline(
        pipeline, family, float8_storage=wishes.float8, quantize=wishes.quantize
    )
    options = PlannedOptions(footprint, asked_of(wishes), shares_host_memory=shares_host_memory)
    return MemoryKeeper(pipeline, footprint, options, device)


def asked_of(wishes: MemoryWishes) -> PlanOptions:
    """The wishes as the planner takes them: of a card of so many bytes CUDA has its part before we do."""
    return PlanOptions(
        offload=None if wishes.offload is None else Residency(wishes.offload),
        vram_limit_bytes=None if wishes.vram_bytes is None else max(0, wishes.vram_bytes - CONTEXT_BYTES),
    )


def _refuse_in_vain(wishes: MemoryWishes, device: str) -> None:
    if wishes.vram_bytes is not None:
        raise InvalidRequest(
            f"vram limits what is used of a card's own memory, and {device} has none; leave it out", "vram"
        )
    if wishes.offload not in (None, Residency.NONE.value):
        raise InvalidRequest(
            f"offload {wishes.offload} moves weights between host and card, and {device} shares the host's "
            "memory; leave it out",
            "offload",
        )


class Room:
    """One request's part: `stage` tells what is at work, which an out-of-memory is put down to."""

    def __init__(self, keeper: MemoryKeeper, stage: Callable[[], Stage]) -> None:
        self._keeper = keeper
        self._stage = stage
        self._recoveries: list[str] = []

    @contextmanager
    def for_request(self, width_px: int, height_px: int, guided: bool) -> Iterator[None]:
        """A plan is in force within, and afterwards memory is tidied up. Raises DoesNotFit, OutOfMemory."""
        self._keeper.before(width_px, height_px, guided)
        try:
            yield
        finally:
            self._keeper.after()

    def made_for(self, work: Callable[[], Made]) -> Made:
        """What `work` returns, done again from its beginning with more room after each out-of-memory.

        Raises OutOfMemory where no more room can be made.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                failed = error
            rung = self._keeper.on_oom(self._stage(), failed)
            del failed
            self._recoveries.append(rung)
            logger.warning("out of memory (%s): %s, and done again", self._stage(), rung)

    @property
    def use(self) -> MemoryUse:
        """What the report tells of it."""
        plan = self._keeper.plan
        assert plan is not None
        peak_bytes = plan.peak_bytes if self._keeper.has_own_memory else None
        return MemoryUse(
            plan.residency.value, plan.because, peak_bytes, tuple(self._recoveries), plan.quantize
        )
