"""Profiles follow the model's defaults."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app.ui.profiles import Profile, profiles_of
from tests.serve_app.ui.painting_service import MODEL


@pytest.mark.parametrize(
    ("steps", "guidance", "profiles"),
    [
        (
            8,
            1.8,
            (
                Profile("draft", 4, 1.0, False),
                Profile("fast", 8, 1.0, True),
                Profile("balanced", 8, 1.8, True),
            ),
        ),
        # Where guidance is off by default, fast would be balanced once more.
        (4, 1.0, (Profile("draft", 2, 1.0, False), Profile("balanced", 4, 1.0, True))),
        (1, 0.0, (Profile("draft", 1, 0.0, False), Profile("balanced", 1, 0.0, True))),
    ],
)
def test_a_models_profiles(steps: int, guidance: float, profiles: tuple[Profile, ...]) -> None:
    model = replace(MODEL, default_steps=steps, default_guidance_scale=guidance)
    assert profiles_of(model) == profiles
