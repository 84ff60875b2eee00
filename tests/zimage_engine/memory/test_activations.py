"""Predicted activations against bytes that the real classes' operations were counted to need."""

from __future__ import annotations

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.benchmarks.activation_bytes import measured_rows
from zimage_engine.families import FAMILIES, family_named
from zimage_engine.memory.activations import native_side_px, size_multiple
from zimage_engine.memory.footprint import published_footprint


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("family", "size"),
    [("z-image-turbo", (1024, 1024)), ("sdxl", (768, 1024)), ("pixart-sigma", (1024, 1024))],
)
def test_predictions_are_never_under_the_counted_bytes_and_at_most_five_percent_over(
    family: str, size: tuple[int, int]
) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = list(measured_rows(family_named(family), [size], all_blocks=False))
    assert {row["stage"].split()[0] for row in rows} == {"denoise", "decode", "encode"}
    for row in rows:
        assert row["measured_bytes"] <= row["predicted_bytes"] <= 1.05 * row["measured_bytes"], row


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_native_size_and_grid_of_published_models(family: object) -> None:
    from zimage_engine.families import ModelFamily

    assert isinstance(family, ModelFamily)
    footprint = published_footprint(family)
    denoiser, vae = footprint.configs[footprint.denoiser], footprint.configs["vae"]
    assert native_side_px(family, denoiser, vae) == family.native_side_px
    assert size_multiple(family, vae) == (8 if "sdxl" in family.name else 16)
