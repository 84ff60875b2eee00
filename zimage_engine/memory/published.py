"""The shapes of the published models, from their config.json files; knows no torch and reads nothing.

Only what decides the size of weights and activations is repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: A component's class and its config.
Component = tuple[str, Mapping[str, Any]]

_BLOCKS = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4


def _vae(latent_channels: int, **others: Any) -> Component:
    return (
        "AutoencoderKL",
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": latent_channels,
            "down_block_types": _BLOCKS[0],
            "up_block_types": _BLOCKS[1],
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "act_fn": "silu",
            "sample_size": 1024,
            **others,
        },
    )


_Z_IMAGE: Mapping[str, Component] = {
    "transformer": (
        "ZImageTransformer2DModel",
        {
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "in_channels": 16,
            "cap_feat_dim": 2560,
            "axes_dims": (32, 48, 48),
            "axes_lens": (1536, 512, 512),
        },
    ),
    "text_encoder": (
        "Qwen3Model",
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
            "max_position_embeddings": 40_960,
        },
    ),
    # Flux's: no convolutions beside the latents.
    "vae": _vae(16, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=True),
}


def _clip(class_name: str, width: int, layers: int, heads: int) -> Component:
    return (
        class_name,
        {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "projection_dim": width,
            "vocab_size": 49_408,
            "max_position_embeddings": 77,
            "hidden_act": "gelu",
        },
    )


def _sdxl(**others: Any) -> Mapping[str, Component]:
    return {
        "unet": (
            "UNet2DConditionModel",
            {
                "sample_size": 128,
                "in_channels": 4,
                "out_channels": 4,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "block_out_channels": (320, 640, 1280),
                "layers_per_block": 2,
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
                **others,
            },
        ),
        "text_encoder": _clip("CLIPTextModel", 768, 12, 12),
        "text_encoder_2": _clip("CLIPTextModelWithProjection", 1280, 32, 20),
        "vae": _vae(4),
    }


def _pixart(sample_size: int, has_conditions: bool) -> Mapping[str, Component]:
    return {
        "transformer": (
            "PixArtTransformer2DModel",
            {
                "num_attention_heads": 16,
                "attention_head_dim": 72,
                "in_channels": 4,
                "out_channels": 8,
                "num_layers": 28,
                "cross_attention_dim": 1152,
                "caption_channels": 4096,
                "attention_bias": True,
                "sample_size": sample_size,
                "patch_size": 2,
                "activation_fn": "gelu-approximate",
                "norm_type": "ada_norm_single",
                "norm_elementwise_affine": False,
                "norm_eps": 1e-6,
                "use_additional_conditions": has_conditions,
            },
        ),
        "text_encoder": (
            "T5EncoderModel",
            {
                "vocab_size": 32_128,
                "d_model": 4096,
                "d_kv": 64,
                "d_ff": 10_240,
                "num_layers": 24,
                "num_heads": 64,
                "relative_attention_num_buckets": 32,
                "feed_forward_proj": "gated-gelu",
            },
        ),
        "vae": _vae(4),
    }


#: By family, then by component.
PUBLISHED_CONFIGS: Mapping[str, Mapping[str, Component]] = {
    "z-image-turbo": _Z_IMAGE,
    "z-image": _Z_IMAGE,
    "sdxl": _sdxl(),
    "sdxl-turbo": _sdxl(sample_size=64),
    "sdxl-lcm": _sdxl(time_cond_proj_dim=256),
    "pixart-alpha-512": _pixart(64, False),
    "pixart-alpha-1024": _pixart(128, True),
    "pixart-sigma": _pixart(128, False),
}
