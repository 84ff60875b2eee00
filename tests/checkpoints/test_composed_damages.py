"""Damages put together at random: the undamaged model's picture, or a typed error, and nothing between."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints.cases import ANYWHERE
from tests.checkpoints.models import WRITERS, picture
from zimage_engine import ModelLoaderAdapter
from zimage_engine.errors import CheckpointError

#: Those that change a folder in place and keep every value, or are refused.
DAMAGES = {name: damage for name, damage, facts in ANYWHERE if "and" not in name.split("-")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, np.ndarray]]:
    """The undamaged model of a name, and what it draws."""
    made: dict[str, tuple[Path, np.ndarray]] = {}
    root = tmp_path_factory.mktemp("whole")

    def model(name: str) -> tuple[Path, np.ndarray]:
        if name not in made:
            folder = WRITERS[name](root / name)
            made[name] = folder, picture(ModelLoaderAdapter(folder, cache_folder=root / "views"))
        return made[name]

    return model


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    model=st.sampled_from(["z-image", "sdxl", "pixart-sigma"]),
    names=st.lists(st.sampled_from(sorted(DAMAGES)), min_size=2, max_size=4, unique=True),
)
def test_no_mixture_of_damages_changes_the_picture_in_silence(whole, model: str, names: list[str]) -> None:
    healthy, expected = whole(model)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        shutil.copytree(healthy, folder)
        for name in names:
            # What an earlier damage left unreadable cannot be damaged further; it is a case as it stands.
            with suppress(Exception):
                DAMAGES[name](folder)
        adapter = ModelLoaderAdapter(folder, cache_folder=Path(work) / "views")
        try:
            drawn = picture(adapter)
        except CheckpointError as error:
            assert 20 < len(str(error)) < 3000
            return
        assert np.array_equal(drawn, expected), f"{names} on {model} changed the picture in silence"
