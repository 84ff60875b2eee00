"""What a person wishes of a card is what the planner is asked."""

from __future__ import annotations

import pytest

from zimage_engine.memory.footprint import published_footprint
from zimage_engine.memory.planner import CONTEXT_BYTES, RESERVE_BYTES, PlanOptions, plan_offload
from zimage_engine.memory.residency import MemoryWishes, Residency
from zimage_engine.memory.room import asked_of

GIB = 2**30


@pytest.mark.parametrize("card_gib", [8, 12, 16, 24])
def test_a_limit_plans_as_a_card_of_that_size_would(card_gib: int) -> None:
    """Of a real card the driver tells what CUDA's context leaves of it; a limit means the same."""
    footprint = published_footprint("z-image-turbo")
    limited = plan_offload(
        footprint,
        1024,
        1024,
        guided=True,
        free_bytes=80 * GIB,
        options=asked_of(MemoryWishes(vram_bytes=card_gib * GIB)),
    )
    real = plan_offload(
        footprint, 1024, 1024, guided=True, free_bytes=card_gib * GIB - CONTEXT_BYTES, options=PlanOptions()
    )
    assert limited == real
    assert limited.peak_bytes <= card_gib * GIB - CONTEXT_BYTES - RESERVE_BYTES


def test_what_is_not_wished_for_is_left_to_the_planner() -> None:
    assert asked_of(MemoryWishes()) == PlanOptions()
    assert asked_of(MemoryWishes(offload="disk", vram_bytes=1)) == PlanOptions(
        offload=Residency.DISK, vram_limit_bytes=0
    )
