"""Guidance that ends before the picture does: the later steps are drawn without it, and in half the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.openai_schema import ImageGenerationRequest, to_engine
from serve_app.receipt import receipt_of, request_of
from zimage_engine import Engine, GenerationRequest
from zimage_engine.errors import InvalidRequest
from zimage_engine.sampling.plan import resolve

#: How far on each of 8 steps begins, at the published shift of 3.
BEGINS = (0.0, 0.045, 0.1, 0.167, 0.25, 0.357, 0.5, 0.7)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    loaded = Engine.load(tiny_model, device="cpu", dtype="float32")
    loaded.draws_again = False
    return loaded


def request(guidance_until: Any = None, guidance_scale: float = 1.8, **others: Any) -> GenerationRequest:
    return GenerationRequest(
        prompt="a red circle",
        negative_prompt="blue",
        seed=5,
        width=64,
        height=64,
        guidance_scale=guidance_scale,
        guidance_until=guidance_until,
        enhance=False,
        refine=False,
        **others,
    )


def drawn(engine: Engine, asked: GenerationRequest) -> tuple[np.ndarray, list[int]]:
    """The picture, and how many the denoiser was given at each step."""
    batches: list[int] = []
    hook = engine.pipeline.transformer.register_forward_pre_hook(
        lambda _module, arguments: batches.append(len(arguments[0]))
    )
    try:
        return np.asarray(engine.generate(asked).images[0]), batches
    finally:
        hook.remove()


@pytest.mark.parametrize(("until", "guided"), [(None, 8), (1.0, 8), (0.5, 7), (0.2, 4), (0.0, 1)])
def test_both_halves_are_one_batch_and_the_steps_after_it_have_one(
    engine: Engine, until: float | None, guided: int
) -> None:
    _, batches = drawn(engine, request(until, num_inference_steps=8))
    assert batches == [2] * guided + [1] * (8 - guided)
    assert sum(begins <= (1.0 if until is None else until) for begins in BEGINS) == guided


def test_all_of_the_way_is_the_picture_without_it_and_less_is_another(engine: Engine) -> None:
    whole, _ = drawn(engine, request(num_inference_steps=8))
    same, _ = drawn(engine, request(1.0, num_inference_steps=8))
    half, _ = drawn(engine, request(0.2, num_inference_steps=8))
    assert np.array_equal(whole, same) and not np.array_equal(whole, half)


def test_what_was_drawn_again_after_a_fault_is_the_same_picture(engine: Engine) -> None:
    """From a step on which guidance no longer acts, and from one on which it does."""
    sound, _ = drawn(engine, request(0.2, num_inference_steps=8))
    for broken in (2, 6):
        calls = 0

        def once_bad(_module: Any, _arguments: Any, output: Any, broken: int = broken) -> Any:
            nonlocal calls
            calls += 1
            return ([each * float("nan") for each in output[0]],) if calls == broken + 1 else output

        hook = engine.pipeline.transformer.register_forward_hook(once_bad)
        try:
            result = engine.generate(request(0.2, num_inference_steps=8))
        finally:
            hook.remove()
        assert [trip.step for trip in result.report.pictures[0].guard.trips] == [broken + 1]
        assert np.array_equal(np.asarray(result.images[0]), sound)


def test_the_report_and_the_receipt_tell_it_and_draw_it_again(engine: Engine) -> None:
    result = engine.generate(request(0.2, num_inference_steps=8))
    assert result.report.guidance_until == 0.2
    receipt = receipt_of(result.report, 0)
    assert receipt["guidance_until"] == 0.2
    again = engine.generate(request_of(receipt))
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(again.images[0]))
    assert "guidance_until" not in receipt_of(engine.generate(request(num_inference_steps=1)).report, 0)


def test_the_api_hands_it_on() -> None:
    assert to_engine(ImageGenerationRequest(prompt="a", guidance_until=0.25)).guidance_until == 0.25
    assert to_engine(ImageGenerationRequest(prompt="a")).guidance_until is None


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), True, "0.5"], ids=str)
def test_what_is_no_part_of_the_way_is_refused(engine: Engine, wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match="guidance_until must be a number from 0 to 1") as refused:
        resolve(request(wrong), engine.description)
    assert refused.value.parameter == "guidance_until"


def test_families_that_cannot_say_so(engine: Engine) -> None:
    from dataclasses import replace

    sdxl = replace(engine.description, family="sdxl")
    assert resolve(request(1.0), sdxl).guidance_until == 1.0
    with pytest.raises(InvalidRequest, match="works with Z-Image models; SDXL"):
        resolve(request(0.5), sdxl)


def test_the_schedule_that_the_table_tells(engine: Engine) -> None:
    scheduler = type(engine.pipeline.scheduler).from_config(engine.pipeline.scheduler.config)
    scheduler.set_timesteps(8, sigmas=torch.linspace(1, 1 / 8, 8).tolist())
    begins = (1000 - scheduler.timesteps) / 1000
    assert begins.tolist() == pytest.approx(BEGINS, abs=0.001)
