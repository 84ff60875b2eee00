"""Quantised matrices draw a picture of their own, the same wherever they lie, and are taken back whole."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.zimage_engine.memory.residencies import ASKED, WRITERS, pixels, plan_for, traces, weights
from tests.zimage_engine.tiny_models.lora import write_lora
from zimage_engine.engine import Engine
from zimage_engine.errors import InvalidRequest
from zimage_engine.families import FAMILIES, family_named
from zimage_engine.loading.lora_weight import LoraWeight
from zimage_engine.memory.footprint import footprint_of_pipeline, published_footprint
from zimage_engine.memory.planner import PlanOptions, all_options, plan_offload
from zimage_engine.memory.quantize import CONFIGS, check_quantisation, quiet_torchao
from zimage_engine.memory.residency import QUANTISATIONS, Footprint, MemoryWishes, Residency
from zimage_engine.memory.strategies import AppliedOffload, apply
from zimage_engine.memory.streaming import tensors_of

#: Ways of moving weights that quantised ones bear.
WAYS = [way for way in Residency if way is not Residency.SEQUENTIAL]
every_word = pytest.mark.parametrize("word", QUANTISATIONS)


class Case:
    """A tiny model, with what it draws and holds when nothing is quantised."""

    def __init__(self, family: str, folder: Path) -> None:
        self.model = WRITERS[family](folder)
        self.engine = Engine.load(self.model, device="cpu")
        self.plain = pixels(self.engine)
        self.family = family_named(self.engine.description.family)
        self.denoiser = getattr(self.engine.pipeline, self.family.denoiser)

    def footprint(self, word: str | None) -> Footprint:
        return footprint_of_pipeline(self.engine.pipeline, self.family, quantize=word)

    def put(self, word: str, residency: Residency, folder: Path, **changes: Any) -> AppliedOffload:
        footprint = self.footprint(word)
        blocks = tuple(footprint.components[footprint.denoiser].blocks)
        streamed = blocks[1:] if residency is Residency.STREAM else ()
        plan = plan_for(residency, quantize=word, streamed_blocks=streamed, **changes)
        return apply(plan, self.engine.pipeline, footprint, "cpu", folder)

    @property
    def denoiser_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in tensors_of((self.denoiser,)))


@pytest.fixture(scope="module", params=WRITERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("z-image", tmp_path_factory.mktemp("models") / "tiny")


def test_every_word_has_torchao_settings() -> None:
    assert set(CONFIGS) == set(QUANTISATIONS)


@every_word
def test_a_picture_is_the_same_wherever_quantised_weights_lie_and_they_are_taken_back_whole(
    case: Case, word: str, tmp_path: Path
) -> None:
    before, values = traces(case.engine), weights(case.engine)
    parameters = {name: id(weight) for name, weight in case.denoiser.named_parameters()}
    drawn = {}
    for way in WAYS:
        applied = case.put(word, way, tmp_path, release_text_encoder=True, stream_text_encoder=True)
        drawn[way] = pixels(case.engine)
        applied.after_encoding()
        assert pixels(case.engine) == drawn[way]
        applied.remove()
        assert traces(case.engine) == before
        assert {name: id(weight) for name, weight in case.denoiser.named_parameters()} == parameters
    assert len(set(drawn.values())) == 1
    assert case.plain not in drawn.values()
    assert not any("extra_repr" in vars(part) for part in case.denoiser.modules())
    after = weights(case.engine)
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert pixels(case.engine) == case.plain


@every_word
def test_the_footprint_is_to_the_byte_what_quantised_weights_take(
    case: Case, word: str, tmp_path: Path
) -> None:
    plain_bytes, name = case.denoiser_bytes, case.family.denoiser
    predicted = case.footprint(None).components[name].bytes - case.footprint(word).components[name].bytes
    applied = case.put(word, Residency.NONE, tmp_path)
    saved = plain_bytes - case.denoiser_bytes
    applied.remove()
    assert saved == predicted > 0
    assert case.denoiser_bytes == plain_bytes


@every_word
def test_a_layer_at_work_takes_the_copies_that_the_planner_counts(word: str) -> None:
    """What PyTorch allocates during one layer's call; the answer for one row is next to nothing."""
    from torch.profiler import ProfilerActivity, profile
    from torchao.quantization import quantize_

    layer = torch.nn.Linear(1024, 4096, bias=False, dtype=torch.bfloat16)
    matrix_bytes = layer.weight.nbytes
    quantize_(layer, CONFIGS[word]())
    asked = torch.randn(1, 1024, dtype=torch.bfloat16)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        layer(asked)
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak / matrix_bytes == pytest.approx(QUANTISATIONS[word].working_copies, rel=0.02)


