"""The tensors of ZImageTransformer2DModel."""

from __future__ import annotations

import re
from typing import Any

from zimage_engine.checkpoint.schemas.schema import Measured, Schema, Settings, TensorTable

#: Fixed in the class: the width of the time embedding's output, of its middle, and of its input.
_MAX_TIME_WIDTH = 256
_TIME_MIDDLE = 1024
_FREQUENCIES = 256

_X_EMBEDDER = re.compile(r"all_x_embedder\.(\d{1,4})-(\d{1,4})\.weight")

_DEFAULTS = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "siglip_feat_dim": None,
}


def _expect(settings: Settings, table: TensorTable) -> None:
    dim = settings.whole("dim")
    time_width = min(dim, _MAX_TIME_WIDTH)
    caption_width = settings.whole("cap_feat_dim")
    siglip_width = settings.whole_or_none("siglip_feat_dim")
    in_channels = settings.whole("in_channels")
    patch_sizes = settings.wholes("all_patch_size")
    for patch, frames in zip(
        patch_sizes, settings.wholes("all_f_patch_size", length=len(patch_sizes)), strict=True
    ):
        patch_values = frames * patch * patch * in_channels
        table.linear(f"all_x_embedder.{patch}-{frames}", dim, patch_values)
        table.linear(f"all_final_layer.{patch}-{frames}.linear", patch_values, dim)
        table.linear(f"all_final_layer.{patch}-{frames}.adaLN_modulation.1", dim, time_width)
    table.linear("t_embedder.mlp.0", _TIME_MIDDLE, _FREQUENCIES)
    table.linear("t_embedder.mlp.2", time_width, _TIME_MIDDLE)
    _add_embedder(table, "cap_embedder", dim, caption_width)
    table.add("x_pad_token", 1, dim)
    table.add("cap_pad_token", 1, dim)
    n_refiners = settings.whole("n_refiner_layers", minimum=0)
    _add_blocks(settings, table, "noise_refiner", n_refiners, modulated=True)
    _add_blocks(settings, table, "context_refiner", n_refiners, modulated=False)
    if siglip_width is not None:
        _add_embedder(table, "siglip_embedder", dim, siglip_width)
        table.add("siglip_pad_token", 1, dim)
        _add_blocks(settings, table, "siglip_refiner", n_refiners, modulated=False)
    _add_blocks(settings, table, "layers", settings.whole("n_layers", minimum=0), modulated=True)


def _add_embedder(table: TensorTable, name: str, dim: int, width: int) -> None:
    table.add(f"{name}.0.weight", width)
    table.linear(f"{name}.1", dim, width)


def _add_blocks(settings: Settings, table: TensorTable, name: str, count: int, modulated: bool) -> None:
    dim = settings.whole("dim")
    n_heads = settings.whole("n_heads")
    head_dim = dim // n_heads
    if head_dim < 1:
        raise settings.refused("n_heads", f"must be at most dim, which is {dim}", n_heads)
    # Key and value heads are as many as query heads, whatever n_kv_heads says: the class does not use it.
    attention_width = n_heads * head_dim
    # Written as the class writes it, in floating point: 8 * dim // 3 differs for some widths.
    hidden = int(dim / 3 * 8)
    for index in range(count):
        block = f"{name}.{index}"
        if settings.flag("qk_norm"):
            table.add(f"{block}.attention.norm_q.weight", head_dim)
            table.add(f"{block}.attention.norm_k.weight", head_dim)
        for projection in ("to_q", "to_k", "to_v"):
            table.add(f"{block}.attention.{projection}.weight", attention_width, dim)
        table.add(f"{block}.attention.to_out.0.weight", dim, attention_width)
        table.add(f"{block}.feed_forward.w1.weight", hidden, dim)
        table.add(f"{block}.feed_forward.w2.weight", dim, hidden)
        table.add(f"{block}.feed_forward.w3.weight", hidden, dim)
        for norm in ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2"):
            table.add(f"{block}.{norm}.weight", dim)
        if modulated:
            table.linear(f"{block}.adaLN_modulation.0", 4 * dim, min(dim, _MAX_TIME_WIDTH))


def _measure(measured: Measured) -> dict[str, Any]:
    patches = sorted(
        (int(match[1]), int(match[2]))
        for match in map(_X_EMBEDDER.fullmatch, measured.shapes)
        if match is not None
    )
    if not patches:
        raise measured.untold("all_patch_size", "no tensor 'all_x_embedder.<patch>-<frames>.weight' is there")
    patch, frames = patches[0]
    dim, patch_values = measured.shape(f"all_x_embedder.{patch}-{frames}.weight", 2, "dim")
    known = Settings(measured.class_name, measured.constants, {})
    axes_width = sum(known.wholes("axes_dims"))
    norms = [
        name
        for stack in ("layers", "noise_refiner", "context_refiner")
        if measured.has(name := f"{stack}.0.attention.norm_q.weight")
    ]
    head_dim = measured.shape(norms[0], 1, "n_heads")[0] if norms else axes_width
    if head_dim != axes_width:
        raise measured.untold(
            "axes_dims", f"heads are {head_dim} wide, but {list(known.wholes('axes_dims'))} make {axes_width}"
        )
    n_heads = measured.divided(dim, head_dim, "n_heads")
    siglip = "siglip_embedder.0.weight"
    return {
        "all_patch_size": [patch for patch, _ in patches],
        "all_f_patch_size": [frames for _, frames in patches],
        "in_channels": measured.divided(patch_values, frames * patch * patch, "in_channels"),
        "dim": dim,
        "n_layers": measured.count("layers"),
        "n_refiner_layers": max(measured.count("noise_refiner"), measured.count("context_refiner")),
        "n_heads": n_heads,
        "n_kv_heads": measured.constants.get("n_kv_heads", n_heads),
        "qk_norm": bool(norms),
        "cap_feat_dim": measured.shape("cap_embedder.0.weight", 1, "cap_feat_dim")[0],
        "siglip_feat_dim": measured.shape(siglip, 1, "siglip_feat_dim")[0] if measured.has(siglip) else None,
    }


Z_IMAGE = Schema(
    class_name="ZImageTransformer2DModel",
    stamp={"_class_name": "ZImageTransformer2DModel"},
    defaults=_DEFAULTS,
    expect=_expect,
    measure=_measure,
    # The class's own axes_lens differ from the published ones.
    untold=(("axes_dims",), ("axes_lens",)),
)
