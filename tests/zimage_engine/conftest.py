"""Models that the engine's tests share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Z-Image folder with random weights; not to be written to."""
    from tests.zimage_engine.tiny_models import write_tiny_z_image

    return write_tiny_z_image(tmp_path_factory.mktemp("models") / "tiny-z-image")


@pytest.fixture
def copy_of_tiny_model(tiny_model: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy of the tiny model that a test may damage."""

    def copy() -> Path:
        folder = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_model, folder)
        return folder

    return copy
