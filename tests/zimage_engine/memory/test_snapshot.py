from __future__ import annotations

import pytest

from zimage_engine.errors import DeviceUnavailable
from zimage_engine.memory.snapshot import (
    allocator_figures,
    available_devices,
    choose_device,
    device_clock,
    device_status,
    largest_free_block,
    take_snapshot,
)

TWO_CARDS = ("cuda:0", "cuda:1", "cpu")
MAC = ("mps", "cpu")


@pytest.mark.parametrize(
    ("requested", "available", "chosen"),
    [
        (None, TWO_CARDS, "cuda:0"),
        (None, MAC, "mps"),
        (None, ("cpu",), "cpu"),
        ("cpu", TWO_CARDS, "cpu"),
        ("cuda", TWO_CARDS, "cuda:0"),
        ("cuda:1", TWO_CARDS, "cuda:1"),
        ("mps", MAC, "mps"),
    ],
)
def test_the_device_is_what_was_asked_or_the_best(requested, available, chosen) -> None:
    assert choose_device(requested, available) == chosen


@pytest.mark.parametrize("requested", ["cuda:2", "mps", "tpu", "", "CUDA"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(requested: str) -> None:
    with pytest.raises(DeviceUnavailable, match="available are: cuda:0, cuda:1, cpu"):
        choose_device(requested, TWO_CARDS)


def test_the_cpu_is_always_there_and_last() -> None:
    assert available_devices()[-1] == "cpu"


def test_the_cpu_tells_no_memory() -> None:
    status = device_status("cpu")
    assert (status.device, status.total_bytes, status.used_bytes) == ("cpu", None, None)
    assert status.name


@pytest.mark.gpu
@pytest.mark.skipif("cuda:0" not in available_devices(), reason="no CUDA device")
def test_a_card_tells_its_memory() -> None:
    status = device_status(choose_device("cuda", available_devices()))
    assert status.total_bytes and status.used_bytes is not None
    assert 0 < status.used_bytes <= status.total_bytes


@pytest.mark.parametrize("device", available_devices())
def test_a_device_clock_goes_forward(device: str) -> None:
    clock = device_clock(device)
    assert clock() <= clock()


#: As `torch.cuda.memory_stats` names them: 8 of 10 GiB reserved are in use, 1.5 lie between pieces in use.
STATS = {
    "allocated_bytes.all.current": 8 * 2**30,
    "allocated_bytes.all.peak": 9 * 2**30,
    "reserved_bytes.all.current": 10 * 2**30,
    "inactive_split_bytes.all.current": 3 * 2**29,
    "num_alloc_retries": 4,
    "num_ooms": 1,
}


def test_the_ratio_is_what_lies_between_pieces_in_use() -> None:
    assert allocator_figures(STATS) == {
        "allocated_bytes": 8 * 2**30,
        "reserved_bytes": 10 * 2**30,
        "peak_allocated_bytes": 9 * 2**30,
        "fragmentation_ratio": 0.15,
        "allocation_retries": 4,
        "ooms": 1,
    }


def test_a_device_that_was_never_used_has_no_fragments() -> None:
    assert set(allocator_figures({}).values()) == {0}


@pytest.mark.parametrize(("device_index", "largest"), [(0, 512), (1, 2048), (2, 0)])
def test_the_largest_free_block_is_that_of_the_device(device_index: int, largest: int) -> None:
    segments = [
        {
            "device": 0,
            "blocks": [
                {"size": 512, "state": "inactive"},
                {"size": 4096, "state": "active_allocated"},
                {"size": 1024, "state": "active_pending_free"},
            ],
        },
        {"device": 1, "blocks": [{"size": 2048, "state": "inactive"}]},
    ]
    assert largest_free_block(segments, device_index) == largest


def test_the_cpu_tells_of_the_host_alone() -> None:
    snapshot = take_snapshot("cpu")
    assert 0 < snapshot.host_available_bytes <= snapshot.host_total_bytes
    assert (snapshot.free_bytes, snapshot.reachable_bytes, snapshot.fragmentation_ratio) == (None, None, None)


@pytest.mark.gpu
@pytest.mark.skipif("cuda:0" not in available_devices(), reason="no CUDA device")
def test_a_card_tells_what_it_holds() -> None:
    import torch

    held = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda:0")
    snapshot = take_snapshot("cuda:0", deep=True)
    assert snapshot.allocated_bytes and snapshot.allocated_bytes >= held.nbytes
    assert snapshot.free_bytes and snapshot.total_bytes and snapshot.free_bytes < snapshot.total_bytes
    assert snapshot.largest_free_block_bytes and 0 <= (snapshot.fragmentation_ratio or 0) < 1
