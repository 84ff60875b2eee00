"""The tensors of Qwen3Model, under its own names: published files put "model." before them."""

from __future__ import annotations

from typing import Any

from zimage_engine.checkpoint.schemas.schema import Measured, Schema, Settings, TensorTable

_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "attention_bias": False,
}


def _expect(settings: Settings, table: TensorTable) -> None:
    hidden = settings.whole("hidden_size")
    inner = settings.whole("intermediate_size")
    head_dim = settings.whole("head_dim")
    n_heads = settings.whole("num_attention_heads")
    query_width = n_heads * head_dim
    key_width = (settings.whole_or_none("num_key_value_heads") or n_heads) * head_dim
    bias = settings.flag("attention_bias")
    table.add("embed_tokens.weight", settings.whole("vocab_size"), hidden)
    for index in range(settings.whole("num_hidden_layers", minimum=0)):
        layer = f"layers.{index}"
        table.linear(f"{layer}.self_attn.q_proj", query_width, hidden, bias)
        table.linear(f"{layer}.self_attn.k_proj", key_width, hidden, bias)
        table.linear(f"{layer}.self_attn.v_proj", key_width, hidden, bias)
        table.linear(f"{layer}.self_attn.o_proj", hidden, query_width, bias)
        table.add(f"{layer}.self_attn.q_norm.weight", head_dim)
        table.add(f"{layer}.self_attn.k_norm.weight", head_dim)
        table.add(f"{layer}.mlp.gate_proj.weight", inner, hidden)
        table.add(f"{layer}.mlp.up_proj.weight", inner, hidden)
        table.add(f"{layer}.mlp.down_proj.weight", hidden, inner)
        table.add(f"{layer}.input_layernorm.weight", hidden)
        table.add(f"{layer}.post_attention_layernorm.weight", hidden)
    table.add("norm.weight", hidden)


def _measure(measured: Measured) -> dict[str, Any]:
    vocab, hidden = measured.shape("embed_tokens.weight", 2, "vocab_size")
    attention = "layers.0.self_attn"
    head_dim = measured.shape(f"{attention}.q_norm.weight", 1, "head_dim")[0]
    query_width = measured.shape(f"{attention}.q_proj.weight", 2, "num_attention_heads")[0]
    key_width = measured.shape(f"{attention}.k_proj.weight", 2, "num_key_value_heads")[0]
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": measured.shape("layers.0.mlp.gate_proj.weight", 2, "intermediate_size")[0],
        "num_hidden_layers": measured.count("layers"),
        "num_attention_heads": measured.divided(query_width, head_dim, "num_attention_heads"),
        "num_key_value_heads": measured.divided(key_width, head_dim, "num_key_value_heads"),
        "head_dim": head_dim,
        "attention_bias": measured.has(f"{attention}.q_proj.bias"),
    }


QWEN3 = Schema(
    class_name="Qwen3Model",
    stamp={"architectures": ["Qwen3Model"], "model_type": "qwen3"},
    defaults=_DEFAULTS,
    expect=_expect,
    measure=_measure,
    # The class's default rotation base is not the published one: every position would be read wrongly.
    untold=(("rope_theta", "rope_parameters"),),
    optional=frozenset({"rotary_emb.inv_freq", "rotary_emb.original_inv_freq"}),
    stored_prefix="model.",
)
