"""Stock diffusers draws with the same tensors, through modules of its own, and measures pair by pair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.zimage_engine.tiny_models import write_tiny_pixart, write_tiny_sdxl
from zimage_engine import Engine, GenerationRequest
from zimage_engine.bench.pictures import PictureClock
from zimage_engine.bench.spread import Spread, ratios, spread_of
from zimage_engine.bench.stock import StockPipeline
from zimage_engine.errors import InvalidRequest
from zimage_engine.families import family_named
from zimage_engine.loading.describe import max_tokens
from zimage_engine.memory.residency import Residency
from zimage_engine.sampling.plan import resolve

REQUEST = GenerationRequest(
    prompt="a red circle",
    negative_prompt="blue",
    seed=3,
    width=64,
    height=64,
    num_inference_steps=2,
    enhance=False,
    refine=False,
)


def stock_of(engine: Engine) -> StockPipeline:
    return StockPipeline(engine, max_tokens(engine.pipeline, family_named(engine.description.family)))


@pytest.fixture(params=["z-image", "sdxl", "pixart"])
def engine(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Engine:
    writers = {"sdxl": write_tiny_sdxl, "pixart": write_tiny_pixart}
    folder = tiny_model
    if request.param in writers:
        folder = writers[request.param](tmp_path / request.param)
    loaded = Engine.load(folder, device="cpu", dtype="float32")
    loaded.draws_again = False
    return loaded


def test_it_draws_our_picture_with_our_tensors(engine: Engine) -> None:
    stock = stock_of(engine)
    theirs = stock.draw(resolve(REQUEST, engine.description), 3)
    ours = engine.generate(REQUEST).images[0]
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    for name, part in engine.pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            twin = getattr(stock.pipeline, name)
            assert twin is not part
            pairs = zip(part.parameters(), twin.parameters(), strict=True)
            assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)


def test_stages_are_told_for_both_in_the_same_way(engine: Engine) -> None:
    stock, family = stock_of(engine), family_named(engine.description.family)
    plan = resolve(REQUEST, engine.description)
    for pipeline, draw in (
        (engine.pipeline, lambda: engine.generate(REQUEST)),
        (stock.pipeline, lambda: stock.draw(plan, 3)),
    ):
        ticks = iter(range(100))
        _, times = PictureClock(pipeline, family, lambda ticks=ticks: float(next(ticks))).timed(draw)
        # Read at the beginning, at two entries of the denoiser, at the decoder's, at the end.
        assert (times.picture, times.encode, times.denoise, times.decode) == (4.0, 1.0, 2.0, 1.0)
        assert times.steps == (1.0, 1.0) and times.step == 1.0


def test_what_is_done_to_ours_does_not_reach_it(tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, device="cpu", dtype="float32")
    stock = stock_of(engine)
    before = stock.draw(resolve(REQUEST, engine.description), 3)
    engine.pipeline.transformer.register_forward_hook(lambda *_: pytest.fail("it was ours that ran"))
    assert stock.draw(resolve(REQUEST, engine.description), 3).tobytes() == before.tobytes()


def test_a_model_that_is_fetched_piece_by_piece_cannot_be_shared(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(tiny_model, device="cpu")
    report = engine.memory_report()
    assert report.plan is not None
    streamed = replace(report, plan=replace(report.plan, residency=Residency.STREAM))
    monkeypatch.setattr(engine, "memory_report", lambda: streamed)  # no processor's plan is one
    with pytest.raises(InvalidRequest, match="the plan here is stream"):
        stock_of(engine)


def test_quartiles_and_ratios_pair_by_pair() -> None:
    assert spread_of([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    assert spread_of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    # Both of a pair were slowed alike: the ratio of medians would say 1.25.
    assert ratios([2.0, 20.0, 3.0], [1.0, 10.0, 1.5]) == Spread(2.0, 2.0, 2.0, 3)
