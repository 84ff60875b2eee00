"""Looks for NaN and infinite values among weights, in memory or in files; knows no model and no pipeline."""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from zimage_engine.checkpoint.tensors import WeightFile
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading.tensor_writer import FLOATING_WORDS, KEPT_DTYPES

#: Large, because a thread that takes Python's lock back after each piece waits 5 ms for a busy one; small
#: enough to be given up soon when loading fails.
_PIECE_BYTES = 256_000_000


@dataclass(frozen=True, slots=True)
class _Bits:
    """A floating dtype as integers: the signed and unsigned numpy types, and infinity's bits without sign."""

    signed: str
    unsigned: str
    infinity: int
    negative_infinity: int

    def are_finite(self, values: np.ndarray) -> bool:
        """Whether bytes hold neither NaN nor infinity: as integers those are the largest of their sign.

        numpy's reductions run on one core and leave the others to whoever loads; torch's threads wait for
        one another in a loop, which took four times the processor time beside a busy one.
        """
        return values.size == 0 or (
            int(values.view(self.signed).max()) < self.infinity
            and int(values.view(self.unsigned).max()) < self.negative_infinity
        )


_BITS = {
    "BF16": _Bits("<i2", "<u2", 0x7F80, 0xFF80),
    "F16": _Bits("<i2", "<u2", 0x7C00, 0xFC00),
    "F32": _Bits("<i4", "<u4", 0x7F800000, 0xFF800000),
}


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; numbers without a fraction always are finite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # NaN goes through aminmax, which reads as fast as memory gives and makes no copy; isfinite took 70
    # times as long in bfloat16 on a CPU.
    least, greatest = torch.aminmax(tensor)
    return bool(torch.isfinite(least)) and bool(torch.isfinite(greatest))


def not_finite(component: str, tensor_name: str) -> CheckpointDamaged:
    """What to raise for a tensor with such a value."""
    return CheckpointDamaged(
        f"{component}: {tensor_name} holds NaN or infinite values, which draw black pictures; "
        "fetch the weight files again"
    )


class StoredWeightsCheck:
    """Reads weight files in a thread of its own while the block runs, which loads them meanwhile.

        with StoredWeightsCheck(plan.weights, "bfloat16") as stored:
            pipeline = load()
            stored.check("transformer")  # waits for the thread; raises CheckpointDamaged

    Stock diffusers maps files that have the wanted dtype, reads none of their weights, and keeps one core
    busy; so what is done here meanwhile takes no time where a second core is free. `components` are those
    that it looks at: whose weights are in safetensors files and are not cast on the way into memory, where
    others could become infinite.
    """

    def __init__(self, weights: Mapping[str, tuple[WeightFile, ...]], dtype: str) -> None:
        unchanged = {FLOATING_WORDS[dtype], *KEPT_DTYPES} if FLOATING_WORDS[dtype] in _BITS else set()
        self._files = {
            component: files
            for component, files in weights.items()
            if all(file.form == "safetensors" for file in files)
            and all(tensor.dtype in unchanged for file in files for tensor in file.tensors)
        }
        self.components = frozenset(self._files)

    def __enter__(self) -> StoredWeightsCheck:
        self._is_over = threading.Event()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights-check")
        self._found: dict[str, Future[str | None]] = {
            component: self._reader.submit(self._first_not_finite, files)
            for component, files in self._files.items()
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._reader.shutdown(wait=True, cancel_futures=True)

    def check(self, component: str) -> None:
        """Wait until the files of `component` (one of `components`) are read; raise for a bad tensor."""
        name = self._found[component].result()
        if name is not None:
            raise not_finite(component, name)

    def _first_not_finite(self, files: tuple[WeightFile, ...]) -> str | None:
        for file in files:
            for run in _runs(file):
                for first in range(0, len(run.values), _PIECE_BYTES):
                    if self._is_over.is_set():
                        return None
                    if not run.bits.are_finite(run.values[first : first + _PIECE_BYTES]):
                        return run.first_not_finite()
        return None


@dataclass(frozen=True, slots=True)
class _Run:
    """Floating tensors of one dtype that lie side by side in a file: `places` are names and
    where in `values` each begins and ends."""

    values: np.ndarray
    bits: _Bits
    places: tuple[tuple[str, int, int], ...]

    def first_not_finite(self) -> str:
        return next(
            name for name, begin, end in self.places if not self.bits.are_finite(self.values[begin:end])
        )


def _runs(file: WeightFile) -> Iterator[_Run]:
    """The floating tensors of a safetensors file, whose header was found sound, mapped and not yet read."""
    with file.path.open("rb") as opened:
        size_bytes = os.fstat(opened.fileno()).st_size
        if size_bytes != file.size_bytes:
            raise CheckpointDamaged(
                f"{file.path} had {file.size_bytes} bytes when its header was read and has {size_bytes} now; "
                "wait until it is written and try again"
            )
        header_bytes = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(header_bytes))
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(mapped, np.uint8)[8 + header_bytes :]
    entries.pop("__metadata__", None)
    in_order = sorted(
        ((name, entry["dtype"], *entry["data_offsets"]) for name, entry in entries.items()),
        key=lambda row: row[2:],
    )
    for dtype, rows in groupby(in_order, key=lambda row: row[1]):
        if dtype in _BITS:
            places = [(name, begin, end) for name, _, begin, end in rows]
            start, stop = places[0][1], places[-1][2]
            near = tuple((name, begin - start, end - start) for name, begin, end in places)
            yield _Run(data[start:stop], _BITS[dtype], near)
