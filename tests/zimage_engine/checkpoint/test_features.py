from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zimage_engine.checkpoint.features import read_features
from zimage_engine.checkpoint.safetensors_header import read_safetensors_header
from zimage_engine.checkpoint.tensors import TensorFacts
from zimage_engine.errors import CheckpointDamaged


def test_a_whole_folder_is_measured(tiny_model: Path) -> None:
    features = read_features(tiny_model)
    assert set(features.components) == {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    assert features.value("model_index._class_name") == "ZImagePipeline"
    assert features.value("transformer.cap_feat_dim") == 16
    assert features.value("scheduler.shift") == 3.0
    assert features.value("transformer.no_such_key") is None
    assert features.value("no_such_component.dim") is None
    transformer = features.components["transformer"]
    assert (transformer.library, transformer.class_name) == ("diffusers", "ZImageTransformer2DModel")
    (weights,) = transformer.weight_files
    assert weights.damage == ""
    assert TensorFacts("x_pad_token", "BF16", (1, 16)) in weights.tensors


def test_a_folder_without_model_index_is_measured_all_the_same(copy_of_tiny_model) -> None:
    folder = copy_of_tiny_model()
    (folder / "model_index.json").unlink()
    features = read_features(folder)
    assert features.model_index == {}
    assert features.value("transformer.cap_feat_dim") == 16


def test_a_component_that_is_listed_but_absent_is_told(copy_of_tiny_model) -> None:
    folder = copy_of_tiny_model()
    (folder / "vae").rename(folder.parent / "elsewhere")
    assert not read_features(folder).components["vae"].is_there


UNREADABLE = [
    ("{", "is not valid JSON"),
    ("[1, 2]", "should hold a JSON object, got a list"),
    ("", "is empty"),
    ("{}", "holds nothing"),
    ("[" * 100_000, "is not valid JSON"),
]


@pytest.mark.parametrize(("content", "clause"), UNREADABLE)
def test_settings_that_cannot_be_read_are_measured_as_damage(
    copy_of_tiny_model, content: str, clause: str
) -> None:
    folder = copy_of_tiny_model()
    (folder / "transformer" / "config.json").write_text(content)
    (folder / "model_index.json").write_text(content)
    features = read_features(folder)
    assert (features.model_index, features.components["transformer"].config) == ({}, {})
    assert clause in features.model_index_damage
    assert features.components["transformer"].config_damage.startswith("config.json ")
    assert clause in features.components["transformer"].config_damage


@pytest.mark.parametrize(("content", "clause"), UNREADABLE[:3])
def test_a_shard_index_that_cannot_be_read_is_named(copy_of_tiny_model, content: str, clause: str) -> None:
    index = copy_of_tiny_model() / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(CheckpointDamaged, match=clause) as raised:
        read_features(index.parent.parent)
    assert str(index) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "variant", "is_shard"),
    [
        ("diffusion_pytorch_model.safetensors", "", False),
        ("diffusion_pytorch_model-00001-of-00003.safetensors", "", True),
        ("diffusion_pytorch_model.fp16.safetensors", "fp16", False),
        ("diffusion_pytorch_model.fp16-00001-of-00003.safetensors", "fp16", True),
        ("model.bf16.safetensors", "bf16", False),
    ],
)
def test_variant_and_shard_are_read_from_the_name(
    tmp_path: Path, name: str, variant: str, is_shard: bool
) -> None:
    component = tmp_path / "part"
    component.mkdir()
    (component / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, component / name)
    (weights,) = read_features(tmp_path).components["part"].weight_files
    assert (weights.variant, weights.is_shard, weights.form) == (variant, is_shard, "safetensors")


def test_other_safetensors_files_are_not_weights_of_the_component(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "part" / "my_lora.safetensors")
    assert read_features(tmp_path).components["part"].weight_files == ()


@pytest.mark.parametrize(
    ("name", "variant", "form"),
    [
        ("diffusion_pytorch_model.safetensors.index.json", "", "safetensors"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "fp16", "safetensors"),
        ("pytorch_model.bin.index.json", "", "bin"),
    ],
)
def test_an_index_lists_its_shards(tmp_path: Path, name: str, variant: str, form: str) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text("{}")
    (tmp_path / "part" / name).write_text(json.dumps({"weight_map": {"a": "two", "b": "one", "c": "two"}}))
    (index,) = read_features(tmp_path).components["part"].indexes
    assert (index.variant, index.form, index.shards) == (variant, form, ("one", "two"))


def test_an_index_without_a_weight_map_is_damage(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text("{}")
    (tmp_path / "part" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointDamaged, match="weight_map"):
        read_features(tmp_path)


def test_the_header_gives_names_dtypes_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, path, metadata={"x": "y"})
    tensors, damage = read_safetensors_header(path)
    assert damage == ""
    assert set(tensors) == {TensorFacts("a", "F32", (2, 3)), TensorFacts("b", "BF16", (4,))}


@pytest.mark.parametrize(
    ("damage_it", "clause"),
    [
        (lambda content: content[:-5], "bytes where its header announces"),
        (lambda content: content + b"more", "bytes where its header announces"),
        (lambda content: content[:20], "header is cut off"),
        (lambda content: b"", "header is cut off"),
        (lambda content: b"<!DOCTYPE html><html>not found</html>", "header is cut off"),
        (lambda content: (8).to_bytes(8, "little") + b"12345678", "not the JSON"),
        (lambda content: (8).to_bytes(8, "little") + b'{"a": 1}', "not the JSON"),
    ],
)
def test_a_damaged_file_is_told_from_its_header(tmp_path: Path, damage_it, clause: str) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2, 3)}, path)
    path.write_bytes(damage_it(path.read_bytes()))
    _, damage = read_safetensors_header(path)
    assert clause in damage