@every_word
def test_a_layer_computes_where_its_parts_were_moved(word: str) -> None:
    """Moving is done to what a weight consists of; the device that the weight itself names is not asked."""
    from torchao.quantization import quantize_

    layer = torch.nn.Linear(32, 64, dtype=torch.bfloat16)
    quantize_(layer, CONFIGS[word]())
    parts = tensors_of((layer,))
    assert len(parts) > 2 and {type(part) for part in parts} <= {torch.Tensor, torch.nn.Parameter}
    # A tensor without values cannot be put in place of one with them, so the weight gets new parts.
    layer.bias = None
    for name in layer.weight.__tensor_flatten__()[0]:  # type: ignore[operator]
        setattr(layer.weight, name, getattr(layer.weight, name).to("meta"))
    assert layer.weight.device.type == "cpu"
    answer = layer(torch.zeros(1, 32, dtype=torch.bfloat16, device="meta"))
    assert (answer.device.type, answer.shape, answer.dtype) == ("meta", (1, 64), torch.bfloat16)


def test_of_torchao_only_what_concerns_nobody_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    quiet_torchao()
    logger = logging.getLogger("torchao")
    logger.warning("Failed to load %s", "_C_mxfp8.so")
    logger.warning("this weight cannot be quantised")
    assert [record.getMessage() for record in caplog.records] == ["this weight cannot be quantised"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda each: each.name)
def test_what_is_published_is_quantised_in_its_blocks_alone(family: Any) -> None:
    plain, small = (published_footprint(family, quantize=word) for word in (None, "int8"))
    before, after = plain.components[family.denoiser], small.components[family.denoiser]
    assert {name: part for name, part in plain.components.items() if name != family.denoiser} == {
        name: part for name, part in small.components.items() if name != family.denoiser
    }
    assert 0.45 * before.bytes < after.bytes < 0.75 * before.bytes
    assert 0 < after.largest_quantised_bytes <= before.largest_module_bytes


@every_word
def test_the_plan_says_it_and_never_takes_the_way_that_cannot_be_taken(word: str) -> None:
    footprint = published_footprint("z-image-turbo", quantize=word)
    asked = {"guided": True, "options": PlanOptions(host_free_bytes=None)}
    for free_bytes in (4 * 2**30, 8 * 2**30, 12 * 2**30, 48 * 2**30):
        rows = all_options(footprint, 1024, 1024, free_bytes=free_bytes, **asked)  # type: ignore[arg-type]
        assert {row.residency for row in rows} == set(WAYS)
        assert {row.quantize for row in rows} == {word}
    plan = plan_offload(footprint, 1024, 1024, free_bytes=48 * 2**30, **asked)  # type: ignore[arg-type]
    assert f"matrices in {word}" in plan.because
    assert "pictures differ" in plan.because


REFUSED = {
    "another word": ({"quantize": "int4"}, "must be one of int8, fp8, got 'int4'"),
    "both": ({"quantize": "int8", "float8": True}, "choose one"),
    "sequential": ({"quantize": "fp8", "offload": "sequential"}, "choose none, model, stream or disk"),
}


