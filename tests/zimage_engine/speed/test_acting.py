"""Levers act on the pictures that they are chosen for and on no other; what is compiled here is real."""

from __future__ import annotations

import gc
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.zimage_engine.tiny_models import write_tiny_pixart, write_tiny_sdxl
from tests.zimage_engine.tiny_models.lora import write_lora
from zimage_engine import Engine, GenerationRequest
from zimage_engine.errors import LeverFailed
from zimage_engine.speed.acting import Levers
from zimage_engine.speed.remembered import key_of_choice, remembered_choices
from zimage_engine.types import GenerationResult, LoraChoice

ASKED = GenerationRequest(prompt="a red circle", seed=3, width=64, height=64, enhance=False, refine=False)
LEVERS = ("channels_last_vae", "compiled")
CHOICES = {64: LEVERS}


def pixels(result: GenerationResult) -> np.ndarray:
    return np.asarray(result.images[0], dtype=np.int16)


def kinds_compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture(scope="module")
def lora_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    write_lora(tiny_model, folder / "style.safetensors")
    return folder


@pytest.fixture(scope="module")
def plain(tiny_model: Path, lora_folder: Path) -> Engine:
    return Engine.load(tiny_model, "cpu", exact=True, lora_folder=lora_folder)


@pytest.fixture(scope="module")
def engine(tiny_model: Path, lora_folder: Path) -> Iterator[Engine]:
    """One engine with all that can act on a processor; compiling is what its making takes."""
    engine = Engine.load(tiny_model, "cpu", exact=True, lora_folder=lora_folder)
    engine.draws_again = False
    engine.accelerate(CHOICES)
    yield engine
    engine.accelerate({})
    # What the compiler is made of need not be searched at each collection of the tests that follow.
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()


def test_what_acts_is_told_and_moves_the_last_bits_alone(engine: Engine, plain: Engine) -> None:
    for guidance_scale in (1.8, 1.0):
        asked = replace(ASKED, guidance_scale=guidance_scale)
        drawn, stock = engine.generate(asked), plain.generate(asked)
        assert drawn.report.accelerated_by == LEVERS
        assert stock.report.accelerated_by == ()
        assert 0 < np.abs(pixels(drawn) - pixels(stock)).mean() < 3


def test_the_same_request_is_drawn_the_same_again(engine: Engine) -> None:
    first = engine.generate(ASKED)
    engine.generate(replace(ASKED, exact=True))
    assert (pixels(first) == pixels(engine.generate(ASKED))).all()


@pytest.mark.parametrize("guidance_scale", [1.8, 1.0])
def test_an_exact_picture_is_that_of_an_engine_without_levers(
    engine: Engine, plain: Engine, guidance_scale: float
) -> None:
    engine.generate(ASKED)
    asked = replace(ASKED, exact=True, guidance_scale=guidance_scale)
    drawn = engine.generate(asked)
    assert drawn.report.accelerated_by == ()
    assert (pixels(drawn) == pixels(plain.generate(asked))).all()


def test_no_request_waits_for_a_compiler(engine: Engine) -> None:
    """Whatever its size, its prompt's length or its steps."""
    before = kinds_compiled()
    engine.levers.choose({64: LEVERS, 91: LEVERS, 128: LEVERS})
    many = ", ".join(["a red circle on a white background"] * 3)
    for asked in (
        replace(ASKED, prompt=many, negative_prompt="blurry"),
        replace(ASKED, width=128, height=64),
        replace(ASKED, width=128, height=128, guidance_scale=1.0, num_inference_steps=3),
    ):
        assert "compiled" in engine.generate(asked).report.accelerated_by
    assert kinds_compiled() == before
    engine.levers.choose(CHOICES)


def test_a_size_that_was_not_measured_is_drawn_plainly(engine: Engine, plain: Engine) -> None:
    asked = replace(ASKED, width=128, height=128, num_inference_steps=2)
    drawn = engine.generate(asked)
    assert drawn.report.accelerated_by == ()
    assert (pixels(drawn) == pixels(plain.generate(asked))).all()


def test_no_compiled_code_acts_beside_loras(engine: Engine, plain: Engine) -> None:
    """Nor beside those that are kept for later, which go when nobody has wanted them for some requests."""
    before = pixels(engine.generate(ASKED))
    asked = replace(ASKED, loras=(LoraChoice("style", 1.0),))
    assert engine.generate(asked).report.accelerated_by == ("channels_last_vae",)
    exact, stock = engine.generate(replace(asked, exact=True)), plain.generate(asked)
    assert (pixels(exact) == pixels(stock)).all()
    told = [engine.generate(ASKED) for _ in range(4)]
    assert [each.report.accelerated_by for each in told] == [("channels_last_vae",)] * 3 + [LEVERS]
    assert (pixels(told[-1]) == before).all()
    plain.set_loras(())


@pytest.mark.parametrize("rungs", [1, 2])
def test_a_bad_value_is_recovered_from_as_without(engine: Engine, plain: Engine, rungs: int) -> None:
    """The first try meets it, then those with the same inputs; what helps is drawn without compiled code."""
    calls = 0

    def spoil(module: torch.nn.Module, args: object, output: tuple[list[torch.Tensor]]) -> object:
        nonlocal calls
        calls += 1
        if 3 <= calls < 3 + rungs:
            return ([torch.full_like(each, float("nan")) for each in output[0]],)
        return output

    handle = engine.pipeline.transformer.register_forward_hook(spoil)
    try:
        drawn = engine.generate(ASKED)
    finally:
        handle.remove()
    trips = drawn.report.pictures[0].guard.trips
    assert len(trips) == 1 and trips[0].recovered_by is not None
    assert np.abs(pixels(drawn) - pixels(plain.generate(ASKED))).mean() < 3


