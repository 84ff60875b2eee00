from __future__ import annotations

from dataclasses import replace

import pytest

from zimage_engine.memory.defrag import Decision, Thresholds, decide, defragment
from zimage_engine.memory.snapshot import MemorySnapshot

GIB = 2**30
#: A 12 GB card with 9 of 10 reserved GiB in use.
HEALTHY = MemorySnapshot(
    device="cuda:0",
    total_bytes=12 * GIB,
    free_bytes=GIB,
    allocated_bytes=9 * GIB,
    reserved_bytes=10 * GIB,
    peak_allocated_bytes=10 * GIB,
    largest_free_block_bytes=None,
    fragmentation_ratio=0.02,
    allocation_retries=0,
    ooms=0,
    host_total_bytes=64 * GIB,
    host_available_bytes=32 * GIB,
    pinned_limit_bytes=None,
)


@pytest.mark.parametrize(
    ("changes", "emptied_before", "kind"),
    [
        ({}, False, "none"),
        ({"allocated_bytes": 8 * GIB}, False, "empty_cache"),
        ({"allocated_bytes": 8 * GIB}, True, "none"),
        ({"allocated_bytes": 6 * GIB, "fragmentation_ratio": 0.4}, False, "empty_cache"),
        ({"allocated_bytes": 6 * GIB, "fragmentation_ratio": 0.4}, True, "deep"),
        ({"allocated_bytes": 6 * GIB, "fragmentation_ratio": 0.34}, True, "none"),
        ({"reserved_bytes": 2**20, "allocated_bytes": 0, "fragmentation_ratio": 1.0}, True, "none"),
        ({"reserved_bytes": 0, "allocated_bytes": 0}, False, "none"),
        ({"fragmentation_ratio": None}, True, "none"),
        ({"fragmentation_ratio": 0.0, "allocated_bytes": 5 * GIB}, True, "none"),
    ],
)
def test_the_figures_decide(changes: dict[str, object], emptied_before: bool, kind: str) -> None:
    decision = decide(replace(HEALTHY, **changes), emptied_before=emptied_before)
    assert decision.kind == kind
    assert decision.because


def test_thresholds_can_be_chosen() -> None:
    assert decide(HEALTHY, Thresholds(least_bytes=GIB, empty_cache_ratio=0.1)).kind == "empty_cache"


def test_the_deep_form_takes_the_weights_away_and_brings_them_back() -> None:
    told: list[str] = []
    reserved = iter([10 * GIB, 7 * GIB])
    report = defragment(
        Decision("deep", "asked for"),
        "cpu",
        lambda: next(reserved),
        lambda: told.append("away"),
        lambda: told.append("back"),
    )
    assert told == ["away", "back"]
    assert (report.kind, report.released_bytes) == ("deep", 3 * GIB)
    assert report.seconds > 0


def test_emptying_the_cache_leaves_the_weights_where_they_are() -> None:
    def never() -> None:
        raise AssertionError("the weights were moved")

    report = defragment(Decision("empty_cache", "asked for"), "cpu", lambda: None, never, never)
    assert report.released_bytes is None
