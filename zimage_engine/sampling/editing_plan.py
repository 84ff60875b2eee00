"""Decides how a picture is drawn from another: size, strength, steps; pure, knows no torch and no pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zimage_engine.errors import InvalidRequest
from zimage_engine.families import ModelFamily
from zimage_engine.types import GenerationRequest, ModelDescription, Notice, SourcePicture

#: The VAE of no family takes less, and a picture of fewer pixels a side shows nothing.
SMALLEST_SIDE_PX = 8
#: Between two numbers of steps nobody sees less.
TOLD_EXCESS = 0.1


@dataclass(frozen=True, slots=True)
class EditPlan:
    """How much of the source stays: of the plan's steps the last `steps_run` are drawn."""

    strength: float
    steps_run: int
    masked: bool
    source_width_px: int
    source_height_px: int


def plan_edit(
    request: GenerationRequest, family: ModelFamily, steps: int, width_px: int, height_px: int
) -> tuple[EditPlan | None, tuple[Notice, ...]]:
    """The plan for the request's picture and what to say about it; None where there is no picture.

    Raises InvalidRequest for a strength out of range or without a picture, for a picture that is not what
    it says it is, and for a family that draws from prompts alone.
    """
    source = request.image
    if source is None:
        if request.strength is not None:
            raise InvalidRequest(
                "strength says how far a picture is drawn anew, and there is none; send image with it",
                "strength",
            )
        return None, ()
    if family.editing is None:
        raise InvalidRequest(
            f"{family.title} draws from a prompt alone: diffusers has no pipeline of it that starts from a "
            "picture. Use a model of the Z-Image or SDXL family to edit pictures",
            "image",
        )
    _check_source(source)
    masked = source.mask is not None
    default = family.editing.masked_strength if masked else family.editing.strength
    strength = _strength(default if request.strength is None else request.strength)
    plan = EditPlan(strength, steps_run(steps, strength), masked, source.width, source.height)
    return plan, (*_stronger(plan, steps), *_notices(source, width_px, height_px))


def steps_run(steps: int, strength: float) -> int:
    """How many of `steps` are drawn: that share, rounded down, but one at the least.

    Rounded up, a strength below 1 would be all steps, which start from noise alone. The least of a sum of
    floating numbers must not cost a step: 0.7 of 10 are 7.
    """
    return max(1, int(steps * strength + 1e-6))


def _stronger(plan: EditPlan, steps: int) -> tuple[Notice, ...]:
    """Says where the one step that is always drawn is far more than the strength that was asked."""
    drawn = plan.steps_run / steps
    if drawn - plan.strength <= TOLD_EXCESS:
        return ()
    return (
        Notice(
            "strength_raised",
            f"one step is drawn at the least, and of {steps} that is a strength of {drawn:g} and not "
            f"{plan.strength:g}; ask for more steps",
        ),
    )


def fitted_size(source: SourcePicture, model: ModelDescription) -> tuple[int, int]:
    """Width and height in pixels that a picture is drawn in by default: its own on the model's grid.

    A picture of more pixels than the model's own size is scaled down to as many, and one that is longer then
    than the model draws as far as that, in its own shape.
    """
    _check_source(source)
    native_pixels = model.native_width * model.native_height
    longest_px = _on_grid(model.max_side, model)
    scale = min(
        1.0,
        math.sqrt(native_pixels / (source.width * source.height)),
        longest_px / max(source.width, source.height),
    )
    return _on_grid(source.width * scale, model), _on_grid(source.height * scale, model)


def _on_grid(side_px: float, model: ModelDescription) -> int:
    multiple = model.size_multiple
    largest = model.max_side // multiple
    return min(max(1, round(side_px / multiple)), largest) * multiple


def _check_source(source: SourcePicture) -> None:
    if min(source.width, source.height) < SMALLEST_SIDE_PX:
        raise InvalidRequest(
            f"image must have at least {SMALLEST_SIDE_PX} pixels a side, got {source.width}x{source.height}",
            "image",
        )
    pixels = source.width * source.height
    for name, content, each in (("image", source.rgb, 3), ("mask", source.mask, 1)):
        if content is not None and len(content) != pixels * each:
            raise InvalidRequest(
                f"{name} of {source.width}x{source.height} must have {pixels * each} bytes, "
                f"got {len(content)}",
                name,
            )
    # The bytes below 128 are those of ASCII, and a fast look.
    if source.mask is not None and source.mask.isascii():
        raise InvalidRequest(
            "mask leaves nothing to be drawn anew: no pixel of it is marked by half or more; mark a part of "
            "the picture",
            "mask",
        )


def _strength(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # A whole number may be too long for a float, and for a sentence.
    if not is_number or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidRequest("strength must be a number above 0 and up to 1", "strength")
    assert isinstance(value, int | float)
    if not 0.0 < value <= 1.0:
        raise InvalidRequest(
            f"strength must be above 0 (hardly anything changes) and at most 1 (all is drawn anew), "
            f"got {f'{value:g}' if abs(value) < 1e9 else 'a number far outside of that'}",
            "strength",
        )
    return float(value)


def _notices(source: SourcePicture, width_px: int, height_px: int) -> tuple[Notice, ...]:
    """Says that the source was scaled or cut to be drawn from, where somebody could see it."""
    was = source.shrunk_from or (source.width, source.height)
    if was == (width_px, height_px):
        return ()
    told = [
        Notice(
            "source_scaled",
            f"the picture of {was[0]}x{was[1]} was scaled to be drawn from at {width_px}x{height_px}",
        )
    ]
    if is_cut(source, width_px, height_px):
        told.append(
            Notice(
                "source_cut",
                f"{width_px}x{height_px} has another shape than the picture of {was[0]}x{was[1]}: what hung "
                "over at its edges was cut off; ask for a size of its shape to keep all of it",
            )
        )
    return tuple(told)


def is_cut(source: SourcePicture, width_px: int, height_px: int) -> bool:
    """Whether more than a fiftieth of a side is lost when the source covers that size."""
    ratio = (source.width * height_px) / (source.height * width_px)
    return max(ratio, 1 / ratio) > 1.02
