"""The tensors of UNet2DConditionModel as Stable Diffusion XL and its relatives (LCM, Turbo, small) use it."""

from __future__ import annotations

from typing import Any

from zimage_engine.checkpoint.schemas.blocks import (
    add_attention,
    add_feed_forward,
    add_resnet,
    add_time_embedding,
)
from zimage_engine.checkpoint.schemas.schema import Measured, Schema, Settings, TensorTable

#: The head width of Stable Diffusion 2 and XL, from which the number of heads follows.
_HEAD_DIM = 64

_DOWN_HAS_ATTENTION = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UP_HAS_ATTENTION = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
_MIDDLE_WITH_ATTENTION = "UNetMidBlock2DCrossAttn"
_MIDDLE_PLAIN = "UNetMidBlock2D"
#: Real ones have 2 or 3; a list of this many depths for each block is still small.
_MAX_LAYERS = 1000

_DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "mid_block_type": _MIDDLE_WITH_ATTENTION,
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    # In this class the key means heads for each block, not the width of a head.
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "time_embedding_dim": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
}
#: Variants of the class that no family here uses: their one known value, which is the class's default.
_ONLY: dict[str, Any] = {
    "only_cross_attention": False,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "class_embeddings_concat": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_type": "default",
    "cross_attention_norm": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}


def _expect(settings: Settings, table: TensorTable) -> None:
    for key, known in _ONLY.items():
        settings.only(key, (known,))
    channels = settings.wholes("block_out_channels")
    n_blocks = len(channels)
    last = n_blocks - 1
    layers = settings.wholes("layers_per_block", n_blocks)
    if max(layers) > _MAX_LAYERS:
        raise settings.refused("layers_per_block", f"must be at most {_MAX_LAYERS}", max(layers))
    heads = settings.wholes("attention_head_dim", n_blocks)
    contexts = settings.wholes("cross_attention_dim", n_blocks)
    down = _has_attention(settings, "down_block_types", _DOWN_HAS_ATTENTION, n_blocks)
    up = _has_attention(settings, "up_block_types", _UP_HAS_ATTENTION, n_blocks)
    down_depths, up_depths = _depths(settings, layers)
    time_width = settings.whole_or_none("time_embedding_dim") or 4 * channels[0]

    in_kernel = settings.whole("conv_in_kernel")
    table.conv("conv_in", channels[0], settings.whole("in_channels"), in_kernel)
    add_time_embedding(table, "time_embedding", time_width, channels[0])
    guidance_width = settings.whole_or_none("time_cond_proj_dim")
    if guidance_width is not None:
        table.add("time_embedding.cond_proj.weight", channels[0], guidance_width)
    if settings.only("addition_embed_type", (None, "text_time")) is not None:
        added_width = settings.whole("projection_class_embeddings_input_dim")
        add_time_embedding(table, "add_embedding", time_width, added_width)

    size = channels[0]
    skips = [size]
    for index, out_size in enumerate(channels):
        block = f"down_blocks.{index}"
        for layer in range(layers[index]):
            add_resnet(table, f"{block}.resnets.{layer}", size, out_size, time_width)
            size = out_size
            skips.append(size)
            if down[index]:
                depth = down_depths[index][layer]
                name = f"{block}.attentions.{layer}"
                _add_transformer(settings, table, name, size, heads[index], contexts[index], depth)
        if index < last:
            table.conv(f"{block}.downsamplers.0.conv", size, size, kernel=3)
            skips.append(size)

    middle = settings.only("mid_block_type", (_MIDDLE_WITH_ATTENTION, _MIDDLE_PLAIN, None))
    if middle is not None:
        add_resnet(table, "mid_block.resnets.0", size, size, time_width)
    if middle == _MIDDLE_WITH_ATTENTION:
        depth = down_depths[-1][0]
        _add_transformer(settings, table, "mid_block.attentions.0", size, heads[-1], contexts[-1], depth)
        add_resnet(table, "mid_block.resnets.1", size, size, time_width)

    for index, out_size in enumerate(reversed(channels)):
        block = f"up_blocks.{index}"
        mirror = last - index
        for layer in range(layers[mirror] + 1):
            add_resnet(table, f"{block}.resnets.{layer}", size + skips.pop(), out_size, time_width)
            size = out_size
            if up[index]:
                depth = up_depths[index][layer]
                name = f"{block}.attentions.{layer}"
                _add_transformer(settings, table, name, size, heads[mirror], contexts[mirror], depth)
        if index < last:
            table.conv(f"{block}.upsamplers.0.conv", size, size, kernel=3)

    table.norm("conv_norm_out", channels[0])
    table.conv("conv_out", settings.whole("out_channels"), channels[0], settings.whole("conv_out_kernel"))


