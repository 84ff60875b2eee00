"""What a person sees of a drawing while it is made, how they stop it, and a server that comes and goes."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect

from tests.browser.board import ask, bars_shown, picture_bytes, wait_for_picture, wait_until, watch_bar
from tests.browser.conftest import PHONE, OpenPage, PageServer, running_page
from tests.serve_app.ui.painting_service import PaintingService

pytestmark = pytest.mark.browser

#: Keeps each forming picture that the page has shown, however short.
_WATCH_FORMING = """() => {
  window.formingShown = new Set();
  new MutationObserver(() => {
    const image = document.querySelector('#forming img');
    if (image && image.checkVisibility({visibilityProperty: true})) window.formingShown.add(image.src);
  }).observe(document.getElementById('canvas'), {subtree: true, childList: true, attributes: true});
}"""


def step_reached(page: Page, step: int, steps: int = 8) -> None:
    expect(page.locator("#progress")).to_contain_text(re.compile(rf"Step [{step}-{steps}] of {steps}"))


def test_the_forming_picture_is_seen_at_every_step_and_gives_way_to_the_picture(
    page_server: PageServer, open_page: OpenPage
) -> None:
    page_server.service.step_seconds = 0.2
    page = open_page(page_server.url)
    page.evaluate(_WATCH_FORMING)
    watch_bar(page)
    ask(page, "a red circle")
    step_reached(page, 2)
    expect(page.locator("#forming img")).to_be_visible()
    assert not page_server.service.replies
    assert page.evaluate("document.querySelector('#forming img').naturalWidth") == 64
    canvas, forming = (page.locator(each).bounding_box() for each in ("#picture", "#forming"))
    assert canvas == forming
    wait_for_picture(page)
    expect(page.locator("#forming")).to_be_hidden()
    assert page.evaluate("window.formingShown.size") >= 6
    assert any(re.fullmatch(r"Step \d of 8: \w+, \d+ s left", text) for _, text in bars_shown(page))


def test_a_drawing_is_stopped_by_button_and_by_escape_and_the_last_picture_stays(
    page_server: PageServer, open_page: OpenPage
) -> None:
    service = page_server.service
    page = open_page(page_server.url)
    expect(page.locator("#stop")).to_be_hidden()
    ask(page, "a red circle")
    wait_for_picture(page)
    shown = picture_bytes(page)
    service.step_seconds = 0.3
    stops = (lambda: page.locator("#stop").click(), lambda: page.keyboard.press("Escape"))
    for times, stop in enumerate(stops, 1):
        page.locator("#generate").click()
        step_reached(page, 2)
        expect(page.locator("#stop")).to_be_visible()
        steps_before = service.steps
        stop()
        wait_until(page, lambda times=times: service.cancelled == times)
        assert service.steps - steps_before <= 1
        expect(page.locator("#progress .stopped")).to_have_text("Stopped. Draw again whenever you like.")
        expect(page.locator("#stop")).to_be_hidden()
        expect(page.locator("#generate")).to_be_focused()
        assert picture_bytes(page) == shown
    service.step_seconds = 0.02
    page.locator("#seed").locator("input, textarea").fill("77")
    page.locator("#generate").click()
    expect(page.locator(".used_seed")).to_have_text("77")
    wait_for_picture(page)
    assert picture_bytes(page) == service.replies[-1].pictures[0] != shown
    # Nothing is there to be stopped any more.
    page.keyboard.press("Escape")
    assert len(service.replies) == 2 and service.cancelled == 2


def test_two_browsers_at_once_get_each_its_own_picture(page_server: PageServer, open_page: OpenPage) -> None:
    service = page_server.service
    service.step_seconds = 0.2
    pages = {"11": open_page(page_server.url), "22": open_page(page_server.url, viewport=PHONE, phone=True)}
    for seed, page in pages.items():
        page.locator("#seed").locator("input, textarea").fill(seed)
        ask(page, f"a red circle, number {seed}")
    for page in pages.values():
        step_reached(page, 1)
    pages["22"].locator("#stop").click()
    expect(pages["22"].locator("#progress .stopped")).to_be_visible()
    wait_for_picture(pages["11"])
    assert service.cancelled == 1
    pages["22"].locator("#generate").click()
    wait_for_picture(pages["22"])
    for seed, page in pages.items():
        expect(page.locator(".used_seed")).to_have_text(seed)
        own = [each for each in service.replies if str(each.report.pictures[0].seed) == seed]
        assert picture_bytes(page) == own[0].pictures[0]


def test_a_server_that_is_restarted_is_told_of_calmly_and_nothing_typed_is_lost(open_page: OpenPage) -> None:
    """First while nothing is drawn, then in the midst of a drawing."""
    with running_page(PaintingService(step_seconds=0.02)) as first:
        page = open_page(first.url)
        ask(page, "a red circle")
        wait_for_picture(page)
        shown = page.locator("#picture img").get_attribute("src")
        page.locator("#prompt textarea").fill("typed, and not drawn yet")
    line = page.locator("#connection [role=status]")
    expect(line).to_contain_text("Connection lost. Trying again")
    port = urlsplit(first.url).port
    assert port is not None
    with running_page(PaintingService(step_seconds=0.3), port) as second:
        expect(line).to_have_text("Connected again.")
        # The same page, never loaded anew.
        expect(page.locator("#picture img")).to_have_attribute("src", shown or "")
        page.locator("#negative textarea, #negative input").fill("fog")
        page.locator("#generate").click()
        step_reached(page, 2)
        assert second.service.requests[0].prompt == "typed, and not drawn yet"
    expect(line).to_contain_text("Connection lost. Trying again")
    expect(page.locator(".toast-wrap")).to_be_hidden()
    with running_page(PaintingService(step_seconds=0.02), port) as third:
        expect(line).to_contain_text("The drawing was interrupted")
        expect(page.locator("#prompt textarea")).to_have_value("typed, and not drawn yet")
        expect(page.locator("#negative textarea, #negative input")).to_have_value("fog")
        page.locator("#generate").click()
        wait_for_picture(page)
        assert [request.negative_prompt for request in third.service.requests] == ["fog"]
