"""Model folders as small as the real classes allow, with seeded random weights: they load, and draw noise."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

TEXT_WIDTH = 16
NATIVE_SIDE_PX = 64
#: Four doublings in the VAE and two by two patches.
SIZE_MULTIPLE = 32
#: The transformer has positions for this many tokens to a side, so for 128 pixels.
TOKENS_PER_SIDE = 4
#: One token a byte and five of the chat template.
FRAME_TOKENS = 5


def write_tiny_z_image(folder: Path) -> Path:
    """Write a whole Z-Image folder in bfloat16, some 700 kB, the same one every time."""
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=_seeded(_vae()),
        text_encoder=_seeded(_text_encoder()),
        tokenizer=_tokenizer(),
        transformer=_seeded(_transformer()),
    )
    pipeline.save_pretrained(folder)
    return folder


def _transformer() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=1,
        n_kv_heads=1,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, TOKENS_PER_SIDE, TOKENS_PER_SIDE],
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 5,
        up_block_types=["UpDecoderBlock2D"] * 5,
        block_out_channels=[8] * 5,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=NATIVE_SIDE_PX,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def _text_encoder() -> Qwen3Model:
    return Qwen3Model(
        Qwen3Config(
            vocab_size=259,
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )


def _tokenizer() -> Qwen2Tokenizer:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate([*alphabet, *specials])},
        merges=[],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=1024,
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>u\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    )
    return tokenizer


def _seeded(module: torch.nn.Module) -> torch.nn.Module:
    """Weights in bfloat16 that depend on nothing but their order; norms keep their ones."""
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(0, fan_in**-0.5, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.1, generator=generator)
    return module.to(torch.bfloat16)
