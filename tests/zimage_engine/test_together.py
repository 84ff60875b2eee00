"""Drawings that share the denoiser's forward passes: each comes out as alone, whatever the others do."""

from __future__ import annotations

import contextvars
import os
import random
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.zimage_engine.tiny_models.lora import write_lora
from tests.zimage_engine.tiny_models.pixart import write_tiny_pixart
from tests.zimage_engine.tiny_models.sdxl import write_tiny_sdxl
from zimage_engine import Engine
from zimage_engine.engine import DEMO_MODEL_PATH
from zimage_engine.errors import DeadlineExceeded, GenerationCancelled, GuardExhausted, InvalidRequest
from zimage_engine.sampling.control import DrawingControl
from zimage_engine.sampling.plan import most_of_size
from zimage_engine.speed.levers import size_bucket
from zimage_engine.together import Asked, Together
from zimage_engine.types import (
    GenerationRequest,
    GenerationResult,
    LoraChoice,
    SourcePicture,
    StepProgress,
)

PROMPTS = (
    "a red circle on a white background",
    "夜晚的大海，月亮和白色的小船",
    "a blue square and a yellow star, two green triangles, a small house under a tree by day with mountains",
    "two green triangles",
)
SIDE = 128


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(None, "cpu", dtype="bfloat16")


def requests(count: int, **fields: object) -> list[GenerationRequest]:
    base = GenerationRequest(prompt="", width=SIDE, height=SIDE, num_inference_steps=4, refine=False)
    base = replace(base, **fields)  # type: ignore[arg-type]
    return [replace(base, prompt=PROMPTS[index % len(PROMPTS)], seed=index) for index in range(count)]


def alike(count: int) -> list[GenerationRequest]:
    """Requests whose prompts are of one length, so that all of them share each pass."""
    return [replace(each, prompt=PROMPTS[0]) for each in requests(count, guidance_scale=1.0)]


class Company:
    """Runs requests together, some from the beginning and the others as steps go by; keeps each one's end."""

    def __init__(
        self,
        engine: Engine,
        wanted: Sequence[GenerationRequest],
        at_once: int,
        most: int = 8,
        exact: bool = True,
    ) -> None:
        self.ends: dict[int, GenerationResult | BaseException] = {}
        self.controls = [DrawingControl() for _ in wanted]
        self.steps: list[tuple[int, int]] = []
        self.together = Together(engine, most, {} if exact else None)
        self._engine = engine
        self._waiting = deque(self._asked(index, each) for index, each in enumerate(wanted))
        self._at_once = at_once

    def _asked(self, index: int, request: GenerationRequest) -> Asked:
        def ended(end: GenerationResult | BaseException) -> None:
            assert index not in self.ends
            self.ends[index] = end

        return Asked(request, self.controls[index], ended, contextvars.copy_context())

    def _newcomers(self) -> list[Asked]:
        return [self._waiting.popleft() for _ in range(min(self._at_once, len(self._waiting)))]

    def run(self) -> list[GenerationResult | BaseException]:
        self.together.run(self._waiting.popleft(), self._newcomers)
        return [self.ends[index] for index in sorted(self.ends)]


def pixels(end: GenerationResult | BaseException) -> list[bytes]:
    if isinstance(end, BaseException):
        raise end
    return [image.tobytes() for image in end.images]


@pytest.mark.parametrize("at_once", [8, 1], ids=["all come at once", "one comes at each step"])
@pytest.mark.parametrize("guidance", [1.0, 1.8])
def test_pictures_are_those_that_are_drawn_alone(engine: Engine, guidance: float, at_once: int) -> None:
    wanted = requests(6, guidance_scale=guidance, enhance=True)
    alone = [pixels(engine.generate(request)) for request in wanted]
    company = Company(engine, wanted, at_once)
    company.run()
    again = Company(engine, wanted, at_once)
    # What came out otherwise in a shared pass the first time would not be shared any more.
    again.together._verdicts = company.together._verdicts
    again.run()
    for each in (company, again):
        assert [pixels(each.ends[index]) for index in range(6)] == alone
    shared = again.together.shared
    assert shared.largest >= 2
    assert shared.passes < shared.calls == 6 * 4
    reports = [end.report for end in again.ends.values() if isinstance(end, GenerationResult)]
    assert sum(report.sharing > 1 for report in reports) >= 2


