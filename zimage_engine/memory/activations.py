"""How many bytes a picture needs beside the weights, stage by stage, and how much is computed; no torch.

The formulas were fitted to the peaks that `python -m tests.benchmarks.activation_bytes` counts: the real
diffusers and transformers classes in their published configuration, run on tensors without values. Against
those counts a prediction is never under and at most 5 % over. For other configurations the formulas follow
the model's width, which is exact where the classes are the same and the proportions too.

What that counting cannot see: workspaces inside kernels (cuDNN's convolutions above all), the allocator's
rounding and fragmentation, and the CUDA context. WORKSPACE_BYTES, ROUNDING_SHARE and DECODE_WORKSPACE_SHARE
allow for the first two; none of them was measured on a GPU. The context is the planner's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zimage_engine.families import ModelFamily

#: Allowances, not measured on a GPU. cuBLAS takes 8 to 32 MiB, and other kernels little beside it.
WORKSPACE_BYTES = 128 * 2**20
#: The allocator gives whole pieces of 2 MiB where a tensor is large.
ROUNDING_SHARE = 0.015
#: A convolution may copy what it reads and writes into another order of channels.
DECODE_WORKSPACE_SHARE = 0.25

#: bfloat16: activations have the dtype of the weights.
_VALUE_BYTES = 2
#: torch's math attention holds the scores and their softmax of each pair, both float32.
_PAIR_BYTES = 8
#: The published VAEs halve the picture three times.
_LATENT_PX = 8


@dataclass(frozen=True, slots=True)
class DenoiserRow:
    """What one kind of denoiser makes while it works.

    A token is `patch` latents on a side. With `reads_caption` the caption's tokens stand in the same row as
    the picture's, else each takes `caption_states`. `states` is how many values of the model's width live
    at the peak for each token with fused kernels, `plain_states` those beside the pairs with plain attention.
    `flops_share` is what is computed for each token and weight: 2 where every weight meets every token, and
    less in a unet, whose deep blocks see a smaller picture. `row_share` is the part of the tokens that the
    longest row in a block with attention has: a unet's begin where the picture is half as wide and high.
    """

    patch: int
    reads_caption: bool
    states: float
    plain_states: float
    caption_states: float
    flops_share: float
    row_share: float = 1.0


_PIXART = DenoiserRow(
    patch=2, reads_caption=False, states=12.02, plain_states=13.02, caption_states=4.62, flops_share=1.6
)
#: By the family's pipeline. Source of every figure: `python -m tests.benchmarks.activation_bytes`.
DENOISERS: Mapping[str, DenoiserRow] = {
    "ZImagePipeline": DenoiserRow(
        patch=2, reads_caption=True, states=15.88, plain_states=14.2, caption_states=0.0, flops_share=2.0
    ),
    "StableDiffusionXLPipeline": DenoiserRow(
        patch=1,
        reads_caption=False,
        states=15.9,
        plain_states=12.4,
        caption_states=0.0,
        flops_share=0.146,
        row_share=0.25,
    ),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
}
#: Z-Image fills the picture's and the caption's tokens up to a multiple of this.
_ROW_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class EncoderRow:
    """What a text encoder makes for each token: the states of all layers, which are kept, and `inner` values
    of the feed forward's width at the peak. The other fields are keys of its config.
    """

    width: str
    inner_width: str
    layers: str
    inner: float


#: By class. Source of `inner`: `python -m tests.benchmarks.activation_bytes`.
ENCODERS: Mapping[str, EncoderRow] = {
    "Qwen3Model": EncoderRow("hidden_size", "intermediate_size", "num_hidden_layers", 10.95),
    "CLIPTextModel": EncoderRow("hidden_size", "intermediate_size", "num_hidden_layers", 2.28),
    "CLIPTextModelWithProjection": EncoderRow("hidden_size", "intermediate_size", "num_hidden_layers", 2.28),
    "T5EncoderModel": EncoderRow("d_model", "d_ff", "num_layers", 6.9),
}

#: Bytes of decoded tiles a pixel: three colours of tiles that overlap, and the rows being joined.
_KEPT_OF_TILES = 10.2
#: Operations that the published VAEs' decoder takes for each pixel and each square of its first width.
_DECODE_FLOPS_SHARE = 580.0


def activation_bytes(
    family: ModelFamily,
    denoiser_config: Mapping[str, Any],
    width_px: int,
    height_px: int,
    guided: bool,
    *,
    plain_attention: bool = False,
    pictures: int = 1,
    latent_px: int = _LATENT_PX,
) -> int:
    """The most that the denoiser makes at a time in one step, with the longest caption it reads.

    Guidance doubles the batch. `plain_attention`: the matrix of all pairs is made, as torch's math kernel
    does. `latent_px` is how many pixels wide a latent is.
    """
    row = DENOISERS[family.pipeline_class]
    tokens = _tokens(row, family, denoiser_config, width_px, height_px, latent_px)
    state = _width(denoiser_config) * _VALUE_BYTES
    caption = row.caption_states * family.caption_tokens(denoiser_config) * state
    each = row.states * tokens * state
    if plain_attention:
        pairs = _PAIR_BYTES * _heads(denoiser_config) * tokens**2
        each = max(each, pairs + row.plain_states * tokens * state)
    return math.ceil(pictures * _batch(family, guided) * (each + caption))


def block_rows(
    family: ModelFamily,
    denoiser_config: Mapping[str, Any],
    width_px: int,
    height_px: int,
    guided: bool,
    *,
    pictures: int = 1,
    latent_px: int = _LATENT_PX,
) -> int:
    """How many rows the largest matrix product of a block with attention has."""
    row = DENOISERS[family.pipeline_class]
    tokens = _tokens(row, family, denoiser_config, width_px, height_px, latent_px)
    return math.ceil(pictures * _batch(family, guided) * row.row_share * tokens)


def encode_bytes(
    family: ModelFamily, name: str, config: Mapping[str, Any], denoiser: Mapping[str, Any]
) -> int:
    """The most that the text encoder `name` makes at a time, for one prompt as long as the denoiser reads."""
    row = ENCODERS[family.components[name].class_names[0]]
    width, inner, layers = (int(config[key]) for key in (row.width, row.inner_width, row.layers))
    kept = (layers + 1) * width
    return math.ceil(family.caption_tokens(denoiser) * _VALUE_BYTES * (kept + row.inner * inner))


def decode_bytes(
    vae_config: Mapping[str, Any],
    width_px: int,
    height_px: int,
    tile_px: int | None = None,
    *,
    plain_attention: bool = False,
    pictures: int = 1,
) -> int:
    """The most that the VAE's decoder makes at a time; `tile_px` None decodes the whole at once."""
    picture_px = pictures * width_px * height_px
    latents = _VALUE_BYTES * int(vae_config.get("latent_channels", 4)) / latent_px_of(vae_config) ** 2
    if tile_px is None or tile_px >= max(width_px, height_px):
        return math.ceil(_decoded_at_once(vae_config, picture_px, plain_attention) + latents * picture_px)
    at_once = pictures * min(tile_px, width_px) * min(tile_px, height_px)
    # All tiles are kept until the picture is put together.
    return math.ceil(
        _decoded_at_once(vae_config, at_once, plain_attention) + (_KEPT_OF_TILES + latents) * picture_px
    )


