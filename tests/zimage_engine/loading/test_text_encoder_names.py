"""Names of text encoder tensors that the stock loader reads by itself: no repair, and the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.zimage_engine.tiny_models import write_tiny_pixart, write_tiny_sdxl
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading.adapter import ModelLoaderAdapter

Weights = dict[str, torch.Tensor]
WORDS, DOUBLE = "shared.weight", "encoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"pixart": write_tiny_pixart(root / "pixart", "sigma"), "sdxl": write_tiny_sdxl(root / "sdxl")}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {
        (new + name.removeprefix(old) if name.startswith(old) else name): tensor
        for name, tensor in weights.items()
    }


CASES: dict[str, tuple[str, str, Callable[[Weights], Weights]]] = {
    "T5 with its words under the encoder alone": ("pixart", "text_encoder", renamed(WORDS, DOUBLE)),
    "T5 with both": ("pixart", "text_encoder", lambda w: {**w, DOUBLE: w[WORDS].clone()}),
    "CLIP with a projection and no prefix": ("sdxl", "text_encoder_2", renamed("text_model.", "")),
    "CLIP with the older prefix": ("sdxl", "text_encoder", renamed("", "text_model.")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", ["as it is", "empty"])
def test_what_stock_reads_itself_is_not_rewritten(models, tmp_path: Path, case: str, config: str) -> None:
    model, component, rename = CASES[case]
    folder = Path(shutil.copytree(models[model], tmp_path / "model"))
    path = folder / component / "model.safetensors"
    save_file(rename(load_file(path)), path, metadata={"format": "pt"})
    if config == "empty":
        # Widths of heads and the like are the tiny model's own, and shapes tell them.
        (folder / component / "config.json").write_text("")
    adapter = ModelLoaderAdapter(folder, cache_folder=tmp_path / "views")
    expected = set() if config == "as it is" else {"write-config"}
    assert {made.repair.name for made in adapter.mending.repairs} == expected
    assert adapter.mending.view is None or adapter.mending.view.weights == ()
    loaded: Any = getattr(adapter.load(), component)
    whole: Any = getattr(ModelLoaderAdapter(models[model]).load(), component)
    for name, tensor in whole.state_dict().items():
        assert not loaded.state_dict()[name].is_meta
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_t5_without_words_is_refused(models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["pixart"], tmp_path / "model"))
    path = folder / "text_encoder" / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != WORDS}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointDamaged, match=r"the first is shared\.weight"):
        ModelLoaderAdapter(folder).explain()


# --- averaged weights beside plain ones


def with_average(folder: Path, averaged: Callable[[str], bool], plain: Callable[[str], bool]) -> Weights:
    """The denoiser as a trainer's file: plain weights halved, averaged ones as they were."""
    place = folder / "transformer"
    whole = load_file(place / "diffusion_pytorch_model.safetensors")
    stored = {f"state_dict_ema.{name}": tensor for name, tensor in whole.items() if averaged(name)}
    stored |= {f"state_dict.{name}": tensor / 2 for name, tensor in whole.items() if plain(name)}
    save_file(stored, place / "diffusion_pytorch_model.safetensors")
    return whole


def always(name: str) -> bool:
    return True


def never_blocks(name: str) -> bool:
    return not name.startswith("transformer_blocks.1.")


@pytest.mark.parametrize(
    ("averaged", "repair", "factor"),
    [(always, "take-averaged-weights", 1.0), (never_blocks, "leave-partial-average", 0.5)],
)
def test_averaged_weights_are_taken_whole_or_not_at_all(
    models, tmp_path: Path, averaged: Callable[[str], bool], repair: str, factor: float
) -> None:
    folder = Path(shutil.copytree(models["pixart"], tmp_path / "model"))
    whole = with_average(folder, averaged, always)
    adapter = ModelLoaderAdapter(folder, cache_folder=tmp_path / "views")
    names: Iterable[str] = [made.repair.name for made in adapter.mending.repairs]
    assert repair in names
    assert len({"take-averaged-weights", "leave-partial-average"} & set(names)) == 1
    weights = adapter.load().transformer.state_dict()
    for name, tensor in whole.items():
        assert torch.equal(weights[name], tensor * factor), name
    left_out = next(model for model in adapter.mending.models if model.name == "transformer").part.dropped
    assert all(name.startswith("state_dict." if factor == 1 else "state_dict_ema.") for name in left_out)
    assert json.dumps(dict(left_out))


def test_neither_kind_whole_is_refused(models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["pixart"], tmp_path / "model"))
    with_average(folder, never_blocks, lambda name: not name.startswith("transformer_blocks.0."))
    with pytest.raises(CheckpointDamaged, match="neither the averaged weights are whole"):
        ModelLoaderAdapter(folder).explain()
