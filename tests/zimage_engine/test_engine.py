"""The engine on a real pipeline of tiny models with random weights: it draws noise, but always the same."""

from __future__ import annotations

import json
import operator
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from torch.utils._pytree import tree_map

from tests.zimage_engine.tiny_models import FRAME_TOKENS, NATIVE_SIDE_PX, SIZE_MULTIPLE, TOKENS_PER_SIDE
from zimage_engine import Engine, GenerationRequest, StepProgress
from zimage_engine.engine import DEMO_MODEL_ID
from zimage_engine.errors import (
    CheckpointNotFound,
    DeviceUnavailable,
    GenerationCancelled,
    InvalidRequest,
    InvalidSize,
    OutOfMemory,
)
from zimage_engine.memory.oom import MemoryKeeper
from zimage_engine.memory.residency import MemoryWishes

ASKED = GenerationRequest(prompt="a red circle", seed=11, num_inference_steps=4, enhance=False)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine.load(tiny_model, device="cpu")


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def test_the_model_is_described_from_what_is_in_it(engine: Engine) -> None:
    model = engine.description
    assert (model.id, model.family, model.device, model.dtype) == (
        "tiny-z-image",
        "z-image-turbo",
        "cpu",
        "bfloat16",
    )
    assert (model.native_width, model.native_height) == (NATIVE_SIDE_PX, NATIVE_SIDE_PX)
    assert model.size_multiple == SIZE_MULTIPLE
    assert model.max_side == TOKENS_PER_SIDE * SIZE_MULTIPLE
    assert (model.default_steps, model.default_guidance_scale) == (8, 1.8)
    assert model.token_limit == 512 - FRAME_TOKENS
    assert pickle.loads(pickle.dumps(model)) == model


def test_the_described_tokenizer_counts_as_the_models_own(engine: Engine) -> None:
    from tokenizers import Tokenizer

    engine.generate(ASKED)  # the call leaves padding set in the pipeline's tokenizer
    tokenizer = Tokenizer.from_str(engine.description.tokenizer_json)
    assert len(tokenizer.encode("a red circle").ids) == len("a red circle")


def test_the_status_is_that_of_the_device(engine: Engine) -> None:
    assert engine.device_status().device == "cpu"
    assert engine.device_status().plan is None, "there is nothing to plan"


