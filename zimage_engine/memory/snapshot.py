"""Asks CUDA, MPS and the CPU what they are and hold; the only file that does. Knows no model.

Which device to use is decided in `choose_device`, which is pure.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence

import torch

from zimage_engine.errors import DeviceUnavailable
from zimage_engine.types import DeviceStatus


def available_devices() -> tuple[str, ...]:
    """Every device here, best first: `cuda:0`, `cuda:1`, ..., `mps`, `cpu`."""
    cuda = (
        tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        if torch.cuda.is_available()
        else ()
    )
    mps = ("mps",) if torch.backends.mps.is_available() else ()
    return (*cuda, *mps, "cpu")


def choose_device(requested: str | None, available: Sequence[str]) -> str:
    """The device to draw on: `requested`, or the first of `available` for None.

    `cuda` stands for `cuda:0`. Raises DeviceUnavailable, which lists what there is.
    """
    if requested is None:
        return available[0]
    wanted = "cuda:0" if requested == "cuda" else requested
    if wanted not in available:
        raise DeviceUnavailable(
            f"device {requested!r} is not available here; available are: {', '.join(available)}"
        )
    return wanted


def device_status(device: str) -> DeviceStatus:
    """What `device` is called and how much of its memory is used, by this process or any other."""
    return _STATUS[torch.device(device).type](device)


def device_clock(device: str) -> Callable[[], float]:
    """A clock in seconds that first waits until `device` has done all work queued on it.

    A GPU works behind the program's back: a plain clock would charge one stage's work to the next.
    """
    wait = _WAIT[torch.device(device).type]

    def seconds() -> float:
        wait(device)
        return time.perf_counter()

    return seconds


def _cuda_status(device: str) -> DeviceStatus:
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return DeviceStatus(device, torch.cuda.get_device_name(device), total_bytes, total_bytes - free_bytes)


def _mps_status(device: str) -> DeviceStatus:
    total_bytes = torch.mps.recommended_max_memory()
    return DeviceStatus(device, "Apple GPU", total_bytes, torch.mps.driver_allocated_memory())


def _cpu_status(device: str) -> DeviceStatus:
    return DeviceStatus(device, platform.processor() or platform.machine(), None, None)


_STATUS: dict[str, Callable[[str], DeviceStatus]] = {
    "cuda": _cuda_status,
    "mps": _mps_status,
    "cpu": _cpu_status,
}
_WAIT: dict[str, Callable[[str], None]] = {
    "cuda": torch.cuda.synchronize,
    "mps": lambda device: torch.mps.synchronize(),
    "cpu": lambda device: None,
}
