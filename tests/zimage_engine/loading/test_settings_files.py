"""Settings files that hold rubbish: mended where family and tensors tell the same, else refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from tests.zimage_engine.tiny_models import write_tiny_sdxl, write_tiny_z_image
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading.adapter import ModelLoaderAdapter
from zimage_engine.loading.known_schedulers import SCHEDULERS

RUBBISH = {"empty": "", "cut off": '{"_class_name": "Auto', "a list": "[]", "an empty object": "{}"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "z-image": write_tiny_z_image(root / "z-image", head_dim=128),
        "sdxl": write_tiny_sdxl(root / "sdxl"),
    }


@pytest.fixture
def copy_of(models, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(models[name], tmp_path / "model"))


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def settings_of(pipeline: Any, component: str) -> dict[str, Any]:
    """What decides how the component computes, without where it was read from."""
    config = getattr(pipeline, component).config
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {key: value for key, value in values.items() if not key.startswith("_") and key != "dtype"}


@pytest.mark.parametrize("content", RUBBISH.values(), ids=RUBBISH)
@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_a_components_config_is_written_anew(
    copy_of, models, tmp_path: Path, component: str, content: str
) -> None:
    folder = copy_of("z-image")
    (folder / component / "config.json").write_text(content)
    adapter = ModelLoaderAdapter(folder, cache_folder=tmp_path / "views")
    explanation = adapter.explain()
    assert f"write-config ({component})" in explanation
    assert "config.json " in explanation
    loaded, whole = adapter.load(), ModelLoaderAdapter(models["z-image"]).load()
    kept = {"transformer": ("axes_lens", "rope_theta"), "vae": ("scaling_factor", "shift_factor")}
    for key in kept.get(component, ("rope_parameters", "hidden_size")):
        assert settings_of(loaded, component)[key] == settings_of(whole, component)[key]


@pytest.mark.parametrize("name", ["MyOwnTransformer", "AutoencoderKL", 7, ["a"]])
def test_a_wrong_class_name_is_corrected_and_the_values_stay(
    copy_of, models, tmp_path: Path, name: object
) -> None:
    folder = copy_of("z-image")
    # A value that neither shapes nor the family would tell.
    edited(folder / "transformer" / "config.json", _class_name=name, t_scale=999.0)
    adapter = ModelLoaderAdapter(folder, cache_folder=tmp_path / "views")
    assert "correct-config (transformer)" in adapter.explain()
    assert adapter.load().transformer.config.t_scale == 999.0


def test_the_config_of_another_model_gives_way_to_what_the_shapes_tell(copy_of, tmp_path: Path) -> None:
    folder = copy_of("z-image")
    shutil.copy(folder / "vae" / "config.json", folder / "transformer" / "config.json")
    adapter = ModelLoaderAdapter(folder, cache_folder=tmp_path / "views")
    assert "correct-config (transformer)" in adapter.explain()
    assert adapter.load().transformer.config.axes_lens == [1536, 512, 512]


def test_a_text_encoders_config_of_another_type_gives_way(copy_of, tmp_path: Path) -> None:
    folder = copy_of("sdxl")
    (folder / "text_encoder" / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5EncoderModel"], "d_model": 8})
    )
    adapter = ModelLoaderAdapter(folder, cache_folder=tmp_path / "views")
    assert "config.json is of a model of type 't5'" in adapter.explain()
    assert adapter.load().text_encoder.config.hidden_act == "quick_gelu"


def test_a_config_that_nothing_tells_is_refused_with_what_is_wrong_in_the_file(copy_of_tiny_model) -> None:
    folder = copy_of_tiny_model()  # its groups and positions are not the published ones
    (folder / "vae" / "config.json").write_text("")
    with pytest.raises(CheckpointDamaged, match=r"vae holds .*\(config\.json is empty\).*--base"):
        ModelLoaderAdapter(folder).explain()


@pytest.mark.parametrize("content", RUBBISH.values(), ids=RUBBISH)
@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json"])
def test_the_list_of_components_and_the_schedule_are_written_anew(
    copy_of, models, tmp_path: Path, name: str, content: str
) -> None:
    folder = copy_of("z-image")
    (folder / name).write_text(content)
    adapter = ModelLoaderAdapter(folder, "z-image-turbo", cache_folder=tmp_path / "views")
    repair = {"model_index.json": "write-model-index"}.get(name, "write-scheduler-config")
    line = next(line for line in adapter.explain().splitlines() if repair in line)
    assert any(words in line for words in ("is empty", "not valid JSON", "should hold", "holds nothing"))
    pipeline, whole = adapter.load(), ModelLoaderAdapter(models["z-image"]).load()
    assert pipeline.scheduler.config.shift == whole.scheduler.config.shift == 3.0


@pytest.mark.parametrize("in_model_index", [False, True])
def test_a_scheduler_class_that_diffusers_lacks_becomes_the_familys(
    copy_of, tmp_path: Path, in_model_index: bool
) -> None:
    folder = copy_of("z-image")
    edited(folder / "scheduler" / "scheduler_config.json", _class_name="MyScheduler")
    if in_model_index:
        edited(folder / "model_index.json", scheduler=["diffusers", "MyScheduler"])
    adapter = ModelLoaderAdapter(folder, cache_folder=tmp_path / "views")
    assert "'MyScheduler' is no scheduler of diffusers" in adapter.explain()
    assert type(adapter.load().scheduler) is diffusers.FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize(
    ("component", "library"),
    [("transformer", "diffusers"), ("text_encoder", "transformers"), ("tokenizer", "transformers")],
)
def test_an_unknown_class_in_the_list_gives_way_to_the_familys(
    copy_of, tmp_path: Path, component: str, library: str
) -> None:
    folder = copy_of("z-image")
    edited(folder / "model_index.json", **{component: [library, "MyOwn"]})
    adapter = ModelLoaderAdapter(folder, cache_folder=tmp_path / "views")
    assert f"set {component}" in adapter.explain()
    assert type(getattr(adapter.load(), component)).__name__ != "MyOwn"


def test_a_scheduler_of_the_users_choice_stays(copy_of) -> None:
    folder = copy_of("sdxl")
    edited(folder / "model_index.json", scheduler=["diffusers", "UniPCMultistepScheduler"])
    edited(folder / "scheduler" / "scheduler_config.json", _class_name="UniPCMultistepScheduler")
    adapter = ModelLoaderAdapter(folder)
    assert adapter.mending.repairs == ()
    assert type(adapter.load().scheduler) is diffusers.UniPCMultistepScheduler


def test_the_known_schedulers_are_those_of_diffusers() -> None:
    theirs = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    assert theirs <= SCHEDULERS
    for name in SCHEDULERS:
        assert hasattr(diffusers, name)


def test_half_a_character_in_a_mended_file_is_written_as_it_was(copy_of, tmp_path: Path) -> None:
    folder = copy_of("z-image")
    edited(folder / "transformer" / "config.json", _class_name="MyOwn", _note="\ud800")
    assert ModelLoaderAdapter(folder, cache_folder=tmp_path / "views").load() is not None
