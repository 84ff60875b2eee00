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

from tests.benchmarks.activation_bytes import LiveBytes
from tests.zimage_engine.memory.quantised_words import HAS_INT8, WORDS, needs_int8
from tests.zimage_engine.memory.residencies import ASKED, WRITERS, pixels, plan_for, traces, weights
from tests.zimage_engine.tiny_models.lora import write_lora
from zimage_engine.engine import Engine
from zimage_engine.errors import InvalidRequest
from zimage_engine.families import FAMILIES, family_named
from zimage_engine.loading.lora_weight import LoraWeight
from zimage_engine.memory.footprint import footprint_of_pipeline, published_footprint
from zimage_engine.memory.planner import PlanOptions, all_options, plan_offload
from zimage_engine.memory.quantize import STORED, check_quantisation, quiet_torchao, refusal
from zimage_engine.memory.residency import QUANTISATIONS, Footprint, MemoryWishes, Residency
from zimage_engine.memory.strategies import AppliedOffload, apply
from zimage_engine.memory.streaming import tensors_of
from zimage_engine.sampling.float32 import wide

#: Ways of moving weights that quantised ones bear.
WAYS = [way for way in Residency if way is not Residency.SEQUENTIAL]
every_word = pytest.mark.parametrize("word", WORDS)


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
    assert set(STORED) == set(QUANTISATIONS)


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
    """What a layer's call allocates; the answer for one row is next to nothing."""
    copies = _working_bytes(word, rows=1, values_in=1024, values_out=4096) / (2 * 1024 * 4096)
    counted = QUANTISATIONS[word].working_copies
    # Multiplying in int8 takes a copy on a card alone.
    assert copies <= counted if word == "int8-dynamic" else copies == pytest.approx(counted, abs=0.02)


@pytest.mark.parametrize("word", [pytest.param("int8-dynamic", marks=needs_int8), "fp8-dynamic"])
@pytest.mark.parametrize("shape", [(64, 1024), (1024, 64), (1024, 1024), (2048, 512)])
def test_what_narrowing_a_token_takes_is_what_the_planner_counts(word: str, shape: tuple[int, int]) -> None:
    """Never under it, and not far over it: a card takes more in int8 than a processor does. The scales of a
    token take a few bytes."""
    rows = 4096
    made = _working_bytes(word, rows=rows, values_in=shape[1], values_out=shape[0]) / rows
    counted = QUANTISATIONS[word].token_bytes([shape])
    assert made - 256 <= counted <= (1.5 if word == "fp8-dynamic" else 2.5) * made


def _working_bytes(word: str, *, rows: int, values_in: int, values_out: int) -> int:
    """What a call allocates at its peak: on this processor, but where that stands in for a card's product
    by widening everything, on tensors without values."""
    from torch.profiler import ProfilerActivity, profile

    layer = _quantised_linear(word, values_in, values_out)
    asked = torch.randn(rows, values_in, dtype=torch.bfloat16)
    if word == "fp8-dynamic":
        _empty(layer)
        counted = LiveBytes()
        asked = asked.to("meta")
        counted.know([*tensors_of((layer,)), asked])
        with torch.no_grad(), counted:
            layer(asked)
        return counted.peak_bytes
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        layer(asked)
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _quantised_linear(word: str, values_in: int, values_out: int, *, bias: bool = False) -> Any:
    layer = torch.nn.Linear(values_in, values_out, bias=bias, dtype=torch.bfloat16)
    layer.weight = torch.nn.Parameter(STORED[word](layer.weight.detach()), requires_grad=False)
    return layer


def _empty(layer: Any) -> None:
    """Puts parts without values in place of those of its weight, as moving puts others in place of them."""
    for name in layer.weight.__tensor_flatten__()[0]:
        setattr(layer.weight, name, getattr(layer.weight, name).to("meta"))


@every_word
def test_a_layer_computes_where_its_parts_were_moved(word: str) -> None:
    """Moving is done to what a weight consists of; the device that the weight itself names is not asked."""
    layer = _quantised_linear(word, 32, 64, bias=True)
    parts = tensors_of((layer,))
    assert len(parts) > 2 and {type(part) for part in parts} <= {torch.Tensor, torch.nn.Parameter}
    # A tensor without values cannot be put in place of one with them, so the weight gets new parts.
    layer.bias = None
    _empty(layer)
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
    "another word": ({"quantize": "int4"}, "must be one of int8, fp8, int8-dynamic, fp8-dynamic, got 'int4'"),
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
    with pytest.raises(InvalidRequest, match="multiplies in int8, and Apple's GPU does not; use int8"):
        check_quantisation("int8-dynamic", "mps")


