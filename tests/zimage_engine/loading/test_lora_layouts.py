"""Names and shapes alone: what is placed, and the sentences about what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zimage_engine.checkpoint.tensors import TensorFacts
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading.lora_layouts import LoraFeatures, normalise, read_lora

WIDTH = 6
BLOCK = "layers.0.attention"
MODULES = {
    **{f"{BLOCK}.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    f"{BLOCK}.norm_q": (WIDTH,),
    "layers.0.feed_forward.w1": (16, WIDTH),
    "layers.0.adaLN_modulation.0": (24, WIDTH),
    "cap_embedder.1": (WIDTH, 5),
    "all_x_embedder.2-1": (WIDTH, 4),
    "all_final_layer.2-1.linear": (4, WIDTH),
}


def lora(*tensors: tuple[str, tuple[int, ...]], **settings: object) -> LoraFeatures:
    facts = tuple(TensorFacts(name, "F32", shape) for name, shape in tensors)
    return LoraFeatures(Path("a.safetensors"), facts, settings)


def pair(stem: str, out_width: int = WIDTH, in_width: int = WIDTH, rank: int = 2):
    return (f"{stem}.lora_A.weight", (rank, in_width)), (f"{stem}.lora_B.weight", (out_width, rank))


@pytest.mark.parametrize(
    ("stem", "module"),
    [
        ("layers.0.attention.out", f"{BLOCK}.to_out.0"),
        ("lora_unet_layers_0_attention_out", f"{BLOCK}.to_out.0"),
        ("lora_unet_layers_0_attention_to_out_0", f"{BLOCK}.to_out.0"),
        ("transformer._orig_mod.layers.0.attention.to_q", f"{BLOCK}.to_q"),
        ("base_model.model.diffusion_model.layers.0.attention.to_q", f"{BLOCK}.to_q"),
        ("lycoris_layers_0_attention_to_q", f"{BLOCK}.to_q"),
    ],
)
def test_names_are_found_among_the_modules(stem: str, module: str) -> None:
    assert [adapted.module for adapted in normalise(lora(*pair(stem)), MODULES).modules] == [module]


@pytest.mark.parametrize(
    ("stem", "module", "sides"),
    [
        ("lora_unet__layers_0_adaLN_modulation_0", "layers.0.adaLN_modulation.0", (24, WIDTH)),
        ("diffusion_model.x_embedder", "all_x_embedder.2-1", (WIDTH, 4)),
        ("lora_unet_final_layer_linear", "all_final_layer.2-1.linear", (4, WIDTH)),
        ("lora_transformer_cap_embedder_1", "cap_embedder.1", (WIDTH, 5)),
    ],
)
def test_names_with_underscores_of_their_own_are_found(
    stem: str, module: str, sides: tuple[int, int]
) -> None:
    assert normalise(lora(*pair(stem, *sides)), MODULES).modules[0].module == module


def test_a_fused_pair_is_cut_into_three_that_share_a() -> None:
    plan = normalise(lora(*pair(f"{BLOCK}.qkv", 3 * WIDTH)), MODULES)
    assert {(m.module.rpartition(".")[2], m.b_rows) for m in plan.modules} == {
        ("to_q", (0, WIDTH)),
        ("to_k", (WIDTH, 2 * WIDTH)),
        ("to_v", (2 * WIDTH, 3 * WIDTH)),
    }
    assert {m.a_source for m in plan.modules} == {f"{BLOCK}.qkv.lora_A.weight"}


def test_a_fused_pair_beside_the_split_ones_is_dropped_with_its_reason() -> None:
    split = [tensor for name in ("to_q", "to_k", "to_v") for tensor in pair(f"{BLOCK}.{name}")]
    plan = normalise(lora(*split, *pair(f"{BLOCK}.qkv", 3 * WIDTH)), MODULES)
    assert [m.b_rows for m in plan.modules] == [None] * 3
    assert set(plan.dropped) == {f"{BLOCK}.qkv.lora_A.weight", f"{BLOCK}.qkv.lora_B.weight"}


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": 8, "r": 4}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"attention.to_q": 1}}, 0.25),
    ],
)
def test_the_scale_without_alphas_is_pefts(settings: dict[str, object], scale: float) -> None:
    (adapted,) = normalise(lora(*pair(f"{BLOCK}.to_q", rank=4), **settings), MODULES).modules
    assert (adapted.alpha_source, adapted.scale) == (None, scale)


QKV_A, _ = pair(f"{BLOCK}.qkv")
Q_A, Q_B = pair(f"{BLOCK}.to_q")


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ([*pair("double_blocks.0.img_attn.qkv")], "fit nothing .* is for Flux"),
        ([*pair("lora_unet_down_blocks_0_attentions_0_proj_in")], "is for Stable Diffusion"),
        ([Q_A, Q_B, *pair("layers.7.attention.to_q")], r"layers\.7.* \(1 other pairs do\)"),
        ([*pair(f"{BLOCK}.to_q", in_width=7)], r"is \(2, 7\).*expected \(2, 6\) and \(6, 2\).*another size"),
        ([*pair(f"{BLOCK}.qkv", 2 * WIDTH)], r"\(18, 2\)"),
        ([*pair(f"{BLOCK}.q_norm")], "another size"),
        ([Q_A, (Q_B[0], (WIDTH, 3))], r"expected \(rank, in\) and \(out, rank\)"),
        ([Q_A, Q_B, (f"{BLOCK}.to_q.alpha", (2,))], "expected one number"),
        ([Q_A, Q_B, ("transformer." + Q_A[0], Q_A[1]), ("transformer." + Q_B[0], Q_B[1])], "twice"),
        ([*pair(f"{BLOCK}.to_q"), *pair(f"{BLOCK}.qkv", 3 * WIDTH)], "twice"),
        ([Q_A], "lack one of A and B"),
        ([Q_A, Q_B, (f"{BLOCK}.to_k.alpha", ())], "lack one of A and B"),
        ([("layers.0.attention.to_q.weight", (6, 6))], "belong to no LoRA.*whole model"),
        ([], "holds no tensors"),
        ([*pair("lora_te_text_model_encoder_layers_0_mlp_fc1")], "text encoder"),
        ([*pair("text_encoder.layers.0.mlp.up_proj")], "text encoder"),
        ([(f"{BLOCK}.to_q.lokr_w1", (2, 2))], "LoKr"),
        ([(f"{BLOCK}.to_q.hada_w1_a", (2, 2))], "LoHa"),
        ([Q_A, Q_B, (f"{BLOCK}.to_q.dora_scale", (6, 1))], "DoRA"),
        ([Q_A, Q_B, (f"{BLOCK}.to_k.diff", (6, 6))], "whole weight differences"),
    ],
)
def test_what_has_no_place_is_refused_in_a_sentence(
    tensors: list[tuple[str, tuple[int, ...]]], sentence: str
) -> None:
    with pytest.raises(CheckpointDamaged, match=sentence):
        normalise(lora(*tensors), MODULES)


def write_empty_tensors(file: Path, **metadata: str) -> None:
    """A safetensors file of one tensor without elements; the header is padded to 128 bytes at least."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({"__metadata__": metadata, "a.lora_A.weight": entry}).encode()
    header = header.ljust(0x80)
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def test_a_header_whose_length_begins_like_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_empty_tensors(file)
    assert file.read_bytes()[0] == 0x80
    assert [tensor.name for tensor in read_lora(file).tensors] == ["a.lora_A.weight"]


def test_settings_are_read_from_the_header_or_from_pefts_file_beside(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    write_empty_tensors(file)
    assert read_lora(tmp_path).settings == {}
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 3}')
    assert read_lora(tmp_path).settings == {"lora_alpha": 3}
    write_empty_tensors(file, lora_adapter_metadata='{"transformer.lora_alpha": 4}')
    assert read_lora(tmp_path).settings == {"lora_alpha": 4}
