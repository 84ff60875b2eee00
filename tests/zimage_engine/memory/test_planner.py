"""The planner as a table of cards, models, sizes and options, and what must hold for all of them."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_engine.errors import DoesNotFit
from zimage_engine.families import FAMILIES
from zimage_engine.memory import footprint as footprints
from zimage_engine.memory.planner import (
    RESERVE_BYTES,
    DeviceSpeed,
    PlanOptions,
    all_options,
    budget_bytes,
    plan_offload,
    title,
)
from zimage_engine.memory.residency import OffloadPlan, Residency

GIB = 2**30
#: Computing a footprint takes longer than planning with it.
published_footprint = lru_cache(footprints.published_footprint)
FAMILY_NAMES = [family.name for family in FAMILIES]

#: Family, GiB free on the card (None: the CPU), size, whether guided, what else is asked, what is decided.
TABLE: tuple[tuple[str, int | None, str, bool, dict[str, Any], str], ...] = (
    ("z-image-turbo", 2, "1024x1024", True, {}, "sequential: every layer fetched, VAE in 512 px tiles"),
    ("z-image-turbo", 4, "1024x1024", True, {}, "stream: 0 of 30 blocks resident, VAE in 512 px tiles"),
    ("z-image-turbo", 6, "1024x1024", True, {}, "stream: 5 of 30 blocks resident"),
    ("z-image-turbo", 8, "1024x1024", True, {}, "stream: 11 of 30 blocks resident"),
    ("z-image-turbo", 12, "1024x1024", True, {}, "stream: 23 of 30 blocks resident"),
    ("z-image-turbo", 16, "1024x1024", True, {}, "resident, text encoder streamed"),
    ("z-image-turbo", 24, "1024x1024", True, {}, "all resident"),
    ("z-image-turbo", 48, "1024x1024", True, {}, "all resident"),
    ("z-image-turbo", 2, "512x512", True, {}, "sequential: every layer fetched"),
    ("z-image-turbo", 4, "512x512", True, {}, "stream: 1 of 30 blocks resident"),
    ("z-image-turbo", 6, "512x512", True, {}, "stream: 7 of 30 blocks resident"),
    ("z-image-turbo", 8, "512x512", True, {}, "stream: 13 of 30 blocks resident"),
    ("z-image-turbo", 12, "512x512", True, {}, "stream: 24 of 30 blocks resident"),
    ("z-image-turbo", 16, "512x512", True, {}, "resident, text encoder streamed"),
    ("z-image-turbo", 24, "512x512", True, {}, "all resident"),
    ("z-image-turbo", 48, "512x512", True, {}, "all resident"),
    ("z-image-turbo", 2, "2048x2048", True, {}, "does not fit, 1104x1104 would"),
    ("z-image-turbo", 4, "2048x2048", True, {}, "does not fit, 1856x1856 would"),
    ("z-image-turbo", 6, "2048x2048", True, {}, "sequential: every layer fetched, VAE in 512 px tiles"),
    ("z-image-turbo", 8, "2048x2048", True, {}, "stream: 3 of 30 blocks resident, VAE in 512 px tiles"),
    ("z-image-turbo", 12, "2048x2048", True, {}, "stream: 6 of 30 blocks resident"),
    ("z-image-turbo", 16, "2048x2048", True, {}, "stream: 18 of 30 blocks resident"),
    ("z-image-turbo", 24, "2048x2048", True, {}, "resident, text encoder streamed"),
    ("z-image-turbo", 48, "2048x2048", True, {}, "all resident"),
    ("z-image-turbo", 2, "1536x1024", True, {}, "does not fit, 1360x896 would"),
    ("z-image-turbo", 4, "1536x1024", True, {}, "sequential: every layer fetched"),
    ("z-image-turbo", 6, "1536x1024", True, {}, "stream: 2 of 30 blocks resident"),
    ("z-image-turbo", 8, "1536x1024", True, {}, "stream: 8 of 30 blocks resident"),
    ("z-image-turbo", 12, "1536x1024", True, {}, "stream: 20 of 30 blocks resident"),
    ("z-image-turbo", 16, "1536x1024", True, {}, "resident, text encoder streamed"),
    ("z-image-turbo", 24, "1536x1024", True, {}, "all resident"),
    ("z-image-turbo", 48, "1536x1024", True, {}, "all resident"),
    ("sdxl", 2, "1024x1024", True, {}, "stream: 24 of 87 blocks resident, VAE in 512 px tiles"),
    ("sdxl", 4, "1024x1024", True, {}, "stream: 55 of 87 blocks resident, VAE in 512 px tiles"),
    ("sdxl", 6, "1024x1024", True, {}, "resident, text encoder streamed, VAE in 256 px tiles"),
    ("sdxl", 8, "1024x1024", True, {}, "resident, text encoder released"),
    ("sdxl", 12, "1024x1024", True, {}, "all resident"),
    ("sdxl", 16, "1024x1024", True, {}, "all resident"),
    ("sdxl", 24, "1024x1024", True, {}, "all resident"),
    ("sdxl", 48, "1024x1024", True, {}, "all resident"),
    ("sdxl", 2, "2048x2048", True, {}, "sequential: every layer fetched, VAE in 512 px tiles"),
    ("sdxl", 4, "2048x2048", True, {}, "stream: 40 of 87 blocks resident, VAE in 512 px tiles"),
    ("sdxl", 6, "2048x2048", True, {}, "stream: 70 of 87 blocks resident, VAE in 512 px tiles"),
    ("sdxl", 8, "2048x2048", True, {}, "resident, text encoder released, VAE in 512 px tiles"),
    ("sdxl", 12, "2048x2048", True, {}, "stream: 67 of 87 blocks resident"),
    ("sdxl", 16, "2048x2048", True, {}, "all resident"),
    ("sdxl", 24, "2048x2048", True, {}, "all resident"),
    ("sdxl", 48, "2048x2048", True, {}, "all resident"),
    ("pixart-sigma", 2, "1024x1024", True, {}, "stream: 2 of 28 blocks resident, VAE in 512 px tiles"),
    ("pixart-sigma", 4, "1024x1024", True, {}, "resident, text encoder streamed"),
    ("pixart-sigma", 6, "1024x1024", True, {}, "resident, text encoder streamed"),
    ("pixart-sigma", 8, "1024x1024", True, {}, "resident, text encoder streamed"),
    ("pixart-sigma", 12, "1024x1024", True, {}, "all resident, VAE in 512 px tiles"),
    ("pixart-sigma", 16, "1024x1024", True, {}, "all resident"),
    ("pixart-sigma", 24, "1024x1024", True, {}, "all resident"),
    ("pixart-sigma", 48, "1024x1024", True, {}, "all resident"),
    ("pixart-sigma", 2, "2048x2048", True, {}, "stream: 2 of 28 blocks resident, VAE in 512 px tiles"),
    ("pixart-sigma", 4, "2048x2048", True, {}, "resident, text encoder streamed, VAE in 512 px tiles"),
    ("pixart-sigma", 6, "2048x2048", True, {}, "resident, text encoder streamed, VAE in 512 px tiles"),
    ("pixart-sigma", 8, "2048x2048", True, {}, "resident, text encoder streamed, VAE in 512 px tiles"),
    ("pixart-sigma", 12, "2048x2048", True, {}, "resident, text encoder streamed"),
    ("pixart-sigma", 16, "2048x2048", True, {}, "resident, text encoder streamed"),
    ("pixart-sigma", 24, "2048x2048", True, {}, "all resident"),
    ("pixart-sigma", 48, "2048x2048", True, {}, "all resident"),
    ("z-image", 8, "512x512", True, {}, "stream: 13 of 30 blocks resident"),
    ("sdxl-turbo", 8, "512x512", True, {}, "all resident"),
    ("sdxl-lcm", 8, "512x512", True, {}, "all resident"),
    ("pixart-alpha-512", 8, "512x512", True, {}, "resident, text encoder streamed"),
    ("z-image-turbo", 24, "1024x1024", True, {"offload": "none"}, "all resident"),
    ("z-image-turbo", 12, "1024x1024", True, {"offload": "none"}, "does not fit, and no size would"),
    ("z-image-turbo", 24, "1024x1024", True, {"offload": "model"}, "model: components take turns"),
    ("z-image-turbo", 12, "1024x1024", True, {"offload": "model"}, "does not fit, and no size would"),
    ("z-image-turbo", 24, "1024x1024", True, {"offload": "stream"}, "stream: 29 of 30 blocks resident"),
    ("z-image-turbo", 12, "1024x1024", True, {"offload": "stream"}, "stream: 23 of 30 blocks resident"),
    ("z-image-turbo", 24, "1024x1024", True, {"offload": "sequential"}, "sequential: every layer fetched"),
    ("z-image-turbo", 12, "1024x1024", True, {"offload": "sequential"}, "sequential: every layer fetched"),
    ("z-image-turbo", 24, "1024x1024", True, {"offload": "disk"}, "disk: every layer read"),
    ("z-image-turbo", 12, "1024x1024", True, {"offload": "disk"}, "disk: every layer read"),
    ("z-image-turbo", 12, "1024x1024", False, {}, "stream: 23 of 30 blocks resident"),
    ("z-image-turbo", 12, "1024x1024", True, {"float8": True}, "resident, text encoder streamed"),
    ("z-image-turbo", 8, "1024x1024", True, {"float8": True}, "stream: 26 of 30 blocks resident"),
    ("z-image-turbo", 12, "1024x1024", True, {"host": 4}, "disk: every layer read"),
    ("z-image-turbo", 12, "1024x1024", True, {"host": 12}, "stream: 23 of 30 blocks resident"),
    ("z-image-turbo", 24, "1024x1024", True, {"limit": 8}, "stream: 11 of 30 blocks resident"),
    ("z-image-turbo", 24, "1024x1024", True, {"tile": 256}, "all resident, VAE in 256 px tiles"),
    ("z-image-turbo", 4, "1024x1024", True, {"tile": 0}, "sequential: every layer fetched"),
    ("z-image-turbo", 12, "1024x1024", True, {"plain": True}, "sequential: every layer fetched"),
    ("z-image-turbo", None, "1024x1024", True, {}, "all resident"),
    ("z-image-turbo", 12, "1024x1024", True, {"pictures": 4}, "stream: 6 of 30 blocks resident"),
)


def options_from(asked: dict[str, Any]) -> PlanOptions:
    return PlanOptions(
        offload=Residency(asked["offload"]) if "offload" in asked else None,
        host_free_bytes=asked["host"] * GIB if "host" in asked else None,
        vram_limit_bytes=asked["limit"] * GIB if "limit" in asked else None,
        vae_tile_px=asked.get("tile"),
        plain_attention=asked.get("plain", False),
        pictures=asked.get("pictures", 1),
    )


def decide(
    family: str, free_bytes: int | None, width: int, height: int, guided: bool, asked: dict[str, Any]
) -> OffloadPlan:
    return plan_offload(
        published_footprint(family, float8_storage=asked.get("float8", False)),
        width,
        height,
        guided=guided,
        free_bytes=free_bytes,
        options=options_from(asked),
    )


@pytest.mark.parametrize(("family", "card", "size", "guided", "asked", "expected"), TABLE)
def test_the_table_of_decisions(
    family: str, card: int | None, size: str, guided: bool, asked: dict[str, Any], expected: str
) -> None:
    width, height = map(int, size.split("x"))
    try:
        plan = decide(family, None if card is None else card * GIB, width, height, guided, asked)
    except DoesNotFit as too_big:
        largest = too_big.largest_size
        decided = (
            f"does not fit, {largest[0]}x{largest[1]} would" if largest else "does not fit, and no size would"
        )
        because = str(too_big)
    else:
        decided, because = title(plan), plan.because
    print(f"{family} {size} on {card} GiB {asked or ''}: {because}")  # noqa: T201, shown with -s and on failure
    assert decided == expected, because


def test_the_table_is_large_enough_and_has_no_row_twice() -> None:
    questions = {repr(row[:-1]) for row in TABLE}
    assert len(questions) == len(TABLE) >= 60


def test_the_reason_names_what_the_next_faster_way_would_need() -> None:
    plan = decide("z-image-turbo", 12 * GIB, 1024, 1024, True, {})
    assert plan.because == (
        "stream: 23 of 30 blocks resident: needs 11.43 GiB of the 11.50 GiB there are; "
        "stream: 24 of 30 blocks resident would need 11.77 GiB"
    )
    assert "into the host's memory, which has 4.00 GiB" in (
        decide("z-image-turbo", 12 * GIB, 1024, 1024, True, {"host": 4}).because
    )


def test_at_1024_a_way_needs_at_most_5_2_gib() -> None:
    rows = all_options(published_footprint("z-image-turbo"), 1024, 1024, guided=True, free_bytes=12 * GIB)
    streamed = min(row.peak_bytes for row in rows if row.residency is Residency.STREAM)
    assert streamed <= 5.2 * GIB


def test_what_stays_and_what_streams_are_all_blocks() -> None:
    footprint = published_footprint("sdxl")
    plan = decide("sdxl", 4 * GIB, 1024, 1024, True, {})
    blocks = list(footprint.components["unet"].blocks)
    assert plan.blocks == len(blocks) == plan.resident_blocks + len(plan.streamed_blocks)
    assert list(plan.streamed_blocks) == [path for path in blocks if path in plan.streamed_blocks]
    # The least active first: the deepest down block and the first up block.
    assert all(path.startswith(("down_blocks.2.", "up_blocks.0.")) for path in plan.streamed_blocks)


def test_plans_and_refusals_travel_between_processes() -> None:
    plan = decide("z-image-turbo", 12 * GIB, 1024, 1024, True, {})
    assert pickle.loads(pickle.dumps(plan)) == plan
    with pytest.raises(DoesNotFit) as refused:
        decide("z-image-turbo", 2 * GIB, 2048, 2048, True, {})
    again = pickle.loads(pickle.dumps(refused.value))
    assert (str(again), again.largest_size) == (str(refused.value), (1104, 1104))


def test_a_slower_bus_keeps_a_plan_and_lowers_its_speed() -> None:
    footprint = published_footprint("z-image-turbo")
    speeds = [
        plan_offload(
            footprint,
            512,
            512,
            guided=False,
            free_bytes=6 * GIB,
            options=PlanOptions(speed=DeviceSpeed(bus_bytes_per_second=rate)),
        ).relative_speed
        for rate in (2e9, 8e9, 32e9)
    ]
    assert speeds == sorted(speeds) and speeds[0] < 0.5 < speeds[-1] <= 1


sides = st.integers(4, 128).map(lambda count: count * 16)
cards = st.integers(1, 40 * 16).map(lambda count: count * GIB // 16)
families = st.sampled_from(FAMILY_NAMES)
asked_for = st.fixed_dictionaries(
    {},
    optional={
        "host": st.integers(0, 40),
        "float8": st.booleans(),
        "offload": st.sampled_from([way.value for way in Residency]),
        "tile": st.sampled_from([0, 256, 512]),
        "plain": st.booleans(),
    },
)


def decide_or_none(*question: Any) -> OffloadPlan | None:
    try:
        return decide(*question)
    except DoesNotFit:
        return None


@settings(max_examples=100, deadline=None)
@given(families, cards, cards, sides, sides, st.booleans(), asked_for)
def test_more_memory_never_gives_a_slower_plan(
    family: str, one: int, other: int, width: int, height: int, guided: bool, asked: dict[str, Any]
) -> None:
    less, more = sorted((one, other))
    small = decide_or_none(family, less, width, height, guided, asked)
    large = decide_or_none(family, more, width, height, guided, asked)
    if small is not None:
        assert large is not None and large.relative_speed >= small.relative_speed


@settings(max_examples=100, deadline=None)
@given(families, sides, sides, sides, st.booleans(), asked_for)
def test_a_bigger_picture_never_gives_a_smaller_prediction(
    family: str, width: int, height: int, more: int, guided: bool, asked: dict[str, Any]
) -> None:
    footprint = published_footprint(family, float8_storage=asked.get("float8", False))
    # A tile is used where the picture is larger than it, so whole pictures are compared with whole ones.
    options = replace(options_from(asked), vae_tile_px=0)
    for bigger in ((width + more, height), (width, height + more)):
        before, after = (
            all_options(footprint, *size, guided=guided, free_bytes=1, options=options)
            for size in ((width, height), bigger)
        )
        assert [title(row) for row in before] == [title(row) for row in after]
        for less, greater in zip(before, after, strict=True):
            assert less.peak_bytes <= greater.peak_bytes, title(less)


@settings(max_examples=100, deadline=None)
@given(families, sides, sides, sides, st.booleans())
def test_the_leanest_way_of_a_bigger_picture_is_never_leaner(
    family: str, width: int, height: int, more: int, guided: bool
) -> None:
    needed = []
    for size in ((width, height), (width + more, height)):
        with pytest.raises(DoesNotFit) as refused:
            plan_offload(published_footprint(family), *size, guided=guided, free_bytes=1)
        assert refused.value.largest_size is None
        needed.append(refused.value.needed_bytes or 0)
    assert 0 < needed[0] <= needed[1]


@settings(max_examples=100, deadline=None)
@given(families, cards, sides, sides, st.booleans(), asked_for)
def test_a_plan_stays_within_its_budget_or_the_size_that_it_names_does(
    family: str, card: int, width: int, height: int, guided: bool, asked: dict[str, Any]
) -> None:
    budget = budget_bytes(card, RESERVE_BYTES)
    assert budget is not None
    try:
        plan = decide(family, card, width, height, guided, asked)
    except DoesNotFit as too_big:
        if too_big.largest_size is None:
            assert decide_or_none(family, card, 64, 64, guided, asked) is None
            return
        smaller_width, smaller_height = too_big.largest_size
        assert smaller_width <= width and smaller_height <= height
        plan = decide(family, card, smaller_width, smaller_height, guided, asked)
    assert plan.peak_bytes <= budget
    assert plan.host_bytes <= asked.get("host", 10**6) * GIB
    assert 0 < plan.relative_speed <= 1
