"""The row that a kind of model is: how it is recognised, its defaults, its limits; knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zimage_engine.checkpoint.match import Condition
from zimage_engine.types import Notice


@dataclass(frozen=True, slots=True)
class GoodRange:
    """Where a value draws well, and in words what happens to either side of it."""

    low: float
    high: float
    below: str
    above: str

    def notice(self, parameter: str, value: float) -> Notice | None:
        """A warning with the code `<parameter>_outside_range`, or None where the value is inside."""
        if self.low <= value <= self.high:
            return None
        side, effect = ("below", self.below) if value < self.low else ("above", self.above)
        message = f"{parameter} {value:g} is {side} the good range of {self.low:g} to {self.high:g}: {effect}"
        return Notice(f"{parameter}_outside_range", message)


@dataclass(frozen=True, slots=True)
class ComponentRow:
    """One thing that a pipeline consists of: its library and classes, the usual one first.

    `constants` are config values of the published model that the shapes of its tensors cannot tell.
    """

    library: str
    class_names: tuple[str, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False


@dataclass(frozen=True, slots=True)
class ValueRange:
    """What the denoiser's output may be: beyond `clip` it is clipped, beyond `trip` it is a fault.

    Both are magnitudes at guidance off; guidance w multiplies what the two halves differ by, so both are
    taken w times. `because` says where they come from.
    """

    clip: float
    trip: float
    because: str

    def at_guidance(self, guidance_scale: float) -> ValueRange:
        factor = max(1.0, guidance_scale)
        return ValueRange(self.clip * factor, self.trip * factor, self.because)


#: Noise and velocity alike: what is predicted has unit deviation, and so have the scaled latents.
UNIT_RESIDUAL = ValueRange(
    clip=32.0,
    trip=64.0,
    because="normal noise stays below 6 at a million values and unit-scaled latents hardly leave 8, so a "
    "prediction is below 16; twice that leaves every sound one alone",
)


@dataclass(frozen=True, slots=True)
class Editing:
    """How a family draws from a picture: diffusers' pipelines for the whole of it and for a masked part.

    `strength` is the default for a whole picture, `masked_strength` for a masked part, `variation_strength`
    for another picture like it. `because` says where they come from.
    """

    image_to_image: str
    inpaint: str
    strength: float
    masked_strength: float
    variation_strength: float
    because: str


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """A kind of model that we support.

    `needed_config` are config keys (`component.key`) without which the stock pipeline loads but cannot draw.
    `denoiser` is the pipeline's component that is called once a step. `default_guidance_scale` is the
    conventional w; `to_pipeline_guidance` makes of it what the stock pipeline takes. Guidance at or
    below 1 is off, a choice of its own, and `good_guidance` does not judge it.
    `good_side_ratio` is how much smaller and larger than the native size, as the root of the area, a
    picture may be before things repeat or go missing.
    `max_side_px(denoiser_config, size_multiple)` and `caption_tokens(denoiser_config)` are the largest
    picture and prompt that the denoiser has positions for. `native_side_px` is used where the VAE does
    not tell; `dtype` is what the weights are loaded as.
    `components` is what the pipeline consists of, `scheduler_defaults` the published scheduler's config,
    `published_id` the maker's model on the hub. `has_chat_template`: prompts are framed by the tokenizer's
    template. Each tokenizer of `text_encoders` reads for the text encoder beside it.
    `editing` is None where diffusers has no pipeline that draws from a picture.
    `can_end_guidance`: the stock pipelines can leave guidance off from some step on (`cfg_truncation`).
    `patch_size` is how many of the picture processor's units a side must be a multiple of.
    `residual` is the range of the denoiser's output, `embedding_limit` and `decoded_limit` the magnitudes
    beyond which the text encoder's answer and the decoded picture (which is -1 to 1) are faults.
    `quantised_layers` is a pattern that the whole path of a linear layer of the denoiser matches if its
    weight may be quantised; it never matches embedders, modulation, projections in and out, norms.
    `encode_rungs`, `denoise_rungs` and `decode_rungs` name what is tried after a fault there, in this order
    (`zimage_engine.sampling.recovery`).
    """

    name: str
    title: str
    fingerprint: Condition
    pipeline_class: str
    needed_config: tuple[str, ...]
    denoiser: str
    dtype: str
    default_steps: int
    default_guidance_scale: float
    good_steps: GoodRange
    good_guidance: GoodRange
    good_side_ratio: tuple[float, float]
    to_pipeline_guidance: Callable[[float], float]
    native_side_px: int
    max_side_px: Callable[[Mapping[str, Any], int], int]
    caption_tokens: Callable[[Mapping[str, Any]], int]
    components: Mapping[str, ComponentRow]
    scheduler_defaults: Mapping[str, Any]
    published_id: str
    quantised_layers: str
    editing: Editing | None = None
    has_chat_template: bool = False
    text_encoders: tuple[tuple[str, str], ...] = (("tokenizer", "text_encoder"),)
    can_end_guidance: bool = False
    patch_size: int = 1
    residual: ValueRange = UNIT_RESIDUAL
    # Single states of large language models reach 1e4 to 1e5; a million is none of them.
    embedding_limit: float = 1e6
    decoded_limit: float = 100.0
    encode_rungs: tuple[str, ...] = ("same_inputs", "plain_attention", "float32")
    denoise_rungs: tuple[str, ...] = (
        "same_inputs",
        "lower_guidance",
        "plain_attention",
        "float32",
        "rest_float32",
    )
    decode_rungs: tuple[str, ...] = ("same_inputs", "float32", "tiled")
