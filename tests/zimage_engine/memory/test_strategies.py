"""Pictures under every residency are those of a resident model, to the bit, and nothing of it stays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zimage_engine.memory.residencies import (
    ASKED,
    WRITERS,
    footprint_of,
    pixels,
    plan_for,
    traces,
    weights,
)
from tests.zimage_engine.tiny_models.lora import write_lora
from zimage_engine.engine import Engine
from zimage_engine.loading.lora_weight import LoraWeight
from zimage_engine.memory.residency import Footprint, Residency
from zimage_engine.memory.strategies import STRATEGIES, AppliedOffload, apply
from zimage_engine.types import LoraChoice


@dataclass
class Case:
    engine: Engine
    footprint: Footprint
    plain: bytes
    model: Path

    def put(self, residency: Residency, folder: Path, **changes: Any) -> AppliedOffload:
        blocks = tuple(self.footprint.components[self.footprint.denoiser].blocks)
        streamed = blocks[1:] if residency is Residency.STREAM else ()
        plan = plan_for(residency, streamed_blocks=streamed, **changes)
        return apply(plan, self.engine.pipeline, self.footprint, "cpu", folder)


@pytest.fixture(scope="module", params=WRITERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return made(request.param, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return made("z-image", tmp_path_factory.mktemp("models") / "tiny")


def made(family: str, folder: Path) -> Case:
    model = WRITERS[family](folder)
    engine = Engine.load(model, device="cpu")
    return Case(engine, footprint_of(engine), pixels(engine), model)


def test_there_is_a_row_for_every_residency() -> None:
    assert set(STRATEGIES) == set(Residency)


@pytest.mark.parametrize("leaving", [False, True], ids=["text-stays", "text-leaves"])
@pytest.mark.parametrize("residency", Residency, ids=lambda each: each.value)
def test_a_picture_is_that_of_a_resident_model(
    case: Case, residency: Residency, leaving: bool, tmp_path: Path
) -> None:
    before, values = traces(case.engine), weights(case.engine)
    applied = case.put(residency, tmp_path, release_text_encoder=leaving, stream_text_encoder=leaving)
    assert pixels(case.engine) == case.plain
    applied.after_encoding()
    assert pixels(case.engine) == case.plain
    applied.remove()
    assert traces(case.engine) == before
    assert not list(tmp_path.iterdir())
    after = weights(case.engine)
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert all(after[name].stride() == value.stride() for name, value in values.items())
    assert "Offload" not in type(case.engine.pipeline).__name__


@pytest.mark.parametrize("residency", Residency, ids=lambda each: each.value)
def test_a_lora_put_on_under_a_plan_acts_as_on_a_resident_model(
    z_image: Case, residency: Residency, tmp_path: Path
) -> None:
    lora = [LoraWeight(write_lora(z_image.model, tmp_path / "style.safetensors"), 0.8)]
    z_image.engine.set_loras(lora)
    resident = pixels(z_image.engine)
    z_image.engine.set_loras(())
    assert resident != z_image.plain
    applied = z_image.put(residency, tmp_path / "disk")
    z_image.engine.set_loras(lora)
    assert pixels(z_image.engine) == resident
    z_image.engine.set_loras(())
    assert pixels(z_image.engine) == z_image.plain
    applied.remove()
    assert pixels(z_image.engine) == z_image.plain


@pytest.mark.parametrize("residency", Residency, ids=lambda each: each.value)
def test_loras_that_requests_switch_leave_no_trace_under_a_plan(
    z_image: Case, residency: Residency, tmp_path: Path
) -> None:
    """They stay on the model while they are idle."""
    engine = z_image.engine
    lora = [LoraWeight(write_lora(z_image.model, tmp_path / "style.safetensors"), 0.8)]
    engine.set_loras(lora)
    styled, half = pixels(engine), (LoraChoice("style", 0.4),)
    at_half = engine.generate(replace(ASKED, loras=half)).images[0].tobytes()
    applied = z_image.put(residency, tmp_path / "disk")
    for loras, expected in (((), z_image.plain), (None, styled), (half, at_half), ((), z_image.plain)):
        assert engine.generate(replace(ASKED, loras=loras)).images[0].tobytes() == expected
    engine.set_loras(())
    applied.remove()
    assert pixels(engine) == z_image.plain


@pytest.mark.parametrize("residency", Residency, ids=lambda each: each.value)
def test_float32_arithmetic_is_the_same_under_a_plan(
    z_image: Case, residency: Residency, tmp_path: Path
) -> None:
    """A fault that three tries do not mend brings the guard's float32, which must not touch the copies."""

    def faulty() -> bytes:
        calls = 0

        def spoil(_module: Any, _args: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            if calls <= 3:
                output[0][0][...] = float("nan")

        handle = z_image.engine.pipeline.transformer.register_forward_hook(spoil)
        try:
            result = z_image.engine.generate(replace(ASKED, guidance_scale=1.0))
        finally:
            handle.remove()
        tried = [attempt.rung for trip in result.report.pictures[0].guard.trips for attempt in trip.attempts]
        assert "float32" in tried
        return result.images[0].tobytes()

    resident = faulty()
    applied = z_image.put(residency, tmp_path)
    assert faulty() == resident
    assert pixels(z_image.engine) == z_image.plain
    applied.remove()


def test_float8_storage_is_taken_back_whole(z_image: Case, tmp_path: Path) -> None:
    before, values = traces(z_image.engine), weights(z_image.engine)
    alone = z_image.put(Residency.NONE, tmp_path, float8_storage=True)
    stored = {weight.dtype for weight in z_image.engine.pipeline.transformer.parameters()}
    assert torch.float8_e4m3fn in stored
    in_float8 = pixels(z_image.engine)
    alone.remove()
    assert traces(z_image.engine) == before
    streamed = z_image.put(Residency.STREAM, tmp_path, float8_storage=True)
    assert pixels(z_image.engine) == in_float8
    streamed.remove()
    assert all(torch.equal(weights(z_image.engine)[name], value) for name, value in values.items())
    assert pixels(z_image.engine) == z_image.plain


def test_tiles_really_tile_and_come_off(case: Case, tmp_path: Path) -> None:
    """A picture that looks like noise is drawn twice, so it is the sides that are looked at."""
    vae, sides = case.engine.pipeline.vae, set()
    handle = vae.decoder.register_forward_hook(lambda _m, args, _o: sides.add(max(args[0].shape[-2:])))
    pixels(case.engine)
    (whole,) = sides
    sides.clear()
    applied = case.put(Residency.NONE, tmp_path, vae_tile_px=32)
    pixels(case.engine)
    assert max(sides) == whole // 2, "32 of 64 pixels"
    applied.remove()
    sides.clear()
    assert pixels(case.engine) == case.plain
    assert sides == {whole}
    handle.remove()


def test_what_cannot_be_applied_leaves_nothing_behind(z_image: Case, tmp_path: Path) -> None:
    before = traces(z_image.engine)
    plan = plan_for(Residency.STREAM, streamed_blocks=("layers.0", "layers.99"), vae_tile_px=32)
    with pytest.raises(AttributeError):
        apply(plan, z_image.engine.pipeline, z_image.footprint, "cpu", tmp_path)
    assert traces(z_image.engine) == before
    assert not z_image.engine.pipeline.vae.use_tiling
    assert pixels(z_image.engine) == z_image.plain


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("residency", Residency, ids=lambda each: each.value)
def test_a_card_draws_the_same_wherever_the_weights_are(
    z_image: Case, residency: Residency, tmp_path: Path
) -> None:
    engine = Engine.load(z_image.model, device="cuda")
    resident = pixels(engine)
    engine.pipeline.to("cpu")
    blocks = tuple(z_image.footprint.components[z_image.footprint.denoiser].blocks)
    streamed = blocks[1:] if residency is Residency.STREAM else ()
    plan = plan_for(residency, streamed_blocks=streamed, release_text_encoder=True, stream_text_encoder=True)
    applied = apply(plan, engine.pipeline, footprint_of(engine), "cuda:0", tmp_path)
    for _ in range(3):
        assert pixels(engine) == resident
        applied.after_encoding()
    applied.remove()
    assert engine.pipeline.transformer.device.type == "cpu"
    assert not any(weight.is_pinned() for weight in engine.pipeline.transformer.parameters())
