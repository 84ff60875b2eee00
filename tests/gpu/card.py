"""The device as the suite uses it: limited to a smaller card, its peaks, its rates, and a memory hog.

On the CPU there are no such figures: they are None, and an out-of-memory is raised instead of brought about.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from zimage_engine.memory.planner import DeviceSpeed
from zimage_engine.memory.snapshot import largest_free_block

GIB = 2**30
#: Matrices of this side are multiplied for the rate, and this much is copied: large enough to be steady.
MATRIX_SIDE, COPY_BYTES = 8192, 1 * GIB
TINY_MATRIX_SIDE, TINY_COPY_BYTES = 256, 2**22
TIMED_REPEATS = 10
#: Expandable segments grow by so much; a hog in whole steps takes no more than it means to.
ALLOCATOR_STEP_BYTES = 20 * 2**20
#: What is taken for a card's memory where there is no card: every way is then planned and drawn.
PRETENDED_BYTES = 32 * GIB


@dataclass(frozen=True)
class Peaks:
    """The most that was allocated and reserved at a time; None where the device does not tell."""

    allocated_bytes: int | None
    reserved_bytes: int | None


class Card:
    """One device. `limit` makes a smaller card of it, the CUDA context counted in."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.is_cuda = device.startswith("cuda")
        self.limit_bytes: int | None = None
        #: Held by the driver for this process beside the allocator's; the kernels used so far count.
        self.context_bytes = 0
        if self.is_cuda:
            torch.zeros(1, device=device)
            self.total_bytes = torch.cuda.mem_get_info(device)[1]
            self.name = torch.cuda.get_device_name(device)
            self.note_context()
        else:
            self.total_bytes = PRETENDED_BYTES
            self.name = "CPU (no memory figures)"

    def note_context(self) -> None:
        """Look what the context takes. Other programs on the card would be counted in."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
            free, total = torch.cuda.mem_get_info(self.device)
            taken = total - free - torch.cuda.memory_reserved(self.device)
            self.context_bytes = max(self.context_bytes, taken)

    @property
    def model_bytes(self) -> int:
        """What the model may take of the card as it is limited now."""
        return (self.limit_bytes or self.total_bytes) - self.context_bytes

    def limit(self, limit_bytes: int | None) -> None:
        """Be a card of this size; None is the card as it is."""
        self.limit_bytes = limit_bytes
        if self.is_cuda:
            share = 1.0 if limit_bytes is None else self.model_bytes / self.total_bytes
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), self.device)

    def clear(self) -> None:
        """Give back what is not in use."""
        if self.is_cuda:
            gc.collect()
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def begin_peaks(self) -> None:
        """Forget the peaks so far, and what was kept in reserve from the picture before."""
        self.clear()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> Peaks:
        """Since `begin_peaks`."""
        if not self.is_cuda:
            return Peaks(None, None)
        return Peaks(
            torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        )

    def true_fragmentation_ratio(self) -> float | None:
        """The part of the reserved and free memory that cannot be given out in one piece."""
        if not self.is_cuda:
            return None
        idle = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        largest = largest_free_block(torch.cuda.memory_snapshot(), torch.device(self.device).index or 0)
        return 1 - largest / idle if idle else 0.0

    def facts(self) -> dict[str, Any]:
        """What a report says of the machine."""
        return {
            "device": self.device,
            "name": self.name,
            "total_bytes": self.total_bytes if self.is_cuda else None,
            "context_bytes": self.context_bytes if self.is_cuda else None,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        }

    def speed(self, tiny: bool) -> DeviceSpeed:
        """The rates, measured: a bfloat16 matrix product and a copy from locked host memory. The disk's rate
        and the cost of starting a fetch are the planner's assumptions."""
        side = TINY_MATRIX_SIDE if tiny else MATRIX_SIDE
        size = TINY_COPY_BYTES if tiny else COPY_BYTES
        found = DeviceSpeed(
            flops_per_second=2 * side**3 / self._product_seconds(side),
            bus_bytes_per_second=size / self._copy_seconds(size),
        )
        self.clear()
        return found

    def _product_seconds(self, side: int) -> float:
        left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        return self._seconds(lambda: left @ right)

    def _copy_seconds(self, size: int) -> float:
        source = torch.empty(size, dtype=torch.uint8, pin_memory=self.is_cuda)
        there = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self._seconds(lambda: there.copy_(source, non_blocking=True))

    def _seconds(self, act: Callable[[], Any]) -> float:
        """The mean of some in a row after three that do not count."""
        for _ in range(3):
            act()
        self._wait()
        started = time.perf_counter()
        for _ in range(TIMED_REPEATS):
            act()
        self._wait()
        return (time.perf_counter() - started) / TIMED_REPEATS

    def _wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


class Hog:
    """Takes the card's memory away when a module is entered, once, and keeps it until it lets go.

    What is left is `left_bytes`; a `greedy` one takes what is there at every entry. On the CPU nothing is
    taken: the first `raises` entries end as they would on a full card.
    """

    def __init__(self, card: Card, left_bytes: int, greedy: bool, raises: int) -> None:
        self._card = card
        self._left_bytes = left_bytes
        self._greedy = greedy
        self._raises = raises
        self._held: list[torch.Tensor] = []
        self.held_bytes = 0
        self.entered = 0

    @contextmanager
    def at(self, module: torch.nn.Module) -> Iterator[None]:
        handle = module.register_forward_pre_hook(lambda *_: self._enter(), prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def _enter(self) -> None:
        self.entered += 1
        if self._card.is_cuda:
            if self._greedy or not self._held:
                self._take()
        elif self.entered <= self._raises:
            raise torch.OutOfMemoryError("out of memory (raised by the suite: the CPU has no limit)")

    def _take(self) -> None:
        self._card.clear()
        reserved = torch.cuda.memory_reserved(self._card.device)
        size = self._card.model_bytes - reserved - self._left_bytes
        size -= size % ALLOCATOR_STEP_BYTES
        if size > 0:
            self._held.append(torch.empty(size, dtype=torch.uint8, device=self._card.device))
            self.held_bytes += size

    def let_go(self) -> None:
        self._held.clear()
        self._card.clear()
