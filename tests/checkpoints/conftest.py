"""The undamaged models, made once for all tests of a session."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints.models import WRITERS, picture
from zimage_engine import ModelLoaderAdapter


@pytest.fixture(scope="session", autouse=True)
def _only_new_objects_are_collected() -> Iterator[None]:
    """What the libraries made at import lives to the end: a look at all of it takes longer than a picture."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, np.ndarray]]:
    """The healthy model of a name and what it draws."""
    made: dict[str, tuple[Path, np.ndarray]] = {}
    root = tmp_path_factory.mktemp("healthy")

    def model(name: str) -> tuple[Path, np.ndarray]:
        if name not in made:
            folder = WRITERS[name](root / name)
            made[name] = folder, picture(ModelLoaderAdapter(folder, cache_folder=root / "views"))
        return made[name]

    return model
