"""The pieces of HTML say what happened, in the words the product promises, and escape what people wrote."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from serve_app.image_codec import ImageEncoding
from serve_app.ui import markup
from tests.serve_app.ui.painting_service import CARD, MODEL, PaintingService
from zimage_engine.types import (
    DeviceStatus,
    GenerationReport,
    GenerationRequest,
    LoraUse,
    Notice,
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
    shown = markup.status_line(status, MODEL.id)
    assert f">{line}</span>" in shown
    assert (status.plan_because or "") in shown


async def test_the_badge_tells_the_defaults_before_and_the_truth_after() -> None:
    assert "Steps: 8 | CFG: 1.8 | bfloat16" in markup.badge_of_defaults(MODEL)
    report = await report_of(num_inference_steps=5, guidance_scale=0.0)
    assert "Steps: 5 | CFG: 1.0 | bfloat16" in markup.badge_of_report(report)


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
    bar = markup.progress_step(StepProgress(1, 1, step, steps), "en")
    assert f"<p>{text}</p>" in bar
    assert f'aria-valuenow="{percent}"' in bar
    assert f"width:{percent}%" in bar


async def test_facts_tell_seed_size_and_seconds() -> None:
    facts = markup.facts(replace(await report_of(), seconds=2.34), "en")
    assert re.findall(r"<dd[^>]*>(.*?)</dd>", facts) == ["5", "256 × 256", "2.3 s"]


async def test_facts_tell_the_loras_in_force() -> None:
    loras = (LoraUse("<ink>.safetensors", 0.8, 12), LoraUse("rain.safetensors", 1.0, 3))
    facts = markup.facts(replace(await report_of(), loras=loras), "zh")
    assert re.findall(r"<dd class=\"used_loras\">(.*?)</dd>", facts) == [
        "&lt;ink&gt;.safetensors × 0.8, rain.safetensors × 1"
    ]


async def test_the_enhancement_lists_what_was_added_and_the_whole_prompts() -> None:
    report = await report_of(negative_prompt="snow")
    html = markup.enhancement(report, "en")
    phrases = re.findall(r"<li>(.*?)</li>", html)
    assert phrases == [*report.enhancement.added, *report.enhancement.added_negative]
    assert phrases
    assert f"<p>{report.prompt}</p>" in html
    assert f"<p>{report.negative_prompt}</p>" in html


async def test_without_enhancement_the_page_says_so() -> None:
    html = markup.enhancement(await report_of(enhance=False), "en")
    assert "Drawn from your words as they are." in html
    assert "<li>" not in html


def test_warnings_become_a_calm_box_and_none_none() -> None:
    box = markup.notices_box([Notice("x", "first"), Notice("y", "second")], "en")
    assert re.findall(r"<p>(.*?)</p>", box) == ["first", "second"]
    assert 'class="box calm"' in box
    assert markup.notices_box([], "en") == ""


@pytest.mark.parametrize(("theirs", "title"), [(True, "One thing to change"), (False, "That did not work")])
def test_a_refusal_says_whether_the_person_can_mend_it(theirs: bool, title: str) -> None:
    assert f"<strong>{title}</strong><p>because</p>" in markup.refusal_box(["because"], theirs, "en")


async def test_nothing_that_people_wrote_is_markup_or_template() -> None:
    report = await report_of(prompt=HOSTILE, negative_prompt=HOSTILE)
    pieces = [
        markup.enhancement(report, "en"),
        markup.refusal_box([HOSTILE], True, "en"),
        markup.notices_box([Notice("x", HOSTILE)], "en"),
        markup.status_line(replace(CARD, name=HOSTILE, plan=HOSTILE, plan_because=HOSTILE), HOSTILE),
    ]
    for piece in pieces:
        assert "<img" not in piece
        assert 'onerror="' not in piece
        assert "${" not in piece
        assert "{{" not in piece
        assert "&lt;img" in piece
