"""A Z-Image folder."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tests.zimage_engine.tiny_models.seeded import seeded

TEXT_WIDTH = 16
NATIVE_SIDE_PX = 64
#: Four doublings in the VAE and two by two patches.
SIZE_MULTIPLE = 32
#: The transformer has positions for this many tokens to a side, so for 128 pixels.
TOKENS_PER_SIDE = 4
#: One token a byte and five of the chat template.
FRAME_TOKENS = 5


#: What the published models say of their positions, at the head width (128) that they have.
PUBLISHED_HEAD_DIM = 128
PUBLISHED_AXES_DIMS = (32, 48, 48)
PUBLISHED_AXES_LENS = (1536, 512, 512)


def write_tiny_z_image(folder: Path, head_dim: int = 16, shift: float = 3.0) -> Path:
    """Write a whole Z-Image folder in bfloat16, the same one every time.

    `head_dim` is 16 (some 700 kB) or 128 as published, with the published positions and group counts.
    The distilled model has the shift 3.0, the base model 6.0.
    """
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift),
        vae=seeded(_vae(channels=32 if head_dim == PUBLISHED_HEAD_DIM else 8)),
        text_encoder=seeded(_text_encoder()),
        tokenizer=_tokenizer(),
        transformer=seeded(_transformer(head_dim)),
    )
    pipeline.save_pretrained(folder)
    return folder


def _transformer(head_dim: int) -> ZImageTransformer2DModel:
    published = head_dim == PUBLISHED_HEAD_DIM
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=head_dim,
        n_layers=1 if published else 2,
        n_refiner_layers=1,
        n_heads=1,
        n_kv_heads=1,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=list(PUBLISHED_AXES_DIMS) if published else [4, 6, 6],
        axes_lens=list(PUBLISHED_AXES_LENS) if published else [1024, TOKENS_PER_SIDE, TOKENS_PER_SIDE],
    )


def _vae(channels: int) -> AutoencoderKL:
    """One group for 8 channels, the published 32 groups for 32."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 5,
        up_block_types=["UpDecoderBlock2D"] * 5,
        block_out_channels=[channels] * 5,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32 if channels == 32 else 1,
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
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
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
