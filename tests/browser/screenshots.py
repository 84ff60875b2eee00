"""Pictures of the page for the READMEs: a real server with the demo model, looked at in Chromium.

    python -m tests.browser.screenshots [FOLDER]

Writes wide.jpg (English, light) and dark.jpg (Chinese, dark) into FOLDER, by default those of the READMEs.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser.board import ask, wait_for_picture
from tests.running_server import running_server

PICTURES = Path(__file__).with_name("pictures")
WIDE = {"width": 1280, "height": 1240}
#: What stands in the gallery, the oldest first.
PROMPTS = (
    "白色背景上的红色圆形",
    "a red circle on a white background, a small yellow star at the top",
    "a yellow star on a blue background",
    "a red house and a tree by day with mountains",
    "夜晚的大海，月亮和白色的小船",
)
LAST = "a red house and a tree by day with mountains, oil painting"


@contextmanager
def opened(browser: Browser, url: str, **context: Any) -> Iterator[Page]:
    """The page in a browser context of its own, ready to draw."""
    own = browser.new_context(**context)
    page = own.new_page()
    page.set_default_timeout(60_000)
    page.goto(url)
    page.wait_for_function("document.querySelector('#badge')?.innerText.includes('CFG')")
    yield page
    own.close()


def drawn(page: Page, prompt: str, seed: int) -> None:
    """A picture of that prompt, shown and kept."""
    page.locator("#seed").locator("input, textarea").fill(str(seed))
    there = page.locator("#gallery li").count()
    ask(page, prompt)
    page.wait_for_function(f"document.querySelectorAll('#gallery li').length > {there}")
    wait_for_picture(page)


def settled(page: Page) -> None:
    """All thumbnails in view are there, and no words of the preview are under way."""
    page.wait_for_load_state("networkidle")
    page.wait_for_function(
        "[...document.querySelectorAll('#gallery img')]"
        ".filter(each => each.getBoundingClientRect().top < innerHeight)"
        ".every(each => each.complete && each.naturalWidth > 0)"
    )


def shot(page: Page, file: Path) -> None:
    page.mouse.move(0, 0)
    settled(page)
    page.screenshot(path=file, type="jpeg", quality=82)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with (
        tempfile.TemporaryDirectory(prefix="zimage-shots-") as data,
        running_server(environment={"ZIMAGE_DATA_DIR": data}) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with opened(browser, server.base_url, locale="en-US", viewport=WIDE) as page:
            for seed, prompt in enumerate(PROMPTS):
                drawn(page, prompt, seed + 1)
            drawn(page, LAST, 7)
            shot(page, folder / "wide.jpg")
        with opened(browser, server.base_url, locale="zh-CN", viewport=WIDE, color_scheme="dark") as page:
            drawn(page, PROMPTS[-1], 5)
            shot(page, folder / "dark.jpg")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES)
