"""An SDXL folder, its distilled relatives, and those with a reduced unet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.zimage_engine.tiny_models.seeded import seeded

#: Of each of the two text encoders: one head of the published width.
TEXT_WIDTH = 64
#: One byte alone, the same at the end of a word, and the two ends of a text.
VOCABULARY_SIZE = 2 * 256 + 2
TEXT_POSITIONS = 77
#: Of each of the six numbers that say how large a picture is, as published: shapes cannot tell it.
SIZE_EMBEDDING = 256
#: The noise schedule of Stable Diffusion.
NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


#: Two down blocks as in the smallest of the published models; each of 64 channels is one head.
_UNET: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (64, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1],
    "attention_head_dim": [1, 1],
}
#: Structures of models cut down from SDXL, as what differs from it.
REDUCED_UNETS: dict[str, dict[str, Any]] = {
    # SSD-1B's: another depth for each transformer, and a middle of one resnet.
    "nested": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (64, 64, 64),
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, [1, 1], [1, 2]],
        "reverse_transformer_layers_per_block": [[1, 1, 2], [2, 1, 1], 1],
        "attention_head_dim": [1, 1, 1],
    },
    # No middle at all, and the way up shallower than the way down.
    "no-middle": {
        "mid_block_type": None,
        "transformer_layers_per_block": [1, 2],
        "reverse_transformer_layers_per_block": [1, 1],
    },
}


def write_tiny_sdxl(
    folder: Path, lcm: bool = False, turbo: bool = False, unet: Mapping[str, Any] | None = None
) -> Path:
    """Write a whole SDXL folder in bfloat16, the same one every time; it draws 64 pixels to a side.

    Head widths and group counts are the published ones. `lcm`: with the guidance embedding and the
    scheduler of LCM-SDXL; `turbo`: with SDXL-Turbo's scheduler. `unet`: what its structure has otherwise.
    """
    scheduler = _lcm_scheduler() if lcm else _turbo_scheduler() if turbo else _euler_scheduler()
    pipeline = StableDiffusionXLPipeline(
        vae=seeded(_vae()),
        text_encoder=seeded(CLIPTextModel(_text_config("quick_gelu"))),
        text_encoder_2=seeded(CLIPTextModelWithProjection(_text_config("gelu"))),
        tokenizer=_tokenizer(pad_token="<|endoftext|>"),
        tokenizer_2=_tokenizer(pad_token="!"),
        unet=seeded(_unet(time_cond_proj_dim=256 if lcm else None, structure=unet or {})),
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def _lcm_scheduler() -> LCMScheduler:
    return LCMScheduler(
        **NOISE_SCHEDULE,
        clip_sample=False,
        set_alpha_to_one=False,
        original_inference_steps=50,
        timestep_spacing="leading",
    )


def _euler_scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        **NOISE_SCHEDULE, steps_offset=1, timestep_spacing="leading", use_karras_sigmas=False
    )


def _turbo_scheduler() -> EulerAncestralDiscreteScheduler:
    return EulerAncestralDiscreteScheduler(**NOISE_SCHEDULE, steps_offset=1, timestep_spacing="trailing")


def _unet(time_cond_proj_dim: int | None, structure: Mapping[str, Any]) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{**_UNET, **structure},
        sample_size=32,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_EMBEDDING,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * SIZE_EMBEDDING,
        time_cond_proj_dim=time_cond_proj_dim,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[32] * 2,
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        force_upcast=True,
        scaling_factor=0.13025,
    )


def _text_config(hidden_act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=TEXT_POSITIONS,
        hidden_act=hidden_act,
        bos_token_id=VOCABULARY_SIZE - 2,
        eos_token_id=VOCABULARY_SIZE - 1,
    )


def _tokenizer(pad_token: str) -> CLIPTokenizer:
    """One token a byte, two more around a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(piece + "</w>" for piece in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[],
        pad_token=pad_token,
        model_max_length=TEXT_POSITIONS,
    )
