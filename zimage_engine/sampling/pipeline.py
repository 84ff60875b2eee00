"""Draws what a plan says with the stock diffusers pipeline, and says how long each stage took.

Knows nothing of requests or reports. Call it from one thread at a time: a scheduler has a state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from zimage_engine.sampling.plan import SamplingPlan
from zimage_engine.sampling.prompt_encoders import encoder_for
from zimage_engine.types import Notice

if TYPE_CHECKING:
    from PIL.Image import Image

#: Seconds from some fixed moment, read when the device has nothing left to do.
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class PromptEmbeddings:
    """Both prompts as arguments of the pipeline that encoded them."""

    arguments: Mapping[str, Any] = field(repr=False)
    encode_seconds: float
    warnings: tuple[Notice, ...]


@dataclass(frozen=True, slots=True)
class DrawnPicture:
    """One picture and what it took.

    `denoise_seconds` runs from the call of the pipeline to the end of its last step (so it holds the
    drawing of the noise too), `decode_seconds` from there to the finished picture.
    """

    image: Image = field(repr=False)
    denoise_seconds: float
    decode_seconds: float


def encode_prompts(pipeline: Any, plan: SamplingPlan, max_tokens: int, clock: Clock) -> PromptEmbeddings:
    """Encode the plan's prompts once, for all of its pictures.

    The text encoder reads at most `max_tokens`, chat template included; a warning tells what was cut off.
    """
    started = clock()
    encoder = encoder_for(pipeline)
    guided = plan.guidance_scale > 1.0
    try:
        with torch.no_grad():
            arguments = encoder.encode(pipeline, plan.prompt, plan.negative_prompt, guided, max_tokens)
    except BaseException:
        pipeline.maybe_free_model_hooks()
        raise
    encode_seconds = clock() - started
    read = {"prompt": plan.prompt}
    if encoder.uses_negative_prompt(pipeline, guided):
        read["negative_prompt"] = plan.negative_prompt
    return PromptEmbeddings(
        arguments=arguments,
        encode_seconds=encode_seconds,
        warnings=tuple(
            Notice(
                f"{parameter}_truncated",
                f"{parameter} takes {count} tokens and this model reads {max_tokens}: "
                f"the last {count - max_tokens} were left out; shorten it",
            )
            for parameter, text in read.items()
            if (count := encoder.count_tokens(pipeline, text)) > max_tokens
        ),
    )


def draw(
    pipeline: Any,
    plan: SamplingPlan,
    embeddings: PromptEmbeddings,
    seed: int,
    clock: Clock,
    on_step: Callable[[int], None],
) -> DrawnPicture:
    """Draw one picture; `on_step` gets 1, 2, ... after each step, and what it raises ends the drawing.

    The noise comes from the CPU's generator on every device, so a seed means the same noise everywhere.
    However it ends, offloaded models are put back, and the pipeline can be used again.
    """
    last_step_at = started = clock()

    def step_ended(index: int) -> None:
        nonlocal last_step_at
        last_step_at = clock()
        on_step(index + 1)

    try:
        output = pipeline(
            **encoder_for(pipeline).call_arguments(embeddings.arguments, step_ended),
            width=plan.width_px,
            height=plan.height_px,
            num_inference_steps=plan.steps,
            guidance_scale=plan.pipeline_guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
        )
    finally:
        pipeline.maybe_free_model_hooks()
    return DrawnPicture(output.images[0], last_step_at - started, clock() - last_step_at)
