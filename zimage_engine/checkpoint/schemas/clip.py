"""The tensors of CLIPTextModel and CLIPTextModelWithProjection, under the names of transformers 5.

There the plain model has no "text_model." before its names, while the one with the projection has; files
published earlier have it for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zimage_engine.checkpoint.schemas.schema import Measured, Schema, Settings, TensorTable

#: Every published CLIP text model has heads of this width.
_HEAD_DIM = 64

_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
}
#: Shapes do not tell: CLIP-L has quick_gelu, OpenCLIP bigG gelu, and the other one draws a different picture.
_UNTOLD = (("hidden_act",),)


def _expect(settings: Settings, table: TensorTable, prefix: str) -> None:
    hidden = settings.whole("hidden_size")
    inner = settings.whole("intermediate_size")
    n_heads = settings.whole("num_attention_heads")
    if hidden % n_heads:
        raise settings.refused("num_attention_heads", f"must divide hidden_size, which is {hidden}", n_heads)
    positions = settings.whole("max_position_embeddings")
    table.add(f"{prefix}embeddings.token_embedding.weight", settings.whole("vocab_size"), hidden)
    table.add(f"{prefix}embeddings.position_embedding.weight", positions, hidden)
    for index in range(settings.whole("num_hidden_layers", minimum=0)):
        layer = f"{prefix}encoder.layers.{index}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            table.linear(f"{layer}.self_attn.{projection}", hidden, hidden)
        table.norm(f"{layer}.layer_norm1", hidden)
        table.linear(f"{layer}.mlp.fc1", inner, hidden)
        table.linear(f"{layer}.mlp.fc2", hidden, inner)
        table.norm(f"{layer}.layer_norm2", hidden)
    table.norm(f"{prefix}final_layer_norm", hidden)


def _expect_plain(settings: Settings, table: TensorTable) -> None:
    _expect(settings, table, prefix="")


def _expect_projected(settings: Settings, table: TensorTable) -> None:
    _expect(settings, table, prefix="text_model.")
    width = settings.whole("projection_dim")
    table.add("text_projection.weight", width, settings.whole("hidden_size"))


def _measure(measured: Measured, prefix: str) -> dict[str, Any]:
    vocab, hidden = measured.shape(f"{prefix}embeddings.token_embedding.weight", 2, "vocab_size")
    positions = f"{prefix}embeddings.position_embedding.weight"
    inner = measured.shape(f"{prefix}encoder.layers.0.mlp.fc1.weight", 2, "intermediate_size")[0]
    n_heads = measured.constants.get("num_attention_heads")
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": measured.count(f"{prefix}encoder.layers"),
        "num_attention_heads": (
            measured.divided(hidden, _HEAD_DIM, "num_attention_heads") if n_heads is None else n_heads
        ),
        "max_position_embeddings": measured.shape(positions, 2, "max_position_embeddings")[0],
    }


def _measure_plain(measured: Measured) -> dict[str, Any]:
    return _measure(measured, prefix="")


def _measure_projected(measured: Measured) -> dict[str, Any]:
    width = measured.shape("text_projection.weight", 2, "projection_dim")[0]
    return {**_measure(measured, prefix="text_model."), "projection_dim": width}


def _schema(
    class_name: str,
    prefix: str,
    stored_prefix: str,
    expect: Callable[[Settings, TensorTable], None],
    measure: Callable[[Measured], dict[str, Any]],
) -> Schema:
    return Schema(
        class_name=class_name,
        stamp={"architectures": [class_name], "model_type": "clip_text_model"},
        defaults=_DEFAULTS,
        expect=expect,
        measure=measure,
        untold=_UNTOLD,
        optional=frozenset({f"{prefix}embeddings.position_ids"}),
        stored_prefix=stored_prefix,
    )


CLIP_TEXT = _schema("CLIPTextModel", "", "text_model.", _expect_plain, _measure_plain)
CLIP_TEXT_WITH_PROJECTION = _schema(
    "CLIPTextModelWithProjection", "text_model.", "", _expect_projected, _measure_projected
)