@pytest.mark.parametrize(("wishes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_wishes_that_exclude_each_other_are_refused(wishes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        MemoryWishes(**wishes)


def test_a_missing_package_is_a_sentence_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name, *rest)
    )
    with pytest.raises(InvalidRequest, match=r"pip install 'zimage-turbo\[quantize\]'"):
        Engine.load(tmp_path / "nothing", device="cpu", memory=MemoryWishes(quantize="int8"))


def test_float8_values_are_refused_where_the_device_has_none() -> None:
    check_quantisation("int8", "mps")
    with pytest.raises(InvalidRequest, match="use int8"):
        check_quantisation("fp8", "mps")


@pytest.fixture(scope="module", params=QUANTISATIONS)
def quantised(request: pytest.FixtureRequest, z_image: Case) -> Engine:
    return Engine.load(z_image.model, device="cpu", memory=MemoryWishes(quantize=request.param))


def test_the_report_says_that_matrices_were_quantised(quantised: Engine, z_image: Case) -> None:
    use = quantised.generate(ASKED).report.memory
    assert use is not None and use.quantize in QUANTISATIONS
    assert f"matrices in {use.quantize}" in use.plan
    plain = z_image.engine.generate(ASKED).report.memory
    assert plain is not None and plain.quantize is None


def test_a_lora_acts_on_quantised_weights_and_comes_off_whole(
    quantised: Engine, z_image: Case, tmp_path: Path
) -> None:
    alone = quantised.generate(ASKED).images[0]
    lora = [LoraWeight(write_lora(z_image.model, tmp_path / "style.safetensors"), 0.8)]
    quantised.set_loras(lora)
    with_lora = quantised.generate(ASKED).images[0]
    adapters = {
        weight.dtype
        for name, weight in quantised.pipeline.transformer.named_parameters()
        if "lora_" in name and not hasattr(weight, "qdata")
    }
    adapted = [
        weight
        for name, weight in quantised.pipeline.transformer.named_parameters()
        if name.endswith("to_q.base_layer.weight")
    ]
    quantised.set_loras(())
    assert adapters and adapted and all(hasattr(weight, "qdata") for weight in adapted)
    assert quantised.generate(ASKED).images[0].tobytes() == alone.tobytes()
    z_image.engine.set_loras(lora)
    unquantised = z_image.engine.generate(ASKED).images[0]
    z_image.engine.set_loras(())
    assert with_lora.tobytes() != alone.tobytes()
    assert _distance(with_lora, unquantised) < _distance(with_lora, alone)


def test_the_guard_redraws_quantised_weights_in_float32(quantised: Engine) -> None:
    """Three faults in a row bring its float32 rung, whose arithmetic reads the quantised weights."""
    dtypes = set()

    def spoiling(times: int) -> Callable[[Any, Any, Any], None]:
        calls = 0

        def spoil(_module: Any, _args: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            if calls <= times:
                output[0][0][...] = float("nan")

        return spoil

    transformer = quantised.pipeline.transformer
    plain = quantised.generate(replace(ASKED, guidance_scale=1.0)).images[0]
    handles = [
        transformer.register_forward_hook(spoiling(3)),
        transformer.layers[0].attention.to_q.register_forward_hook(
            lambda _m, _a, output: dtypes.add(output.dtype)
        ),
    ]
    try:
        result = quantised.generate(replace(ASKED, guidance_scale=1.0))
    finally:
        for handle in handles:
            handle.remove()
    tried = {
        attempt.rung: attempt.outcome
        for trip in result.report.pictures[0].guard.trips
        for attempt in trip.attempts
    }
    assert tried["float32"] == "recovered"
    assert dtypes == {torch.bfloat16, torch.float32}
    assert _distance(result.images[0], plain) < 4.0


def _distance(one: Any, other: Any) -> float:
    """Mean distance of pixel values, of 255."""
    return float(numpy.abs(numpy.asarray(one, float) - numpy.asarray(other, float)).mean())
