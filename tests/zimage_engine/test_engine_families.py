"""Every other family through the engine and through the stock call: bit for bit the same picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from tests.zimage_engine.tiny_models import write_tiny_pixart, write_tiny_sdxl, write_tiny_z_image
from zimage_engine import Engine, GenerationRequest, StepProgress
from zimage_engine.errors import InvalidRequest

ASKED = GenerationRequest(
    prompt="A red circle", seed=11, width=64, height=48, num_inference_steps=4, enhance=False
)
PIXART_CALL = {"clean_caption": False, "use_resolution_binning": False}
#: Family, writer, what the stock call needs beside the request, native side, size multiple, token limit.
CASES: tuple[tuple[str, Callable[[Path], Path], dict[str, Any], int, int, int], ...] = (
    ("sdxl", write_tiny_sdxl, {}, 64, 2, 77),
    ("sdxl-lcm", lambda folder: write_tiny_sdxl(folder, lcm=True), {}, 64, 2, 77),
    ("pixart-alpha-512", write_tiny_pixart, PIXART_CALL, 128, 4, 120),
    ("pixart-alpha-1024", lambda folder: write_tiny_pixart(folder, "alpha-1024"), PIXART_CALL, 256, 4, 120),
    ("pixart-sigma", lambda folder: write_tiny_pixart(folder, "sigma"), PIXART_CALL, 256, 4, 300),
)
CALLS = {case[0]: case[2] for case in CASES}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0])
def case(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def engine(case: Any, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(case[1](tmp_path_factory.mktemp("models") / "tiny"), device="cpu")


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def test_the_family_and_its_limits_are_read_from_the_folder(engine: Engine, case: Any) -> None:
    family, _, _, native_side, multiple, token_limit = case
    model = engine.description
    assert (model.family, model.dtype) == (family, "bfloat16")
    assert (model.native_width, model.native_height, model.size_multiple) == (
        native_side,
        native_side,
        multiple,
    )
    assert model.token_limit == token_limit


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("negative_prompt", ["", "blue"])
def test_a_picture_is_the_one_that_the_stock_call_draws(
    engine: Engine, guidance_scale: float, negative_prompt: str
) -> None:
    request = replace(ASKED, negative_prompt=negative_prompt, guidance_scale=guidance_scale)
    (image,) = engine.generate(request).images
    stated = {"negative_prompt": negative_prompt} if negative_prompt else {}
    stock = engine.pipeline(
        prompt="A red circle",
        **stated,
        width=64,
        height=48,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(11),
        **CALLS[engine.description.family],
    ).images[0]
    assert image.size == (64, 48)
    assert same(image, stock)


def test_words_and_guidance_change_the_picture(engine: Engine) -> None:
    (image,) = engine.generate(replace(ASKED, guidance_scale=3.5)).images
    for changes in ({"prompt": "a blue square"}, {"guidance_scale": 6.0}, {"guidance_scale": 1.0}):
        (other,) = engine.generate(replace(ASKED, **{"guidance_scale": 3.5, **changes})).images
        assert not same(image, other), changes


def test_each_picture_of_several_is_the_one_that_its_seed_draws_alone(engine: Engine) -> None:
    together = engine.generate(replace(ASKED, n=2))
    (alone,) = engine.generate(replace(ASKED, seed=12)).images
    assert same(together.images[1], alone)
    assert not same(together.images[0], together.images[1])


def test_every_step_is_told(engine: Engine) -> None:
    told: list[StepProgress] = []
    engine.generate(ASKED, on_step=told.append)
    assert told == [StepProgress(1, 1, step, 4) for step in (1, 2, 3, 4)]


def test_the_last_token_that_fits_gives_no_warning_and_the_next_one_does(engine: Engine, case: Any) -> None:
    around = {"sdxl": 2, "sdxl-lcm": 2}.get(case[0], 1)
    longest = " ".join("x" * ((case[5] - around) // 2)) if case[0].startswith("pixart") else "x" * 75
    warnings = engine.generate(replace(ASKED, prompt=longest)).report.warnings
    assert "prompt_truncated" not in [notice.code for notice in warnings]
    warnings = engine.generate(replace(ASKED, prompt=longest + " x x x")).report.warnings
    assert "prompt_truncated" in [notice.code for notice in warnings]


def test_z_image_with_the_published_head_width_draws(tmp_path: Path) -> None:
    engine = Engine.load(write_tiny_z_image(tmp_path / "tiny", head_dim=128, shift=6.0), device="cpu")
    assert engine.description.family == "z-image"
    (image,) = engine.generate(replace(ASKED, width=32, height=32, num_inference_steps=2)).images
    assert image.size == (32, 32)


def test_one_step_draws_a_picture(engine: Engine) -> None:
    """The stock PixArt pipeline raises here with its own scheduler."""
    drawn = engine.generate(replace(ASKED, num_inference_steps=1))
    assert drawn.images[0].size == (64, 48) and drawn.report.num_inference_steps == 1


def test_more_steps_than_the_scheduler_has_are_refused(engine: Engine) -> None:
    most = engine.description.max_steps
    assert most == (50 if engine.description.family == "sdxl-lcm" else 100)
    with pytest.raises(InvalidRequest, match=f"num_inference_steps must be from 1 to {most}, got {most + 1}"):
        engine.generate(replace(ASKED, num_inference_steps=most + 1))
