"""Decides every value of a drawing before anything is drawn; pure but for a random seed, knows no torch."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace
from typing import Any

from zimage_engine.errors import InvalidRequest, InvalidSize
from zimage_engine.families import ModelFamily, family_named
from zimage_engine.sampling.editing_plan import EditPlan, fitted_size, plan_edit
from zimage_engine.types import EnhancedPrompt, GenerationRequest, ModelDescription, Notice

MAX_PICTURES = 10
MAX_GUIDANCE_SCALE = 20.0
#: torch's CPU generator keeps 32 bits of a seed: beyond this, two seeds would draw one picture.
MAX_SEED = 2**32 - 1
#: Some sixty times what the text encoder reads; a longer one is a mistake, and tokenizing it costs seconds.
MAX_PROMPT_CHARACTERS = 32_000
#: A forward pass of so many pixels keeps a device busy; with more nothing is gained, and everybody waits.
PIXELS_A_PASS = 1024 * 1024


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """What will be drawn: no None is left, and every value has been checked.

    `guidance_scale` is the conventional w, 1.0 where it is off; `pipeline_guidance` is the same in the
    stock pipeline's terms. `guidance_until` is 1.0 where guidance acts in every step. There is one seed for
    each picture. `warnings` concern values that were allowed but do not draw well. `edit` is None where
    nothing but the prompt is drawn from.
    """

    prompt: str
    negative_prompt: str
    width_px: int
    height_px: int
    steps: int
    guidance_scale: float
    pipeline_guidance: float
    seeds: tuple[int, ...]
    refine: bool
    warnings: tuple[Notice, ...]
    edit: EditPlan | None = None
    guidance_until: float = 1.0

    @property
    def drawn_steps(self) -> int:
        """The steps that are computed: fewer than `steps` where a picture is drawn from."""
        return self.steps if self.edit is None else self.edit.steps_run

    def with_prompts(self, enhanced: EnhancedPrompt) -> SamplingPlan:
        """The same plan for the prompts that the enhancer made."""
        return replace(self, prompt=enhanced.prompt, negative_prompt=enhanced.negative_prompt)


def resolve(request: GenerationRequest, model: ModelDescription) -> SamplingPlan:
    """Decide what to draw for `request` on `model`.

    None becomes the model's default, a missing seed a random one, guidance from 0 to 1 becomes 1.0 (off).
    Raises InvalidSize for a width or height off the model's grid and InvalidRequest for anything else that
    cannot be used; both name the parameter.
    """
    family = family_named(model.family)
    count = _whole_number("n", request.n, 1, MAX_PICTURES)
    steps = _default(request.num_inference_steps, model.default_steps)
    steps = _whole_number("num_inference_steps", steps, 1, model.max_steps)
    guidance_scale = max(1.0, _guidance(_default(request.guidance_scale, model.default_guidance_scale)))
    guidance_until = _guidance_until(request.guidance_until, family)
    native_px = (model.native_width, model.native_height)
    default_px = native_px if request.image is None else fitted_size(request.image, model)
    width_px = _side("width", _default(request.width, default_px[0]), model)
    height_px = _side("height", _default(request.height, default_px[1]), model)
    edit, edit_notices = plan_edit(request, family, steps, width_px, height_px)
    return SamplingPlan(
        prompt=_prompt(request.prompt) if edit is None else _text("prompt", request.prompt),
        negative_prompt=_text("negative_prompt", _default(request.negative_prompt, "")),
        width_px=width_px,
        height_px=height_px,
        steps=steps,
        guidance_scale=guidance_scale,
        pipeline_guidance=family.to_pipeline_guidance(guidance_scale),
        seeds=_seeds(request.seed, count),
        refine=request.enhance if request.refine is None else request.refine,
        warnings=(
            *_warnings(family, steps, guidance_scale),
            *_size_warnings(family, width_px, height_px, model),
            *edit_notices,
        ),
        edit=edit,
        guidance_until=guidance_until,
    )


def most_of_size(width_px: int, height_px: int, most: int) -> int:
    """How many pictures of this size share a forward pass, at most `most` and at least one."""
    return max(1, min(most, PIXELS_A_PASS // (width_px * height_px)))


def _default(asked: Any, default: Any) -> Any:
    return default if asked is None else asked


def _warnings(family: ModelFamily, steps: int, guidance_scale: float) -> tuple[Notice, ...]:
    judged = [family.good_steps.notice("num_inference_steps", steps)]
    if guidance_scale > 1.0:  # off is a choice of its own: half the work
        judged.append(family.good_guidance.notice("guidance_scale", guidance_scale))
    return tuple(notice for notice in judged if notice is not None)


def _size_warnings(
    family: ModelFamily, width_px: int, height_px: int, model: ModelDescription
) -> tuple[Notice, ...]:
    low, high = family.good_side_ratio
    ratio = math.sqrt(width_px * height_px / (model.native_width * model.native_height))
    if low <= ratio <= high:
        return ()
    message = (
        f"size {width_px}x{height_px} is far from the {model.native_width}x{model.native_height} that this "
        "model draws best: things may be repeated, cut or missing"
    )
    return (Notice("size_outside_range", message),)


def _prompt(value: object) -> str:
    prompt = _text("prompt", value)
    if not prompt:
        raise InvalidRequest("prompt is empty; say in words what the picture should show", "prompt")
    return prompt


def _text(parameter: str, value: object) -> str:
    """`value` without white space around it, if it is text that a tokenizer can read."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{parameter} must be text, got {_shown(value)}", parameter)
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequest(
            f"{parameter} must have at most {MAX_PROMPT_CHARACTERS} characters, got {len(value)}; shorten it",
            parameter,
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{parameter} is not valid Unicode: half a surrogate pair at character {error.start + 1}",
            parameter,
        ) from error
    return value.strip()


