"""One picture as the page sees it: which moments come, in which order, and how a failure is told."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from serve_app.error_mapping import ModelNotReady, WorkerLost
from serve_app.logs import context_of_request, request_id
from serve_app.queueing import Place, QueueFull
from serve_app.ui import drawing
from serve_app.ui.drawing import (
    Asked,
    ControlUnreadable,
    Drawn,
    Moment,
    Refused,
    Started,
    Stepped,
    Waiting,
    WaitingForModel,
    draw,
    request_from,
)
from serve_app.worker_reply import Preview, WorkerReply
from tests.serve_app.ui.painting_service import MODEL, PaintingService
from zimage_engine.errors import GenerationCancelled
from zimage_engine.types import StepProgress

ASKED = Asked(
    prompt="a red circle",
    negative_prompt="",
    enhance=True,
    refine=True,
    size="256x256",
    steps=4,
    guidance_scale=1.8,
    seed="7",
    language="en",
)


async def moments(service: PaintingService, asked: Asked) -> list[Moment]:
    return [moment async for moment in draw(service, asked)]


async def test_every_step_is_told_in_order_and_then_the_picture() -> None:
    service = PaintingService()
    told = await moments(service, ASKED)
    assert told[0] == Started()
    steps = [moment for moment in told if isinstance(moment, Stepped)]
    assert [moment.progress for moment in steps] == [StepProgress(1, 1, step, 4) for step in (1, 2, 3, 4)]
    assert steps[0].seconds_left is None and steps[-1].seconds_left == 0
    assert told[-1] == Drawn(service.replies[0].pictures, service.replies[0].report)


async def test_every_step_but_the_last_shows_what_is_forming() -> None:
    told = await moments(PaintingService(step_seconds=0.01), ASKED)
    previews = [moment for moment in told if isinstance(moment, Preview)]
    assert [preview.progress.step for preview in previews] == [1, 2, 3]
    assert len({preview.file for preview in previews}) == 3


async def test_who_listens_slowly_hears_every_step_and_the_newest_preview_alone() -> None:
    told: list[Moment] = []
    async with aclosing(draw(PaintingService(), ASKED)) as moments:
        async for moment in moments:
            told.append(moment)
            await asyncio.sleep(0.05)
    assert [moment.progress.step for moment in told if isinstance(moment, Stepped)] == [1, 2, 3, 4]
    assert [moment.progress.step for moment in told if isinstance(moment, Preview)] == [3]


def test_the_time_left_is_that_of_all_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 102.0, 104.0, 105.0))
    monkeypatch.setattr(drawing, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    pace = drawing._Pace()
    ended = ((1, 1), (1, 2), (2, 1))
    told = [pace.seconds_left(StepProgress(picture, 2, step, 3)) for picture, step in ended]
    assert told == [None, 2.0 * 4, 4 / 3 * 2]
    # The first picture once more, on another worker: what was known of the pace is of no use.
    assert pace.seconds_left(StepProgress(1, 2, 1, 3)) is None


async def test_steps_are_told_while_the_drawing_goes_on() -> None:
    service = PaintingService(step_seconds=0.02)
    async with aclosing(draw(service, ASKED)) as told:
        async for moment in told:
            if isinstance(moment, Stepped) and moment.progress.step == 2:
                assert not service.replies
                break
        else:
            pytest.fail("no second step was told")


async def test_whoever_stops_listening_cancels_the_drawing() -> None:
    service = PaintingService(step_seconds=0.02)
    async with aclosing(draw(service, ASKED)) as told:
        async for moment in told:
            if isinstance(moment, Stepped):
                break
    await asyncio.sleep(0.05)
    assert service.cancelled == 1
    assert not service.replies


async def test_a_request_made_while_the_model_loads_waits_and_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drawing, "READY_POLL_SECONDS", 0.01)
    service = PaintingService(loaded=False)

    async def load() -> None:
        await asyncio.sleep(0.03)
        service.loaded = True

    loading = asyncio.create_task(load())
    told = await moments(service, ASKED)
    await loading
    assert told[:2] == [WaitingForModel(), Started()]
    assert isinstance(told[-1], Drawn)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"prompt": "  a tree \n"}, "prompt", "a tree"),
        ({"negative_prompt": " "}, "negative_prompt", None),
        ({"negative_prompt": "blur"}, "negative_prompt", "blur"),
        ({"enhance": False}, "enhance", False),
        ({"size": "320 × 224"}, "width", 320),
        ({"size": "320 × 224"}, "height", 224),
        ({"size": ""}, "width", None),
        ({"seed": " 42 "}, "seed", 42),
        ({"seed": ""}, "seed", None),
        ({"steps": 12.0}, "num_inference_steps", 12),
        ({"guidance_scale": 1.7000000000000002}, "guidance_scale", 1.7),
    ],
)
def test_controls_become_the_request(changes: dict[str, object], field: str, value: object) -> None:
    request = request_from(replace(ASKED, **changes), MODEL)
    assert getattr(request, field) == value
    assert type(getattr(request, field)) is type(value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": " \n"}, "Write in a few words"),
        ({"prompt": "", "language": "zh"}, "请先用几个词"),
        ({"seed": "seven"}, "whole number, or empty for a new one; it was “seven”"),
        ({"seed": "1.5"}, "whole number"),
        ({"seed": "9" * 5000}, "whole number"),
        ({"size": "large"}, "such as 256x256; it was “large”"),
        ({"size": "256"}, "width x height"),
        ({"size": "大", "language": "zh"}, "例如 256x256；现在是“大”"),
    ],
)
async def test_what_cannot_be_read_is_told_and_nothing_is_drawn(
    changes: dict[str, object], words: str
) -> None:
    asked = replace(ASKED, **changes)
    with pytest.raises(ControlUnreadable, match=words):
        request_from(asked, MODEL)
    service = PaintingService()
    told = await moments(service, asked)
    assert isinstance(told[-1], Refused)
    assert told[-1].theirs
    assert words in told[-1].sentences[0]
    assert not service.requests


async def test_the_engines_own_refusal_reaches_the_page_word_for_word() -> None:
    told = await moments(PaintingService(), replace(ASKED, size="300x256"))
    assert isinstance(told[-1], Refused)
    assert told[-1].theirs
    assert "width must be a multiple of 32, got 300" in told[-1].sentences[0]


async def test_readers_of_chinese_get_the_meaning_first_and_the_numbers_after() -> None:
    told = await moments(PaintingService(), replace(ASKED, size="300x256", language="zh"))
    assert isinstance(told[-1], Refused)
    assert told[-1].sentences[0] == "有一项设置无法使用："
    assert "300" in told[-1].sentences[1]


@pytest.mark.parametrize(
    ("failure", "english", "chinese"),
    [
        (QueueFull("The queue is full (64 requests wait).", {}), "The queue is full", "排队"),
        (ModelNotReady("No worker has its model yet."), "No worker has its model yet.", "还没有准备好"),
        (WorkerLost("The worker died."), "The worker died.", "意外停止"),
        (RayActorError(), "worker that drew this picture stopped", "意外停止"),
        (GenerationCancelled(), "stopped before it was done", "被停止"),
        (RuntimeError("cuda kernel trace with secrets"), "the fault is its own", "提示词没有问题"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_a_failure_on_the_way_is_told_in_plain_words(
    failure: Exception, english: str, chinese: str
) -> None:
    for language, words in (("en", english), ("zh", chinese)):
        told = await moments(PaintingService(fails_with=failure), replace(ASKED, language=language))
        assert isinstance(told[-1], Refused)
        assert not told[-1].theirs
        assert words in told[-1].sentences[0]
        assert "secrets" not in " ".join(told[-1].sentences)


async def test_the_place_in_the_queue_is_told_before_the_first_step() -> None:
    told = await moments(PaintingService(place=Place(3, 12.4)), ASKED)
    assert told[:2] == [Started(), Waiting(3, 12.4)] and isinstance(told[2], Stepped)


async def test_the_log_tells_the_request_that_asked_and_no_other() -> None:
    """The page's drawings run in tasks that some request began, and seldom the one that asks."""
    seen: list[str] = []

    class Listening(PaintingService):
        async def generate(self, *arguments: Any, **named: Any) -> WorkerReply:
            seen.append(request_id())
            return await super().generate(*arguments, **named)

    async def drawn() -> None:
        for id in ("the-one-that-asks", ""):
            assert [moment async for moment in draw(Listening(), ASKED, "ann", id)]

    await asyncio.create_task(drawn(), context=context_of_request("the-first-one"))
    assert seen == ["the-one-that-asks", ""]


async def test_the_service_hears_who_asks() -> None:
    service = PaintingService()
    assert [moment async for moment in draw(service, ASKED, "ann")] and service.callers == ["ann"]


@pytest.mark.parametrize("enhance", [True, False])
@pytest.mark.parametrize("refine", [True, False])
def test_refining_is_a_switch_of_its_own(enhance: bool, refine: bool) -> None:
    """What a receipt puts back into the controls has its prompt enhanced already, and is refined."""
    request = request_from(replace(ASKED, enhance=enhance, refine=refine), MODEL)
    assert (request.enhance, request.refine) == (enhance, refine)


@pytest.mark.parametrize(
    ("more", "exact"), [("{}", False), ('{"exact": null}', False), ('{"exact": true}', True)]
)
def test_a_picture_that_was_drawn_exactly_is_asked_for_so_again(more: str, exact: bool) -> None:
    assert request_from(replace(ASKED, more=more), MODEL).exact is exact
