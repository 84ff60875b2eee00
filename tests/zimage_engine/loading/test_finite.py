"""NaN and infinity among weights are found, and what was found finite is not looked through twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.zimage_engine.tiny_models import write_tiny_z_image
from zimage_engine.checkpoint.tensors import WeightFile
from zimage_engine.checkpoint.weight_files import read_weight_file
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading import finite, verify
from zimage_engine.loading.adapter import ModelLoaderAdapter
from zimage_engine.loading.finite import FiniteNotes, is_finite

FLOATING = (torch.bfloat16, torch.float16, torch.float32)


def stored(folder: Path, value: float = 1.0, name: str = "a.safetensors") -> tuple[WeightFile, ...]:
    save_file({"weight": torch.full((3, 70_000), value, dtype=torch.bfloat16)}, folder / name)
    return (read_weight_file(folder / name),)


@pytest.mark.parametrize("dtype", FLOATING)
def test_the_largest_numbers_of_either_sign_and_the_smallest_are_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    values = [limits.max, limits.min, limits.smallest_normal, limits.smallest_normal / 4, 0, -0.0]
    assert is_finite(torch.tensor(values).to(dtype))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 262_144, 600_000])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, value: float, place: int) -> None:
    weight = torch.linspace(-1, 1, 600_001).to(dtype)
    weight[place] = value
    assert not is_finite(weight)


def test_integers_and_empty_tensors_are_finite() -> None:
    assert is_finite(torch.full((4,), -1)) and is_finite(torch.ones(0))


def test_a_note_holds_for_the_same_content_wherever_it_stands(tmp_path: Path) -> None:
    notes = FiniteNotes(tmp_path / "notes")
    files = stored(tmp_path)
    assert not notes.knows(files, "bfloat16")
    notes.remember(files, "bfloat16")
    assert notes.knows(files, "bfloat16")
    (tmp_path / "moved").mkdir()
    moved = files[0].path.rename(tmp_path / "moved" / "b.safetensors")
    assert notes.knows((read_weight_file(moved),), "bfloat16")


def test_other_bytes_another_dtype_or_another_file_have_no_note(tmp_path: Path) -> None:
    notes = FiniteNotes(tmp_path / "notes")
    files = stored(tmp_path)
    notes.remember(files, "bfloat16")
    assert not notes.knows(files, "float16")
    assert not notes.knows((*files, *stored(tmp_path, 2.0, "b.safetensors")), "bfloat16")
    times = (files[0].path.stat().st_atime_ns, files[0].path.stat().st_mtime_ns)
    changed = stored(tmp_path, 3.0)
    os.utime(changed[0].path, ns=times)  # the content tells, not the time alone
    assert not notes.knows(changed, "bfloat16")


def test_notes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "MOST_NOTES", 2)
    notes = FiniteNotes(tmp_path / "notes")
    for number, age in ((1, 300), (2, 200), (3, 100)):
        files = stored(tmp_path, number, f"{number}.safetensors")
        notes.remember(files, "bfloat16")
        note = notes._note(files, "bfloat16")
        os.utime(note, (note.stat().st_atime - age, note.stat().st_mtime - age))
    notes.remember(stored(tmp_path, 4, "4.safetensors"), "bfloat16")
    assert len(list((tmp_path / "notes").iterdir())) == 2
    # Written anew, it has another time of change.
    assert not notes.knows(stored(tmp_path, 4, "4.safetensors"), "bfloat16")


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("a file where the folder should be")
    notes = FiniteNotes(tmp_path / "notes")
    notes.remember(stored(tmp_path), "bfloat16")
    assert not notes.knows(stored(tmp_path), "bfloat16")


def test_a_second_load_does_not_look_again_and_damage_is_seen_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_z_image(tmp_path / "tiny")
    looked: list[str] = []
    look = verify.check_finite

    def counted(component: str, *rest: object, **options: object) -> None:
        looked.append(component)
        look(component, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(verify, "check_finite", counted)

    def load() -> list[str]:
        looked.clear()
        ModelLoaderAdapter(model, cache_folder=tmp_path / "views").load()
        return sorted(looked)

    assert load() == ["text_encoder", "transformer", "vae"]
    assert load() == []
    (file,) = (model / "vae").glob("*.safetensors")
    from safetensors.torch import load_file

    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointDamaged, match=r"vae: .* holds NaN or infinite values"):
        load()
    assert looked == ["vae"]