def _whole_number(parameter: str, value: object, lowest: int, highest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(
            f"{parameter} must be a whole number from {lowest} to {highest}, got {_shown(value)}", parameter
        )
    if not lowest <= value <= highest:
        raise InvalidRequest(
            f"{parameter} must be from {lowest} to {highest}, got {_shown(value)}", parameter
        )
    return value


def _guidance(value: object) -> float:
    parameter = "guidance_scale"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{parameter} must be a number, got {_shown(value)}", parameter)
    if not (0.0 <= value <= MAX_GUIDANCE_SCALE and math.isfinite(value)):
        raise InvalidRequest(
            f"{parameter} must be from 0 to {MAX_GUIDANCE_SCALE:g} (1 or 0 is off), got {_shown(value)}",
            parameter,
        )
    return float(value)


def _guidance_until(value: object, family: ModelFamily) -> float:
    parameter = "guidance_until"
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise InvalidRequest(
            f"{parameter} must be a number from 0 to 1 (1 is guidance in every step), got {_shown(value)}",
            parameter,
        )
    if value < 1.0 and not family.can_end_guidance:
        raise InvalidRequest(
            f"{parameter} works with Z-Image models; {family.title} is drawn with guidance in every step or "
            "in none: leave it out, or set guidance_scale to 1",
            parameter,
        )
    return float(value)


def _seeds(first: object, count: int) -> tuple[int, ...]:
    """One seed a picture, counting up from `first`, or from a random one that leaves room for all."""
    if first is None:
        first = secrets.randbelow(MAX_SEED - count + 2)
    seed = _whole_number("seed", first, 0, MAX_SEED)
    if seed + count - 1 > MAX_SEED:
        raise InvalidRequest(
            f"seed counts up by one for each picture and must stay within {MAX_SEED}: "
            f"for n {count} it can be at most {MAX_SEED - count + 1}, got {seed}",
            "seed",
        )
    return tuple(range(seed, seed + count))


def _side(parameter: str, value: object, model: ModelDescription) -> int:
    """A width or height on the model's grid; the error names the nearest that are."""
    multiple = model.size_multiple
    largest = model.max_side // multiple * multiple
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidSize(f"{parameter} must be a whole number of pixels, got {_shown(value)}", parameter)
    if not multiple <= value <= largest:
        raise InvalidSize(
            f"{parameter} must be from {multiple} to {largest} pixels for this model, got {_shown(value)}",
            parameter,
        )
    if value % multiple:
        smaller = value // multiple * multiple
        raise InvalidSize(
            f"{parameter} must be a multiple of {multiple}, got {value}; "
            f"nearest are {smaller} and {smaller + multiple}",
            parameter,
        )
    return value


def _shown(value: object) -> str:
    """`value` as an error shows it: its kind where that is what is wrong, and never a page of it."""
    if isinstance(value, str):
        kind, text = "the text ", repr(value[:40])
    elif isinstance(value, int | float):
        kind, text = "", str(value) if abs(value) < 10**20 or not isinstance(value, int) else "a huge number"
    elif value is None:
        kind, text = "", "nothing"
    else:
        kind, text = "a ", type(value).__name__
    return kind + text
