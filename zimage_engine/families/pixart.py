"""PixArt Alpha (at 512 and at 1024 pixels) and Sigma: a transformer on the states of a T5 text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zimage_engine.checkpoint.match import (
    config_class,
    config_has,
    config_is,
    config_is_not,
    pipeline_class,
)
from zimage_engine.families.family import ComponentRow, GoodRange, ModelFamily

MAX_SIDE_PX = 2048


def to_pipeline_guidance(guidance_scale: float) -> float:
    """The pipeline takes the conventional w: 1 is off."""
    return guidance_scale


def max_side_px(transformer: Mapping[str, Any], size_multiple: int) -> int:
    """Positions are computed for any size; attention's work bounds the side."""
    return MAX_SIDE_PX


def alpha_caption_tokens(transformer: Mapping[str, Any]) -> int:
    """`max_sequence_length` of diffusers' PixArtAlphaPipeline, as it was trained."""
    return 120


def sigma_caption_tokens(transformer: Mapping[str, Any]) -> int:
    """`max_sequence_length` of diffusers' PixArtSigmaPipeline, as it was trained."""
    return 300


_TRANSFORMER = ComponentRow(
    "diffusers",
    # The published folders name the older class, which diffusers takes for the newer one.
    ("PixArtTransformer2DModel", "Transformer2DModel"),
    {
        "attention_head_dim": 72,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "num_embeds_ada_norm": 1000,
    },
)
_VAE = {
    "shift_factor": None,
    "act_fn": "silu",
    "norm_num_groups": 32,
}


def _components(sample_size: int, vae: Mapping[str, Any]) -> dict[str, ComponentRow]:
    return {
        "scheduler": ComponentRow("diffusers", ("DPMSolverMultistepScheduler",)),
        "text_encoder": ComponentRow(
            "transformers",
            ("T5EncoderModel",),
            {
                "feed_forward_proj": "gated-gelu",
                "relative_attention_max_distance": 128,
                "layer_norm_epsilon": 1e-6,
                "pad_token_id": 0,
                "eos_token_id": 1,
                "decoder_start_token_id": 0,
            },
        ),
        "tokenizer": ComponentRow(
            "transformers",
            ("T5Tokenizer", "T5TokenizerFast"),
            {
                "tokenizer_class": "T5Tokenizer",
                "model_max_length": 512,
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": "<pad>",
            },
        ),
        "transformer": replace(
            _TRANSFORMER, constants={**_TRANSFORMER.constants, "sample_size": sample_size}
        ),
        "vae": ComponentRow("diffusers", ("AutoencoderKL",), {**_VAE, **vae}),
    }


#: Alpha's VAE is Stable Diffusion 1's, Sigma's is SDXL's: it tells them where model_index.json is gone.
_ALPHA_SCALING, _SIGMA_SCALING = 0.18215, 0.13025
_TRANSFORMER_FITS = config_class("transformer", *_TRANSFORMER.class_names) & config_has(
    "transformer", "caption_channels"
)

PIXART_ALPHA_512 = ModelFamily(
    name="pixart-alpha-512",
    title="PixArt-Alpha 512",
    fingerprint=(
        pipeline_class("PixArtAlphaPipeline")
        & _TRANSFORMER_FITS
        & config_is("transformer", "sample_size", 32, 64)
        & config_is("transformer", "use_additional_conditions", None, False)
        & config_is_not("vae", "scaling_factor", _SIGMA_SCALING)
    ),
    pipeline_class="PixArtAlphaPipeline",
    needed_config=("vae.scaling_factor", "transformer.sample_size"),
    denoiser="transformer",
    # The text encoder overflows in float16.
    dtype="bfloat16",
    # The pipeline's own defaults; the ranges were not measured.
    default_steps=20,
    default_guidance_scale=4.5,
    good_steps=GoodRange(14, 30, below="soft and unfinished", above="slower and no better"),
    good_guidance=GoodRange(3.0, 7.0, below="grey, and off the prompt", above="oversaturated and hard"),
    good_side_ratio=(0.7, 1.3),
    to_pipeline_guidance=to_pipeline_guidance,
    native_side_px=512,
    max_side_px=max_side_px,
    caption_tokens=alpha_caption_tokens,
    components=_components(64, {"scaling_factor": _ALPHA_SCALING, "force_upcast": True, "sample_size": 256}),
    scheduler_defaults={
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
    },
    published_id="PixArt-alpha/PixArt-XL-2-512x512",
    # Attention and feed-forward, not the one modulation that all blocks share.
    quantised_layers=r"transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))",
    patch_size=2,
)

PIXART_ALPHA_1024 = replace(
    PIXART_ALPHA_512,
    name="pixart-alpha-1024",
    title="PixArt-Alpha 1024",
    # It is told its size and aspect; the class decides that by sample_size where the config is silent.
    fingerprint=(
        pipeline_class("PixArtAlphaPipeline")
        & _TRANSFORMER_FITS
        & config_is("transformer", "sample_size", 128)
        & config_is("transformer", "use_additional_conditions", None, True)
        & config_is_not("vae", "scaling_factor", _SIGMA_SCALING)
    ),
    native_side_px=1024,
    components=_components(128, {"scaling_factor": _ALPHA_SCALING, "force_upcast": True, "sample_size": 256}),
    published_id="PixArt-alpha/PixArt-XL-2-1024-MS",
)

PIXART_SIGMA = replace(
    PIXART_ALPHA_512,
    name="pixart-sigma",
    title="PixArt-Sigma",
    fingerprint=(
        pipeline_class("PixArtSigmaPipeline")
        & _TRANSFORMER_FITS
        & config_is("transformer", "use_additional_conditions", None, False)
        & config_is_not("vae", "scaling_factor", _ALPHA_SCALING)
    ),
    pipeline_class="PixArtSigmaPipeline",
    native_side_px=1024,
    caption_tokens=sigma_caption_tokens,
    # The VAE is SDXL's.
    components=_components(
        128, {"scaling_factor": _SIGMA_SCALING, "force_upcast": True, "sample_size": 1024}
    ),
    published_id="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
)
