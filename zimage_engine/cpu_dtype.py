"""Whether this processor computes faster in bfloat16 or in float32: measures, remembers, decides.

Processors without instructions for bfloat16 convert every value on its way, and some operations have no fast
kernel at all: a picture can take many times longer than in float32. Knows no model but its widths.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: The word for "whatever is faster here".
AUTO = "auto"

#: float32 takes twice the memory and draws other pixels: it must be worth that.
MIN_GAIN = 1.25
#: What a copy of the weights must leave of the host's available memory, for activations and for others.
MEMORY_LEFT = 0.25

#: Wide enough to be busy with arithmetic, narrow enough that a slow processor is done in a second.
MOST_MATMUL_WIDTH = 1024
MOST_CHANNELS = 128
TOKENS = 256
CONV_SIDE_PX = 32

_ROUNDS = 8
#: At least this many rounds; after that many seconds no further one.
_FEWEST_ROUNDS = 2
_ENOUGH_SECONDS = 0.1

_FORMAT_VERSION = 1
_BFLOAT16_SETS = ("avx512_bf16", "amx_bf16", "avx_ne_convert")


@dataclass(frozen=True, slots=True)
class Widths:
    """The matrix and the convolution that most of a model's weights are in, cut to what is quick to try."""

    matmul_in: int
    matmul_out: int
    conv_in: int
    conv_out: int


@dataclass(frozen=True, slots=True)
class DtypeSpeeds:
    """Seconds of one matrix product and one convolution in each dtype: the fastest of several, since
    whatever else the machine does only adds to them."""

    matmul_bfloat16: float
    matmul_float32: float
    conv_bfloat16: float
    conv_float32: float

    @property
    def gain(self) -> float:
        """How many times faster float32 is; the two operations count alike."""
        matmul = self.matmul_bfloat16 / self.matmul_float32
        return math.sqrt(matmul * self.conv_bfloat16 / self.conv_float32)


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """What to compute in, and why, in a clause."""

    dtype: str
    because: str


def choose_dtype(speeds: DtypeSpeeds, float32_bytes: int, available_bytes: int) -> DtypeChoice:
    """float32 where it is clearly faster and its weights, a copy of the files', fit; else bfloat16."""
    gain = speeds.gain
    measured = "matrix products and convolutions are measured to be"
    if gain < 1:
        return DtypeChoice("bfloat16", f"{measured} {1 / gain:.1f} times as fast as in float32 here")
    if gain < MIN_GAIN:
        return DtypeChoice(
            "bfloat16", f"{measured} only {gain:.2f} times as fast in float32 here, for twice the memory"
        )
    faster = f"{measured} {gain:.1f} times as fast in float32 here"
    if float32_bytes > available_bytes * (1 - MEMORY_LEFT):
        needed, free = (f"{size / 2**30:.1f} GiB" for size in (float32_bytes, available_bytes))
        return DtypeChoice(
            "bfloat16", f"{faster}, but its weights take {needed}, and {free} of memory are free"
        )
    return DtypeChoice("float32", faster)


def widths_of(denoiser: Iterable[tuple[int, ...]], vae: Iterable[tuple[int, ...]]) -> Widths:
    """From the shapes of all tensors of a model's denoiser and VAE."""
    matmul_out, matmul_in = _commonest(denoiser, 2) or (MOST_MATMUL_WIDTH, MOST_MATMUL_WIDTH)
    conv_out, conv_in, *_ = _commonest(vae, 4) or (MOST_CHANNELS, MOST_CHANNELS)
    return Widths(
        min(matmul_in, MOST_MATMUL_WIDTH),
        min(matmul_out, MOST_MATMUL_WIDTH),
        min(conv_in, MOST_CHANNELS),
        min(conv_out, MOST_CHANNELS),
    )


def _commonest(shapes: Iterable[tuple[int, ...]], dimensions: int) -> tuple[int, ...] | None:
    """The shape that the most weights are in; of equals the larger, so that no order matters."""
    counted = Counter(shape for shape in shapes if len(shape) == dimensions)
    return max(counted, key=lambda shape: (counted[shape] * math.prod(shape), shape), default=None)


def measured_speeds(widths: Widths, folder: Path) -> DtypeSpeeds:
    """As measured here before and noted in `folder`, else measured now and noted: a model keeps its dtype
    from one start to the next. A folder that cannot be written is no error."""
    note = folder / _key(widths)
    known = _read_note(note)
    if known is not None:
        return known
    speeds = measure_speeds(widths)
    _write_note(note, speeds)
    return speeds


def measure_speeds(widths: Widths) -> DtypeSpeeds:
    """Tens of milliseconds of computing, a second or two where a processor is very slow in one dtype."""
    import torch

    with torch.inference_mode():
        works = {
            f"{operation}_{name}": work
            for name in ("bfloat16", "float32")
            for operation, work in _works(widths, getattr(torch, name)).items()
        }
        for work in works.values():  # the first call makes kernels and threads
            work()
        fastest = dict.fromkeys(works, math.inf)
        began = time.perf_counter()
        for done in range(_ROUNDS):
            if done >= _FEWEST_ROUNDS and time.perf_counter() - began > _ENOUGH_SECONDS:
                break
            # Side by side, so that what else the machine does meets both.
            for name, work in works.items():
                fastest[name] = min(fastest[name], _seconds(work))
    return DtypeSpeeds(**fastest)


def _works(widths: Widths, dtype: Any) -> dict[str, Callable[[], Any]]:
    import torch
    from torch.nn import functional

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype)

    tokens, matrix = ones(TOKENS, widths.matmul_in), ones(widths.matmul_out, widths.matmul_in)
    picture = ones(1, widths.conv_in, CONV_SIDE_PX, CONV_SIDE_PX)
    kernel = ones(widths.conv_out, widths.conv_in, 3, 3)
    return {
        "matmul": lambda: functional.linear(tokens, matrix),
        "conv": lambda: functional.conv2d(picture, kernel, padding=1),
    }


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def has_bfloat16_instructions() -> bool:
    """False where an x86 processor says that it has none; asks, does not measure."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    # Others name their sets otherwise, or not at all.
    return capabilities.get("architecture") != "x86_64" or any(
        capabilities.get(name) for name in _BFLOAT16_SETS
    )


def _key(widths: Widths) -> str:
    """32 hex digits for all that the speeds depend on."""
    import torch

    facts = {
        "format": _FORMAT_VERSION,
        "widths": asdict(widths),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "processor": {name: str(value) for name, value in torch.cpu.get_capabilities().items()},
        "machine": platform.machine(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _read_note(note: Path) -> DtypeSpeeds | None:
    try:
        said: Mapping[str, float] = json.loads(note.read_text(encoding="utf-8"))
        speeds = DtypeSpeeds(**{name: float(seconds) for name, seconds in said.items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return speeds if all(0 < seconds < math.inf for seconds in asdict(speeds).values()) else None


def _write_note(note: Path, speeds: DtypeSpeeds) -> None:
    """Whole or not at all."""
    unfinished = note.with_name(f".{note.name}.{secrets.token_hex(4)}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(asdict(speeds)), encoding="utf-8")
        unfinished.replace(note)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
