"""A run of the tests leaves nothing in the cache of the person who runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.zimage_engine.tiny_models import write_tiny_z_image
from zimage_engine import ModelLoaderAdapter

ROOT = Path(__file__).parents[1]


def test_a_repaired_copy_is_kept_in_the_folder_of_the_session(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = write_tiny_z_image(tmp_path / "model")
    (model / "model_index.json").unlink()
    assert ModelLoaderAdapter(model).model_path.is_relative_to(tmp_path_factory.getbasetemp())


def test_a_run_leaves_nothing_in_the_users_cache(tmp_path: Path) -> None:
    repairing = f"{__file__}::{test_a_repaired_copy_is_kept_in_the_folder_of_the_session.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", repairing]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "users")}
    run = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert run.returncode == 0, run.stdout
    assert not (tmp_path / "users" / "zimage-turbo").exists()
