"""Out-of-memory put into real tiny models at every stage, and what has to come of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.zimage_engine.memory.residencies import footprint_of, pixels, plan_for, traces
from zimage_engine.engine import Engine
from zimage_engine.errors import OutOfMemory
from zimage_engine.families import family_named
from zimage_engine.loading.describe import max_tokens
from zimage_engine.memory.oom import (
    CALM_REQUESTS,
    FIRST_PATIENCE,
    GROWN_BYTES,
    Distrust,
    MemoryKeeper,
    Stage,
    choose,
    next_rung,
    same_placement,
)
from zimage_engine.memory.residency import OffloadPlan, Residency
from zimage_engine.sampling.pipeline import GuardedPipeline
from zimage_engine.sampling.plan import resolve
from zimage_engine.types import GenerationRequest

ASKED = GenerationRequest(
    prompt="a red circle", seed=5, width=64, height=64, num_inference_steps=2, enhance=False
)
RESIDENT = plan_for(Residency.NONE, peak_bytes=900, relative_speed=1.0)
RELEASED = plan_for(Residency.NONE, peak_bytes=700, relative_speed=0.9, release_text_encoder=True)
HALF = plan_for(
    Residency.STREAM,
    peak_bytes=500,
    relative_speed=0.8,
    streamed_blocks=("layers.1",),
    release_text_encoder=True,
)
STREAMED = replace(HALF, peak_bytes=300, relative_speed=0.6, streamed_blocks=("layers.0", "layers.1"))
LAYERS = plan_for(Residency.SEQUENTIAL, peak_bytes=100, relative_speed=0.2)
OPTIONS = (RESIDENT, RELEASED, HALF, STREAMED, LAYERS)


class Offered:
    """A planner of few options; what it is asked is kept."""

    def __init__(self, options: Sequence[OffloadPlan]) -> None:
        self._options = options
        self.asked_for_size: list[int] = []

    def options(self, width_px: int, height_px: int, guided: bool, free_bytes: int | None) -> Any:
        return self._options

    def largest_size(self, width_px: int, height_px: int, guided: bool, free_bytes: int) -> Any:
        self.asked_for_size.append(free_bytes)
        return (32, 32)

    def beside(self, taken_bytes: int) -> Offered:
        return self


@pytest.mark.parametrize(
    ("stage", "taken", "current", "rung", "plan"),
    [
        ("denoise", (), RESIDENT, "freed", RESIDENT),
        ("denoise", ("freed",), RESIDENT, "leaner", RELEASED),
        ("denoise", ("freed", "leaner"), RELEASED, "leaner", HALF),
        ("encode", ("freed",), STREAMED, "leaner", LAYERS),
        ("denoise", ("freed",), LAYERS, "refused", None),
        ("decode", ("freed",), LAYERS, "tiled", replace(LAYERS, vae_tile_px=512)),
        (
            "decode",
            ("freed", "tiled"),
            replace(LAYERS, vae_tile_px=512),
            "tiled",
            replace(LAYERS, vae_tile_px=256),
        ),
        ("decode", ("freed", "tiled"), replace(LAYERS, vae_tile_px=128), "refused", None),
    ],
)
def test_the_ladder(stage: Stage, taken: Any, current: OffloadPlan, rung: str, plan: Any) -> None:
    decision = next_rung(stage, taken, current, OPTIONS)
    assert (decision.rung, decision.plan) == (rung, plan)


@pytest.mark.parametrize(
    ("current", "distrust", "calm", "chosen"),
    [
        (None, None, 0, RESIDENT),
        (None, Distrust(900, None, 3), 0, RELEASED),
        (None, Distrust(50, None, 3), 0, LAYERS),
        (RESIDENT, Distrust(900, None, 3), 0, RELEASED),
        (HALF, None, 0, HALF),
        (HALF, None, CALM_REQUESTS, RESIDENT),
        (STREAMED, Distrust(900, None, 3), CALM_REQUESTS, RELEASED),
    ],
)
def test_what_no_longer_fits_is_left_at_once_and_what_is_faster_waits(
    current: OffloadPlan | None, distrust: Distrust | None, calm: int, chosen: OffloadPlan
) -> None:
    assert same_placement(choose(current, OPTIONS, distrust, calm), chosen)


def test_a_plan_that_streams_more_than_needed_is_kept_with_the_new_prediction() -> None:
    kept = choose(STREAMED, (replace(HALF, peak_bytes=444, width_px=96),), None, 0)
    assert same_placement(kept, STREAMED)
    assert (kept.peak_bytes, kept.width_px) == (444, 96)


@pytest.mark.parametrize(
    ("then", "now", "left", "holds"),
    [
        (None, None, 1, True),
        (None, None, 0, False),
        (5 * GROWN_BYTES, 6 * GROWN_BYTES, 1, False),
        (5 * GROWN_BYTES, 6 * GROWN_BYTES - 1, 1, True),
    ],
)
def test_trust_returns_with_time_or_with_memory(then: Any, now: Any, left: int, holds: bool) -> None:
    assert Distrust(900, then, left).holds(now) is holds


# What follows draws.


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine.load(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def plain(engine: Engine) -> bytes:
    return pixels(engine, ASKED)


@pytest.fixture
def keeper(engine: Engine, tmp_path: Path) -> Iterator[MemoryKeeper]:
    made = MemoryKeeper(engine.pipeline, footprint_of(engine), Offered(OPTIONS), "cpu", tmp_path)
    yield made
    made.close()


def drawn(engine: Engine, keeper: MemoryKeeper) -> bytes:
    """A picture as the engine draws it, each stage tried again as often as the keeper finds a way."""
    family = family_named(engine.description.family)
    guarded = GuardedPipeline(engine.pipeline, family, lambda: 0.0)
    plan = resolve(ASKED, engine.description)
    keeper.before(ASKED.width or 0, ASKED.height or 0, False)
    try:
        embeddings = retried(
            keeper, lambda: guarded.encode(plan, max_tokens(engine.pipeline, family)), lambda: "encode"
        )
        keeper.encoded()
        steps: list[int] = []

        def picture() -> Image.Image:
            steps.clear()
            return guarded.draw(plan, embeddings, 5, lambda: None, lambda step, _: steps.append(step)).image

        return retried(keeper, picture, lambda: "decode" if len(steps) == plan.steps else "denoise").tobytes()
    finally:
        keeper.after()


def retried(keeper: MemoryKeeper, act: Any, stage: Any) -> Any:
    while True:
        try:
            return act()
        except torch.OutOfMemoryError as raised:
            error = raised
        keeper.on_oom(stage(), error)


PLACES: dict[Stage, str] = {
    "encode": "text_encoder.layers.1",
    "denoise": "transformer.layers.1.attention",
    "decode": "vae.decoder",
}


@contextmanager
def out_of_memory(engine: Engine, stage: Stage, times: int) -> Iterator[None]:
    """The first `times` calls in the middle of the stage end as CUDA ends them."""
    component, _, path = PLACES[stage].partition(".")
    left = times

    def spend(*_: Any) -> None:
        nonlocal left
        if left > 0:
            left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    module = engine.pipeline.components[component].get_submodule(path)
    handle = module.register_forward_hook(spend)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize("stage", PLACES)
def test_a_picture_comes_out_the_same_whatever_it_took(
    engine: Engine, plain: bytes, keeper: MemoryKeeper, stage: Stage, times: int
) -> None:
    before = traces(engine)
    with out_of_memory(engine, stage, times):
        assert drawn(engine, keeper) == plain
    assert sum(keeper.report.ooms.values()) == times
    assert keeper.report.ooms[stage, "freed"] == 1
    assert keeper.plan is not None and same_placement(keeper.plan, OPTIONS[times - 1])
    assert drawn(engine, keeper) == plain
    keeper.close()
    assert traces(engine) == before
    assert pixels(engine, ASKED) == plain


@pytest.mark.parametrize("stage", PLACES)
def test_what_nothing_helps_against_is_refused_with_a_size_and_the_next_one_is_drawn(
    engine: Engine, plain: bytes, tmp_path: Path, stage: Stage
) -> None:
    offered = Offered(OPTIONS)
    keeper = MemoryKeeper(engine.pipeline, footprint_of(engine), offered, "cpu", tmp_path)
    with out_of_memory(engine, stage, 100), pytest.raises(OutOfMemory) as refused:
        drawn(engine, keeper)
    assert (refused.value.stage, refused.value.largest_size) == (stage, (32, 32))
    assert "32x32" in str(refused.value)
    assert offered.asked_for_size == [90], "the leanest plan's 100 were too much"
    assert keeper.report.ooms[stage, "refused"] == 1
    assert keeper.report.ooms.get((stage, "tiled"), 0) == (3 if stage == "decode" else 0)
    assert drawn(engine, keeper) == plain
    keeper.close()


def test_the_faster_plan_comes_back_when_its_time_is_over(
    engine: Engine, plain: bytes, keeper: MemoryKeeper
) -> None:
    with out_of_memory(engine, "denoise", 2):
        drawn(engine, keeper)
    seen = []
    for _ in range(FIRST_PATIENCE + CALM_REQUESTS + 1):
        plan = keeper.before(64, 64, False)
        keeper.after()
        seen.append(same_placement(plan, RESIDENT))
    assert not any(seen[: FIRST_PATIENCE - 1])
    assert seen[-1]
    assert drawn(engine, keeper) == plain


def test_weights_that_find_no_room_bring_the_next_plan(
    engine: Engine, plain: bytes, keeper: MemoryKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zimage_engine.memory import oom

    really = oom.apply

    def cramped(plan: OffloadPlan, *others: Any) -> Any:
        if plan.peak_bytes > 400:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return really(plan, *others)

    monkeypatch.setattr(oom, "apply", cramped)
    assert drawn(engine, keeper) == plain
    assert keeper.plan is not None and same_placement(keeper.plan, STREAMED)


def test_weights_may_change_under_a_plan(engine: Engine, plain: bytes, keeper: MemoryKeeper) -> None:
    keeper.before(64, 64, False)
    bias = engine.pipeline.vae.decoder.conv_out.bias
    before = bias.detach().clone()
    with keeper.weights_change(), torch.no_grad():
        bias.add_(1.0)
    assert drawn(engine, keeper) != plain
    with keeper.weights_change(), torch.no_grad():
        bias.copy_(before)
    assert drawn(engine, keeper) == plain