def denoise_flops(
    family: ModelFamily,
    denoiser_config: Mapping[str, Any],
    denoiser_values: float,
    width_px: int,
    height_px: int,
    guided: bool,
    latent_px: int = _LATENT_PX,
) -> float:
    """What one step computes, with `denoiser_values` weights; for comparing ways, so within some 15 %."""
    row = DENOISERS[family.pipeline_class]
    tokens = _tokens(row, family, denoiser_config, width_px, height_px, latent_px)
    layers = int(denoiser_config.get("n_layers") or denoiser_config.get("num_layers") or 0)
    attention = 4 * tokens**2 * _width(denoiser_config) * layers
    return _batch(family, guided) * (row.flops_share * denoiser_values * tokens + attention)


def decode_flops(vae_config: Mapping[str, Any], width_px: int, height_px: int) -> float:
    """What decoding computes; for comparing ways."""
    return _DECODE_FLOPS_SHARE * _widths(vae_config)[0] ** 2 * width_px * height_px


def latent_px_of(vae_config: Mapping[str, Any]) -> int:
    """How many pixels wide one latent is."""
    return int(2 ** (len(_widths(vae_config)) - 1))


def size_multiple(family: ModelFamily, vae_config: Mapping[str, Any]) -> int:
    """What width and height must be multiples of."""
    return latent_px_of(vae_config) * DENOISERS[family.pipeline_class].patch