CARDS: dict[str, tuple[str, tuple[int, int] | None, str, str | None]] = {
    "A100": ("fp8-dynamic", (8, 0), "bfloat16", "compute capability 8.9 or more, got one of 8.0; use fp8,"),
    "RTX 4090": ("fp8-dynamic", (8, 9), "bfloat16", None),
    "H200": ("fp8-dynamic", (9, 0), "bfloat16", None),
    "RTX 5090": ("fp8-dynamic", (12, 0), "bfloat16", None),
    "H200 in float16": ("fp8-dynamic", (9, 0), "float16", "computes in float16; leave out dtype, or use fp8"),
    "another maker's": ("fp8-dynamic", None, "bfloat16", "got another maker's; use fp8,"),
    "V100 in int8": ("int8-dynamic", (7, 0), "bfloat16", "7.5 or more, got one of 7.0; use int8,"),
    "A100 in int8": ("int8-dynamic", (8, 0), "float16", None),
    "V100, widened": ("fp8", (7, 0), "float16", None),
}


@pytest.mark.parametrize(("word", "capability", "dtype", "sentence"), CARDS.values(), ids=CARDS)
def test_a_card_that_does_not_multiply_in_the_small_type_is_told_what_to_use(
    word: str, capability: tuple[int, int] | None, dtype: str, sentence: str | None
) -> None:
    reason = refusal(word, "cuda", capability, getattr(torch, dtype))
    assert reason is None if sentence is None else sentence in str(reason)
    assert refusal(word, "cpu", None, getattr(torch, dtype)) is None


def test_a_processor_without_int8_products_is_told_what_to_use() -> None:
    assert "VNNI or AMX), and this one does not; use int8," in str(
        refusal("int8-dynamic", "cpu", None, has_int8=False)
    )
    for word in ("int8", "fp8", "fp8-dynamic"):
        assert refusal(word, "cpu", None, has_int8=False) is None


@needs_int8
def test_a_fault_in_a_row_stays_in_it_and_is_seen() -> None:
    layer = _quantised_linear("int8-dynamic", 64, 32, bias=True)
    asked = torch.randn(4, 64, dtype=torch.bfloat16)
    asked[1, 3], asked[2, 5] = float("nan"), float("inf")
    with torch.no_grad():
        answer, rows = layer(asked), [layer(row[None])[0] for row in asked]
    assert answer.isfinite().all(dim=1).tolist() == [True, False, False, True]
    assert all(torch.equal(answer[place], rows[place]) for place in (0, 3)), "no row depends on another"


@needs_int8
def test_multiplying_in_int8_on_the_cpu_is_what_torchao_does_but_for_rounding() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    theirs = torch.nn.Linear(320, 96, dtype=torch.bfloat16)
    ours = torch.nn.Linear(320, 96, dtype=torch.bfloat16)
    ours.load_state_dict(theirs.state_dict())
    ours.weight = torch.nn.Parameter(STORED["int8-dynamic"](ours.weight.detach()), requires_grad=False)
    asked = torch.randn(2, 5, 320, dtype=torch.bfloat16)
    asked[0, 0] = 0.0
    with torch.no_grad():
        exact = theirs(asked).float()
        quantize_(theirs, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
        found, wanted = ours(asked), theirs(asked)
    assert (found.shape, found.dtype) == (exact.shape, torch.bfloat16)
    torch.testing.assert_close(found.float(), wanted.float(), atol=0.02, rtol=0.02)
    assert torch.equal(found[0, 0], ours.bias)
    errors = [(each.float() - exact).abs().mean() for each in (found, wanted)]
    assert errors[0] <= 1.05 * errors[1]


def test_a_matrix_that_cards_do_not_multiply_by_is_widened_and_takes_as_much() -> None:
    weight = torch.randn(24, 40, dtype=torch.bfloat16)
    for word, plain in (("int8-dynamic", "int8"), ("fp8-dynamic", "fp8")):
        for odd in (weight[:, :36], weight[:20]):
            stored: Any = STORED[word](odd)
            assert stored.act_quant_kwargs is None
            assert torch.equal(stored.dequantize(), STORED[plain](odd).dequantize())
    narrowing: Any = STORED["int8-dynamic"](weight)
    assert narrowing.act_quant_kwargs is not None


def test_in_float32_arithmetic_no_activation_is_narrowed() -> None:
    """An outlier makes the steps of a narrowed row coarse; the recovery rung must not have them."""
    asked = torch.randn(3, 64)
    asked[:, 0] = 1000.0
    for word in ("int8-dynamic", "fp8-dynamic"):
        layer = _quantised_linear(word, 64, 32, bias=True)
        values = layer.weight.dequantize(torch.float32)
        exact = torch.nn.functional.linear(asked, values, layer.bias.float())
        with torch.no_grad(), wide(layer):
            found = layer(asked)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-3)
        if word == "fp8-dynamic" or HAS_INT8:
            with torch.no_grad():
                narrowed = layer(asked.bfloat16()).float()
            assert (narrowed - exact).abs().max() > 0.05


@pytest.fixture(scope="module", params=WORDS)
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
