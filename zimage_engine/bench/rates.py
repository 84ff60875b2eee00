"""What the device does in a second, measured here and now: matrix products, memory, the bus to it.

They are the limit that a picture is held against; knows no model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

#: Sides of the square matrices; the best rate of all of them counts, so that one saturates any device.
SIDES = (512, 1024, 2048, 4096, 8192)
#: No larger side is tried once a product takes so long: it is saturated long before.
LONG_SECONDS = 0.2
#: A side is tried for so long, and at least so often; what else the machine does only adds to the fastest.
ENOUGH_SECONDS, FEWEST = 0.4, 5
#: Far beyond any cache, and little of any memory.
COPIED_BYTES = 256 * 2**20
TINY_SIDES, TINY_COPIED_BYTES = (64, 128), 2**20


@dataclass(frozen=True, slots=True)
class MatmulRate:
    """The best rate of dense square products; `side` is that of the matrices that reached it."""

    dtype: str
    flops_per_second: float
    side: int


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """`memory_bytes_per_second` counts what is read and what is written of the device's own memory;
    `to_device_bytes_per_second` is the way there from locked memory of the host, None where there is none."""

    matmul: tuple[MatmulRate, ...]
    memory_bytes_per_second: float
    to_device_bytes_per_second: float | None

    def flops_per_second(self, dtype: str) -> float:
        """The rate in that dtype. Raises KeyError where it was not measured."""
        return {rate.dtype: rate.flops_per_second for rate in self.matmul}[dtype]


def measure_rates(device: str, tiny: bool = False) -> DeviceRates:
    """A few seconds of computing; with `tiny` none to speak of, and rates that mean nothing."""
    sides, size = (TINY_SIDES, TINY_COPIED_BYTES) if tiny else (SIDES, COPIED_BYTES)
    with torch.inference_mode():
        matmul = tuple(_matmul(dtype, sides, device, tiny) for dtype in ("bfloat16", "float32"))
        source = torch.ones(size, dtype=torch.uint8, device=device)
        there = torch.empty_like(source)
        copying = _fastest(lambda: there.copy_(source), device, tiny)
        to_device = None
        if device.startswith("cuda"):
            locked = torch.ones(size, dtype=torch.uint8, pin_memory=True)
            to_device = size / _fastest(lambda: there.copy_(locked, non_blocking=True), device, tiny)
    return DeviceRates(matmul, 2 * size / copying, to_device)


def _matmul(dtype: str, sides: tuple[int, ...], device: str, tiny: bool) -> MatmulRate:
    best = MatmulRate(dtype, 0.0, sides[0])
    for side in sides:
        # Random values: of zeros and ones some devices make more in a second than of a picture's.
        values = torch.randn(2, side, side, device=device).to(getattr(torch, dtype))
        left, right = values.unbind()
        answer = torch.empty_like(left)
        seconds = _fastest(lambda: torch.mm(left, right, out=answer), device, tiny)  # noqa: B023
        rate = 2 * side**3 / seconds
        if rate > best.flops_per_second:
            best = MatmulRate(dtype, rate, side)
        if seconds > LONG_SECONDS:
            break
    return best


def _fastest(act: Callable[[], object], device: str, tiny: bool) -> float:
    """Seconds of the fastest run, after two that make kernels and threads."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else _no_wait
    for _ in range(1 if tiny else 2):
        act()
    wait()
    fastest, done, began = math.inf, 0, time.perf_counter()
    while done < FEWEST or (not tiny and time.perf_counter() - began < ENOUGH_SECONDS):
        started = time.perf_counter()
        act()
        wait()
        fastest = min(fastest, time.perf_counter() - started)
        done += 1
    return fastest


def _no_wait() -> None:
    """What a processor is told, it has done when the call returns."""
