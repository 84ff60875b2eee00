from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from tests.stand_in_hub import StandInHub
from zimage_engine.checkpoint.features import read_features
from zimage_engine.errors import CheckpointNotFound
from zimage_engine.loading.adapter import ModelLoaderAdapter
from zimage_engine.loading.locate import locate, missing_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache of a machine without a network."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def put_into_cache(cache: Path, repo_id: str, model: Path) -> Path:
    """Lay a model down as `huggingface_hub` does: a snapshot, and a ref that names it."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    snapshot = repo / "snapshots" / COMMIT
    shutil.copytree(model, snapshot)
    return snapshot


def test_a_folder_is_itself(tiny_model: Path) -> None:
    assert locate(tiny_model) == tiny_model
    assert locate(str(tiny_model)) == tiny_model


def test_a_folder_in_the_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate("~/model") == tmp_path / "model"


def test_a_hub_id_is_found_in_the_cache_without_a_network(hub_cache: Path, tiny_model: Path) -> None:
    snapshot = put_into_cache(hub_cache, "someone/tiny-z-image", tiny_model)
    assert locate("someone/tiny-z-image") == snapshot


def test_a_folder_wins_over_a_hub_id_of_the_same_spelling(
    hub_cache: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_into_cache(hub_cache, "someone/model", tiny_model)
    (tmp_path / "someone" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("someone/model") == Path("someone/model")


def test_a_hub_id_that_is_nowhere_says_what_to_do(hub_cache: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"'someone/absent' is not whole .* name a folder on disk"):
        locate("someone/absent")


def test_a_snapshot_that_lacks_a_component_is_not_taken_for_the_model(
    hub_cache: Path, tiny_model: Path
) -> None:
    snapshot = put_into_cache(hub_cache, "someone/partial", tiny_model)
    shutil.rmtree(snapshot / "transformer")
    with pytest.raises(
        CheckpointNotFound, match=r"not whole in the Hugging Face cache \(missing: transformer/\)"
    ):
        locate("someone/partial")


def test_a_hub_id_that_is_not_in_the_cache_is_fetched_and_checked(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    with StandInHub() as hub:
        hub.publish("someone/tiny", tiny_model)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        folder = locate("someone/tiny")
        assert missing_files(read_features(folder)) == ()
        asked = len(hub.requests)
        assert locate("someone/tiny") == folder
        assert len(hub.requests) == asked


def without_component(folder: Path) -> None:
    shutil.rmtree(folder / "transformer")


def without_weights(folder: Path) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()


def with_a_shard_not_yet_there(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("take_away", "missing"),
    [
        (without_component, "transformer/"),
        (without_weights, "the weights of transformer"),
        (with_a_shard_not_yet_there, "text_encoder/model-00002-of-00002.safetensors"),
        (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").touch(), None),
    ],
)
def test_what_a_folder_lacks_is_named(copy_of_tiny_model, take_away, missing: str | None) -> None:
    folder = copy_of_tiny_model()
    take_away(folder)
    assert missing_files(read_features(folder)) == ((missing,) if missing else ())


def test_a_single_file_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert locate(file) == file


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "./a/b", "a/b/c", "a b/c"])
def test_what_is_neither_folder_nor_id_is_refused(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFound, match="there is nothing at"):
        locate(name)


def test_a_revision_after_the_id_chooses_the_snapshot(hub_cache: Path, tiny_model: Path) -> None:
    newest = put_into_cache(hub_cache, "someone/tiny-z-image", tiny_model)
    older = newest.parent / ("f" * 40)
    shutil.copytree(tiny_model, older)
    (newest.parent.parent / "refs" / "v1").write_text(older.name)
    assert locate("someone/tiny-z-image") == newest
    assert locate(f"someone/tiny-z-image@{older.name}") == older
    assert locate("someone/tiny-z-image@v1") == older
    with pytest.raises(CheckpointNotFound):
        locate("someone/tiny-z-image@v2")


def test_the_commit_that_an_id_was_resolved_to_is_explained(hub_cache: Path, tiny_model: Path) -> None:
    put_into_cache(hub_cache, "someone/tiny-z-image", tiny_model)
    adapter = ModelLoaderAdapter("someone/tiny-z-image")
    assert adapter.commit == COMMIT
    assert f"at the commit {COMMIT}" in adapter.explain()
    assert ModelLoaderAdapter(tiny_model).commit is None
    assert "commit" not in ModelLoaderAdapter(tiny_model).explain()


def test_without_fetching_a_model_of_the_cache_is_found_and_another_is_refused(
    hub_cache: Path, tiny_model: Path
) -> None:
    snapshot = put_into_cache(hub_cache, "someone/tiny-z-image", tiny_model)
    assert locate("someone/tiny-z-image", fetch=False) == snapshot
    with pytest.raises(CheckpointNotFound, match="zimage-turbo download --model someone/else"):
        locate("someone/else", fetch=False)
    with pytest.raises(CheckpointNotFound, match="--model someone/else --revision v2"):
        locate("someone/else@v2", fetch=False)


def test_without_fetching_half_a_model_is_refused_with_what_it_lacks(
    hub_cache: Path, tiny_model: Path
) -> None:
    snapshot = put_into_cache(hub_cache, "someone/half", tiny_model)
    shutil.rmtree(snapshot / "vae")
    with pytest.raises(CheckpointNotFound, match=r"missing: vae/.*fetch it first"):
        ModelLoaderAdapter("someone/half", fetch=False).explain()
