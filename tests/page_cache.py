"""Puts files out of the system's page cache, and asks what of them is in it; on Linux."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path


def put_out(files: Iterable[Path]) -> None:
    """As far as the system follows: what a file system in memory holds stays, and so does what is mapped."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is not written yet stays
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def part_in_memory(files: Iterable[Path]) -> float:
    """How much of the files is in the cache, 0 to 1; asking reads nothing of them."""
    libc = ctypes.CDLL(None, use_errno=True)
    there = total = 0
    for file in files:
        size = file.stat().st_size
        if not size:
            continue
        pages = -(-size // mmap.PAGESIZE)
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
            found = (ctypes.c_ubyte * pages)()
            first = ctypes.c_ubyte.from_buffer(mapped)
            answer = libc.mincore(ctypes.byref(first), ctypes.c_size_t(size), found)
            del first
            if answer:
                raise OSError(ctypes.get_errno(), f"mincore does not tell of {file}")
        there += sum(page & 1 for page in found)
        total += pages
    return there / max(1, total)
