"""Brings a model's files into the system's cache while something else is still on its way; imports no torch.

    reading = ReadingAhead(lambda: adapter.weight_files)
    import torch                          # seconds, in which the disk would have nothing to do
    engine = Engine.load(...)             # finds in memory what was read meanwhile
    reading.wait()

It reads files whole, in the order in which they will be wanted, in large pieces and several at a time, where
a loader that maps them waits for the disk at each page. What was read is never put out again by what is read
after it: only so much is read as the memory holds beside what is there. It changes nothing of what is loaded,
and keeps its errors to itself: a file that is missing or damaged is for the loader to tell.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from zimage_engine.cpu import control_group_folders
from zimage_engine.errors import EngineError

logger = logging.getLogger(__name__)

#: Reads that are under way at a time: a fast disk answers several sooner than one after another, and makes no
#: difference to a slow one (2.2 GB/s with one, 2.5 with two, 2.3 to 2.6 with four on a virtual disk).
READERS = 4
PIECE_BYTES = 8 * 2**20
#: What of the memory that is free for it is taken: loading itself needs some, and others do.
PART_OF_FREE = 0.8

#: The files with a control group's limit and what of it is in use, by the version.
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")


@dataclass(frozen=True, slots=True)
class FilePart:
    """A stretch of a file."""

    file: Path
    start: int
    bytes: int


@dataclass(frozen=True, slots=True)
class ReadingProgress:
    """How far it is; `wanted_bytes` is 0 until the files have been looked at."""

    read_bytes: int
    wanted_bytes: int

    @property
    def ratio(self) -> float | None:
        """The part that is read, 0 to 1; None where nothing is known to be wanted."""
        return min(1.0, self.read_bytes / self.wanted_bytes) if self.wanted_bytes else None


class ReadingAhead:
    """Reads from the moment at which it is made, in threads that end by themselves, or with the process."""

    def __init__(
        self,
        files: Callable[[], Sequence[Path]],
        free_bytes: Callable[[], int] | None = None,
        readers: int = READERS,
    ) -> None:
        """`files` is called in the first of the threads; what it raises as EngineError or OSError means none.

        `free_bytes` tells how much memory files may take now, None: `bytes_free_for_files`.
        """
        self._files = files
        self._free_bytes = free_bytes or bytes_free_for_files
        self._readers = readers
        self._lock = threading.Lock()
        self._waiting: Iterator[FilePart] = iter(())
        self._progress = ReadingProgress(0, 0)
        self._is_to_stop = threading.Event()
        # As daemons, for a program that ends earlier does not wait for them.
        self._thread = threading.Thread(target=self._read, name="reading ahead", daemon=True)
        self._thread.start()

    @property
    def progress(self) -> ReadingProgress:
        """How far it is, from any thread."""
        return self._progress

    def wait(self, seconds: float | None = None) -> bool:
        """Returns when all is read, or `seconds` are over; whether it is at its end."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Read no further; pieces that are under way are read to their end."""
        self._is_to_stop.set()

    def _read(self) -> None:
        try:
            parts = parts_to_read(self._files(), int(PART_OF_FREE * self._free_bytes()))
        except (EngineError, OSError) as error:
            logger.debug("nothing is read ahead: %s", error)
            return
        self._progress = ReadingProgress(0, sum(part.bytes for part in parts))
        self._waiting = iter(parts)
        others = [
            threading.Thread(target=self._read_parts, name="reading ahead", daemon=True)
            for _ in range(self._readers - 1)
        ]
        for other in others:
            other.start()
        self._read_parts()
        for other in others:
            other.join()

    def _read_parts(self) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        while not self._is_to_stop.is_set():
            with self._lock:
                part = next(self._waiting, None)
            if part is None:
                return
            # The loader meets it as well, and tells.
            with contextlib.suppress(OSError):
                _read_part(part, buffer)
            with self._lock:
                done = self._progress
                self._progress = ReadingProgress(done.read_bytes + part.bytes, done.wanted_bytes)


def parts_to_read(files: Sequence[Path], most_bytes: int) -> list[FilePart]:
    """The files in pieces, from the first on and no more than `most_bytes`; what is not there is left out."""
    parts = []
    left_bytes = most_bytes
    for file in files:
        try:
            size_bytes = file.stat().st_size
        except OSError:
            continue
        for start in range(0, min(size_bytes, left_bytes), PIECE_BYTES):
            parts.append(FilePart(file, start, min(PIECE_BYTES, size_bytes - start, left_bytes - start)))
        left_bytes = max(0, left_bytes - size_bytes)
    return parts


def bytes_free_for_files(root: Path = Path("/")) -> int:
    """How much memory files may take: what the system can spare, within the limits of control groups.

    Files that are in memory already count as free, here as there, since others may take their place.
    """
    rooms = (_room_in(folder) for folder in control_group_folders("memory", root))
    available: int = psutil.virtual_memory().available
    return min([available, *(room for room in rooms if room is not None)])


def _room_in(folder: Path) -> int | None:
    """What one group has left of its limit; None without one. The files: cgroup-v2, cgroup-v1/memory."""
    is_v2 = (folder / "memory.max").exists()
    limit, used = V2 if is_v2 else V1
    try:
        limit_bytes = int((folder / limit).read_text())
        used_bytes = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max" is no limit
        return None
    kinds = ("active_file", "inactive_file")
    cached_bytes = sum(int(stat.get(kind if is_v2 else f"total_{kind}", 0)) for kind in kinds)
    return max(0, limit_bytes - used_bytes + cached_bytes)


def _read_part(part: FilePart, buffer: memoryview) -> None:
    with part.file.open("rb", buffering=0) as opened:
        opened.seek(part.start)
        left_bytes = part.bytes
        while left_bytes and (read_bytes := opened.readinto(buffer[:left_bytes])):
            left_bytes -= read_bytes
