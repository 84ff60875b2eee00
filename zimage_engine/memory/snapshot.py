"""Asks CUDA, MPS and the CPU what they are and hold; the only file that does. Knows no model.

    take_snapshot("cuda:0").free_bytes    # cheap enough for every request and every scrape

Which device to use is decided in `choose_device`, which is pure.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from zimage_engine.errors import DeviceUnavailable
from zimage_engine.types import DeviceStatus


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """What a device and its host held at one moment; None where the device does not tell.

    `free_bytes` is free for anyone, `reserved_bytes` is this process's, `allocated_bytes` of that in use.
    `fragmentation_ratio` is the part of the reserved memory that lies free between pieces in use, where
    `largest_free_block_bytes` (a deep look only) is the largest stretch that could be given out at once.
    `pinned_limit_bytes`: how much host memory this process may lock, None for no limit.
    """

    device: str
    total_bytes: int | None
    free_bytes: int | None
    allocated_bytes: int | None
    reserved_bytes: int | None
    peak_allocated_bytes: int | None
    largest_free_block_bytes: int | None
    fragmentation_ratio: float | None
    allocation_retries: int | None
    ooms: int | None
    host_total_bytes: int
    host_available_bytes: int
    pinned_limit_bytes: int | None

    @property
    def reachable_bytes(self) -> int | None:
        """What this process could still allocate: free for anyone, or reserved by it and not in use."""
        if self.free_bytes is None:
            return None
        return self.free_bytes + (self.reserved_bytes or 0) - (self.allocated_bytes or 0)


def take_snapshot(device: str, deep: bool = False) -> MemorySnapshot:
    """What `device` and the host hold now. `deep` walks all of the allocator's blocks for the largest free
    one, which takes milliseconds for each thousand of them; without it that figure is None."""
    figures = _FIGURES[torch.device(device).type](device, deep)
    host = psutil.virtual_memory()
    return MemorySnapshot(
        device=device,
        host_total_bytes=host.total,
        host_available_bytes=host.available,
        pinned_limit_bytes=_pinned_limit_bytes(),
        **{**dict.fromkeys(_DEVICE_FIGURES), **figures},
    )


_DEVICE_FIGURES = (
    "total_bytes",
    "free_bytes",
    "allocated_bytes",
    "reserved_bytes",
    "peak_allocated_bytes",
    "largest_free_block_bytes",
    "fragmentation_ratio",
    "allocation_retries",
    "ooms",
)


def allocator_figures(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a snapshot that `torch.cuda.memory_stats` holds; an empty mapping is an unused device.

    Free memory inside a segment in use (`inactive_split`) cannot be given back; a free segment can, so the
    ratio leaves it out. cudaMallocAsync tells neither, and the ratio is then 0.
    """
    reserved = stats.get("reserved_bytes.all.current", 0)
    split = stats.get("inactive_split_bytes.all.current", 0)
    return {
        "allocated_bytes": stats.get("allocated_bytes.all.current", 0),
        "reserved_bytes": reserved,
        "peak_allocated_bytes": stats.get("allocated_bytes.all.peak", 0),
        "fragmentation_ratio": split / reserved if reserved else 0.0,
        "allocation_retries": stats.get("num_alloc_retries", 0),
        "ooms": stats.get("num_ooms", 0),
    }


def largest_free_block(segments: Iterable[Mapping[str, Any]], device_index: int) -> int:
    """Bytes of the largest free block in what `torch.cuda.memory_snapshot` returns; 0 where none is free."""
    return max(
        (
            block["size"]
            for segment in segments
            if segment["device"] == device_index
            for block in segment["blocks"]
            if block["state"] == "inactive"
        ),
        default=0,
    )


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


def _cuda_figures(device: str, deep: bool) -> dict[str, Any]:
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    figures = {"total_bytes": total_bytes, "free_bytes": free_bytes}
    figures |= allocator_figures(torch.cuda.memory_stats(device))
    if deep:
        # The driver's free memory is one stretch to us: with expandable segments any part of it will do.
        index = torch.device(device).index or 0
        inside = largest_free_block(torch.cuda.memory_snapshot(), index)
        figures["largest_free_block_bytes"] = max(inside, free_bytes)
    return figures


def _mps_figures(device: str, deep: bool) -> dict[str, Any]:
    total_bytes = torch.mps.recommended_max_memory()
    reserved_bytes = torch.mps.driver_allocated_memory()
    return {
        "total_bytes": total_bytes,
        "free_bytes": max(0, total_bytes - reserved_bytes),
        "allocated_bytes": torch.mps.current_allocated_memory(),
        "reserved_bytes": reserved_bytes,
    }


def _cpu_figures(device: str, deep: bool) -> dict[str, Any]:
    return {}


def _pinned_limit_bytes() -> int | None:
    """What the system lets this process lock; CUDA's driver is mostly exempt, containers not always."""
    try:
        import resource
    except ImportError:  # no such limit on Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


_FIGURES: dict[str, Callable[[str, bool], dict[str, Any]]] = {
    "cuda": _cuda_figures,
    "mps": _mps_figures,
    "cpu": _cpu_figures,
}
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
