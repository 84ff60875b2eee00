"""What a person does with the page, for the tests to do alike."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urljoin

from playwright.sync_api import Page, expect

#: Keeps every value that the bar has shown, however short.
_WATCH_BAR = """() => {
  window.barsShown = [];
  new MutationObserver(() => {
    const bar = document.querySelector('#progress [role=progressbar]');
    if (bar) window.barsShown.push([Number(bar.getAttribute('aria-valuenow')), bar.innerText.trim()]);
  }).observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
}"""


def ask(page: Page, prompt: str) -> None:
    """Type the prompt and press the button."""
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#generate").click()


def watch_bar(page: Page) -> None:
    page.evaluate(_WATCH_BAR)


def bars_shown(page: Page) -> list[tuple[int, str]]:
    """Each (percent, text) that the bar has shown since `watch_bar`, without repetitions."""
    shown = [(percent, text) for percent, text in page.evaluate("window.barsShown")]
    return list(dict.fromkeys(shown))


def wait_for_picture(page: Page, timeout_ms: float = 60_000) -> None:
    """Until the bar has gone and a picture is loaded."""
    expect(page.locator("#facts .facts")).to_be_visible(timeout=timeout_ms)
    expect(page.locator("#progress .progress")).to_have_count(0, timeout=timeout_ms)
    page.wait_for_function("document.querySelector('#picture img')?.naturalWidth > 0")


def picture_bytes(page: Page) -> bytes:
    """The file that the page shows."""
    source = page.locator("#picture img").get_attribute("src")
    assert source is not None
    response = page.request.get(urljoin(page.url, source))
    assert response.ok
    return response.body()


def wait_until(page: Page, condition: Callable[[], bool], seconds: float = 60) -> None:
    """Let the page go on until the condition, on this side of the wire, holds."""
    for _ in range(round(seconds / 0.05)):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"did not come true within {seconds:g} s")
