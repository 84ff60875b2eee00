"""The main job, whole: a person types a prompt into the page of the real server and sees that picture."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import expect

from serve_app.image_codec import read_parameters
from tests.browser.board import ask, bars_shown, picture_bytes, wait_for_picture, wait_until, watch_bar
from tests.browser.conftest import OpenPage
from zimage_engine.demo.detector import detect, judge
from zimage_engine.demo.pictures import ShapesSpec, Thing

pytestmark = [pytest.mark.browser, pytest.mark.server]

RED_CIRCLE_ON_WHITE = ShapesSpec(background="white", things=(Thing("red", "circle"),))
#: Generous: a busy machine draws slowly, and the first picture warms the model up.
PICTURE_LIMIT_MS = 120_000
#: A hundred steps of that size take many times as long.
MOST_SECONDS_AFTER_A_TAB = 4.0


@pytest.mark.parametrize(
    ("prompt", "locale"),
    [("a red circle on a white background", "en-US"), ("白色背景上的红色圆形", "zh-CN")],
    ids=["English", "Chinese"],
)
def test_what_is_typed_is_what_is_drawn(
    open_page: OpenPage, server: str, tmp_path: Path, prompt: str, locale: str
) -> None:
    page = open_page(server, locale=locale)
    expect(page.locator("#badge")).to_have_text("Steps: 8 | CFG: 1.8 | bfloat16", timeout=PICTURE_LIMIT_MS)
    expect(page.locator("#status .status")).to_have_text(
        re.compile(r"^(GPU: CUDA OK( [|] VRAM: [0-9.]+/[0-9.]+ GB)?|MPS|CPU)$")
    )
    page.locator("#seed").locator("input, textarea").fill("1")
    watch_bar(page)
    ask(page, prompt)
    wait_for_picture(page, PICTURE_LIMIT_MS)
    page.screenshot(path=tmp_path / "page.png", full_page=True)

    percents = [percent for percent, _ in bars_shown(page)]
    assert percents == sorted(percents)
    assert len(set(percents)) >= 4
    expect(page.locator("#badge")).to_have_text("Steps: 8 | CFG: 1.8 | bfloat16")
    expect(page.locator(".used_seed")).to_have_text("1")

    file = picture_bytes(page)
    (tmp_path / "picture.png").write_bytes(file)
    parameters = read_parameters(file)
    assert parameters is not None and prompt in parameters and "Seed: 1" in parameters
    picture = Image.open(io.BytesIO(file))
    assert judge(RED_CIRCLE_ON_WHITE, picture).content_ok, f"seen: {detect(picture)}, in {tmp_path}"


def test_a_closed_tab_frees_the_worker(open_page: OpenPage, server: str) -> None:
    page = open_page(server, locale="en-US")
    expect(page.locator("#size input")).not_to_have_value("", timeout=PICTURE_LIMIT_MS)
    for control, value in (("#steps input[type=number]", "100"), ("#size input", "512x512")):
        page.locator(control).fill(value)
        page.locator(control).press("Enter")
    with httpx.Client(base_url=server, timeout=60) as client:

        def told(name: str) -> float:
            lines = client.get("/metrics").text.splitlines()
            return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

        def cancelled() -> float:
            return told('zimage_requests_total{outcome="cancelled"')

        before = cancelled()
        ask(page, "a red circle on a white background")
        wait_until(page, lambda: told("zimage_worker_busy") == 1)
        page.close()
        closed_at = time.monotonic()
        while cancelled() == before or told("zimage_worker_busy") == 1:
            assert time.monotonic() - closed_at < MOST_SECONDS_AFTER_A_TAB
            time.sleep(0.05)