def test_no_one_beside_is_no_one_beside(engine: Engine) -> None:
    (request,) = requests(1)
    (end,) = Company(engine, [request], 1).run()
    assert isinstance(end, GenerationResult)
    assert end.report.sharing == 1.0
    assert pixels(end) == pixels(engine.generate(request))


def test_one_that_is_cancelled_or_late_or_wrong_leaves_the_others_alone(engine: Engine) -> None:
    wanted = requests(5)
    wanted[2] = replace(wanted[2], num_inference_steps=4, loras=None)
    company = Company(engine, wanted, 8)

    def cancel(progress: StepProgress) -> None:
        if progress.step == 2:
            company.controls[1].cancel()

    company.controls[0]._on_step = cancel
    company.controls[3] = DrawingControl(deadline_seconds=0.0)
    company._waiting[3] = replace(company._waiting[3], control=company.controls[3])
    company._waiting[4] = replace(company._waiting[4], request=replace(wanted[4], num_inference_steps=0))
    company.run()
    assert isinstance(company.ends[1], GenerationCancelled)
    assert not isinstance(company.ends[1], DeadlineExceeded)
    assert isinstance(company.ends[3], DeadlineExceeded)
    assert isinstance(company.ends[4], InvalidRequest)
    for index in (0, 2):
        assert pixels(company.ends[index]) == pixels(engine.generate(wanted[index]))


@pytest.fixture
def poison(engine: Engine) -> Iterator[list[int]]:
    """The denoiser's passes, by their number, whose first answer has a value that is not finite."""
    denoiser = engine.pipeline.transformer
    numbers: list[int] = []
    made = 0

    def spoil(_module: torch.nn.Module, _args: object, output: tuple[list[torch.Tensor]]) -> object:
        nonlocal made
        made += 1
        if made not in numbers:
            return output
        first, *others = output[0]
        return ([torch.full_like(first, float("nan")), *others],)

    handle = denoiser.register_forward_hook(spoil)
    yield numbers
    handle.remove()


def test_a_bad_value_of_one_is_recovered_from_alone(engine: Engine, poison: list[int]) -> None:
    wanted = alike(3)
    alone = [pixels(engine.generate(request)) for request in wanted]
    company = Company(engine, wanted, 8, exact=False)
    poison.append(3 * 4 + 2)  # the second pass that is shared
    company.run()
    assert [pixels(company.ends[index]) for index in range(3)] == alone
    trips = [
        len(end.report.pictures[0].guard.trips)
        for end in (company.ends[index] for index in range(3))
        if isinstance(end, GenerationResult)
    ]
    assert trips == [1, 0, 0]


