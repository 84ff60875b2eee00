"""PixArt folders: Alpha at 512 and at 1024 pixels, and Sigma."""

from __future__ import annotations

from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from tests.zimage_engine.tiny_models.seeded import seeded

TEXT_WIDTH = 32
#: One head of the published width.
HEAD_DIM = 72
#: Letters that the tokenizer knows one by one; the scores do not matter where no piece holds two.
LETTERS = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'-()白色背景上的红圆形"
VOCABULARY_SIZE = 128

PIPELINES = {
    "alpha": PixArtAlphaPipeline,
    "alpha-1024": PixArtAlphaPipeline,
    "sigma": PixArtSigmaPipeline,
}
#: In latents; diffusers takes 128 for "is told its size and aspect" where the pipeline is Alpha's.
SAMPLE_SIZES = {"alpha": 64, "alpha-1024": 128, "sigma": 128}
#: Alpha has the VAE of Stable Diffusion 1, Sigma that of SDXL.
SCALING_FACTORS = {"alpha": 0.18215, "alpha-1024": 0.18215, "sigma": 0.13025}


def write_tiny_pixart(folder: Path, kind: str = "alpha") -> Path:
    """Write a whole PixArt folder in bfloat16, the same one every time; `kind` is a key of PIPELINES.

    Its native size is 128 pixels to a side for "alpha" and 256 for the others: a latent is two pixels wide.
    """
    pipeline = PIPELINES[kind](
        tokenizer=_tokenizer(),
        text_encoder=seeded(_text_encoder()),
        vae=seeded(_vae(SCALING_FACTORS[kind])),
        transformer=seeded(_transformer(kind)),
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", num_train_timesteps=1000
        ),
    )
    pipeline.save_pretrained(folder)
    return folder


def _transformer(kind: str) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=SAMPLE_SIZES[kind],
        patch_size=2,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=kind == "alpha-1024",
    )


def _vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[32] * 2,
        layers_per_block=1,
        latent_channels=4,
        sample_size=64,
        scaling_factor=scaling_factor,
    )


def _text_encoder() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=VOCABULARY_SIZE,
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    )


def _tokenizer() -> T5Tokenizer:
    """One token a letter and one for the end."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(
        vocab=[*specials, *((letter, -4.0) for letter in LETTERS)], extra_ids=0, model_max_length=512
    )
