"""Draws what a plan says with the stock diffusers pipeline, and says how long each stage took.

Knows nothing of requests or reports. Call it from one thread at a time: a scheduler has a state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from zimage_engine.sampling.plan import SamplingPlan
from zimage_engine.types import Notice

if TYPE_CHECKING:
    from PIL.Image import Image

#: Seconds from some fixed moment, read when the device has nothing left to do.
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class PromptEmbeddings:
    """The text encoder's states of both prompts, each `(tokens, features)`; no negative with guidance off."""

    positive: tuple[torch.Tensor, ...] = field(repr=False)
    negative: tuple[torch.Tensor, ...] = field(repr=False)
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
    guided = plan.pipeline_guidance > 0
    try:
        with torch.no_grad():
            positive, negative = pipeline.encode_prompt(
                # Lists of our own: the pipeline writes its templates into those that it is given.
                prompt=[plan.prompt],
                negative_prompt=[plan.negative_prompt],
                do_classifier_free_guidance=guided,
                max_sequence_length=max_tokens,
            )
    except BaseException:
        pipeline.maybe_free_model_hooks()
        raise
    encode_seconds = clock() - started
    read = {"prompt": plan.prompt} | ({"negative_prompt": plan.negative_prompt} if guided else {})
    return PromptEmbeddings(
        positive=tuple(positive),
        negative=tuple(negative),
        encode_seconds=encode_seconds,
        warnings=tuple(
            Notice(
                f"{parameter}_truncated",
                f"{parameter} takes {count} tokens and this model reads {max_tokens}: "
                f"the last {count - max_tokens} were left out; shorten it",
            )
            for parameter, text in read.items()
            if (count := count_tokens(pipeline, text)) > max_tokens
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

    def step_ended(_pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal last_step_at
        last_step_at = clock()
        on_step(index + 1)
        return tensors

    try:
        output = pipeline(
            prompt_embeds=list(embeddings.positive),
            negative_prompt_embeds=list(embeddings.negative),
            width=plan.width_px,
            height=plan.height_px,
            num_inference_steps=plan.steps,
            guidance_scale=plan.pipeline_guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=step_ended,
        )
    finally:
        pipeline.maybe_free_model_hooks()
    return DrawnPicture(output.images[0], last_step_at - started, clock() - last_step_at)


def count_tokens(pipeline: Any, prompt: str) -> int:
    """How many tokens the text encoder would be given for `prompt` if nothing were cut off."""
    framed = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,
    )
    return len(pipeline.tokenizer(framed, truncation=False, padding=False, verbose=False).input_ids)
