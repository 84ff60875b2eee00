from __future__ import annotations

import pytest

from zimage_engine.errors import DeviceUnavailable
from zimage_engine.memory.snapshot import available_devices, choose_device, device_clock, device_status

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
