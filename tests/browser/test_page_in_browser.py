"""The page in a real browser, over a service that paints without a model: everything but the art."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from serve_app.ui.texts import EXAMPLES, LABELS
from tests.browser.board import ask, bars_shown, picture_bytes, wait_for_picture, wait_until, watch_bar
from tests.browser.conftest import DESKTOP, PHONE, OpenPage, PageServer

pytestmark = pytest.mark.browser

VISIBLE_LABELS = ("prompt", "enhance", "negative", "size", "seed", "steps", "guidance", "generate")


def test_the_bar_moves_and_badge_status_and_facts_tell_the_truth(
    page_server: PageServer, open_page: OpenPage
) -> None:
    page = open_page(page_server.url)
    expect(page.locator("#badge")).to_have_text("Steps: 8 | CFG: 1.8 | bfloat16")
    expect(page.locator("#status .status")).to_have_text("GPU: CUDA OK | VRAM: 5.2/12.0 GB")
    page.locator("#steps input[type=number]").fill("12")
    page.locator("#steps input[type=number]").press("Tab")
    watch_bar(page)
    ask(page, "a red circle")
    wait_for_picture(page)
    percents = [percent for percent, _ in bars_shown(page)]
    assert percents == sorted(percents)
    assert len(set(percents)) >= 6
    assert any(text.startswith("Step 4 of 12: outline") for _, text in bars_shown(page))
    expect(page.locator("#badge")).to_have_text("Steps: 12 | CFG: 1.8 | bfloat16")
    expect(page.locator(".used_seed")).to_have_text(
        str(page_server.service.replies[0].report.pictures[0].seed)
    )
    expect(page.locator("#enhancement li").first).to_have_text("masterpiece")
    assert picture_bytes(page) == page_server.service.replies[0].pictures[0]


def test_the_download_is_the_workers_file(page_server: PageServer, open_page: OpenPage) -> None:
    page = open_page(page_server.url)
    page.locator("#seed").locator("input, textarea").fill("77")
    ask(page, "a red circle")
    wait_for_picture(page)
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "zimage-77.png"
    assert Path(download.value.path()).read_bytes() == page_server.service.replies[0].pictures[0]


def test_the_used_seed_can_be_used_again(page_server: PageServer, open_page: OpenPage) -> None:
    page = open_page(page_server.url)
    ask(page, "a red circle")
    wait_for_picture(page)
    page.locator("#reuse-seed").click()
    seed = page_server.service.replies[0].report.pictures[0].seed
    expect(page.locator("#seed").locator("input, textarea")).to_have_value(str(seed))
    page.locator("#generate").click()
    wait_until(page, lambda: len(page_server.service.replies) == 2)
    assert [request.seed for request in page_server.service.requests] == [None, seed]


def test_an_example_is_one_click_away(page_server: PageServer, open_page: OpenPage) -> None:
    page = open_page(page_server.url)
    for example in EXAMPLES:
        page.get_by_role("button", name=example, exact=True).click()
        expect(page.locator("#prompt textarea")).to_have_value(example)


def test_every_control_reaches_the_service(page_server: PageServer, open_page: OpenPage) -> None:
    page = open_page(page_server.url)
    page.locator("#enhance input[type=checkbox]").uncheck()
    page.locator("#negative textarea, #negative input").fill("blurry")
    page.locator("#aspect").get_by_role("radio", name="3:4").check()
    expect(page.locator("#size input")).to_have_value("224 × 288")
    for control, value in (("steps", "5"), ("guidance", "2.3")):
        page.locator(f"#{control} input[type=number]").fill(value)
        page.locator(f"#{control} input[type=number]").press("Tab")
    page.locator("#seed").locator("input, textarea").fill("4294967295")
    ask(page, "two\nlines")
    wait_for_picture(page)
    (request,) = page_server.service.requests
    assert request.prompt == "two\nlines"
    assert request.negative_prompt == "blurry"
    assert request.enhance is False
    assert (request.width, request.height) == (224, 288)
    assert request.num_inference_steps == 5
    assert request.guidance_scale == 2.3
    assert request.seed == 2**32 - 1


def test_shift_enter_draws(page_server: PageServer, open_page: OpenPage) -> None:
    page = open_page(page_server.url)
    page.locator("#prompt textarea").fill("a red circle")
    page.locator("#prompt textarea").press("Shift+Enter")
    wait_for_picture(page)


def test_a_refusal_is_readable_and_the_next_picture_can_be_asked(
    page_server: PageServer, open_page: OpenPage
) -> None:
    page = open_page(page_server.url)
    page.locator("#seed input").fill("seven")
    ask(page, "a red circle")
    expect(page.locator("#message")).to_contain_text("The seed is a whole number")
    page.locator("#seed input").fill("")
    page_server.service.fails_with = RuntimeError("secrets")
    page.locator("#generate").click()
    expect(page.locator("#message")).to_contain_text("the fault is its own")
    expect(page.locator("body")).not_to_contain_text("secrets")
    expect(page.locator("#progress .progress")).to_have_count(0)
    page_server.service.fails_with = None
    page.locator("#generate").click()
    wait_for_picture(page)
    expect(page.locator("#message .box")).to_have_count(0)


def test_a_second_click_while_drawing_asks_for_nothing_more(
    page_server: PageServer, open_page: OpenPage
) -> None:
    page_server.service.step_seconds = 0.5
    page = open_page(page_server.url)
    ask(page, "a red circle")
    expect(page.locator("#progress")).to_contain_text(re.compile(r"Step [1-6] of 8"))
    page.locator("#generate").click()
    wait_for_picture(page)
    page.wait_for_timeout(500)
    assert len(page_server.service.requests) == 1


def test_while_the_model_loads_the_page_says_so_and_then_draws(
    page_server: PageServer, open_page: OpenPage
) -> None:
    page_server.service.loaded = False
    page = open_page(page_server.url)
    expect(page.locator("#status .status")).to_have_text("The model is loading…")
    expect(page.locator("#loading")).to_contain_text("The model is loading…")
    page_server.service.loading_part = 0.459
    expect(page.locator("#loading strong")).to_have_text("The model is loading: 45 % is read")
    expect(page.locator("#status .status")).to_have_text("The model is loading: 45 % is read")
    ask(page, "a red circle")
    expect(page.locator("#progress")).to_contain_text("your picture comes right after")
    page_server.service.loaded = True
    wait_for_picture(page)
    expect(page.locator("#status")).to_contain_text("CUDA OK")
    expect(page.locator("#loading .box")).to_have_count(0)


def test_what_people_write_is_shown_and_never_run(page_server: PageServer, open_page: OpenPage) -> None:
    hostile = "<img src=x onerror=alert(1)> ${alert(2)} {{alert(3)}}"
    page = open_page(page_server.url)
    ask(page, hostile)
    wait_for_picture(page)
    page.locator("#enhancement summary").first.click()
    expect(page.locator("#enhancement details p").first).to_contain_text(hostile)


@pytest.mark.parametrize(("locale", "language"), [("en-US", "en"), ("zh-CN", "zh"), ("de-DE", "en")])
@pytest.mark.parametrize(("viewport", "phone"), [(DESKTOP, False), (PHONE, True)], ids=["desktop", "phone"])
def test_the_page_speaks_the_readers_language_and_fits_the_window(
    page_server: PageServer, open_page: OpenPage, locale: str, language: str, viewport: dict, phone: bool
) -> None:
    page = open_page(page_server.url, locale=locale, viewport=viewport, phone=phone)
    expect(page.locator("#badge")).to_contain_text("bfloat16")
    for key in VISIBLE_LABELS:
        expect(page.get_by_text(getattr(LABELS[key], language), exact=True).first).to_be_visible()
    assert "__i18n__" not in page.content().split("<body")[1].split("<script")[0]
    ask(page, "a red circle" if language == "en" else "红色圆形")
    wait_for_picture(page)
    expect(page.locator("#facts dt").first).to_have_text("Seed" if language == "en" else "种子")
    expect(page.locator("#picture img")).to_be_in_viewport(ratio=0.9)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    for box in ("#ask", "#result", "#settings"):
        bounds = page.locator(box).bounding_box()
        assert bounds is not None and bounds["x"] >= 0
        assert bounds["x"] + bounds["width"] <= viewport["width"]
    assert not re.search(r"undefined|\[object", page.locator("body").inner_text())
