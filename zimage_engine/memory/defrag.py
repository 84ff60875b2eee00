"""Wins memory back that lies free on the device and still cannot be used. Knows no model's shape.

What PyTorch can do, and cannot. Its allocator takes segments from the driver and cuts blocks out of them. A
segment with no block in use can be given back (`empty_cache`); one with a single small block in use cannot,
and no block is ever moved: there is no compaction. With `expandable_segments:True`, which must be in
`PYTORCH_ALLOC_CONF` before CUDA starts, a segment grows and shrinks by pages, so most of the waste does not
come about. What remains is the deep form: every weight leaves for the host, the then empty pool is given back
whole, and the weights return into fresh ones. It costs a trip over the bus both ways, so it comes last, and
between requests alone: within a step tensors are in use that nobody here knows. cudaMallocAsync keeps no such
figures: the ratio is 0 there and nothing is ever decided.

Sizes are not rounded into buckets here. A picture has the size that was asked for, and its tensors are the
pipeline's own: there is no buffer of ours from one picture to the next to round up. Expandable segments are
PyTorch's answer to sizes that change (notes on CUDA semantics, "Optimizing memory usage"): blocks of any size
are laid into one segment, which grows where none that is free is large enough. Without them who must can have
the allocator itself round, by `roundup_power2_divisions` in the same variable.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from zimage_engine.memory.snapshot import MemorySnapshot

Defrag = Literal["none", "empty_cache", "deep"]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When it is worth it. The defaults are chosen, not measured.

    Fragments below `least_bytes` are not worth a pause. The cache is emptied where fragments or free reserved
    memory take `empty_cache_ratio` of what is reserved; the deep form comes at `deep_ratio`, and only where
    emptying did not help just before.
    """

    least_bytes: int = 256 * 2**20
    empty_cache_ratio: float = 0.2
    deep_ratio: float = 0.35


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and why in a sentence."""

    kind: Defrag
    because: str


@dataclass(frozen=True, slots=True)
class DefragReport:
    """What was done, how long it took, and by how much the reserved memory fell (None: not told)."""

    kind: Defrag
    because: str
    seconds: float
    released_bytes: int | None


def decide(
    snapshot: MemorySnapshot, thresholds: Thresholds | None = None, emptied_before: bool = False
) -> Decision:
    """What the figures ask for between two requests; `emptied_before`: emptying was the last thing done."""
    limits = thresholds or Thresholds()
    ratio, reserved = snapshot.fragmentation_ratio, snapshot.reserved_bytes
    if ratio is None or not reserved:
        return Decision("none", f"{snapshot.device} tells nothing of fragments")
    fragments = round(ratio * reserved)
    idle = reserved - (snapshot.allocated_bytes or 0)
    if idle < limits.least_bytes:
        return Decision("none", f"{_mib(idle)} MiB lie idle, below {_mib(limits.least_bytes)} MiB")
    if emptied_before and ratio >= limits.deep_ratio and fragments >= limits.least_bytes:
        return Decision("deep", f"{ratio:.0%} of the reserved memory are fragments after emptying the cache")
    idle_ratio = idle / reserved
    if not emptied_before and idle_ratio >= limits.empty_cache_ratio:
        return Decision("empty_cache", f"{idle_ratio:.0%} of the reserved memory lie idle")
    return Decision("none", f"{idle_ratio:.0%} of the reserved memory lie idle, {ratio:.0%} as fragments")


def defragment(
    decision: Decision,
    device: str,
    reserved_bytes: Callable[[], int | None],
    weights_away: Callable[[], None],
    weights_back: Callable[[], None],
) -> DefragReport:
    """Do what was decided. Never within a step.

    `weights_away` takes every weight off the device and `weights_back` puts them where they were; the deep
    form alone calls them. `reserved_bytes` is asked before and after.
    """
    started = time.perf_counter()
    before = reserved_bytes()
    if decision.kind == "deep":
        weights_away()
        try:
            release_cache(device)
        finally:
            weights_back()
    elif decision.kind == "empty_cache":
        release_cache(device)
    after = reserved_bytes()
    released = None if before is None or after is None else before - after
    return DefragReport(decision.kind, decision.because, time.perf_counter() - started, released)


def release_cache(device: str) -> None:
    """Give free segments back to the driver; tensors in reference cycles are let go first."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    elif device.startswith("mps"):
        torch.mps.empty_cache()


def _mib(size_bytes: int) -> int:
    return size_bytes // 2**20
