"""SDXL, its smaller relatives of the same classes, and the distilled SDXL-Turbo and LCM-SDXL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zimage_engine.checkpoint.match import (
    config_class,
    config_has,
    config_is,
    config_is_not,
    config_lacks,
    pipeline_class,
)
from zimage_engine.families.family import ComponentRow, Editing, GoodRange, ModelFamily

#: CLIP has this many positions, the two ends of a text included.
CLIP_TOKENS = 77
MAX_SIDE_PX = 2048


def to_pipeline_guidance(guidance_scale: float) -> float:
    """The pipeline takes the conventional w: 1 is off."""
    return guidance_scale


def max_side_px(unet: Mapping[str, Any], size_multiple: int) -> int:
    """The unet has no positions to run out of; attention's work bounds the side."""
    return MAX_SIDE_PX


def caption_tokens(unet: Mapping[str, Any]) -> int:
    """The unet reads captions of any length, the text encoders do not."""
    return CLIP_TOKENS


_CLIP = {
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": CLIP_TOKENS,
    # 2 is not CLIP's end of text: transformers takes it for "pool at the highest id", as the maker did.
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

_CLIP_TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": CLIP_TOKENS,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}

_COMPONENTS = {
    "scheduler": ComponentRow(
        "diffusers", ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler")
    ),
    "text_encoder": ComponentRow("transformers", ("CLIPTextModel",), {**_CLIP, "hidden_act": "quick_gelu"}),
    "text_encoder_2": ComponentRow(
        "transformers", ("CLIPTextModelWithProjection",), {**_CLIP, "hidden_act": "gelu"}
    ),
    "tokenizer": ComponentRow(
        "transformers",
        ("CLIPTokenizer", "CLIPTokenizerFast"),
        {**_CLIP_TOKENIZER, "pad_token": "<|endoftext|>"},
    ),
    # OpenCLIP pads with the id 0, which is the exclamation mark's.
    "tokenizer_2": ComponentRow(
        "transformers", ("CLIPTokenizer", "CLIPTokenizerFast"), {**_CLIP_TOKENIZER, "pad_token": "!"}
    ),
    "unet": ComponentRow(
        "diffusers",
        ("UNet2DConditionModel",),
        {
            "sample_size": 128,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "norm_num_groups": 32,
            "act_fn": "silu",
            "flip_sin_to_cos": True,
            "freq_shift": 0,
        },
    ),
    "vae": ComponentRow(
        "diffusers",
        ("AutoencoderKL",),
        {
            "scaling_factor": 0.13025,
            "shift_factor": None,
            "act_fn": "silu",
            "norm_num_groups": 32,
            "sample_size": 1024,
            "force_upcast": True,
        },
    ),
}

_STRUCTURE = (
    pipeline_class("StableDiffusionXLPipeline")
    & config_class("unet", "UNet2DConditionModel")
    & config_is("unet", "addition_embed_type", "text_time")
    # More channels take a picture or a mask as well: other pipelines draw with those.
    & config_is("unet", "in_channels", 4)
)

_NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}

SDXL = ModelFamily(
    name="sdxl",
    title="SDXL",
    fingerprint=(
        _STRUCTURE
        & config_lacks("unet", "time_cond_proj_dim")
        & config_is_not("scheduler", "timestep_spacing", "trailing")
    ),
    pipeline_class="StableDiffusionXLPipeline",
    # The class default is Stable Diffusion 1's.
    needed_config=("vae.scaling_factor",),
    denoiser="unet",
    # The VAE overflows in float16 and gives black pictures.
    dtype="bfloat16",
    # Common advice for the published model; the ranges were not measured.
    default_steps=30,
    default_guidance_scale=5.0,
    good_steps=GoodRange(20, 50, below="soft and unfinished", above="slower and no better"),
    good_guidance=GoodRange(3.0, 9.0, below="grey, and off the prompt", above="oversaturated and hard"),
    good_side_ratio=(0.7, 1.3),
    to_pipeline_guidance=to_pipeline_guidance,
    native_side_px=1024,
    max_side_px=max_side_px,
    caption_tokens=caption_tokens,
    components=_COMPONENTS,
    scheduler_defaults={
        "_class_name": "EulerDiscreteScheduler",
        **_NOISE_SCHEDULE,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    },
    published_id="stabilityai/stable-diffusion-xl-base-1.0",
    editing=Editing(
        image_to_image="StableDiffusionXLImg2ImgPipeline",
        inpaint="StableDiffusionXLInpaintPipeline",
        strength=0.65,
        masked_strength=0.9,
        variation_strength=0.4,
        because="common advice, as for Z-Image. Not measured",
    ),
    # Attention and feed-forward. Convolutions are no linear layers; projections around a block stay.
    quantised_layers=r".+\.transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))",
    text_encoders=(("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
)

SDXL_TURBO = replace(
    SDXL,
    name="sdxl-turbo",
    title="SDXL-Turbo",
    # Its unet is SDXL's: the schedule alone tells them apart.
    fingerprint=(
        _STRUCTURE
        & config_lacks("unet", "time_cond_proj_dim")
        & config_is("scheduler", "timestep_spacing", "trailing")
    ),
    # The maker's advice: one to four steps, without guidance.
    default_steps=4,
    default_guidance_scale=1.0,
    good_steps=GoodRange(1, 4, below="nothing is drawn", above="oversaturated, and slower"),
    good_guidance=GoodRange(1.0, 1.0, below="grey", above="blown: it was distilled without guidance"),
    native_side_px=512,
    components={
        **_COMPONENTS,
        "unet": replace(_COMPONENTS["unet"], constants={**_COMPONENTS["unet"].constants, "sample_size": 64}),
    },
    scheduler_defaults={
        "_class_name": "EulerAncestralDiscreteScheduler",
        **_NOISE_SCHEDULE,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    },
    published_id="stabilityai/sdxl-turbo",
)

SDXL_LCM = replace(
    SDXL,
    name="sdxl-lcm",
    title="LCM-SDXL",
    # Guidance goes in as an embedding, so a step is one call whatever the guidance is.
    fingerprint=(
        _STRUCTURE & config_has("unet", "time_cond_proj_dim") & config_class("scheduler", "LCMScheduler")
    ),
    # Examples for the published model draw 4 steps at 8, while its card also advises 1 to 2. Not measured.
    default_steps=4,
    default_guidance_scale=8.0,
    good_steps=GoodRange(4, 8, below="blurred", above="slower and smoother, no better"),
    good_guidance=GoodRange(3.0, 13.0, below="grey and weak", above="oversaturated: never trained for"),
    scheduler_defaults={
        "_class_name": "LCMScheduler",
        **_NOISE_SCHEDULE,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "original_inference_steps": 50,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    },
    published_id="latent-consistency/lcm-sdxl",
)
