"""A content that was verified once is loaded as it was then; anything else is looked at anew."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.zimage_engine.tiny_models import write_tiny_z_image
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading import adapter as adapters
from zimage_engine.loading import known_loads
from zimage_engine.loading.adapter import ModelLoaderAdapter
from zimage_engine.loading.known_loads import KnownLoad, KnownLoads, key_of_load

LOAD = KnownLoad("sdxl", "bfloat16", True, None, "", ("write-config",))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_z_image(tmp_path / "tiny")


@pytest.fixture
def load(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, int]]:
    """Loads the model; gives the adapter, and how often it was measured and planned."""
    plan, planned = adapters.plan_mending, []

    def counted(*arguments: Any) -> Any:
        planned.append(arguments)
        return plan(*arguments)

    monkeypatch.setattr(adapters, "plan_mending", counted)

    def loaded(path: Path = model, **words: Any) -> tuple[Any, int]:
        planned.clear()
        adapter = ModelLoaderAdapter(path, cache_folder=tmp_path / "cache" / "views", **words)
        adapter.pipeline = adapter.load()  # type: ignore[attr-defined]
        assert adapter.family.name == "z-image-turbo"
        return adapter, len(planned)

    return loaded


def weights_of(pipeline: Any) -> dict[str, torch.Tensor]:
    return dict(pipeline.transformer.state_dict())


def same(one: Any, other: Any) -> bool:
    first, second = weights_of(one), weights_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_second_load_gives_the_same_without_a_look(load: Callable[..., tuple[Any, int]]) -> None:
    first, looked = load()
    second, looked_again = load()
    assert (looked, looked_again) == (1, 0)
    assert same(first.pipeline, second.pipeline)
    assert second.repairs == first.repairs == ()
    assert "repairs: none" in second.explain()


def test_a_repaired_one_is_found_again_with_its_view(
    load: Callable[..., tuple[Any, int]], model: Path
) -> None:
    (model / "model_index.json").unlink()
    first, looked = load()
    second, looked_again = load()
    assert (looked, looked_again) == (1, 0)
    assert first.repairs == second.repairs == ("write-model-index",)
    assert same(first.pipeline, second.pipeline)
    shutil.rmtree(first.model_path)
    third, looked_for_the_third = load()
    assert looked_for_the_third == 1
    assert same(first.pipeline, third.pipeline)


def test_what_was_asked_is_part_of_it(load: Callable[..., tuple[Any, int]]) -> None:
    load()
    other, looked = load(dtype="float32")
    assert looked == 1 and other.pipeline.transformer.dtype is torch.float32
    again, looked = load(dtype="float32")
    assert looked == 0 and again.family.dtype == "float32"


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_damage_done_since_is_seen(load: Callable[..., tuple[Any, int]], model: Path, part: str) -> None:
    load()
    (file,) = (model / part).glob("*.safetensors")
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=times)  # the content tells, not the time alone
    with pytest.raises(CheckpointDamaged, match=f"{part}: .* holds NaN or infinite values"):
        load()
    with pytest.raises(CheckpointDamaged):  # a load that failed is not remembered
        load()


def test_a_changed_setting_and_a_new_file_are_seen(load: Callable[..., tuple[Any, int]], model: Path) -> None:
    load()
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert load()[1] == 1
    (model / "notes.txt").write_text("new", encoding="utf-8")
    assert load()[1] == 1
    assert load()[1] == 0


def test_another_place_or_library_is_looked_at_anew(
    load: Callable[..., tuple[Any, int]], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    assert load(model.rename(model.with_name("moved")))[1] == 1
    monkeypatch.setattr(known_loads, "version", lambda name: f"9.9 of {name}")
    assert load(model.with_name("moved"))[1] == 1


def test_a_note_that_is_no_note_is_not_there(tmp_path: Path) -> None:
    loads = KnownLoads(tmp_path / "views")
    note = tmp_path / "loads" / "a"
    loads.remember("a", LOAD)
    assert loads.recall("a") == LOAD
    for text in ("", "[]", "{}", json.dumps({"family": "sdxl", "unknown": 1, "repairs": []}), "\udcff"):
        note.write_text(text, encoding="utf-8", errors="surrogateescape")
        assert loads.recall("a") is None
    assert (loads.forget(), loads.forget()) == (1, 0)
    note.parent.rmdir()
    note.parent.write_text("where the folder should be", encoding="utf-8")
    loads.remember("a", LOAD)
    assert loads.recall("a") is None
    assert loads.forget() == 0


def test_notes_and_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_loads, "MOST_NOTES", 2)
    monkeypatch.setattr(known_loads, "MOST_FILES", 3)
    loads = KnownLoads(tmp_path / "views")
    for name, time in (("old", 1), ("new", 2)):
        loads.remember(name, LOAD)
        os.utime(tmp_path / "loads" / name, (time, time))
    loads.remember("newest", LOAD)
    assert sorted(path.name for path in (tmp_path / "loads").iterdir()) == ["new", "newest"]
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(3):
        (folder / str(number)).touch()
    assert key_of_load({"model": folder}, {}) is not None
    (folder / "fourth").touch()
    assert key_of_load({"model": folder}, {}) is None
    assert key_of_load({"model": tmp_path / "gone"}, {}) is None
