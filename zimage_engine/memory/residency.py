"""Where the weights are while a picture is drawn: the words that measuring, planning and doing share.

Knows no torch; sizes are bytes.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


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
class OffloadPlan:
    """What was decided about memory for one model on one device, and why, in a line.

    `resident_blocks` of `blocks` of the denoiser stay on the device (all with NONE and MODEL, fewer with
    STREAM, none below). `release_text_encoder`: it leaves the device once the prompts are encoded.
    `vae_tile_px` is the side of the pieces in which the VAE decodes, None for all at once. `peak_bytes` is
    the prediction for `width_px` x `height_px` with guidance as given; `relative_speed` is 1 where all is
    resident.
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


@dataclass(frozen=True, slots=True)
class ComponentFootprint:
    """One component's weights as they lie on the device, in their final dtype.

    `blocks` are the repeated blocks that can be fetched one by one, by module path in the order in which
    they are called; `other_bytes` is the rest of the component.
    """

    name: str
    other_bytes: int
    blocks: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return self.other_bytes + sum(self.blocks.values())


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a checkpoint's weights take, from its headers or from a published model's shapes.

    `denoiser`, `text_encoders` and `vae` name components; `source` says where the figures come from.
    """

    family: str
    components: Mapping[str, ComponentFootprint]
    denoiser: str
    text_encoders: tuple[str, ...]
    vae: str
    source: str

    @property
    def bytes(self) -> int:
        return sum(component.bytes for component in self.components.values())
