"""Schedules that are not stated whole: completed where one family alone can be meant, else asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.zimage_engine.tiny_models.sdxl import write_tiny_sdxl
from tests.zimage_engine.tiny_models.z_image import write_tiny_z_image
from zimage_engine import ModelLoaderAdapter
from zimage_engine.errors import CheckpointDamaged, UnknownFamily
from zimage_engine.families import SDXL, SDXL_TURBO, Z_IMAGE, Z_IMAGE_TURBO, ModelFamily
from zimage_engine.loading.scheduler_mending import schedule_of

EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"


def without(family: ModelFamily, *keys: str, **others: object) -> dict[str, Any]:
    kept = {key: value for key, value in family.scheduler_defaults.items() if key not in keys}
    return {**kept, **others}


#: What is stated, the class in model_index.json, what the base lends; a field, its value, whether it is told.
COMPLETED: dict[str, tuple[ModelFamily, dict[str, Any], str, dict[str, Any], str, object, bool]] = {
    "all stated": (Z_IMAGE, without(Z_IMAGE, shift=4.0), "", {}, "shift", 4.0, True),
    "one field gone": (Z_IMAGE, without(Z_IMAGE, "shift"), "", {}, "shift", 6.0, True),
    "a field that is null": (Z_IMAGE, without(Z_IMAGE, shift=None), "", {}, "shift", 6.0, True),
    "lent by a base": (
        Z_IMAGE,
        without(Z_IMAGE, "shift"),
        "",
        without(Z_IMAGE, shift=4.0),
        "shift",
        4.0,
        True,
    ),
    "lent by a base of another class": (
        *(Z_IMAGE, without(Z_IMAGE, "shift"), "", {"_class_name": EULER, "shift": 4.0}, "shift", 6.0, True),
    ),
    "nothing stated": (SDXL_TURBO, {}, "", {}, "timestep_spacing", "trailing", True),
    "nothing stated, but listed": (SDXL_TURBO, {}, ANCESTRAL, {}, "timestep_spacing", "trailing", True),
    "nothing stated, another listed": (SDXL, {}, ANCESTRAL, {}, "timestep_spacing", None, False),
    "nothing stated, all lent": (Z_IMAGE_TURBO, {}, "", without(Z_IMAGE), "shift", 6.0, True),
    "training, another of the family's classes": (
        *(SDXL, {"_class_name": ANCESTRAL}, ANCESTRAL, {}, "beta_schedule", "scaled_linear", True),
    ),
    "no sampler's field of another class": (
        *(SDXL, {"_class_name": ANCESTRAL}, ANCESTRAL, {}, "timestep_spacing", None, True),
    ),
    "a class of its own choice": (
        *(SDXL, {"_class_name": "EDMEulerScheduler"}, "", {}, "beta_schedule", None, True),
    ),
}


@pytest.mark.parametrize("row", COMPLETED.values(), ids=COMPLETED)
def test_what_is_stated_stays_and_the_rest_is_completed(row: tuple[Any, ...]) -> None:
    family, stated, listed, lent, key, value, is_told = row
    schedule = schedule_of(family, stated, listed, lent)
    assert schedule.values.get(key) == value
    assert schedule.is_told is is_told


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "turbo": write_tiny_z_image(root / "turbo"),
        "base": write_tiny_z_image(root / "base", shift=6.0),
        "sdxl": write_tiny_sdxl(root / "sdxl"),
        "sdxl-turbo": write_tiny_sdxl(root / "sdxl-turbo", turbo=True),
    }


def without_field(folder: Path, key: str, **set_to: object) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    stated = {name: value for name, value in json.loads(path.read_text()).items() if name != key}
    path.write_text(json.dumps(stated | set_to))


def test_a_missing_shift_is_asked_for_with_both_names_and_what_to_do(models, tmp_path: Path) -> None:
    folder = shutil.copytree(models["base"], tmp_path / "z-image-turbo")
    without_field(folder, "shift")
    with pytest.raises(UnknownFamily) as raised:
        ModelLoaderAdapter(folder).explain()
    message = str(raised.value)
    assert "has no shift" in message
    assert "--family z-image-turbo or --family z-image" in message
    assert "--base" in message
    assert "\n" not in message


@pytest.mark.parametrize(("base", "family"), [("turbo", "z-image-turbo"), ("base", "z-image")])
@pytest.mark.parametrize("is_file", [True, False], ids=["single-file", "folder-without-shift"])
def test_a_base_folder_tells_the_schedule(
    models, tmp_path: Path, base: str, family: str, is_file: bool
) -> None:
    if is_file:
        path = tmp_path / "model.safetensors"
        shutil.copy(models["turbo"] / "transformer" / "diffusion_pytorch_model.safetensors", path)
    else:
        path = shutil.copytree(models["turbo"], tmp_path / "model")
        without_field(path, "shift")
    adapter = ModelLoaderAdapter(path, base=models[base], cache_folder=tmp_path / "views")
    assert adapter.family.name == family
    assert adapter.load().scheduler.config.shift == {"turbo": 3.0, "base": 6.0}[base]


def test_a_single_file_alone_is_told_of_the_base_folder_first(models, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(models["turbo"] / "transformer" / "diffusion_pytorch_model.safetensors", path)
    with pytest.raises(CheckpointDamaged, match="--base"):
        ModelLoaderAdapter(path).explain()


def test_the_usual_sampler_without_its_spacing_is_sdxls(models, tmp_path: Path) -> None:
    folder = shutil.copytree(models["sdxl"], tmp_path / "model")
    without_field(folder, "timestep_spacing")
    adapter = ModelLoaderAdapter(folder, cache_folder=tmp_path / "views")
    assert adapter.family.name == "sdxl"
    assert adapter.load().scheduler.config.timestep_spacing == "leading"


def test_turbos_sampler_on_sdxl_with_its_spacing_stated_is_sdxl(models, tmp_path: Path) -> None:
    folder = shutil.copytree(models["sdxl-turbo"], tmp_path / "model")
    without_field(folder, "timestep_spacing", timestep_spacing="leading")
    adapter = ModelLoaderAdapter(folder, cache_folder=tmp_path / "views")
    assert adapter.family.name == "sdxl"
    assert not adapter.mending.repairs


def test_the_schedule_of_turbos_sampler_without_its_training_is_completed(models, tmp_path: Path) -> None:
    folder = shutil.copytree(models["sdxl-turbo"], tmp_path / "model")
    without_field(folder, "beta_schedule", timestep_spacing="leading")
    adapter = ModelLoaderAdapter(folder, cache_folder=tmp_path / "views")
    assert adapter.load().scheduler.config.beta_schedule == "scaled_linear"
