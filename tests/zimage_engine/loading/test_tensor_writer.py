"""What is written is what torch makes of the same tensors, bit for bit, in a file that safetensors reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zimage_engine.checkpoint.parts import Recipe
from zimage_engine.checkpoint.tensors import TensorFacts
from zimage_engine.checkpoint.weight_files import read_weight_file
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading import tensor_writer
from zimage_engine.loading.tensor_writer import write_safetensors, written_bytes

_NOISE = torch.Generator().manual_seed(3)
QKV = torch.randn(12, 5, generator=_NOISE)
FP8 = torch.randn(6, 4, generator=_NOISE).to(torch.float8_e4m3fn)
BY_ROWS = torch.rand(6, generator=_NOISE) + 0.5
WHOLE = torch.tensor(0.037)
CONVOLUTION = torch.randn(4, 3, 1, 1, generator=_NOISE, dtype=torch.float16)
IDS = torch.arange(7, dtype=torch.int64)
INT8 = torch.arange(-12, 12, dtype=torch.int8).reshape(6, 4)

#: What, the stored tensors, the recipe, and what torch makes of them before the cast.
CASES: tuple[tuple[str, Mapping[str, torch.Tensor], Recipe, torch.Tensor], ...] = (
    ("as it is", {"a": QKV}, Recipe("x", (12, 5), "a"), QKV),
    ("rows", {"a": QKV}, Recipe("x", (4, 5), "a", rows=(4, 8)), QKV[4:8]),
    ("transposed", {"a": QKV}, Recipe("x", (5, 12), "a", transpose=True), QKV.t()),
    ("rows transposed", {"a": QKV}, Recipe("x", (5, 4), "a", rows=(8, 12), transpose=True), QKV[8:12].t()),
    ("a row more", {"a": QKV[0]}, Recipe("x", (1, 5), "a"), QKV[:1]),
    ("a 1x1 convolution", {"a": CONVOLUTION}, Recipe("x", (4, 3), "a"), CONVOLUTION[:, :, 0, 0]),
    ("one number", {"a": WHOLE}, Recipe("x", (), "a"), WHOLE),
    ("nothing", {"a": torch.empty(0, 3)}, Recipe("x", (0, 3), "a"), torch.empty(0, 3)),
    ("fp8", {"a": FP8}, Recipe("x", (6, 4), "a"), FP8.float()),
    ("scaled whole", {"a": FP8, "s": WHOLE}, Recipe("x", (6, 4), "a", scale="s"), FP8.float() * WHOLE),
    (
        "scaled by rows, some rows, transposed",
        {"a": FP8, "s": BY_ROWS},
        Recipe("x", (4, 3), "a", rows=(2, 5), transpose=True, scale="s"),
        (FP8.float() * BY_ROWS[:, None])[2:5].t(),
    ),
    (
        "scaled by columns",
        {"a": FP8, "s": BY_ROWS[None, :4]},
        Recipe("x", (6, 4), "a", scale="s"),
        FP8.float() * BY_ROWS[None, :4],
    ),
    ("scaled integers", {"a": INT8, "s": WHOLE}, Recipe("x", (6, 4), "a", scale="s"), INT8.float() * WHOLE),
)


def facts_of(stored: Mapping[str, torch.Tensor], folder: Path) -> tuple[TensorFacts, ...]:
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in stored.items()}, folder / "stored.safetensors"
    )
    return read_weight_file(folder / "stored.safetensors").tensors


@pytest.mark.parametrize("piece_bytes", [32, 32_000_000], ids=["in pieces", "at once"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("stored", "recipe", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_it_writes_what_torch_makes(
    stored: Mapping[str, torch.Tensor],
    recipe: Recipe,
    expected: torch.Tensor,
    dtype: str,
    piece_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensor_writer, "_PIECE_BYTES", piece_bytes)
    write_safetensors(tmp_path / "x", [recipe], stored.__getitem__, facts_of(stored, tmp_path), dtype)
    written = load_file(tmp_path / "x")["x"]
    wanted = expected.to(getattr(torch, dtype)).contiguous().view(recipe.shape)
    assert (written.dtype, written.shape) == (wanted.dtype, wanted.shape)
    assert written.reshape(-1).view(torch.uint8).equal(wanted.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
)
def test_integers_and_booleans_keep_their_type(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = {"ids": torch.tensor([0, 1, 1, 0]).to(dtype)}
    write_safetensors(
        tmp_path / "x",
        [Recipe("ids", (4,), "ids")],
        stored.__getitem__,
        facts_of(stored, tmp_path),
        "bfloat16",
    )
    assert load_file(tmp_path / "x")["ids"].dtype == dtype
    assert load_file(tmp_path / "x")["ids"].equal(stored["ids"])


def test_each_tensor_begins_at_a_multiple_of_its_element_and_each_source_is_read_once(tmp_path: Path) -> None:
    stored = {"flags": torch.tensor([True, False, True]), "qkv": QKV, "ids": IDS, "other": QKV[:3]}
    recipes = [
        Recipe("flags", (3,), "flags"),
        Recipe("q", (4, 5), "qkv", rows=(0, 4)),
        Recipe("other", (3, 5), "other"),
        Recipe("k", (4, 5), "qkv", rows=(4, 8)),
        Recipe("ids", (7,), "ids"),
    ]
    reads: list[str] = []

    def read(name: str) -> torch.Tensor:
        reads.append(name)
        return stored[name]

    facts = facts_of(stored, tmp_path)
    write_safetensors(tmp_path / "x", recipes, read, facts, "bfloat16")
    assert sorted(reads) == sorted(stored)
    content = (tmp_path / "x").read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    assert header.pop("__metadata__") == {"format": "pt"}
    widths = {"BOOL": 1, "BF16": 2, "I64": 8}
    assert (8 + header_bytes) % 8 == 0
    assert all(entry["data_offsets"][0] % widths[entry["dtype"]] == 0 for entry in header.values())
    assert len(content) - 8 - header_bytes == written_bytes(recipes, facts, "bfloat16")
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.get_tensor("k").equal(QKV[4:8].bfloat16())


WRONG = (
    ("other sides", Recipe("x", (12, 6), "a"), ("a", "[12, 5]", "x", "[12, 6]")),
    ("sides swapped, as many numbers", Recipe("x", (5, 12), "a"), ("[12, 5]", "[5, 12]")),
    ("rows beyond the end", Recipe("x", (4, 5), "a", rows=(10, 14)), ("[12, 5]", "[4, 5]", "rows 10 to 14")),
    ("a row is no matrix", Recipe("x", (5,), "row", transpose=True), ("row", "[5]", "transposed")),
    ("no such tensor", Recipe("x", (5,), "gone"), ("gone",)),
    ("no such scale", Recipe("x", (12, 5), "a", scale="gone"), ("gone",)),
    ("a scale of other sides", Recipe("x", (12, 5), "a", scale="row"), ("row", "[12, 5]", "[5]")),
)


@pytest.mark.parametrize(("recipe", "words"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_what_does_not_fit_is_named(recipe: Recipe, words: tuple[str, ...], tmp_path: Path) -> None:
    stored = {"a": QKV, "row": QKV[0]}
    with pytest.raises(CheckpointDamaged) as refused:
        write_safetensors(
            tmp_path / "x", [recipe], stored.__getitem__, facts_of(stored, tmp_path), "bfloat16"
        )
    assert all(word in str(refused.value) for word in words), str(refused.value)
