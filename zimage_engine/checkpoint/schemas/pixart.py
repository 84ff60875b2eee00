"""The tensors of PixArtTransformer2DModel, Alpha and Sigma."""

from __future__ import annotations

from math import isqrt
from typing import Any

from zimage_engine.checkpoint.schemas.blocks import add_attention, add_feed_forward, add_time_embedding
from zimage_engine.checkpoint.schemas.schema import Measured, Schema, Settings, TensorTable

#: Fixed in the class: the width of the sinusoids that time, size and aspect ratio enter as.
_FREQUENCIES = 256
#: The head width of every published PixArt.
_HEAD_DIM = 72
#: Without a word in its config, a model of this sample size is told its resolution and aspect ratio.
_CONDITIONED_SAMPLE_SIZE = 128
_POSITIONS = "pos_embed.pos_embed"
_RESOLUTION = "adaln_single.emb.resolution_embedder"
_ASPECT_RATIO = "adaln_single.emb.aspect_ratio_embedder"

_DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 128,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "use_additional_conditions": None,
    "caption_channels": None,
    "attention_type": "default",
}


def _expect(settings: Settings, table: TensorTable) -> None:
    settings.only("norm_type", ("ada_norm_single",))
    settings.only("attention_type", ("default",))
    gated = settings.only("activation_fn", ("gelu-approximate", "gelu", "geglu")) == "geglu"
    width = settings.whole("num_attention_heads") * settings.whole("attention_head_dim")
    context_width = settings.whole_or_none("cross_attention_dim")
    bias = settings.flag("attention_bias")
    affine = settings.flag("norm_elementwise_affine")
    in_channels = settings.whole("in_channels")
    out_channels = settings.whole_or_none("out_channels") or in_channels
    patch = settings.whole("patch_size")
    caption_width = settings.whole_or_none("caption_channels")

    table.add("scale_shift_table", 2, width)
    table.conv("pos_embed.proj", width, in_channels, kernel=patch)
    for index in range(settings.whole("num_layers", minimum=0)):
        block = f"transformer_blocks.{index}"
        table.add(f"{block}.scale_shift_table", 6, width)
        add_attention(table, f"{block}.attn1", width, width, width, bias)
        if context_width is not None:
            add_attention(table, f"{block}.attn2", width, context_width, width, bias)
        add_feed_forward(table, f"{block}.ff", width, gated)
        if affine:
            table.norm(f"{block}.norm1", width)
            table.norm(f"{block}.norm2", width)
    table.linear("proj_out", patch * patch * out_channels, width)
    add_time_embedding(table, "adaln_single.emb.timestep_embedder", width, _FREQUENCIES)
    if _has_conditions(settings):
        add_time_embedding(table, _RESOLUTION, width // 3, _FREQUENCIES)
        add_time_embedding(table, _ASPECT_RATIO, width // 3, _FREQUENCIES)
    table.linear("adaln_single.linear", 6 * width, width)
    if caption_width is not None:
        add_time_embedding(table, "caption_projection", width, caption_width)


def _has_conditions(settings: Settings) -> bool:
    sample_size = settings.whole("sample_size")
    if settings.value("use_additional_conditions") is None:
        return sample_size == _CONDITIONED_SAMPLE_SIZE
    return settings.flag("use_additional_conditions")


def _measure(measured: Measured) -> dict[str, Any]:
    width, in_channels, patch, _ = measured.shape("pos_embed.proj.weight", 4, "patch_size")
    out_values = measured.shape("proj_out.weight", 2, "out_channels")[0]
    has_conditions = measured.has(f"{_RESOLUTION}.linear_1.weight")
    first = "transformer_blocks.0"
    context = f"{first}.attn2.to_k.weight"
    caption = "caption_projection.linear_1.weight"
    up_width = measured.shape(f"{first}.ff.net.0.proj.weight", 2, "activation_fn")[0]
    down_width = measured.shape(f"{first}.ff.net.2.weight", 2, "activation_fn")[1]
    known_activation = measured.constants.get("activation_fn", _DEFAULTS["activation_fn"])
    head_dim = _head_dim(measured, width)
    return {
        "num_attention_heads": measured.divided(width, head_dim, "num_attention_heads"),
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": measured.divided(out_values, patch * patch, "out_channels"),
        "num_layers": measured.count("transformer_blocks"),
        "cross_attention_dim": (
            measured.shape(context, 2, "cross_attention_dim")[1] if measured.has(context) else None
        ),
        "attention_bias": measured.has(f"{first}.attn1.to_q.bias"),
        "sample_size": _sample_size(measured, patch, has_conditions),
        "patch_size": patch,
        "activation_fn": "geglu" if up_width == 2 * down_width else known_activation,
        "norm_elementwise_affine": measured.has(f"{first}.norm1.weight"),
        "use_additional_conditions": has_conditions,
        "caption_channels": (
            measured.shape(caption, 2, "caption_channels")[1] if measured.has(caption) else None
        ),
    }


def _head_dim(measured: Measured, width: int) -> int:
    known = Settings(measured.class_name, measured.constants, {})
    if "attention_head_dim" in measured.constants:
        return known.whole("attention_head_dim")
    if "num_attention_heads" in measured.constants:
        return measured.divided(width, known.whole("num_attention_heads"), "attention_head_dim")
    return _HEAD_DIM


def _sample_size(measured: Measured, patch: int, has_conditions: bool) -> int:
    """Latent pixels a side. A wrong one draws a wrong picture, so without a source it is refused.

    The sin-cos table of older files tells it; else the constants; else a model that is told its resolution
    is the one of 128.
    """
    if measured.has(_POSITIONS):
        places = measured.shape(_POSITIONS, 3, "sample_size")[1]
        if isqrt(places) ** 2 != places:
            raise measured.untold("sample_size", f"the {places} places of '{_POSITIONS}' are no square")
        return isqrt(places) * patch
    if "sample_size" in measured.constants:
        return Settings(measured.class_name, measured.constants, {}).whole("sample_size")
    if has_conditions:
        return _CONDITIONED_SAMPLE_SIZE
    raise measured.untold("sample_size", "no tensor depends on it, and the family does not say it")


PIXART = Schema(
    class_name="PixArtTransformer2DModel",
    stamp={"_class_name": "PixArtTransformer2DModel"},
    defaults=_DEFAULTS,
    expect=_expect,
    measure=_measure,
    untold=(),
    optional=frozenset({_POSITIONS}),
)