def native_side_px(
    family: ModelFamily, denoiser_config: Mapping[str, Any], vae_config: Mapping[str, Any]
) -> int:
    """The side that the model was made for, as its configs tell, on its grid."""
    latent_side = denoiser_config.get("sample_size")
    multiple = size_multiple(family, vae_config)
    side = (
        latent_side * latent_px_of(vae_config)
        if isinstance(latent_side, int)
        else vae_config.get("sample_size") or family.native_side_px
    )
    largest = family.max_side_px(denoiser_config, multiple)
    return int(side) if side % multiple == 0 and side <= largest else min(family.native_side_px, largest)


def _batch(family: ModelFamily, guided: bool) -> int:
    """How many pictures' worth one call draws: guidance that goes in as an embedding doubles nothing."""
    return 2 if guided and family.name not in _GUIDED_WITHIN else 1


#: Families that take guidance as an embedding.
_GUIDED_WITHIN = frozenset({"sdxl-lcm"})


def _tokens(
    row: DenoiserRow,
    family: ModelFamily,
    config: Mapping[str, Any],
    width_px: int,
    height_px: int,
    latent_px: int,
) -> int:
    token_px = latent_px * row.patch
    picture = math.ceil(width_px / token_px) * math.ceil(height_px / token_px)
    if not row.reads_caption:
        return picture
    caption = family.caption_tokens(config)
    return sum(math.ceil(part / _ROW_MULTIPLE) * _ROW_MULTIPLE for part in (picture, caption))


def _width(config: Mapping[str, Any]) -> int:
    """Values of a state at the picture's full size."""
    if "block_out_channels" in config:
        return int(config["block_out_channels"][0])
    if "dim" in config:
        return int(config["dim"])
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


def _heads(config: Mapping[str, Any]) -> float:
    """Heads of an attention over all tokens. A unet's deeper levels have a sixteenth of the pairs each."""
    if "block_out_channels" not in config:
        return float(config.get("n_heads") or config["num_attention_heads"])
    given = config.get("attention_head_dim", 8)
    levels = config["down_block_types"]
    heads = given if isinstance(given, Sequence) else (given,) * len(levels)
    return max(
        (int(count) / 16**level for level, count in enumerate(heads) if "CrossAttn" in levels[level]),
        default=0.0,
    )


def _widths(vae_config: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(width) for width in vae_config.get("block_out_channels") or (128, 256, 512, 512))


def _decoded_at_once(vae_config: Mapping[str, Any], pixels: int, plain_attention: bool) -> float:
    """Six maps of the first width at the picture's size, or three of a deeper one where those are larger."""
    widths = _widths(vae_config)
    deeper = (3 * width / 4**level for level, width in enumerate(widths[1:]))
    fused = max(6 * widths[0], *deeper, 0) * _VALUE_BYTES * pixels
    if not plain_attention:
        return float(fused)
    # In the middle, at the latents' size, every place attends to every other.
    places = pixels / latent_px_of(vae_config) ** 2
    return float(max(fused, _PAIR_BYTES * places**2 + 14 * widths[-1] * _VALUE_BYTES * places))