def test_a_pass_that_fails_for_several_is_made_for_each(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = alike(3)
    alone = [pixels(engine.generate(request)) for request in wanted]
    stock = engine.pipeline.transformer.forward

    def forward(latents: list[torch.Tensor], *args: object, **kwargs: object) -> object:
        if len(latents) == 3:
            raise RuntimeError("no kernel for so many")
        return stock(latents, *args, **kwargs)

    monkeypatch.setattr(engine.pipeline.transformer, "forward", forward)
    company = Company(engine, wanted, 8, exact=False)
    company.run()
    assert [pixels(company.ends[index]) for index in range(3)] == alone
    # Once: such a pass is not tried again.
    assert company.together.shared.done_again == 1


def test_who_runs_out_of_memory_beside_others_is_drawn_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = requests(3)
    alone = [pixels(engine.generate(request)) for request in wanted]
    stock, is_in_company = type(engine.pipeline.vae).decode, True

    def decode(vae: torch.nn.Module, *args: object, **kwargs: object) -> object:
        if is_in_company and vae is not engine.pipeline.vae:
            raise torch.OutOfMemoryError("out of memory")
        return stock(vae, *args, **kwargs)

    monkeypatch.setattr(type(engine.pipeline.vae), "decode", decode)
    company = Company(engine, wanted, 8)
    company.run()
    assert [pixels(company.ends[index]) for index in range(3)] == alone


def test_passes_that_come_out_otherwise_are_not_shared(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = alike(3)
    alone = [pixels(engine.generate(request)) for request in wanted]
    stock = engine.pipeline.transformer.forward

    def forward(latents: list[torch.Tensor], *args: object, **kwargs: object) -> object:
        (drawn,) = stock(latents, *args, **kwargs)
        return ([each * (1 + 2**-7 * (len(latents) > 1)) for each in drawn],)

    monkeypatch.setattr(engine.pipeline.transformer, "forward", forward)
    company = Company(engine, wanted, 8)
    company.run()
    assert [pixels(company.ends[index]) for index in range(3)] == alone
    assert company.together.shared.largest == 1


def test_who_may_join(engine: Engine) -> None:
    first, other = requests(2)
    together = Together(engine, 8, None)
    assert together.may_join(first, other)
    assert together.may_join(first, replace(other, num_inference_steps=9, guidance_scale=1.0))
    assert not together.may_join(first, replace(other, width=256))
    assert not together.may_join(first, replace(other, num_inference_steps=0))
    assert not together.may_join(first, replace(other, exact=True))
    written_for = replace(other, enhance=True, enhancer="model")
    assert not together.may_join(first, written_for)
    assert not together.may_join(written_for, first)
    assert not Together(engine, 1, None).may_join(first, other)
    large = [replace(each, width=1024, height=1024) for each in (first, other)]
    assert not together.may_join(*large)
    assert most_of_size(512, 512, 8) == 4
    assert most_of_size(2048, 2048, 8) == 1


def test_float32_on_a_cpu_is_drawn_alone() -> None:
    engine = Engine.load(None, "cpu", dtype="float32")
    assert not Together(engine, 8, None).may_join(*requests(2))


def test_an_exhausted_guard_ends_one_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = requests(3, guidance_scale=1.0)
    alone = [pixels(engine.generate(request)) for request in wanted]
    stock = engine.pipeline.transformer.forward
    spoilt: list[torch.Tensor] = []

    def forward(latents: list[torch.Tensor], times: object, prompts: list[torch.Tensor], **kw: object) -> Any:
        (drawn,) = stock(latents, times, prompts, **kw)
        if not spoilt:
            spoilt.append(prompts[1])
        is_its = [prompt.shape == spoilt[0].shape and bool((prompt == spoilt[0]).all()) for prompt in prompts]
        return ([each * float("nan") if its else each for each, its in zip(drawn, is_its, strict=True)],)

    monkeypatch.setattr(engine.pipeline.transformer, "forward", forward)
    company = Company(engine, wanted, 8, exact=False)
    company.run()
    assert isinstance(company.ends[1], GuardExhausted)
    assert pixels(company.ends[0]) == alone[0]
    assert pixels(company.ends[2]) == alone[2]


def several(n: int, **fields: object) -> GenerationRequest:
    (request,) = requests(1, guidance_scale=1.0, **fields)
    return replace(request, n=n, seed=5, prompt=PROMPTS[0])


def test_the_pictures_of_one_request_share_passes(engine: Engine) -> None:
    wanted = [several(5, refine=True), replace(several(2), seed=40)]
    alone = [engine.generate(each) for each in wanted]
    company = Company(engine, wanted, 8)
    told: list[StepProgress] = []
    company.controls[0]._on_step = told.append
    ends = company.run()
    assert [pixels(end) for end in ends] == [pixels(each) for each in alone]
    assert company.together.shared.largest == 7
    # Compared with passes alone in the first step, shared in the other three.
    assert company.together.shared.passes == 7 + 3
    for end, one in zip(ends, alone, strict=True):
        assert isinstance(end, GenerationResult)
        assert [each.seed for each in end.report.pictures] == [each.seed for each in one.report.pictures]
        assert end.report.prompt_cache is not None
        assert end.report.prompt_cache.hits + end.report.prompt_cache.misses == 1
        assert end.report.device_seconds is not None
        assert end.report.device_seconds < end.report.seconds
    assert [each.steps_ended for each in told] == list(range(1, 21))
    assert [each.picture for each in told] == [1, 2, 3, 4, 5] * 4
    for picture in range(1, 6):
        assert [each.step for each in told if each.picture == picture] == [1, 2, 3, 4]


def test_no_more_pictures_of_one_request_are_begun_than_share_a_pass(engine: Engine) -> None:
    wanted = several(5)
    company = Company(engine, [wanted], 1, most=2)
    told: list[StepProgress] = []
    company.controls[0]._on_step = told.append
    (end,) = company.run()
    assert pixels(end) == pixels(engine.generate(wanted))
    assert [each.picture for each in told] == [1, 2] * 4 + [3, 4] * 4 + [5] * 4


@pytest.mark.parametrize("most", [8, 2])
def test_one_picture_that_fails_ends_its_request_and_no_other(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    wanted = [several(3), replace(several(1), seed=40)]
    alone = pixels(engine.generate(wanted[1]))
    stock = type(engine.pipeline.vae).decode
    decoded = 0

    def decode(vae: torch.nn.Module, *args: object, **kwargs: object) -> object:
        nonlocal decoded
        decoded += 1
        if decoded == 2:
            raise ValueError("no second one")
        return stock(vae, *args, **kwargs)

    monkeypatch.setattr(type(engine.pipeline.vae), "decode", decode)
    company = Company(engine, wanted, 8, most=most)
    company.run()
    assert isinstance(company.ends[0], ValueError)
    assert pixels(company.ends[1]) == alone


def test_cancelling_a_request_ends_all_of_its_pictures(engine: Engine) -> None:
    wanted = [several(3), replace(several(1), seed=40)]
    company = Company(engine, wanted, 8)
    told: list[StepProgress] = []

    def stepped(progress: StepProgress) -> None:
        told.append(progress)
        if len(told) == 4:
            company.controls[0].cancel()

    company.controls[0]._on_step = stepped
    company.run()
    assert isinstance(company.ends[0], GenerationCancelled)
    assert len(told) == 4
    assert pixels(company.ends[1]) == pixels(engine.generate(wanted[1]))


def test_previews_are_of_the_picture_whose_step_has_ended(engine: Engine) -> None:
    wanted = several(3)
    shown: dict[bool, dict[tuple[int, int], bytes]] = {}
    for is_together in (False, True):
        company = Company(engine, [wanted], 1)
        seen = shown[is_together] = {}

        def begins(
            drawing: Engine,
            control: DrawingControl = company.controls[0],
            seen: dict[tuple[int, int], bytes] = seen,
        ) -> None:
            def look(progress: StepProgress, latents: torch.Tensor) -> None:
                image = drawing.preview(latents)
                assert image is not None
                seen[progress.picture, progress.step] = image.tobytes()

            control.show(look)

        if is_together:
            company._waiting[0] = replace(company._waiting[0], begins=begins)
            company.run()
        else:
            begins(engine)
            engine.generate(wanted, control=company.controls[0])
    assert len(shown[True]) == 12
    assert shown[True] == shown[False]


def test_several_that_run_out_of_memory_beside_each_other_are_drawn_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = several(3)
    alone = pixels(engine.generate(wanted))
    stock = type(engine.pipeline.vae).decode

    def decode(vae: torch.nn.Module, *args: object, **kwargs: object) -> object:
        if vae is not engine.pipeline.vae:
            raise torch.OutOfMemoryError("out of memory")
        return stock(vae, *args, **kwargs)

    monkeypatch.setattr(type(engine.pipeline.vae), "decode", decode)
    (end,) = Company(engine, [wanted], 1).run()
    assert pixels(end) == alone


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_several_that_are_drawn_from_a_picture_share_passes_too(engine: Engine, masked: bool) -> None:
    rgb = numpy.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), numpy.uint8)
    mask = numpy.zeros((SIDE, SIDE), numpy.uint8)
    mask[: SIDE // 2] = 255
    source = SourcePicture(SIDE, SIDE, rgb.tobytes(), mask.tobytes() if masked else None)
    wanted = several(3, image=source, strength=0.6)
    company = Company(engine, [wanted], 1)
    (end,) = company.run()
    assert pixels(end) == pixels(engine.generate(wanted))
    assert company.together.shared.largest == 3


def test_loras_are_those_of_the_first_and_a_file_that_was_exchanged_is_drawn_alone(tmp_path: Path) -> None:
    style = write_lora(DEMO_MODEL_PATH, tmp_path / "loras" / "style.safetensors", seed=1)
    other = write_lora(DEMO_MODEL_PATH, tmp_path / "other.safetensors", seed=2)
    engine = Engine.load(None, "cpu", dtype="bfloat16", lora_folder=style.parent, exact=True)
    wanted = [replace(each, loras=(LoraChoice("style"),)) for each in alike(4)]
    plain = replace(wanted[0], loras=None)
    before = [pixels(engine.generate(each)) for each in wanted]
    company = Company(engine, wanted, 1)
    together = company.together
    assert together.may_join(wanted[0], wanted[1])
    assert not together.may_join(wanted[0], plain)
    come = company._newcomers

    def newcomers() -> list[Asked]:
        if len(company._waiting) == 1:
            other.replace(style)
            os.utime(style, (1, 1))
        return come()

    together.run(company._waiting.popleft(), newcomers)
    after = pixels(engine.generate(wanted[3]))
    assert after != before[3]
    assert [pixels(company.ends[index]) for index in range(4)] == [*before[:3], after]
    assert together.shared.largest == 3
    # One LoRA lies idle then, which is no reason not to draw without.
    (end,) = Company(engine, [plain], 1).run()
    assert pixels(end) == pixels(engine.generate(plain))
    style.unlink()
    assert together.may_join(wanted[0], wanted[1]), "files are for the thread that draws"
    (end,) = Company(engine, wanted[:1], 1).run()
    assert isinstance(end, InvalidRequest)


def test_levers_act_in_passes_and_are_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    acting: list[tuple[str, ...]] = []
    stock = engine.levers.during_passes

    def during_passes(names: Collection[str], may_compile: bool = False) -> Any:
        acting.append(tuple(names))
        return stock(names, may_compile)

    wanted = alike(3)
    engine.levers.choose({size_bucket(SIDE, SIDE): ("channels_last_vae",)})
    try:
        alone = [engine.generate(each) for each in wanted]
        monkeypatch.setattr(engine.levers, "during_passes", during_passes)
        company = Company(engine, wanted, 8)
        ends = company.run()
        exact = Company(engine, [replace(wanted[0], exact=True)], 1).run()
    finally:
        engine.levers.choose({})
    assert [pixels(end) for end in ends] == [pixels(each) for each in alone]
    for end in ends:
        assert isinstance(end, GenerationResult)
        assert end.report.accelerated_by == ("channels_last_vae",)
    assert isinstance(exact[0], GenerationResult)
    assert exact[0].report.accelerated_by == ()
    assert pixels(exact[0]) == pixels(engine.generate(wanted[0]))
    assert acting.count(("channels_last_vae",)) >= 4 + 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


FAMILIES = {
    "sdxl": write_tiny_sdxl,
    "sdxl-turbo": partial(write_tiny_sdxl, turbo=True),
    "sdxl-lcm": partial(write_tiny_sdxl, lcm=True),
    "pixart-alpha-512": write_tiny_pixart,
    "pixart-alpha-1024": partial(write_tiny_pixart, kind="alpha-1024"),
    "pixart-sigma": partial(write_tiny_pixart, kind="sigma"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_share_passes_too(family: str, folders: Path) -> None:
    engine = Engine.load(FAMILIES[family](folders / family), "cpu", dtype="bfloat16", exact=True)
    assert engine.description.family == family
    wanted = [
        replace(
            request,
            prompt=words,
            guidance_scale=guidance,
            num_inference_steps=steps,
            n=n,
            width=64,
            height=64,
            enhance=False,
        )
        for request, words, guidance, steps, n in zip(
            requests(4),
            ("a red circle", "white", "a blue square, two stars and a house", "a red circle"),
            (5.0, 1.0, 5.0, 1.0),
            (3, 3, 2, 3),
            (1, 2, 1, 1),
            strict=True,
        )
    ]
    alone = [pixels(engine.generate(request)) for request in wanted]
    company = Company(engine, wanted, 2)
    assert [pixels(end) for end in company.run()] == alone
    # With no comparing all are shared, and only last bits may differ.
    free = Company(engine, wanted, 4, exact=False)
    ends = free.run()
    assert free.together.shared.largest >= 3
    assert free.together.shared.done_again == 0
    for end, one in zip(ends, alone, strict=True):
        for shared, by_itself in zip(pixels(end), one, strict=True):
            levels = numpy.frombuffer(shared, numpy.uint8).astype(int) - numpy.frombuffer(
                by_itself, numpy.uint8
            )
            assert abs(levels).mean() < 2


def test_random_companies(engine: Engine) -> None:
    rng = random.Random(7)
    wanted = [
        replace(
            request,
            num_inference_steps=rng.choice([1, 2, 3, 5]),
            guidance_scale=rng.choice([1.0, 1.8]),
            enhance=rng.random() < 0.5,
            refine=rng.random() < 0.5,
            n=rng.choice([1, 1, 2]),
        )
        for request in requests(10)
    ]
    company = Company(engine, wanted, 2, most=3)
    company.run()
    for index, request in enumerate(wanted):
        assert pixels(company.ends[index]) == pixels(engine.generate(request))
    assert company.together.shared.largest == 3
