"""Where a model really overflows, stock diffusers draws black and the engine what was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from tests.zimage_engine.sampling.overflowing_models import (
    ASKED,
    BFLOAT16,
    BLOCK,
    FLOAT16,
    FUSED_ATTENTION,
    GUIDANCE,
    OVERFLOWS,
    WEIGHTS,
    Overflow,
    engine_of,
    our_result,
    side_by_side,
    stock_picture,
    stock_pipeline,
    write_overflowing,
)
from zimage_engine import Engine
from zimage_engine.demo.detector import judge
from zimage_engine.engine import DEMO_MODEL_PATH

#: Another arithmetic moves a picture by rounding alone: 0.3 levels of 255 on average, 7 at most, were seen.
MOST_MEAN_LEVELS, MOST_LEVELS = 1.0, 24
#: What helps first and what afterwards, step after step.
HELPERS = {
    FLOAT16: ["float32", "rest_float32"],
    BFLOAT16: ["float32", "rest_float32"],
    FUSED_ATTENTION: ["plain_attention"] * 2,
}

Folder = Callable[[Overflow], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("overflowing")
    written = {overflow: write_overflowing(overflow, root / overflow.name) for overflow in OVERFLOWS}
    return written.__getitem__


@pytest.fixture(scope="module")
def undamaged() -> Any:
    return stock_pipeline(DEMO_MODEL_PATH, torch.bfloat16)


def levels(image: Image.Image) -> NDArray[np.int16]:
    return np.asarray(image).astype(np.int16)


def assert_same_but_for_rounding(image: Image.Image, reference: Image.Image) -> None:
    difference = np.abs(levels(image) - levels(reference))
    assert difference.mean() < MOST_MEAN_LEVELS
    assert difference.max() < MOST_LEVELS


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("overflow", OVERFLOWS, ids=lambda overflow: overflow.name)
def test_stock_draws_black_and_the_engine_what_was_asked(
    overflow: Overflow, folder_of: Folder, undamaged: Any
) -> None:
    pipeline = stock_pipeline(folder_of(overflow), overflow.dtype)
    drawn_by_stock = levels(stock_picture(pipeline))
    assert drawn_by_stock.max() == 0, "stock diffusers was expected to draw black"

    result = our_result(engine_of(pipeline))

    assert judge(ASKED, result.images[0]).all_ok
    assert_same_but_for_rounding(result.images[0], stock_picture(undamaged))
    (report,) = result.report.pictures
    assert {trip.stage for trip in report.guard.trips} == {"denoise"}
    assert [trip.recovered_by for trip in report.guard.trips] == HELPERS[overflow]
    assert report.guard.final_guidance_scale == GUIDANCE
    assert {notice.code for notice in report.warnings} == {"guard_recovered"}

    assert levels(stock_picture(pipeline)).max() == 0, "the engine must leave the pipeline as it was"


@pytest.mark.parametrize("prompt", ["a red circle", "白色背景上的绿色爱心"])
def test_bfloat16_overflows_for_every_prompt_and_is_recovered_from(
    prompt: str, folder_of: Folder, undamaged: Any
) -> None:
    result = our_result(engine_of(stock_pipeline(folder_of(BFLOAT16), torch.bfloat16)), prompt)
    assert_same_but_for_rounding(result.images[0], stock_picture(undamaged, prompt))
    assert [trip.recovered_by for trip in result.report.pictures[0].guard.trips] == HELPERS[BFLOAT16]


def test_as_the_engine_loads_it_the_float16_case_draws_the_undamaged_picture_bit_for_bit(
    folder_of: Folder, undamaged: Any
) -> None:
    result = our_result(Engine.load(folder_of(FLOAT16), device="cpu"))
    assert result.report.dtype == "bfloat16"
    assert result.report.pictures[0].guard.trips == ()
    assert result.report.pictures[0].warnings == ()
    assert np.array_equal(levels(result.images[0]), levels(stock_picture(undamaged)))


def test_it_is_the_scaling_that_overflows_not_float16() -> None:
    image = stock_picture(stock_pipeline(DEMO_MODEL_PATH, torch.float16))
    assert judge(ASKED, image).all_ok


@pytest.mark.parametrize("overflow", OVERFLOWS, ids=lambda overflow: overflow.name)
def test_only_two_matrices_are_scaled_and_all_weights_stay_finite(
    overflow: Overflow, folder_of: Folder
) -> None:
    before, after = load_file(DEMO_MODEL_PATH / WEIGHTS), load_file(folder_of(overflow) / WEIGHTS)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"{BLOCK}.attention.to_v.weight",
        f"{BLOCK}.attention.to_out.0.weight",
    }
    assert all(bool(torch.isfinite(weight).all()) for weight in after.values())


def test_the_pictures_stand_side_by_side() -> None:
    black, white = Image.new("RGB", (256, 256)), Image.new("RGB", (256, 256), (255, 255, 255))
    sheet = side_by_side([("stock", black), ("here", white)])
    assert sheet.getpixel((sheet.width // 4, sheet.height // 2)) == (0, 0, 0)
    assert sheet.getpixel((sheet.width * 3 // 4, sheet.height // 2)) == (255, 255, 255)
