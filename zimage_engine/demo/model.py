"""The demo model's shape, how it is written to disk, and a batched forward pass for training.

The shape is that of Z-Image (`ZImagePipeline`) at a size that a laptop trains.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from zimage_engine.demo.tokenizer import TOKEN_LIMIT, build_tokenizer
from zimage_engine.demo.train_vae import VAE_CONFIG

TEXT_WIDTH = 192
TRANSFORMER_CONFIG = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": VAE_CONFIG["latent_channels"],
    "dim": 192,
    "n_layers": 8,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": TEXT_WIDTH,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [16, 24, 24],
    "axes_lens": [1536, 512, 512],
}
#: As the real Z-Image-Turbo: no dynamic shifting, shift 3.
SCHEDULER_CONFIG = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}
#: The denoiser pads captions to this multiple with a learned token.
CAPTION_MULTIPLE = 32


def new_text_encoder(vocabulary_size: int) -> Qwen3Model:
    """A Qwen3 of three layers; the pipeline reads `hidden_states[-2]`, so two of them speak."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocabulary_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=64,
            max_position_embeddings=TOKEN_LIMIT,
            tie_word_embeddings=True,
        )
    )


def new_transformer() -> ZImageTransformer2DModel:
    """A denoiser with random weights, the outputs of its last layer near nought."""
    transformer = ZImageTransformer2DModel(**TRANSFORMER_CONFIG)
    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 2 and "adaLN_modulation" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif "adaLN_modulation" in name and name.endswith("weight"):
            torch.nn.init.zeros_(parameter)
        elif "adaLN_modulation" in name and "all_final_layer" not in name:
            # Gates pass through tanh: half open at the start, so that every block learns at once.
            scale_attention, gate_attention, scale_feed, gate_feed = parameter.data.chunk(4)
            for part, value in (
                (scale_attention, 0.0),
                (gate_attention, 0.3),
                (scale_feed, 0.0),
                (gate_feed, 0.3),
            ):
                part.fill_(value)
        elif parameter.ndim == 1 and name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    for final in transformer.all_final_layer.values():
        torch.nn.init.zeros_(final.linear.weight)
    return transformer


def write_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    text_encoder: Qwen3Model,
    transformer: ZImageTransformer2DModel,
    tokenizer: Qwen2Tokenizer | None = None,
) -> None:
    """Write a complete `ZImagePipeline` folder in bfloat16 safetensors, made from copies on the CPU."""
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG),
        vae=vae.to(torch.bfloat16),
        text_encoder=text_encoder.to(torch.bfloat16),
        tokenizer=tokenizer or build_tokenizer(),
        transformer=transformer.to(torch.bfloat16),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


class _RealRotation:
    """Z-Image's attention for whole batches: its complex rotation written with real numbers.

    torch.compile does not fuse complex arithmetic; this computes the same products.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, freqs_cis=None):  # type: ignore[no-untyped-def]
        cos, sin = freqs_cis
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1))
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            _rotate(norm(part), cos, sin) for norm, part in ((attn.norm_q, query), (attn.norm_k, key))
        )
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        # Written out: at a hundred tokens the CPU's fused attention spends a third of a step going back.
        scores = (query @ key.transpose(2, 3)).float() * query.shape[-1] ** -0.5
        mixed = scores.softmax(dim=-1).to(value.dtype) @ value
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class BatchedDenoiser(torch.nn.Module):
    """`ZImageTransformer2DModel` for batches whose pictures, and whose padded captions, have one length.

    The stock forward pass takes lists and pads each item by itself, which costs more time than the
    arithmetic of a model of this size. This one uses the same modules in the same order; that it
    computes the same is tested.
    """

    def __init__(self, transformer: ZImageTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        for module in transformer.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(_RealRotation())

    def rotations(self, caption_length: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `(1, rows * columns + caption_length, 1, head_dim / 2)`, picture first."""
        picture = torch.cartesian_prod(
            torch.tensor([caption_length + 1]), torch.arange(rows), torch.arange(columns)
        )
        words = torch.zeros(caption_length, 3, dtype=picture.dtype)
        words[:, 0] = torch.arange(1, caption_length + 1)
        turns = self.transformer.rope_embedder(torch.cat((picture, words)))
        return turns.real[None, :, None].contiguous(), turns.imag[None, :, None].contiguous()

    def forward(
        self,
        latents: torch.Tensor,
        time: torch.Tensor,
        words: torch.Tensor,
        words_mask: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """Latents `(B, C, H, W)`, time `(B,)` as 1 - sigma, words `(B, L, D)` with L a multiple of 32,
        mask `(B, L)` true where a word stands. Returns picture minus noise, `(B, C, H, W)`."""
        model = self.transformer
        batch, channels, height, width = latents.shape
        rows, columns = height // 2, width // 2
        count = rows * columns
        condition = model.t_embedder(time * model.t_scale).type_as(latents)
        patches = latents.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1)
        picture = model.all_x_embedder["2-1"](patches.reshape(batch, count, 4 * channels))
        for block in model.noise_refiner:
            picture = block(picture, None, (cos[:, :count], sin[:, :count]), condition)
        told = model.cap_embedder(words)
        told = torch.where(words_mask[..., None], told, model.cap_pad_token)
        for block in model.context_refiner:
            told = block(told, None, (cos[:, count:], sin[:, count:]))
        both = torch.cat((picture, told), dim=1)
        for block in model.layers:
            both = block(both, None, (cos, sin), condition)
        out = model.all_final_layer["2-1"](both[:, :count], c=condition)
        out = out.view(batch, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(batch, channels, height, width)


def read_words(text_encoder: Qwen3Model, token_ids: torch.Tensor) -> torch.Tensor:
    """`hidden_states[-2]` of the text encoder, `(B, L, D)`, without running its last layer.

    No padding mask is needed: attention is causal, and padding stands behind the words.
    """
    hidden = text_encoder.embed_tokens(token_ids)
    positions = torch.arange(token_ids.shape[1])[None]
    turns = text_encoder.rotary_emb(hidden, positions)
    for layer in text_encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None, position_embeddings=turns)
    return hidden
