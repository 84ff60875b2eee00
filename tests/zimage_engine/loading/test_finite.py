from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zimage_engine.checkpoint.weight_files import read_weight_file
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading import finite
from zimage_engine.loading.finite import StoredWeightsCheck, is_finite

NAN, INFINITE = float("nan"), float("inf")
#: More than one piece of any dtype, and no whole number of them.
PIECE_BYTES = 512 * 1024
LENGTH = 600_001


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_PIECE_BYTES", PIECE_BYTES)


def _check(file: Path, dtype: torch.dtype) -> None:
    with StoredWeightsCheck({"part": (read_weight_file(file),)}, str(dtype).removeprefix("torch.")) as stored:
        stored.check("part")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_largest_numbers_of_either_sign_and_the_smallest_are_finite(tmp_path: Path, dtype) -> None:
    limits = torch.finfo(dtype)
    values = torch.tensor(
        [limits.max, limits.min, limits.smallest_normal, limits.smallest_normal / 4, 0, -0.0]
    )
    save_file(
        {"weight": values.to(dtype), "scalar": torch.tensor(-1.0, dtype=dtype)}, tmp_path / "a.safetensors"
    )
    _check(tmp_path / "a.safetensors", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("value", [NAN, -NAN, INFINITE, -INFINITE])
@pytest.mark.parametrize("place", [0, 262_144, LENGTH - 1])
def test_one_stored_value_that_is_not_finite_is_found_anywhere(
    tmp_path: Path, dtype: torch.dtype, value: float, place: int
) -> None:
    weight = torch.linspace(-1, 1, LENGTH).to(dtype)
    weight[place] = value
    save_file({"whole": torch.ones(3, dtype=dtype), "weight": weight}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointDamaged, match="part: weight holds NaN or infinite values"):
        _check(tmp_path / "a.safetensors", dtype)


def test_every_bit_pattern_is_judged_as_torch_judges_it(tmp_path: Path) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = patterns.view(dtype)
        finite = torch.isfinite(values)
        save_file({"weight": values[finite]}, tmp_path / "finite.safetensors")
        _check(tmp_path / "finite.safetensors", dtype)
        for pattern in values[~finite][::97]:
            save_file({"weight": pattern.clone()}, tmp_path / "one.safetensors")
            with pytest.raises(CheckpointDamaged):
                _check(tmp_path / "one.safetensors", dtype)


def test_integers_are_finite_whatever_their_bits(tmp_path: Path) -> None:
    ids = torch.full((4,), -1, dtype=torch.int64)
    save_file({"weight": torch.ones(2, dtype=torch.bfloat16), "ids": ids}, tmp_path / "a.safetensors")
    _check(tmp_path / "a.safetensors", torch.bfloat16)
    assert is_finite(ids)


def test_what_is_cast_while_it_is_loaded_is_left_to_a_look_at_the_memory(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "cast.safetensors")
    torch.save({"weight": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "pickled.bin")
    save_file({"weight": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "as_is.safetensors")
    files = {file.stem: (read_weight_file(file),) for file in tmp_path.iterdir()}
    assert StoredWeightsCheck(files, "bfloat16").components == {"as_is"}


def test_a_file_that_got_shorter_since_its_header_was_read_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"weight": torch.ones(LENGTH)}, file)
    header = read_weight_file(file)
    with file.open("r+b") as opened:
        opened.truncate(header.size_bytes - 1)
    with (
        StoredWeightsCheck({"part": (header,)}, "float32") as stored,
        pytest.raises(CheckpointDamaged, match="bytes when its header was read and has"),
    ):
        stored.check("part")


def test_the_thread_ends_with_the_block_also_when_loading_fails(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(LENGTH * 20)}, tmp_path / "a.safetensors")
    files = {str(number): (read_weight_file(tmp_path / "a.safetensors"),) for number in range(50)}
    with pytest.raises(ValueError, match="no such class"), StoredWeightsCheck(files, "float32"):
        raise ValueError("no such class")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights-check")]
