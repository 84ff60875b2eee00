"""Where the weights are while a picture is drawn: the words that measuring, planning and doing share.

Knows no torch; sizes are bytes.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zimage_engine.errors import InvalidRequest

_UNITS = {
    letter + ending: base**power
    for power, letter in enumerate("KMGT", start=1)
    for ending, base in (("", 1024), ("B", 1000), ("IB", 1024))
}


class Residency(enum.Enum):
    """How much of a model stays on the device, the fastest first. The value is what `--offload` takes."""

    #: Everything stays.
    NONE = "none"
    #: Text encoder, denoiser and VAE take turns; the denoiser is whole on the device while it works.
    MODEL = "model"
    #: As many of the denoiser's blocks as fit stay, the others are fetched one ahead of their turn.
    STREAM = "stream"
    #: Every module is fetched when it is called, and given back.
    SEQUENTIAL = "sequential"
    #: As sequential, and what is not on the device lies on the disk.
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What a way of quantising weights takes. Sizes are those of torchao 0.18, which keeps a scale a row.

    `row_bytes` goes with each row of a matrix beside a byte a value. While a layer computes,
    `working_copies` of its matrix are there in the dtype of the computing, and where activations are narrowed
    too, `input_bytes` for each value that goes in or `output_bytes` for each that comes out, for each token.
    `verb` says what a device must do; `needs_int8`: so must a CPU; `capability` is the least of an Nvidia
    card, None: any card, and `answers` the one dtype that a card's product comes out in, None: any. `instead`
    is the way that asks less.
    """

    word: str
    row_bytes: int
    working_copies: int
    because: str
    verb: str
    input_bytes: int = 0
    output_bytes: int = 0
    is_on_apple: bool = False
    needs_int8: bool = False
    capability: tuple[int, int] | None = None
    answers: str | None = None
    instead: str = "int8"

    def token_bytes(self, shapes: Iterable[tuple[int, int]]) -> int:
        """The most that a layer with one of these matrices `(out, in)` makes for one token to narrow it."""
        return max(
            (
                max(self.input_bytes * values_in, 2 * values_in + self.output_bytes * values_out)
                for values_out, values_in in shapes
                if self.input_bytes
            ),
            default=0,
        )


