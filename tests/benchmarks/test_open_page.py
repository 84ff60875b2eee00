"""A short form of a day at an open page: what `open_page` counts stays where it was."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser

from tests.benchmarks.open_page import draw, left, look, opened, served, stop
from tests.browser.conftest import chromium  # noqa: F401

pytestmark = pytest.mark.browser

#: Fewer than the drawings: one object that each of them leaves behind is seen.
SLACK = 22


def test_an_open_page_leaves_nothing_behind_in_server_and_browser(chromium: Browser) -> None:  # noqa: F811
    with served() as url:
        page = opened(chromium, url)
        draw(page, 4)
        stop(page, 2)
        look(page, 20)
        before = left(page, url)
        draw(page, 12)
        stop(page, 12)
        look(page, 60)
        after = left(page, url)
        page.context.close()
    assert after.tables == before.tables
    assert after.tables["sessions"] == 1 and after.tables["events"] == after.tables["iterators"] == 0
    assert abs(after.tasks - before.tasks) <= 2
    assert after.objects - before.objects < SLACK
    assert after.nodes - before.nodes < SLACK
    assert after.listeners - before.listeners < SLACK
    assert after.heap_bytes - before.heap_bytes < 1_500_000
