"""The tensors of T5EncoderModel."""

from __future__ import annotations

from typing import Any

from zimage_engine.checkpoint.schemas.schema import Measured, Schema, Settings, TensorTable

_DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "relu",
}
_TIED = "encoder.embed_tokens.weight"
_POSITIONS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def _expect(settings: Settings, table: TensorTable) -> None:
    model = settings.whole("d_model")
    inner = settings.whole("d_ff")
    n_heads = settings.whole("num_heads")
    attention = n_heads * settings.whole("d_kv")
    gated = settings.word("feed_forward_proj").startswith("gated-")
    for name in ("shared.weight", _TIED):
        table.add(name, settings.whole("vocab_size"), model)
    for index in range(settings.whole("num_layers", minimum=0)):
        layer = f"encoder.block.{index}.layer"
        for projection in ("q", "k", "v"):
            table.add(f"{layer}.0.SelfAttention.{projection}.weight", attention, model)
        table.add(f"{layer}.0.SelfAttention.o.weight", model, attention)
        if index == 0:  # the first block's distances serve all
            table.add(_POSITIONS, settings.whole("relative_attention_num_buckets"), n_heads)
        table.add(f"{layer}.0.layer_norm.weight", model)
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            table.add(f"{layer}.1.DenseReluDense.{name}.weight", inner, model)
        table.add(f"{layer}.1.DenseReluDense.wo.weight", model, inner)
        table.add(f"{layer}.1.layer_norm.weight", model)
    table.add("encoder.final_layer_norm.weight", model)


def _measure(measured: Measured) -> dict[str, Any]:
    vocab, model = measured.shape("shared.weight", 2, "vocab_size")
    buckets, n_heads = measured.shape(_POSITIONS, 2, "num_heads")
    attention = measured.shape("encoder.block.0.layer.0.SelfAttention.q.weight", 2, "d_kv")[0]
    gated = measured.has("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    known = measured.constants.get("feed_forward_proj")
    return {
        "vocab_size": vocab,
        "d_model": model,
        "d_kv": measured.divided(attention, n_heads, "d_kv"),
        "d_ff": measured.shape("encoder.block.0.layer.1.DenseReluDense.wo.weight", 2, "d_ff")[1],
        "num_layers": measured.count("encoder.block"),
        "num_heads": n_heads,
        "relative_attention_num_buckets": buckets,
        # Published are two: "relu" of the first T5, and "gated-gelu" of version 1.1 and all after it.
        "feed_forward_proj": (
            known
            if isinstance(known, str) and known.startswith("gated-") == gated
            else "gated-gelu"
            if gated
            else "relu"
        ),
    }


T5_ENCODER = Schema(
    class_name="T5EncoderModel",
    stamp={"architectures": ["T5EncoderModel"], "model_type": "t5"},
    defaults=_DEFAULTS,
    expect=_expect,
    measure=_measure,
    untold=(),
    optional=frozenset({_TIED}),
)
