"""The sizes on offer fit the model's grid, and typed ones are read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app.ui.sizes import read_size, sizes_that_fit
from tests.serve_app.ui.painting_service import MODEL
from zimage_engine.sampling.plan import resolve
from zimage_engine.types import GenerationRequest, ModelDescription

MODELS = [
    pytest.param(MODEL, id="256 on a grid of 32"),
    pytest.param(replace(MODEL, native_width=1024, native_height=1024, size_multiple=16), id="1024 on 16"),
    pytest.param(replace(MODEL, native_width=768, native_height=512, size_multiple=64), id="768x512 on 64"),
]


@pytest.mark.parametrize("model", MODELS)
def test_there_is_a_size_for_each_aspect_and_the_engine_takes_them_all(model: ModelDescription) -> None:
    sizes = sizes_that_fit(model)
    assert list(sizes) == ["1:1", "4:3", "3:4", "16:9", "9:16", "3:2", "2:3"]
    for aspect, (width, height) in sizes.items():
        across, down = map(int, aspect.split(":"))
        assert width / height == pytest.approx(across / down, rel=0.2)
        plan = resolve(GenerationRequest("a tree", width=width, height=height), model)
        assert (plan.width_px, plan.height_px) == (width, height)


@pytest.mark.parametrize("model", MODELS)
def test_sizes_have_about_the_native_area(model: ModelDescription) -> None:
    native_area = model.native_width * model.native_height
    for width, height in sizes_that_fit(model).values():
        assert 0.75 < width * height / native_area < 1.3


def test_no_side_is_longer_than_the_model_can_draw() -> None:
    model = replace(MODEL, native_width=1024, native_height=1024, size_multiple=16, max_side=1200)
    assert max(side for size in sizes_that_fit(model).values() for side in size) == 1200


@pytest.mark.parametrize("typed", ["640x480", "640X480", " 640 × 480 ", "640*480", "640，480", "640 480"])
def test_a_size_is_read_however_it_is_typed(typed: str) -> None:
    assert read_size(typed) == (640, 480)


@pytest.mark.parametrize("typed", ["", "640", "x", "640x", "640x480x3", "-640x480", "6.4x480", "640x1234567"])
def test_what_is_no_size_is_not_read(typed: str) -> None:
    assert read_size(typed) is None
