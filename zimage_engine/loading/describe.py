"""Reads from a loaded pipeline what callers without torch need to know of it."""

from __future__ import annotations

import json
from typing import Any

from zimage_engine.families import ModelFamily
from zimage_engine.types import ModelDescription

#: No turbo model draws better with more, and a mistyped number would hold the device for hours.
MAX_STEPS = 100


def describe(pipeline: Any, family: ModelFamily, model_id: str, device: str) -> ModelDescription:
    """The description of `pipeline` under the name `model_id`; sizes come from the model, not from a name."""
    size_multiple = int(pipeline.image_processor.config.vae_scale_factor) * family.patch_size
    max_side = family.max_side_px(getattr(pipeline, family.denoiser).config, size_multiple)
    latent_side = getattr(pipeline, family.denoiser).config.get("sample_size")
    native_side = (
        latent_side * pipeline.vae_scale_factor
        if isinstance(latent_side, int)
        else pipeline.vae.config.get("sample_size") or family.native_side_px
    )
    if native_side % size_multiple or native_side > max_side:
        native_side = min(family.native_side_px, max_side)
    return ModelDescription(
        id=model_id,
        family=family.name,
        device=device,
        dtype=family.dtype,
        native_width=native_side,
        native_height=native_side,
        size_multiple=size_multiple,
        default_steps=family.default_steps,
        default_guidance_scale=family.default_guidance_scale,
        token_limit=max_tokens(pipeline, family)
        - (_frame_tokens(pipeline.tokenizer) if family.has_chat_template else 0),
        tokenizer_json=_tokenizer_json(pipeline.tokenizer),
        max_side=max_side,
        # LCM takes its steps out of those that it was distilled on.
        max_steps=min(MAX_STEPS, pipeline.scheduler.config.get("original_inference_steps") or MAX_STEPS),
    )


def max_tokens(pipeline: Any, family: ModelFamily) -> int:
    """How many tokens, a chat template's included, tokenizers, text encoders and denoiser have room for."""
    rooms = [family.caption_tokens(getattr(pipeline, family.denoiser).config)]
    for tokenizer, text_encoder in family.text_encoders:
        rooms.append(int(getattr(pipeline, tokenizer).model_max_length))
        # T5 has no such bound: its positions are relative.
        positions = getattr(getattr(pipeline, text_encoder).config, "max_position_embeddings", None)
        rooms += [] if positions is None else [int(positions)]
    return min(rooms)


def _frame_tokens(tokenizer: Any) -> int:
    """How many tokens the chat template puts around a prompt."""
    framed = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return len(tokenizer(framed).input_ids)


def _tokenizer_json(tokenizer: Any) -> str:
    """The tokenizer as a `tokenizers` file, without the padding and truncation that calls leave set in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    return json.dumps(
        json.loads(backend.to_str()) | {"padding": None, "truncation": None}, ensure_ascii=False
    )