def _has_attention(settings: Settings, key: str, known: dict[str, bool], n_blocks: int) -> list[bool]:
    entries = settings.entries(key, n_blocks)
    for entry in entries:
        settings.only_one_of(key, entry, tuple(known))
    return [known[entry] for entry in entries]


def _depths(
    settings: Settings, layers: tuple[int, ...]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """For each down block and each up block: the depth of the transformer behind each of its resnets.

    An entry that is itself a list names every transformer of its block; then the way up, which has one more
    in each block, must be given too.
    """
    key, reverse_key = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    value = settings.value(key)
    entries = (
        settings.entries(key, len(layers)) if isinstance(value, list | tuple) else (value,) * len(layers)
    )
    reversed_entries = tuple(reversed(entries))
    if settings.value(reverse_key) is not None:
        reversed_entries = settings.entries(reverse_key, len(layers))
    elif any(isinstance(entry, list | tuple) for entry in entries):
        raise settings.refused(reverse_key, f"must be given where {key} holds lists", None)
    up_layers = tuple(count + 1 for count in reversed(layers))
    return (
        [_depths_of(settings, key, entry, count) for entry, count in zip(entries, layers, strict=True)],
        [
            _depths_of(settings, reverse_key, entry, count)
            for entry, count in zip(reversed_entries, up_layers, strict=True)
        ],
    )


def _depths_of(settings: Settings, key: str, entry: Any, count: int) -> tuple[int, ...]:
    if not isinstance(entry, list | tuple):
        return (settings.checked_whole(key, entry),) * count
    if len(entry) != count:
        raise settings.refused(key, f"must have {count} entries in the list for this block", entry)
    return tuple(settings.checked_whole(key, depth) for depth in entry)


def _add_transformer(
    settings: Settings, table: TensorTable, name: str, size: int, heads: int, context: int, depth: int
) -> None:
    inner = heads * (size // heads)
    if inner < 1:
        raise settings.refused("attention_head_dim", f"must be at most {size} for this block", heads)
    table.norm(f"{name}.norm", size)
    if settings.flag("use_linear_projection"):
        table.linear(f"{name}.proj_in", inner, size)
        table.linear(f"{name}.proj_out", size, inner)
    else:
        table.conv(f"{name}.proj_in", inner, size, kernel=1)
        table.conv(f"{name}.proj_out", size, inner, kernel=1)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        for norm in ("norm1", "norm2", "norm3"):
            table.norm(f"{block}.{norm}", inner)
        add_attention(table, f"{block}.attn1", inner, inner, inner, bias=False)
        add_attention(table, f"{block}.attn2", inner, context, inner, bias=False)
        add_feed_forward(table, f"{block}.ff", inner, gated=True)


def _measure(measured: Measured) -> dict[str, Any]:
    n_blocks = measured.count("down_blocks")
    if not 1 <= n_blocks <= 100:
        raise measured.untold("block_out_channels", f"the tensors name {n_blocks} blocks 'down_blocks.<n>'")
    channels = [
        measured.shape(f"down_blocks.{index}.resnets.0.conv1.weight", 4, "block_out_channels")[0]
        for index in range(n_blocks)
    ]
    layers = [measured.count(f"down_blocks.{index}.resnets") for index in range(n_blocks)]
    down = [_measured_depths(measured, f"down_blocks.{index}") for index in range(n_blocks)]
    up = [_measured_depths(measured, f"up_blocks.{index}") for index in range(n_blocks)]
    middle = _measured_depths(measured, "mid_block")
    is_linear = any(
        len(shape) == 2 for name, shape in measured.shapes.items() if name.endswith(".proj_in.weight")
    )
    conv_in = measured.shape("conv_in.weight", 4, "in_channels")
    conv_out = measured.shape("conv_out.weight", 4, "out_channels")
    time_width = measured.shape("time_embedding.linear_1.weight", 2, "time_embedding_dim")[0]
    guidance, added = "time_embedding.cond_proj.weight", "add_embedding.linear_1.weight"
    if measured.has(added) and "addition_time_embed_dim" not in measured.constants:
        raise measured.untold(
            "addition_time_embed_dim", "no shape depends on it, and the family does not say it"
        )
    return {
        "in_channels": conv_in[1],
        "out_channels": conv_out[0],
        "conv_in_kernel": conv_in[2],
        "conv_out_kernel": conv_out[2],
        "down_block_types": ["CrossAttnDownBlock2D" if depths else "DownBlock2D" for depths in down],
        "mid_block_type": (
            _MIDDLE_WITH_ATTENTION
            if middle
            else _MIDDLE_PLAIN
            if measured.count("mid_block.resnets")
            else None
        ),
        "up_block_types": ["CrossAttnUpBlock2D" if depths else "UpBlock2D" for depths in up],
        "block_out_channels": channels,
        "layers_per_block": _one_if_same(layers),
        **_measured_context(measured),
        **_transformer_layers(measured, down, middle, up),
        "attention_head_dim": _heads(measured, channels, is_linear),
        "use_linear_projection": is_linear,
        "addition_embed_type": "text_time" if measured.has(added) else None,
        "projection_class_embeddings_input_dim": (
            measured.shape(added, 2, "projection_class_embeddings_input_dim")[1]
            if measured.has(added)
            else None
        ),
        "time_embedding_dim": None if time_width == 4 * channels[0] else time_width,
        "time_cond_proj_dim": (
            measured.shape(guidance, 2, "time_cond_proj_dim")[1] if measured.has(guidance) else None
        ),
    }


def _measured_depths(measured: Measured, block: str) -> list[int]:
    """The depth of each transformer of `block`; empty where it has none."""
    n_attentions = measured.count(f"{block}.attentions")
    if n_attentions > _MAX_LAYERS:
        raise measured.untold("layers_per_block", f"'{block}' names {n_attentions} attentions")
    return [measured.count(f"{block}.attentions.{index}.transformer_blocks") for index in range(n_attentions)]


def _measured_context(measured: Measured) -> dict[str, Any]:
    widths = {
        shape[1]
        for name, shape in measured.shapes.items()
        if name.endswith(".attn2.to_k.weight") and len(shape) == 2
    }
    if len(widths) > 1:
        raise measured.untold(
            "cross_attention_dim", f"the transformers read texts of different widths: {sorted(widths)}"
        )
    return {"cross_attention_dim": widths.pop()} if widths else {}


def _transformer_layers(
    measured: Measured, down: list[list[int]], middle: list[int], up: list[list[int]]
) -> dict[str, Any]:
    """The two depth keys. A block without transformers takes its mirror's number, or 1: it builds nothing.

    The middle has no key of its own: the class gives it the last block's first depth.
    """
    there: list[Any] = []
    for index, depths in enumerate(down):
        mirrored = up[len(down) - 1 - index]
        if not depths and index == len(down) - 1:
            depths = middle
        there.append(_one_if_same(depths or mirrored or [1]))
    first_of_last = there[-1][0] if isinstance(there[-1], list) else there[-1]
    if middle and middle[0] != first_of_last:
        raise measured.untold(
            "transformer_layers_per_block",
            f"the middle is {middle[0]} deep, where the block before it makes it {first_of_last}",
        )
    back = [_one_if_same(depths) if depths else 1 for depths in up]
    is_mirrored = all(
        not depths or value == other for depths, value, other in zip(up, back, reversed(there), strict=True)
    )
    is_nested = any(isinstance(value, list) for value in there)
    return {
        "transformer_layers_per_block": there,
        "reverse_transformer_layers_per_block": None if is_mirrored and not is_nested else back,
    }


def _heads(measured: Measured, channels: list[int], is_linear: bool) -> Any:
    """How many heads each block has, which no shape tells.

    The constants say it; else 64 wide heads, the rule of all models with linear projections (Stable
    Diffusion 2 and XL). Without them (Stable Diffusion 1) the number is the same in each block.
    """
    if "attention_head_dim" in measured.constants:
        return measured.constants["attention_head_dim"]
    if not is_linear:
        raise measured.untold("attention_head_dim", "no shape depends on it, and the family does not say it")
    return [measured.divided(size, _HEAD_DIM, "attention_head_dim") for size in channels]


def _one_if_same(values: list[int]) -> Any:
    return values[0] if len(set(values)) == 1 else values


UNET = Schema(
    class_name="UNet2DConditionModel",
    stamp={"_class_name": "UNet2DConditionModel"},
    defaults={**_DEFAULTS, **_ONLY},
    expect=_expect,
    measure=_measure,
    untold=(),
)
