"""Each tiny folder is of exactly one family, and a foreign one is told every family's reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.zimage_engine.tiny_models import write_tiny_pixart, write_tiny_sdxl, write_tiny_z_image
from zimage_engine.checkpoint.features import read_features
from zimage_engine.errors import UnknownFamily
from zimage_engine.families import FAMILIES, identify

FOLDERS: tuple[tuple[str, Callable[[Path], Path]], ...] = (
    ("z-image-turbo", write_tiny_z_image),
    ("z-image", lambda folder: write_tiny_z_image(folder, shift=6.0)),
    ("sdxl", write_tiny_sdxl),
    ("sdxl-turbo", lambda folder: _changed(write_tiny_sdxl(folder), {"timestep_spacing": "trailing"})),
    ("sdxl-lcm", lambda folder: write_tiny_sdxl(folder, lcm=True)),
    ("pixart-alpha-512", write_tiny_pixart),
    ("pixart-alpha-1024", lambda folder: write_tiny_pixart(folder, "alpha-1024")),
    ("pixart-sigma", lambda folder: write_tiny_pixart(folder, "sigma")),
)


def _changed(folder: Path, scheduler: dict[str, object]) -> Path:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    return folder


def test_every_family_has_a_folder_here() -> None:
    assert sorted(name for name, _ in FOLDERS) == sorted(family.name for family in FAMILIES)


@pytest.mark.parametrize(("name", "write"), FOLDERS, ids=[name for name, _ in FOLDERS])
def test_exactly_one_family_fits(name: str, write: Callable[[Path], Path], tmp_path: Path) -> None:
    features = read_features(write(tmp_path / "model"))
    assert [each.name for each in FAMILIES if each.fingerprint.first_failure(features) is None] == [name]
    family = identify(features)
    listed = {key: tuple(entry) for key, entry in features.model_index.items() if isinstance(entry, list)}
    for component, row in family.components.items():
        library, class_name = listed[component]
        assert library == row.library
        assert component == "scheduler" or class_name in row.class_names


def test_a_shift_that_is_not_stated_is_neither_models(tmp_path: Path) -> None:
    folder = write_tiny_z_image(tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    stated = json.loads(path.read_text())
    del stated["shift"]
    path.write_text(json.dumps(stated))
    with pytest.raises(UnknownFamily, match=r"scheduler\.shift is nothing"):
        identify(read_features(folder))


def test_a_foreign_folder_is_told_each_familys_failed_condition(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UnknownFamily) as raised:
        identify(read_features(tmp_path))
    reasons = str(raised.value).splitlines()[1:]
    assert [reason.split(":")[0].strip() for reason in reasons] == [family.name for family in FAMILIES]
    assert all("model_index._class_name is 'FluxPipeline'" in reason for reason in reasons)
