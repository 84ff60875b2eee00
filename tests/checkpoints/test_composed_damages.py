"""Damages put together at random: the undamaged model's picture, or a typed error, and nothing between."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import damages as d
from tests.checkpoints.cases import COMMON, RARE, SCHEDULER, SOME_MODELS
from tests.checkpoints.models import picture
from zimage_engine import ModelLoaderAdapter
from zimage_engine.errors import CheckpointError

#: Those that change a folder in place and keep every value, or are refused.
DAMAGES = {
    **{name: damage for name, damage, _ in (*COMMON, *RARE) if name != "compiled-and-parallel"},
    "scheduler-missing": d.without("scheduler"),
    "schedule-missing": d.edited(
        SCHEDULER, lambda content: [content.pop(key, None) for key in ("shift", "timestep_spacing")] and None
    ),
    "training-missing": d.edited(
        SCHEDULER, lambda content: [content.pop(key, None) for key in ("beta_schedule", "beta_end")] and None
    ),
    "scheduler-class-missing": d.edited(SCHEDULER, lambda content: content.pop("_class_name")),
}


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    model=st.sampled_from(SOME_MODELS),
    names=st.lists(st.sampled_from(sorted(DAMAGES)), min_size=2, max_size=4, unique=True),
)
def test_no_mixture_of_damages_changes_the_picture_in_silence(healthy, model: str, names: list[str]) -> None:
    whole, expected = healthy(model)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        shutil.copytree(whole, folder)
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
