"""The pieces of HTML say what happened, in the words the product promises, and escape what people wrote."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from serve_app.image_codec import ImageEncoding
from serve_app.ui import markup
from serve_app.ui.drawing import Stepped
from serve_app.ui.texts import MESSAGES, Language
from serve_app.worker_reply import Preview
from tests.serve_app.ui.painting_service import CARD, MODEL, PaintingService
from zimage_engine.speed.levers import LEVER_NAMES, LEVERS
from zimage_engine.types import (
    DeviceStatus,
    GenerationReport,
    GenerationRequest,
    GuardAttempt,
    GuardTrace,
    GuardTrip,
    LoraUse,
    Notice,
    PictureReport,
    Rewrite,
    RewriteOutcome,
    StepProgress,
)

HOSTILE = """</p><img src=x onerror="alert('1')"> ${alert(2)} {{3}}"""


async def report_of(**asked: object) -> GenerationReport:
    request = GenerationRequest(**{"prompt": "a tree", "seed": 5, **asked})
    return (await PaintingService().generate(request, ImageEncoding("png"))).report


@pytest.mark.parametrize(
    ("steps", "guidance", "dtype", "badge"),
    [
        (8, 1.8, "bfloat16", "Steps: 8 | CFG: 1.8 | bfloat16"),
        (4, 1.0, "float32", "Steps: 4 | CFG: 1.0 | float32"),
        (20, 5, "torch.bfloat16", "Steps: 20 | CFG: 5.0 | bfloat16"),
    ],
)
def test_the_badge_reads_as_promised(steps: int, guidance: float, dtype: str, badge: str) -> None:
    assert markup.badge_text(steps, guidance, dtype) == badge


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (CARD, "GPU: CUDA OK | VRAM: 5.2/12.0 GB"),
        (DeviceStatus("cuda", "card", 8 * 2**30, 0), "GPU: CUDA OK | VRAM: 0.0/8.0 GB"),
        (DeviceStatus("cuda:1", "card", None, None), "GPU: CUDA OK"),
        (
            replace(CARD, plan="stream: 21 of 30 blocks resident", plan_because="needs 10.75 GiB"),
            "GPU: CUDA OK | VRAM: 5.2/12.0 GB | stream: 21 of 30 blocks resident",
        ),
        (DeviceStatus("mps", "Apple M3", None, None), "MPS"),
        (DeviceStatus("cpu", "a processor", None, None), "CPU"),
        (DeviceStatus("cpu", "a processor", 2**34, 2**30), "CPU"),
    ],
)
def test_the_status_line_reads_as_promised(status: DeviceStatus, line: str) -> None:
    assert markup.status_text(status) == line
    assert (status.plan_because or "") in markup.status_hint(status, MODEL.id)


@pytest.mark.parametrize(
    ("step", "steps", "text", "percent"),
    [
        (1, 8, "Step 1 of 8: outline", 12),
        (4, 8, "Step 4 of 8: outline", 50),
        (5, 8, "Step 5 of 8: detail", 62),
        (8, 8, "Finishing the picture…", 100),
        (1, 1, "Finishing the picture…", 100),
        (2, 3, "Step 2 of 3: detail", 67),
    ],
)
def test_the_bar_shows_how_far_it_is(step: int, steps: int, text: str, percent: int) -> None:
    bar = markup.progress_step(Stepped(StepProgress(1, 1, step, steps)), "en")
    assert f"<p>{text}</p>" in bar
    assert f'aria-valuenow="{percent}"' in bar
    assert f"width:{percent}%" in bar


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s left"), (12.1, "13 s left"), (None, "Step 3 of 8: outline</p>")],
)
def test_the_bar_tells_the_time_left_where_it_is_known(seconds: float | None, text: str) -> None:
    assert text in markup.progress_step(Stepped(StepProgress(1, 1, 3, 8), seconds), "en")


def test_a_forming_picture_is_within_the_page_itself() -> None:
    shown = markup.forming(Preview(StepProgress(1, 1, 3, 8), b"\xff\xd8", 64, 48))
    assert 'src="data:image/jpeg;base64,/9g="' in shown and 'width="64" height="48"' in shown


async def test_facts_tell_seed_size_and_seconds() -> None:
    facts = markup.facts(replace(await report_of(), seconds=2.34), "en")
    assert re.findall(r"<dd[^>]*>(.*?)</dd>", facts) == ["5", "256 × 256", "2.3 s"]


async def test_facts_tell_the_loras_in_force() -> None:
    loras = (LoraUse("<ink>.safetensors", 0.8, 12), LoraUse("rain.safetensors", 1.0, 3))
    facts = markup.facts(replace(await report_of(), loras=loras), "zh")
    assert re.findall(r"<dd class=\"used_loras\">(.*?)</dd>", facts) == [
        "&lt;ink&gt;.safetensors × 0.8, rain.safetensors × 1"
    ]


@pytest.mark.parametrize(
    ("language", "told"),
    [("en", "channels-last VAE, compiled blocks"), ("zh", "VAE 通道后置排列、编译模型块")],
)
async def test_facts_tell_what_made_the_picture_quicker(language: Language, told: str) -> None:
    report = replace(await report_of(), accelerated_by=("channels_last_vae", "compiled"))
    assert re.findall(r"<dd class=\"used_levers\">(.*?)</dd>", markup.facts(report, language)) == [told]
    assert "used_levers" not in markup.facts(await report_of(), language)


def test_everything_that_makes_pictures_quicker_has_words() -> None:
    in_english = {name: MESSAGES[f"lever_{name}"].en for name in LEVER_NAMES}
    assert in_english == {lever.name: lever.title for lever in LEVERS}


async def test_the_enhancement_lists_what_was_added_and_the_whole_prompts() -> None:
    report = await report_of(negative_prompt="snow")
    html = markup.enhancement(report, "en")
    phrases = re.findall(r"<li>(.*?)</li>", html)
    assert phrases == [*report.enhancement.added, *report.enhancement.added_negative]
    assert phrases
    assert f"<p>{report.prompt}</p>" in html
    assert f"<p>{report.negative_prompt}</p>" in html


@pytest.mark.parametrize(("outcome", "is_shown"), [("used", True), ("number", False)])
async def test_what_a_language_model_wrote_is_shown_as_that(outcome: RewriteOutcome, is_shown: bool) -> None:
    report = await report_of(negative_prompt="snow")
    rewrite = Rewrite("model", outcome, "because")
    report = replace(report, enhancement=replace(report.enhancement, added=(), rewrite=rewrite))
    for language, words in (("en", "Rewritten by a language model"), ("zh", "由语言模型改写")):
        html = markup.enhancement(report, language)
        assert (f"<h2>{words}</h2><ul><li>{report.prompt}</li>" in html) == is_shown


async def test_without_enhancement_the_page_says_so() -> None:
    html = markup.enhancement(await report_of(enhance=False), "en")
    assert "Drawn from your words as they are." in html
    assert "<li>" not in html


def test_warnings_become_a_calm_box_and_none_none() -> None:
    box = markup.notices_box([Notice("x", "first"), Notice("y", "second")], "en")
    assert re.findall(r"<p>(.*?)</p>", box) == ["first", "second"]
    assert 'class="box calm"' in box
    assert markup.notices_box([], "en") == ""


def test_what_the_guard_did_is_told_step_by_step_in_words() -> None:
    attempts = (
        GuardAttempt("same_inputs", "failed", 0.1),
        GuardAttempt("plain_attention", "skipped", 0.0, "it is plain already"),
        GuardAttempt("float32", "recovered", 0.2),
    )
    trips = (
        GuardTrip("denoise", 3, "nan", attempts),
        GuardTrip("picture", None, "picture_noise", (GuardAttempt("moon_phase", "recovered", 0.1),)),
    )
    picture = PictureReport(1, 1.0, 0.1, 0.8, 0.1, guard=GuardTrace(trips))
    clean = PictureReport(2, 1.0, 0.1, 0.8, 0.1)
    assert markup.guard_trace([picture], "en") == [
        "Step 3: the denoiser's output was not a number. "
        "Tried: the same once more (this did not), computing in float32 (this helped).",
        "The finished picture looked wrong. Tried: moon phase (this helped).",
    ]
    told = markup.guard_trace([clean, picture], "zh")
    assert told[0] == (
        "第 2 张，第 3 步：去噪网络的输出不是有效数字。"
        "尝试过：用相同的输入重算（无效）、改用 float32 计算（有效）。"
    )
    assert markup.guard_trace([clean], "en") == []
    box = markup.notices_box([Notice("x", "first")], "en", [HOSTILE])
    assert "<details>" in box and "<img" not in box


@pytest.mark.parametrize(("theirs", "title"), [(True, "One thing to change"), (False, "That did not work")])
def test_a_refusal_says_whether_the_person_can_mend_it(theirs: bool, title: str) -> None:
    assert f"<strong>{title}</strong><p>because</p>" in markup.refusal_box(["because"], theirs, "en")


async def test_nothing_that_people_wrote_is_markup_or_template() -> None:
    report = await report_of(prompt=HOSTILE, negative_prompt=HOSTILE)
    pieces = [
        markup.enhancement(report, "en"),
        markup.refusal_box([HOSTILE], True, "en"),
        markup.notices_box([Notice("x", HOSTILE)], "en"),
        markup.facts(report, "en", [{"id": None, "parameters": {"prompt": HOSTILE}}]),
        markup.several_pictures([markup.SeveralPicture(HOSTILE, 1)], HOSTILE, "en"),
    ]
    for piece in pieces:
        assert "<img src=x" not in piece
        assert 'onerror="' not in piece
        assert "${" not in piece
        assert "{{" not in piece
        assert "&lt;img" in piece
