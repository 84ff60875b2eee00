"""Takes a model out of memory again, whole, so that another one has its place. Knows no server."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from zimage_engine.checkpoint.features import CheckpointFeatures
from zimage_engine.engine import Engine
from zimage_engine.families import ModelFamily
from zimage_engine.memory.footprint import footprint_of
from zimage_engine.memory.snapshot import take_snapshot

#: Beside its weights a model needs room for what it computes, and for their copies while they are brought in.
ROOM_RATIO = 1.25

_READ_BYTES = 16 * 2**20


def unload(engine: Engine) -> None:
    """Free all that `engine` holds, whoever still holds the engine itself, which can do nothing from now on.

    To be called from the thread that drew with it.
    """
    device = engine.description.device
    vars(engine).clear()
    # The pipeline, its modules and their hooks refer to each other in rings, which are not looked for among
    # what was frozen: a server does that with all that is there when it has started.
    was_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if was_frozen:
        gc.freeze()
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.empty_cache()
    elif kind == "mps":
        torch.mps.empty_cache()
    if sys.platform == "linux":
        # What glibc keeps of freed pieces goes back to the system; other libraries of C have no such call.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def weight_bytes(engine: Engine) -> int:
    """What the weights of a loaded model take, wherever they are."""
    modules = [part for part in engine.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    tensors = {id(tensor): tensor for part in modules for tensor in (*part.parameters(), *part.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def weight_bytes_of_files(features: CheckpointFeatures, family: ModelFamily) -> int:
    """What the weights will take once they are loaded. Raises CheckpointDamaged as `footprint_of`."""
    return sum(part.bytes for part in footprint_of(features, family).components.values())


def reachable_bytes(device: str) -> int:
    """What could be allocated on `device` now; of one without memory of its own, of the host's."""
    snapshot = take_snapshot(device)
    reachable = snapshot.reachable_bytes
    return snapshot.host_available_bytes if reachable is None else reachable


def read_through(files: list[Path], on_read: Callable[[float], None]) -> None:
    """Bring files from the disk into the system's cache, so that loading them takes no longer than it must.

    `on_read` hears the part that is done, 0 to 1, after each piece.
    """
    total_bytes = sum(file.stat().st_size for file in files) or 1
    done_bytes = 0
    piece = bytearray(_READ_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while read_bytes := opened.readinto(piece):
                done_bytes += read_bytes
                on_read(min(1.0, done_bytes / total_bytes))


def can_stay(loaded_bytes: list[int], wanted_bytes: int, free_bytes: int) -> int:
    """How many of the loaded models, the last of the list first, can stay where another one comes in.

    The list begins with the one to go first. Where even all must go, the new one is tried all the same: the
    memory plan may still find a way for it.
    """
    needed_bytes = wanted_bytes * ROOM_RATIO
    for leaving, leaving_bytes in enumerate((0, *_running_sums(loaded_bytes))):
        if free_bytes + leaving_bytes >= needed_bytes:
            return len(loaded_bytes) - leaving
    return 0


def _running_sums(sizes: list[int]) -> list[int]:
    return [sum(sizes[: count + 1]) for count in range(len(sizes))]
