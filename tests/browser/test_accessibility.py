"""The page for those who do not see it, or see it badly: axe-core looks at each of its states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.browser.board import ask, wait_for_picture
from tests.browser.conftest import DESKTOP, PHONE, OpenPage
from tests.browser.keeping import keeping_page
from tests.serve_app.ui.keeping_service import KeepingService

pytestmark = pytest.mark.browser

#: What axe calls so keeps somebody from using the page; the others are advice.
GRAVE = ("serious", "critical")


def faults(page: Page) -> list[str]:
    """What is grave: the rule, what it says, and where."""
    found: list[dict[str, Any]] = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {each['help']}: {node['html'][:160]} ({node['failureSummary'][:200]})"
        for each in found
        if each["impact"] in GRAVE
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("locale", "viewport"), [("en-US", DESKTOP), ("zh-CN", PHONE)], ids=["wide", "phone"]
)
def test_axe_finds_nothing_grave(
    tmp_path: Path, open_page: OpenPage, locale: str, viewport: dict[str, int], theme: str
) -> None:
    with keeping_page(tmp_path, KeepingService(step_seconds=0.02)) as server:
        page = open_page(server.url, locale=locale, viewport=viewport, phone=viewport is PHONE)
        page.emulate_media(color_scheme=theme)
        expect(page.locator("#badge")).to_contain_text("CFG")
        at_first = faults(page)
        ask(page, "a red house and a tree by day with mountains, oil painting")
        wait_for_picture(page)
        page.locator("#gallery img").first.wait_for()
        expect(page.locator("#keywords")).to_contain_text("oil painting")
        drawn = faults(page)
        page.locator("#gallery img").first.click()
        page.locator("dialog[open]").first.wait_for()
        viewed = faults(page)
        page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert {"at first": at_first, "with a picture": drawn, "in the viewer": viewed} == {
        "at first": [],
        "with a picture": [],
        "in the viewer": [],
    }