def test_the_status_of_a_card_tells_the_plan_in_force(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.place()
    monkeypatch.setattr(MemoryKeeper, "has_own_memory", True)
    status = engine.device_status()
    assert status.plan == "all resident"
    assert status.plan_because == engine.memory_report().plan.because  # type: ignore[union-attr]


def test_offload_alone_is_said_without_other_wishes(tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, device="cpu", offload="none")
    plan = engine.memory_report().plan
    assert plan is not None and plan.residency.value == "none"
    assert Engine.load(tiny_model, device="cpu", offload="auto").memory_report().plan == plan
    with pytest.raises(InvalidRequest, match="offload must be one of"):
        Engine.load(tiny_model, device="cpu", offload="gpu")
    with pytest.raises(InvalidRequest, match="shares the host"):
        Engine.load(tiny_model, device="cpu", memory=MemoryWishes(float8=True), offload="stream")


@pytest.mark.parametrize(("guidance_scale", "stock_guidance"), [(1.8, 0.8), (1.0, 0.0), (0.0, 0.0)])
def test_a_picture_is_the_one_that_the_stock_call_draws(
    engine: Engine, guidance_scale: float, stock_guidance: float
) -> None:
    stock = engine.pipeline(
        prompt="a red circle",
        negative_prompt="blue",
        width=64,
        height=96,
        num_inference_steps=4,
        guidance_scale=stock_guidance,
        generator=torch.Generator("cpu").manual_seed(11),
    ).images[0]
    request = replace(ASKED, negative_prompt="blue", width=64, height=96, guidance_scale=guidance_scale)
    (image,) = engine.generate(request).images
    assert image.size == (64, 96)
    assert image.mode == "RGB"
    assert same(image, stock)


def test_each_picture_of_several_is_the_one_that_its_seed_draws_alone(engine: Engine) -> None:
    together = engine.generate(replace(ASKED, n=3))
    assert [picture.seed for picture in together.report.pictures] == [11, 12, 13]
    for picture, image in zip(together.report.pictures, together.images, strict=True):
        (alone,) = engine.generate(replace(ASKED, seed=picture.seed)).images
        assert same(image, alone)
    assert not same(together.images[0], together.images[1])


def test_a_reported_random_seed_draws_the_picture_again(engine: Engine) -> None:
    first = engine.generate(replace(ASKED, seed=None))
    again = engine.generate(replace(ASKED, seed=first.report.pictures[0].seed))
    assert same(first.images[0], again.images[0])


def test_words_guidance_and_steps_change_the_picture(engine: Engine) -> None:
    (image,) = engine.generate(ASKED).images
    for changes in (
        {"prompt": "a blue square"},
        {"guidance_scale": 2.5},
        {"num_inference_steps": 5},
        {"negative_prompt": "grey"},
    ):
        (other,) = engine.generate(replace(ASKED, **changes)).images
        assert not same(image, other), changes


def test_the_report_tells_every_value(engine: Engine) -> None:
    report = engine.generate(replace(ASKED, negative_prompt=" blue ", n=2)).report
    assert (report.model, report.family, report.device) == ("tiny-z-image", "z-image-turbo", "cpu")
    assert (report.dtype, report.scheduler) == ("bfloat16", "FlowMatchEulerDiscreteScheduler")
    assert (report.prompt, report.negative_prompt) == ("a red circle", "blue")
    assert (report.width, report.height, report.num_inference_steps) == (64, 64, 4)
    assert report.guidance_scale == 1.8
    assert report.warnings == ()
    assert json.loads(json.dumps(report.to_dict()))["pictures"][1]["seed"] == 12


def test_the_seconds_of_the_stages_add_up(engine: Engine) -> None:
    report = engine.generate(replace(ASKED, n=2)).report
    first, second = report.pictures
    assert first.encode_seconds > 0.0
    assert second.encode_seconds == 0.0  # the prompts are encoded once
    for picture in report.pictures:
        assert picture.denoise_seconds > 0.0
        assert picture.decode_seconds > 0.0
        stages = picture.encode_seconds + picture.denoise_seconds + picture.decode_seconds
        assert picture.seconds == pytest.approx(stages)
    assert sum(picture.seconds for picture in report.pictures) <= report.seconds


def test_the_time_of_a_step_counts_as_denoising(engine: Engine) -> None:
    import time

    report = engine.generate(ASKED, on_step=lambda progress: time.sleep(0.05 * (progress.step < 4))).report
    assert report.pictures[0].denoise_seconds > 0.15


def test_the_enhancer_is_applied_and_reported(engine: Engine) -> None:
    plain = engine.generate(ASKED)
    enhanced = engine.generate(replace(ASKED, enhance=True))
    report = enhanced.report
    assert report.enhancement.added
    assert report.prompt == report.enhancement.prompt != "a red circle"
    assert report.negative_prompt == report.enhancement.negative_prompt != ""
    assert plain.report.enhancement.added == ()
    assert not same(plain.images[0], enhanced.images[0])


def test_enhanced_prompts_given_as_they_are_draw_the_same(engine: Engine) -> None:
    enhanced = engine.generate(replace(ASKED, enhance=True))
    report = enhanced.report
    finished = replace(ASKED, prompt=report.prompt, negative_prompt=report.negative_prompt, refine=True)
    assert same(enhanced.images[0], engine.generate(finished).images[0])


def test_every_step_of_every_picture_is_told(engine: Engine) -> None:
    told: list[StepProgress] = []
    engine.generate(replace(ASKED, n=2), on_step=told.append)
    assert told == [StepProgress(picture, 2, step, 4) for picture in (1, 2) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("raised", [GenerationCancelled("enough"), KeyboardInterrupt(), ZeroDivisionError()])
def test_what_the_step_callback_raises_comes_out_and_the_engine_goes_on(
    engine: Engine, raised: BaseException
) -> None:
    (before,) = engine.generate(ASKED).images

    def stop(progress: StepProgress) -> None:
        if progress.step == 2:
            raise raised

    with pytest.raises(type(raised)) as caught:
        engine.generate(ASKED, on_step=stop)
    assert caught.value is raised
    assert same(engine.generate(ASKED).images[0], before)


def test_offloaded_models_are_put_back_however_a_drawing_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_back: list[bool] = []
    stock = engine.pipeline.maybe_free_model_hooks
    monkeypatch.setattr(engine.pipeline, "maybe_free_model_hooks", lambda: (put_back.append(True), stock()))

    def stop(progress: StepProgress) -> None:
        raise GenerationCancelled("enough")

    with pytest.raises(GenerationCancelled):
        engine.generate(ASKED, on_step=stop)
    assert put_back


def test_nothing_is_written_to_the_terminal(engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    engine.generate(ASKED)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({"prompt": "x" * (512 - FRAME_TOKENS)}, []),
        ({"prompt": "x" * (513 - FRAME_TOKENS)}, ["prompt_truncated"]),
        ({"negative_prompt": "y" * 600}, ["negative_prompt_truncated"]),
        ({"negative_prompt": "y" * 600, "guidance_scale": 1.0}, []),
        ({"num_inference_steps": 2}, ["num_inference_steps_outside_range"]),
        (
            {"num_inference_steps": 2, "prompt": "x" * 600},
            ["num_inference_steps_outside_range", "prompt_truncated"],
        ),
    ],
)
def test_the_report_warns_of_what_was_drawn_otherwise_than_asked(engine: Engine, changes, codes) -> None:
    warnings = engine.generate(replace(ASKED, **changes)).report.warnings
    assert [notice.code for notice in warnings] == codes


def test_the_truncation_warning_counts_what_was_lost(engine: Engine) -> None:
    (notice,) = engine.generate(replace(ASKED, prompt="x" * 520)).report.warnings
    assert "takes 525 tokens and this model reads 512: the last 13 were left out" in notice.message


def test_the_end_of_a_truncated_prompt_is_really_not_read(engine: Engine) -> None:
    one = engine.generate(replace(ASKED, prompt="x" * 520 + "a"))
    other = engine.generate(replace(ASKED, prompt="x" * 520 + "b"))
    assert same(one.images[0], other.images[0])


def test_a_long_prompt_leaves_no_room_for_the_enhancer(engine: Engine) -> None:
    longest = "x" * engine.description.token_limit
    report = engine.generate(replace(ASKED, prompt=longest, enhance=True)).report
    assert report.enhancement.added == ()
    assert report.warnings == ()


def test_a_black_picture_carries_its_warning(tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, device="cpu")
    with torch.no_grad():
        engine.pipeline.vae.decoder.conv_out.weight.zero_()
        engine.pipeline.vae.decoder.conv_out.bias.fill_(-5.0)
    report = engine.generate(replace(ASKED, n=2)).report
    assert [[notice.code for notice in picture.warnings] for picture in report.pictures] == [
        ["picture_black"]
    ] * 2


@pytest.mark.parametrize(
    ("changes", "error", "parameter"),
    [
        ({"prompt": " "}, InvalidRequest, "prompt"),
        ({"width": 65}, InvalidSize, "width"),
        ({"height": 160}, InvalidSize, "height"),
        ({"n": 0}, InvalidRequest, "n"),
    ],
)
def test_a_wrong_request_is_refused_before_the_first_step(engine: Engine, changes, error, parameter) -> None:
    told: list[StepProgress] = []
    with pytest.raises(error) as raised:
        engine.generate(replace(ASKED, **changes), on_step=told.append)
    assert raised.value.parameter == parameter
    assert told == []


def test_every_size_of_the_grid_draws(engine: Engine) -> None:
    for width in (32, 96, 128):
        for height in (32, 128):
            (image,) = engine.generate(replace(ASKED, width=width, height=height)).images
            assert image.size == (width, height)


def test_a_device_that_is_not_there_is_told_before_loading() -> None:
    with pytest.raises(DeviceUnavailable, match="device 'tpu' is not available here"):
        Engine.load("/nowhere", device="tpu")


def test_a_model_that_is_not_there_is_told() -> None:
    with pytest.raises(CheckpointNotFound):
        Engine.load("/nowhere", device="cpu")


def test_a_long_prompt_is_told_by_the_report_alone(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.generate(replace(ASKED, prompt="x" * 2000))
    assert caplog.records == []


def test_the_demo_model_is_the_default() -> None:
    engine = Engine.load(device="cpu")
    model = engine.description
    assert (model.id, model.family) == (DEMO_MODEL_ID, "z-image-turbo")
    assert (model.native_width, model.native_height, model.size_multiple) == (256, 256, 32)
    result = engine.generate(GenerationRequest(prompt="a red circle on a white background", seed=1))
    assert result.images[0].size == (256, 256)
    assert (result.report.num_inference_steps, result.report.guidance_scale) == (8, 1.8)


def test_a_model_with_fewer_positions_reads_shorter_prompts(copy_of_tiny_model) -> None:
    folder = copy_of_tiny_model()
    for path, changes in (
        (folder / "tokenizer" / "tokenizer_config.json", {"model_max_length": 80}),
        (folder / "text_encoder" / "config.json", {"max_position_embeddings": 64}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    engine = Engine.load(folder, device="cpu")
    assert engine.description.token_limit == 64 - FRAME_TOKENS
    (notice,) = engine.generate(replace(ASKED, prompt="x" * 60)).report.warnings
    assert "takes 65 tokens and this model reads 64" in notice.message


def test_a_picture_that_only_looks_wrong_is_kept_where_float32_fails(tiny_model: Path) -> None:
    """A black picture is drawn again, and that drawing breaks down."""
    engine = Engine.load(tiny_model, device="cpu")
    calls = 0

    def breaks_down(_module: Any, _inputs: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return tree_map(lambda value: value * float("nan"), output) if calls > 4 else output

    engine.pipeline.vae.decoder.register_forward_hook(lambda _module, _inputs, output: output * 0 - 1)
    expected = engine.generate(ASKED)
    assert expected.report.pictures[0].guard.trips[-1].stage == "picture"
    hook = engine.pipeline.transformer.register_forward_hook(breaks_down)
    kept = engine.generate(ASKED)
    hook.remove()
    undisturbed = engine.generate(ASKED)
    assert same(kept.images[0], undisturbed.images[0])
    trips = kept.report.pictures[0].guard.trips
    assert [trip.stage for trip in trips] == ["denoise", "picture"]
    assert trips[-1].attempts[0].outcome == "failed" and "nothing helped" in trips[-1].attempts[0].because
    assert "guard_recovered" not in {notice.code for notice in kept.report.pictures[0].warnings}


@pytest.mark.parametrize("place", ["text_encoder", "transformer", "vae.decoder"])
def test_an_out_of_memory_is_met_and_told_and_leaves_nothing_behind(tiny_model: Path, place: str) -> None:
    engine = Engine.load(tiny_model, device="cpu", embedding_cache_bytes=0)  # so that each request encodes
    expected = engine.generate(ASKED)
    module = operator.attrgetter(place)(engine.pipeline)
    left = 1

    def runs_out(*_: Any) -> None:
        nonlocal left
        if left:
            left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    steps: list[int] = []
    hook = module.register_forward_pre_hook(runs_out)
    try:
        met = engine.generate(ASKED, on_step=lambda progress: steps.append(progress.step))
        assert met.report.memory is not None and met.report.memory.oom_recoveries == ("freed",)
        assert same(met.images[0], expected.images[0])
        assert steps == [1, 2, 3, 4]
        left = 1000
        with pytest.raises(OutOfMemory, match="ran out of memory"):
            engine.generate(ASKED)
    finally:
        hook.remove()
    after = engine.generate(ASKED)
    assert same(after.images[0], expected.images[0])
    assert after.report.memory is not None and after.report.memory.oom_recoveries == ()


def test_wishes_about_memory_are_checked_and_told(tiny_model: Path) -> None:
    with pytest.raises(InvalidRequest, match="offload must be one of none, model, stream"):
        MemoryWishes(offload="everything")
    for in_vain in (MemoryWishes(vram_bytes=2**30), MemoryWishes(offload="stream")):
        with pytest.raises(InvalidRequest, match="leave it out"):
            Engine.load(tiny_model, device="cpu", memory=in_vain)
    engine = Engine.load(tiny_model, device="cpu", memory=MemoryWishes(offload="none"))
    use = engine.generate(ASKED).report.memory
    assert use is not None
    assert (use.offload, use.predicted_peak_bytes) == ("none", None)
    assert "share the host's memory" in use.plan
