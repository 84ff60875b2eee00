"""The levers: rows that say what each does, where it can be tried, and which exclude one another.

Which of them is worth it is for a measurement on the very machine to say (`zimage_engine.tuning`). Knows no
torch and no pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

#: Levers that act on pictures of about this many pixels a side, as the root of the area, by their names.
Choices = Mapping[int, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class LeverFacts:
    """What can be said of a loaded model and its device before anything is tried.

    `device` is its kind ("cuda", "cpu", "mps"). `has_blocks`: the denoiser repeats blocks that can be
    compiled one by one. `builds_kernels`: a compiler is there that turns compiled code into the device's own.
    """

    device: str
    has_blocks: bool
    builds_kernels: bool


@dataclass(frozen=True, slots=True)
class Lever:
    """Something that may be quicker. Of those with one `group` at most one acts at a time.

    `devices` are the kinds on which it can be quicker at all; `compiles`: it takes part in compiled code.
    """

    name: str
    title: str
    group: str
    devices: tuple[str, ...]
    because: str
    compiles: bool = False

    def refusal(self, facts: LeverFacts) -> str | None:
        """Why it cannot be tried here, in a clause; None where it can."""
        if facts.device not in self.devices:
            return f"it is for {' and '.join(self.devices)}, and this is {facts.device}"
        if self.compiles and not facts.has_blocks:
            return "this model's denoiser repeats no blocks"
        if self.compiles and not facts.builds_kernels:
            on_cpu = facts.device == "cpu"
            needed = "a C++ compiler (g++ or clang++)" if on_cpu else "triton and a C compiler (gcc or clang)"
            return f"compiling needs {needed}, which is not installed"
        return None


#: In the order in which they are tried: compiled code is made for the attention that was chosen before it.
LEVERS: tuple[Lever, ...] = (
    Lever(
        "attention_cudnn",
        "attention by cuDNN",
        "attention",
        ("cuda",),
        "on recent cards cuDNN's fused kernel is the quickest of torch's, and torch does not choose it first",
    ),
    Lever(
        "attention_flash",
        "attention by FlashAttention",
        "attention",
        ("cuda",),
        "where no mask is needed; with a mask the next kernel takes over",
    ),
    Lever(
        "attention_efficient",
        "memory-efficient attention",
        "attention",
        ("cuda",),
        "takes masks, and is quicker than FlashAttention on some older cards",
    ),
    Lever(
        "channels_last_vae",
        "channels-last VAE",
        "layout",
        ("cuda", "cpu"),
        "convolutions read the channels of a pixel side by side, which the fused kernels want",
    ),
    Lever(
        "compiled",
        "compiled blocks",
        "compile",
        ("cuda", "cpu"),
        "norms, activations and casts of a block run as few kernels instead of dozens",
        compiles=True,
    ),
    Lever(
        "cuda_graphs",
        "compiled blocks in CUDA graphs",
        "compile",
        ("cuda",),
        "the kernels of a block are launched at once: the host is the limit with small pictures",
        compiles=True,
    ),
)
LEVER_NAMES: tuple[str, ...] = tuple(lever.name for lever in LEVERS)
_BY_NAME: Mapping[str, Lever] = {lever.name: lever for lever in LEVERS}


def lever_named(name: str) -> Lever:
    """The row. Raises KeyError for another name."""
    return _BY_NAME[name]


def with_lever(chosen: Iterable[str], name: str) -> tuple[str, ...]:
    """`chosen` and the lever `name`, which takes the place of the one of its group; in the table's order."""
    group = _BY_NAME[name].group
    names = {name, *(each for each in chosen if _BY_NAME[each].group != group)}
    return tuple(each for each in LEVER_NAMES if each in names)


def compiles(chosen: Collection[str]) -> str | None:
    """The lever among them that is compiled code, of those that this version knows; None where none is."""
    return next((name for name in chosen if name in _BY_NAME and _BY_NAME[name].compiles), None)


def only(choices: Choices, wanted: Callable[[Lever], bool]) -> Choices:
    """The same with those levers alone that are `wanted`."""
    return {
        bucket: tuple(name for name in names if wanted(_BY_NAME[name])) for bucket, names in choices.items()
    }


def names_in(choices: Choices) -> tuple[str, ...]:
    """Every lever that acts at some size, in the table's order."""
    found = {name for names in choices.values() for name in names}
    return tuple(name for name in LEVER_NAMES if name in found)


def size_bucket(width_px: int, height_px: int) -> int:
    """A side in pixels that stands for all sizes of about that area: a power of the root of two.

    1024x1024 and 1344x768 are in 1024, 768x768 is in 724, 512x512 in 512.
    """
    halves = round(math.log2(max(1, width_px * height_px)))
    return round(2 ** (halves / 2))


def agreeing(choices: Choices) -> Choices:
    """The same, with compiled code only where it is one for all sizes.

    Blocks are compiled once, together with the attention that acted then; of choices that differ in either
    the largest size's is kept, and the others do without compiled code.
    """
    kept: dict[int, tuple[str, ...]] = {}
    wanted: tuple[str, ...] | None = None
    for bucket in sorted(choices, reverse=True):
        names = choices[bucket]
        if compiles(names) is not None:
            part = tuple(name for name in names if _BY_NAME[name].group in ("attention", "compile"))
            wanted = part if wanted is None else wanted
            if part != wanted:
                names = tuple(name for name in names if not _BY_NAME[name].compiles)
        kept[bucket] = names
    return {bucket: kept[bucket] for bucket in sorted(kept)}