#: What `--quantize` takes.
QUANTISATIONS: Mapping[str, Quantisation] = {
    row.word: row
    for row in (
        Quantisation(
            "int8",
            4 + 1,
            1,
            "a float32 scale and an int8 zero point; the matrix is widened once",
            verb="reads int8 values",
            is_on_apple=True,
        ),
        Quantisation(
            "fp8",
            4,
            5,
            "a float32 scale; widened to float32, scaled there, and narrowed: 2 + 2 + 1 copies",
            verb="reads float8 values",
        ),
        Quantisation(
            "int8-dynamic",
            4 + 1,
            1,
            "stored as int8; a card puts the matrix in another order, which is half a copy, and a processor "
            "makes none; eager code narrows what goes in by way of float32, and int32 products as well",
            verb="multiplies in int8",
            input_bytes=9,
            output_bytes=8,
            needs_int8=True,
            capability=(7, 5),
        ),
        Quantisation(
            "fp8-dynamic",
            4,
            0,
            "stored as fp8; a card multiplies by what is stored; eager code scales and clamps in float32. A "
            "processor has no such product and widens both, which is not counted: it has no memory to plan",
            verb="multiplies in float8",
            input_bytes=13,
            output_bytes=2,
            capability=(8, 9),
            answers="bfloat16",
            instead="fp8",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class MemoryWishes:
    """What a person has decided about the device's memory.

    `offload` is "none", "model", "stream", "sequential" or "disk", None: whatever is fastest and fits.
    `vram_bytes` is the most that may be used, None: what there is. `float8` keeps the denoiser's matrices in
    half the room by casting alone; `quantize`, a word of `QUANTISATIONS`, does it with a scale for each row,
    and leaves sensitive layers as they are; the dynamic ones multiply in the small type too. Raises
    InvalidRequest for another word, and for what excludes something else.
    """

    offload: str | None = None
    vram_bytes: int | None = None
    float8: bool = False
    quantize: str | None = None

    def __post_init__(self) -> None:
        ways = [way.value for way in Residency]
        if self.offload is not None and self.offload not in ways:
            raise InvalidRequest(f"offload must be one of {', '.join(ways)}, got {self.offload!r}", "offload")
        if self.quantize is None:
            return
        if self.quantize not in QUANTISATIONS:
            words = ", ".join(QUANTISATIONS)
            raise InvalidRequest(f"quantize must be one of {words}, got {self.quantize!r}", "quantize")
        if self.float8:
            raise InvalidRequest(
                "float8 and quantize are two ways of storing the same matrices in one byte a value; "
                "choose one of them",
                "quantize",
            )
        if self.offload == Residency.SEQUENTIAL.value:
            raise InvalidRequest(
                "offload sequential moves layers by diffusers' own hooks, under which quantised weights are "
                "not known to stay as they are; choose none, model, stream or disk, or leave out quantize",
                "offload",
            )


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """What was decided about memory for one model on one device, and why, in a line.

    `resident_blocks` of `blocks` of the denoiser stay on the device (all with NONE and MODEL, fewer with
    STREAM, none below). `release_text_encoder`: it leaves the device once the prompts are encoded.
    `vae_tile_px` is the side of the pieces in which the VAE decodes, None for all at once. `peak_bytes` is
    the prediction for `width_px` x `height_px` with guidance as given; `relative_speed` is 1 where all is
    resident.

    `stream_text_encoder`: its layers are fetched one ahead of their turn while the prompts are encoded,
    instead of the whole at once. `streamed_blocks` are the paths of the denoiser's blocks that are fetched,
    in the order in which they are called. `host_bytes` is what lies in the host's memory instead. `quantize`
    is the way in which the denoiser's matrices are quantised.
    """

    residency: Residency
    blocks: int
    resident_blocks: int
    release_text_encoder: bool
    vae_tile_px: int | None
    float8_storage: bool
    peak_bytes: int
    relative_speed: float
    width_px: int
    height_px: int
    guided: bool
    because: str
    stream_text_encoder: bool = False
    streamed_blocks: tuple[str, ...] = ()
    host_bytes: int = 0
    quantize: str | None = None


@dataclass(frozen=True, slots=True)
class ComponentFootprint:
    """One component's weights as they lie on the device, in their final dtype.

    `blocks` are the repeated blocks that can be fetched one by one, by module path in the order in which
    they are called; `other_bytes` is the rest of the component. `largest_module_bytes` is the most that one
    layer (a matrix, an embedding) has of its own, in the dtype that it works in, and
    `two_largest_modules_bytes` that of the two largest. `largest_quantised_bytes` is that of the largest
    matrix that is stored quantised, 0: none is; `quantised_shapes` are their different shapes `(out, in)`.
    """

    name: str
    other_bytes: int
    blocks: Mapping[str, int] = field(default_factory=dict)
    largest_module_bytes: int = 0
    two_largest_modules_bytes: int = 0
    largest_quantised_bytes: int = 0
    quantised_shapes: tuple[tuple[int, int], ...] = ()

    @property
    def bytes(self) -> int:
        return self.other_bytes + sum(self.blocks.values())


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a checkpoint's weights take, from its headers or from a published model's shapes.

    `denoiser`, `text_encoders` and `vae` name components; `source` says where the figures come from.
    `float8_storage`: the denoiser's figures are those of matrices kept in float8; `quantize`: those of
    matrices quantised in that way. `configs` are the
    components' settings, from which activations are predicted; `value_bytes` is what a value takes in the
    dtype that is computed in.
    """

    family: str
    components: Mapping[str, ComponentFootprint]
    denoiser: str
    text_encoders: tuple[str, ...]
    vae: str
    source: str
    float8_storage: bool = False
    quantize: str | None = None
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    value_bytes: int = 2

    @property
    def bytes(self) -> int:
        return sum(component.bytes for component in self.components.values())


def parse_memory(text: str, option: str = "--vram") -> int:
    """ "12GiB" and "12G" as 12 * 2**30, "12GB" as 12 * 10**9, "512MiB", or plain bytes; above 0.

    Raises InvalidRequest, which says how it is written.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?(?:I?B)?)", text.strip().upper(), re.ASCII)
    unit = found[2] if found else None
    if found is None or (unit not in _UNITS and unit not in ("", "B")):
        raise InvalidRequest(
            f"{option} must be a size such as 12GiB, 8G or 512MiB, got {text[:40]!r}", "vram"
        )
    amount = int(float(found[1]) * _UNITS.get(unit or "", 1))
    if amount <= 0:
        raise InvalidRequest(f"{option} must be more than nothing, got {text[:40]!r}")
    return amount
