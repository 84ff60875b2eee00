"""Answers the keeper's questions by the planner, for one footprint and one person's wishes; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from zimage_engine.memory.planner import (
    RESERVE_BYTES,
    PlanOptions,
    all_options,
    budget_bytes,
    largest_size,
    plan_offload,
)
from zimage_engine.memory.residency import Footprint, OffloadPlan

#: What is free moves a little from request to request; such steps keep the plan, and its cost, steady.
FREE_STEP_BYTES = 128 * 2**20


@dataclass(frozen=True, eq=False)
class PlannedOptions:
    """`zimage_engine.memory.oom.Planner` for `footprint`; `asked` holds what a person has decided already."""

    footprint: Footprint
    asked: PlanOptions
    reserve_bytes: int = RESERVE_BYTES
    #: The device has no memory of its own (CPU, Apple's GPU): there is nothing to move.
    shares_host_memory: bool = False

    def beside(self, taken_bytes: int) -> PlannedOptions:
        """The same where so much is taken by what the footprint does not tell of, such as LoRAs."""
        return replace(self, reserve_bytes=self.reserve_bytes + taken_bytes)

    def options(
        self, width_px: int, height_px: int, guided: bool, free_bytes: int | None
    ) -> Sequence[OffloadPlan]:
        """The planner's choice first, then what else fits, the fastest first.

        What does not fit is no option: the plan in force is left as soon as it is none any more.

        Where a way of offloading was asked for there are only plans of that way. Raises DoesNotFit.
        """
        own_memory = None if self.shares_host_memory else free_bytes
        steady = None if own_memory is None else own_memory // FREE_STEP_BYTES * FREE_STEP_BYTES
        return _options(self, width_px, height_px, guided, steady)

    def largest_size(
        self, width_px: int, height_px: int, guided: bool, free_bytes: int
    ) -> tuple[int, int] | None:
        """The largest picture of this shape that fits in `free_bytes`; None where none does."""
        return largest_size(self.footprint, width_px, height_px, guided, free_bytes, self.asked)


@lru_cache(maxsize=256)
def _options(
    planned: PlannedOptions, width_px: int, height_px: int, guided: bool, free_bytes: int | None
) -> tuple[OffloadPlan, ...]:
    asked, reserve = planned.asked, planned.reserve_bytes
    terms = {"guided": guided, "free_bytes": free_bytes, "reserve_bytes": reserve, "options": asked}
    chosen = plan_offload(planned.footprint, width_px, height_px, **terms)  # type: ignore[arg-type]
    budget = budget_bytes(free_bytes, reserve, asked)
    others = [
        plan
        for plan in all_options(planned.footprint, width_px, height_px, **terms)  # type: ignore[arg-type]
        if asked.offload in (None, plan.residency) and (budget is None or plan.peak_bytes <= budget)
    ]
    others.sort(key=lambda plan: -plan.relative_speed)
    return (chosen, *others)
