"""What only a CUDA device can show, with the tiny model; the rest of `-m gpu` lies beside what it tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import bench as suite
from tests.gpu.card import GIB, Card
from tests.gpu.drawing import Asked
from tests.gpu.parts import Bench, oom, residencies
from zimage_engine.engine import Engine
from zimage_engine.tuning import TuneWishes, tune
from zimage_engine.types import GenerationRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda:0"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(DEVICE, tiny=True, seconds=300.0, cache_folder=tmp_path)
    yield made
    made.card.limit(None)


def test_every_residency_draws_the_resident_picture_within_its_prediction(bench: Bench) -> None:
    rows = list(residencies(bench, 12))
    assert rows
    for row in rows:
        assert row["outcome"] == "drawn", row["way"]
        assert row["equal_to_resident"], row["way"]
        assert row["peak_allocated_bytes"] <= row["predicted_peak_bytes"], row["way"]


def test_a_limited_card_refuses_what_is_beyond_it() -> None:
    card = Card(DEVICE)
    card.limit(card.context_bytes + GIB)
    try:
        half = torch.empty(GIB // 2, dtype=torch.uint8, device=DEVICE)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(GIB, dtype=torch.uint8, device=DEVICE)
        del half
    finally:
        card.limit(None)
        card.clear()


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_a_real_out_of_memory_harms_no_later_picture(bench: Bench, stage: Any) -> None:
    """The tiny model may find room beside the hog, so what came out is open; what comes after is not."""
    for row in oom(bench, stage, 2):
        assert row["accident"] in ("drawn", "refused")
        assert row.get("accident_equal") is not False
        assert (row["after"], row["after_equal"]) == ("drawn", True)


def test_float32_arithmetic_mends_a_picture_on_the_device(tiny_z_image: Path) -> None:
    """A fault that comes back until float32 is tried: the picture is whole, and so is the next one."""
    engine = Engine.load(tiny_z_image, device=DEVICE)
    asked = GenerationRequest(
        prompt="a red circle", seed=5, width=64, height=64, num_inference_steps=2, guidance_scale=1.0
    )
    plain = engine.generate(asked).images[0].tobytes()
    calls = 0

    def spoil(_module: Any, _arguments: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        if calls <= 3:
            output[0][0][...] = float("nan")

    handle = engine.pipeline.transformer.register_forward_hook(spoil)
    try:
        report = engine.generate(asked).report
    finally:
        handle.remove()
    tried = [attempt.rung for trip in report.pictures[0].guard.trips for attempt in trip.attempts]
    assert "float32" in tried
    assert {weight.dtype for weight in engine.pipeline.transformer.parameters()} == {torch.bfloat16}
    assert engine.generate(asked).images[0].tobytes() == plain


def test_the_guard_draws_what_stock_diffusers_draws(bench: Bench) -> None:
    from tests.gpu.drawing import draw_stock

    asked = Asked(64, 64, 1.8, 2)
    with bench.applied(replace(bench.plan_for(asked), release_text_encoder=False)):
        ours = bench.painter.draw(asked)
        prompt = bench.painter.plan(asked).prompt
        stock = draw_stock(bench.model, asked, prompt, bench.painter.max_tokens, bench.card)
    assert ours.trips == 0
    assert ours.digest == stock.digest


def test_expandable_segments_are_in_force_in_a_job_s_process() -> None:
    """Told by the segments themselves: a pool of these says so of each."""
    code = (
        "import torch; held = torch.empty(2**26, dtype=torch.uint8, device='cuda:0');"
        "print(all(segment['is_expandable'] for segment in torch.cuda.memory_snapshot()))"
    )
    environment = {**os.environ, suite.ALLOCATOR: suite.EXPANDABLE}
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.split() == ["True"]


@pytest.fixture(scope="module")
def tiny_z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.zimage_engine.tiny_models import write_tiny_z_image

    return write_tiny_z_image(tmp_path_factory.mktemp("models") / "tiny")


def test_levers_stay_near_the_plain_path_and_exact_is_exact() -> None:
    """Every lever that a card has, on the demo model."""
    engine, plain = (Engine.load(device=DEVICE, exact=True) for _ in range(2))
    tuning = tune(engine, [(256, 256), (512, 512)], TuneWishes(repeat=3))
    for size in tuning.sizes:
        tried = [trial for trial in size.trials if trial.seconds is not None]
        assert {trial.lever for trial in tried} >= {"channels_last_vae", "compiled", "cuda_graphs"}
        assert all((trial.mean_difference or 0) < 3 for trial in tried)
        if size.levers:
            assert size.mean_difference is not None and size.mean_difference <= 1
    asked = GenerationRequest(prompt="a red circle", seed=5, width=256, height=256, exact=True)
    drawn = [each.generate(asked).images[0].tobytes() for each in (engine, plain)]
    assert drawn[0] == drawn[1]