def test_a_picture_that_is_kept_after_a_second_look_is_told_as_it_was_drawn(engine: Engine) -> None:
    """The tiny model's pictures are noise: the second, in float32, runs as it is, and looks the same."""
    drawn = engine.generate(ASKED)
    engine.draws_again = True
    try:
        looked_at = engine.generate(ASKED)
    finally:
        engine.draws_again = False
    assert {trip.stage for trip in looked_at.report.pictures[0].guard.trips} <= {"picture"}
    assert (pixels(looked_at) == pixels(drawn)).all()
    assert looked_at.report.accelerated_by == LEVERS


def test_a_layout_that_failed_halfway_is_made_good(
    engine: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = engine.pipeline.vae
    exact = replace(ASKED, exact=True)
    engine.generate(exact)

    def fails_halfway(memory_format: torch.memory_format) -> None:
        vae.decoder.conv_in.to(memory_format=memory_format)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as failing:
        failing.setattr(vae, "to", fails_halfway)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate(ASKED)
    assert (pixels(engine.generate(exact)) == pixels(plain.generate(ASKED))).all()
    assert all(each.is_contiguous() for each in vae.parameters())


def test_a_copy_of_the_pipeline_has_none_of_it(engine: Engine, plain: Engine) -> None:
    from zimage_engine.bench.stock import StockPipeline
    from zimage_engine.sampling.plan import resolve

    engine.generate(ASKED)
    asked = replace(ASKED, negative_prompt="")
    stock = StockPipeline(engine, 512)
    drawn = stock.draw(resolve(asked, engine.description), 3)
    assert (np.asarray(drawn, dtype=np.int16) == pixels(plain.generate(asked))).all()
    assert engine.generate(ASKED).report.accelerated_by == LEVERS


def test_compiled_code_is_kept_for_the_next_process(engine: Engine) -> None:
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.is_relative_to(Path(os.environ["XDG_CACHE_HOME"]))
    assert folder.stat().st_mode & 0o077 == 0
    assert any(folder.rglob("*.so"))


def test_an_engine_that_is_loaded_later_takes_what_is_remembered(
    tiny_model: Path, plain: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    remembered, names = remembered_choices(), ("channels_last_vae",)
    assert remembered.remember(key_of_choice(plain.lever_facts), plain.lever_facts, 64, names, None)
    try:
        with caplog.at_level(logging.INFO, "zimage_engine"):
            later = Engine.load(tiny_model, "cpu")
        assert "quicker by channels-last VAE" in caplog.text
        assert later.generate(ASKED).report.accelerated_by == names
        assert Engine.load(tiny_model, "cpu", exact=True).generate(ASKED).report.accelerated_by == ()
        # Another dtype is another measurement.
        assert Engine.load(tiny_model, "cpu", dtype="float32").generate(ASKED).report.accelerated_by == ()
    finally:
        remembered.forget()


def test_what_cannot_be_compiled_is_told_and_left_out(
    tiny_model: Path, plain: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a machine whose compiler was taken away after it had been measured."""
    remembered = remembered_choices()
    remembered.remember(key_of_choice(plain.lever_facts), plain.lever_facts, 64, LEVERS, None)

    def broken(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler")

    try:
        with monkeypatch.context() as without:
            without.setattr(torch.nn.Module, "compile", broken)
            later = Engine.load(tiny_model, "cpu")
        assert "what was measured to be quicker here is left out: RuntimeError: no compiler" in caplog.text
        assert later.generate(ASKED).report.accelerated_by == ("channels_last_vae",)
        drawn = later.generate(replace(ASKED, exact=True))
        assert (pixels(drawn) == pixels(plain.generate(ASKED))).all()
        with pytest.raises(LeverFailed, match="no compiler"), monkeypatch.context() as without:
            without.setattr(torch.nn.Module, "compile", broken)
            later.accelerate(CHOICES)
    finally:
        remembered.forget()


def test_facts_are_those_of_the_machine_and_the_model(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.levers.facts.device == "cpu" and engine.levers.facts.has_blocks
    assert engine.levers.facts.builds_kernels is (shutil.which("g++") is not None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not engine.levers.facts.builds_kernels
    for write in (write_tiny_pixart, write_tiny_sdxl):
        other = Engine.load(write(tmp_path / write.__name__), "cpu", exact=True)
        assert other.levers.facts.has_blocks


def test_kernels_are_as_before_after_each_pass(engine: Engine, plain: Engine) -> None:
    """torch's order of attention kernels is the process's. A processor has one that is fused, and the last
    lever leaves that out."""
    levers: Levers = engine.levers
    before = torch._C._get_sdp_priority_order()
    stock = pixels(plain.generate(ASKED))
    for name, is_stock in (
        ("attention_cudnn", True),
        ("attention_flash", True),
        ("attention_efficient", False),
    ):
        levers.choose({64: (name,)})
        drawn = engine.generate(ASKED)
        assert drawn.report.accelerated_by == (name,)
        assert torch._C._get_sdp_priority_order() == before
        assert (pixels(drawn) == stock).all() == is_stock
    levers.choose(CHOICES)


def test_code_for_another_attention_is_another(engine: Engine) -> None:
    """torch's compiled code does not tell for which attention it was made; ours is made anew.

    The last of this file, which the engine is not needed after: compiling takes its time.
    """
    first = pixels(engine.generate(ASKED))
    before = kinds_compiled()
    engine.accelerate({64: ("attention_efficient", *LEVERS)})
    assert kinds_compiled() > before
    drawn = engine.generate(ASKED)
    assert drawn.report.accelerated_by == ("attention_efficient", *LEVERS)
    assert (pixels(drawn) != first).any()
