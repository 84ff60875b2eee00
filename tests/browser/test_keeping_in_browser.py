"""What the page keeps, in a real browser: gallery, viewer, two compared, grids, links, dropped files."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page, expect

from tests.browser.board import ask, wait_until
from tests.browser.conftest import PHONE, OpenPage, PageServer
from tests.browser.keeping import keeping_page
from tests.serve_app.ui.keeping_service import KeepingService

pytestmark = pytest.mark.browser

TRICKY = 'it\'s "quoted"\nwith $HOME `id` \\n \\ and 红色的圆 🔴 !'
DROP = """([name, type, content]) => {
  const bytes = Uint8Array.from(atob(content), (sign) => sign.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type}));
  for (const kind of ['dragenter', 'dragover', 'drop']) {
    if (kind === 'drop') window.veilSeen = document.querySelector('#keep-veil')?.innerText ?? '';
    const at = document.querySelector('#prompt textarea');
    at.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: transfer}));
  }
}"""
PASTE = """([name, type, content]) => {
  const bytes = Uint8Array.from(atob(content), (sign) => sign.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type}));
  document.body.dispatchEvent(
    new ClipboardEvent('paste', {bubbles: true, cancelable: true, clipboardData: transfer}));
}"""


@pytest.fixture
def keeping(tmp_path: Path) -> Iterator[PageServer]:
    with keeping_page(tmp_path / "kept", KeepingService(step_seconds=0.01)) as server:
        yield server


def tiles(page: Page) -> Any:
    return page.locator("#gallery li")


def control(page: Page, id: str) -> Any:
    return page.locator(f"#{id} textarea, #{id} input:not([type=range])").first


def draw(page: Page, prompt: str, seed: int) -> None:
    before = tiles(page).count()
    control(page, "seed").fill(str(seed))
    ask(page, prompt)
    expect(tiles(page)).to_have_count(before + 1)
    expect(page.locator("#progress .progress")).to_have_count(0)


def kept(server: PageServer) -> list[dict[str, Any]]:
    return list(httpx.get(f"{server.url}v1/history").raise_for_status().json()["data"])


def have_kept(server: PageServer, *prompts: str) -> None:
    """Pictures of the history, the last the newest, without the page."""
    with httpx.Client(base_url=server.url) as client:
        for number, prompt in enumerate(prompts, start=1):
            body = {"prompt": prompt, "seed": number, "num_inference_steps": 1}
            client.post("page/cell", json=body).raise_for_status()


def drop(page: Page, name: str, type: str, content: bytes, how: str = DROP) -> None:
    page.evaluate(how, [name, type, base64.b64encode(content).decode()])


def test_what_is_drawn_stays_over_a_reload_and_a_restart_and_can_be_put_back(
    open_page: OpenPage, tmp_path: Path
) -> None:
    with keeping_page(tmp_path, KeepingService(step_seconds=0.01)) as first:
        page = open_page(first.url)
        expect(page.locator("#gallery .keep-told")).to_have_text("What you draw is kept here.")
        draw(page, "a red circle", 7)
        draw(page, "<b>a blue star</b>", 8)
        expect(tiles(page).first.locator("img")).to_have_attribute("alt", "<b>a blue star</b>")
        page.reload()
        expect(tiles(page)).to_have_count(2)
    with keeping_page(tmp_path, KeepingService(step_seconds=0.01)) as second:
        page = open_page(second.url)
        expect(tiles(page)).to_have_count(2)
        page.wait_for_function(
            "[...document.querySelectorAll('#gallery img')].every((i) => i.naturalWidth > 0)"
        )
        control(page, "prompt").fill("something else")

        # By keys alone: to the tiles, over them, into one, to its neighbour and back.
        tiles(page).first.locator("button").focus()
        page.keyboard.press("ArrowRight")
        expect(tiles(page).nth(1).locator("button")).to_be_focused()
        page.keyboard.press("Enter")
        viewer = page.locator("#viewer")
        expect(viewer).to_be_visible()
        expect(viewer.locator("dl")).to_contain_text("a red circle")
        page.keyboard.press("ArrowLeft")
        expect(viewer.locator("dl")).to_contain_text("<b>a blue star</b>")
        expect(viewer.locator(".viewed")).to_have_attribute("src", kept(second)[0]["url"])
        for kind, magic in (("PNG", b"\x89PNG"), ("WebP", b"RIFF"), ("JPEG", b"\xff\xd8")):
            with page.expect_download() as download:
                viewer.get_by_role("link", name=kind, exact=True).click()
            assert Path(download.value.path()).read_bytes().startswith(magic), kind
            assert download.value.suggested_filename.endswith(f"-8.{kind.lower()}")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Escape")
        expect(viewer).to_be_hidden()
        expect(tiles(page).nth(1).locator("button")).to_be_focused()

        page.keyboard.press("Enter")
        viewer.get_by_role("button", name="Use all its settings").click()
        expect(control(page, "prompt")).to_have_value("a red circle")
        expect(control(page, "seed")).to_have_value("7")
        expect(viewer).to_be_hidden()
        page.locator("#generate").click()
        expect(tiles(page)).to_have_count(3)
        newest, oldest = kept(second)[0], kept(second)[-1]
        assert newest["parameters"] == oldest["parameters"]
        assert (
            httpx.get(second.url + newest["url"][1:]).content
            == httpx.get(second.url + oldest["url"][1:]).content
        )


def test_pictures_are_removed_one_by_one_with_a_way_back_or_all_at_once(
    keeping: PageServer, open_page: OpenPage
) -> None:
    have_kept(keeping, "a red circle", "a tree", "mountains")
    page = open_page(keeping.url)
    expect(tiles(page)).to_have_count(3)
    note = page.locator("#keep-note")

    tiles(page).nth(1).locator("button").focus()
    page.keyboard.press("Delete")
    expect(tiles(page)).to_have_count(2)
    expect(tiles(page).nth(1).locator("button")).to_be_focused()
    note.get_by_role("button", name="Undo").click()
    expect(tiles(page)).to_have_count(3)
    expect(tiles(page).nth(1).locator("img")).to_have_attribute("alt", "a tree")
    assert len(kept(keeping)) == 3

    tiles(page).nth(1).click()
    page.locator("#viewer").get_by_role("button", name="Remove").click()
    expect(page.locator("#viewer dl")).to_contain_text("a red circle")
    note.get_by_role("button", name="Close").click()
    wait_until(page, lambda: len(kept(keeping)) == 2)
    page.keyboard.press("Escape")

    page.get_by_placeholder("Search the prompts").fill("mount")
    expect(tiles(page)).to_have_count(1)
    page.get_by_placeholder("Search the prompts").fill("nothing like it")
    expect(page.locator("#gallery .keep-told")).to_have_text("No picture speaks of this.")
    page.get_by_placeholder("Search the prompts").fill("")
    expect(tiles(page)).to_have_count(2)

    page.get_by_role("button", name="Remove all…").click()
    expect(page.get_by_role("button", name="Keep them")).to_be_focused()
    page.keyboard.press("Escape")
    assert len(kept(keeping)) == 2
    page.get_by_role("button", name="Remove all…").click()
    page.get_by_role("button", name="Remove them").click()
    expect(page.locator("#gallery .keep-told")).to_have_text("What you draw is kept here.")
    assert kept(keeping) == []


def test_a_long_gallery_is_loaded_as_one_goes_on(keeping: PageServer, open_page: OpenPage) -> None:
    have_kept(keeping, *(f"picture {number}" for number in range(1, 53)))
    page = open_page(keeping.url)
    expect(tiles(page)).to_have_count(48)
    assert page.locator("#gallery li img[loading=lazy]").count() == 48
    page.get_by_role("button", name="Show more").scroll_into_view_if_needed()
    expect(tiles(page)).to_have_count(52)
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()
    # What another window has drawn meanwhile is there when one looks again.
    have_kept(keeping, "of another window")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(tiles(page)).to_have_count(53)
    expect(tiles(page).first.locator("img")).to_have_attribute("alt", "of another window")


def test_two_pictures_are_wiped_over_one_another(keeping: PageServer, open_page: OpenPage) -> None:
    have_kept(keeping, "a red circle", "a tree")
    page = open_page(keeping.url, locale="zh-CN", viewport=PHONE, phone=True)
    tiles(page).nth(1).click()
    page.get_by_role("button", name="对比…").click()
    expect(page.locator("#gallery .keep-choosing")).to_contain_text("请选择第二张图片。")
    tiles(page).first.click()
    slider = page.get_by_role("slider", name="左右分界")
    expect(slider).to_be_focused()
    for key, value in (("ArrowRight", "52"), ("PageDown", "42"), ("Home", "0"), ("End", "100")):
        page.keyboard.press(key)
        expect(slider).to_have_attribute("aria-valuenow", value)
    box = page.locator(".compare-stage").bounding_box()
    assert box is not None and box["width"] <= PHONE["width"]
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 20)
    page.mouse.up()
    expect(slider).to_have_attribute("aria-valuenow", "25")
    rows = page.locator("#compare tbody tr")
    assert rows.all_inner_texts() == ["提示词\ta red circle\ta tree", "种子\t1\t2"]
    page.keyboard.press("Escape")
    expect(page.locator("#compare")).to_be_hidden()


def test_copied_commands_and_links_draw_what_they_were_copied_from(
    keeping: PageServer, open_page: OpenPage, tmp_path: Path
) -> None:
    page = open_page(keeping.url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    control(page, "prompt").fill(TRICKY)
    control(page, "negative").fill("it's blurry")
    control(page, "seed").fill("41")
    copied: dict[str, str] = {}
    for name in ("curl", "Python", "Link"):
        page.locator("#share").get_by_role("button", name=name, exact=True).click()
        expect(page.locator("#keep-note")).to_contain_text("on the clipboard")
        copied[name] = page.evaluate("navigator.clipboard.readText()")
        page.locator("#keep-note").get_by_role("button", name="Close").click()

    (tmp_path / "program.py").write_text(copied["Python"], encoding="utf-8")
    commands = (
        (["bash", "-c", copied["curl"]], "zimage.png"),
        ([sys.executable, "program.py"], "zimage-1.png"),
    )
    for command, file in commands:
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8"}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
        request = keeping.service.requests[-1]
        assert (request.prompt, request.negative_prompt) == (TRICKY, "it's blurry")
        assert (request.seed, request.num_inference_steps, request.guidance_scale) == (41, 8, 1.8)
        assert Image.open(tmp_path / file).size == (256, 256)

    # A page over plain HTTP from another machine has no clipboard.
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.locator("#share").get_by_role("button", name="Link", exact=True).click()
    area = page.locator("#keep-note textarea")
    expect(area).to_be_focused()
    assert area.evaluate("(a) => a.value.slice(a.selectionStart, a.selectionEnd)") == copied["Link"]

    asked: list[str] = []
    other = page.context.new_page()
    other.on("request", lambda request: asked.append(request.url))
    other.goto(copied["Link"])
    expect(control(other, "prompt")).to_have_value(TRICKY)
    expect(control(other, "seed")).to_have_value("41")
    expect(control(other, "negative")).to_have_value("it's blurry")
    assert "#" not in other.url
    assert not any("#p=" in url or copied["Link"].partition("#p=")[2][:40] in url for url in asked)
    for wrong in (
        "e30",
        "%%%",
        "bm90IGpzb24",
        _link({"prompt": 5}),
        _link({"prompt": "a", "evil": 1}),
        _link({"prompt": "a", "num_inference_steps": 1000}),
        _link(["a"]),
    ):
        other.evaluate("(wrong) => { location.hash = 'p=' + wrong }", wrong)
        expect(other.locator("#keep-note")).to_contain_text("broken or none of ours")
        other.locator("#keep-note").get_by_role("button", name="Close").click()
    expect(control(other, "prompt")).to_have_value(TRICKY)


def _link(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def test_a_dropped_pasted_or_chosen_picture_fills_the_controls(
    keeping: PageServer, open_page: OpenPage, tmp_path: Path
) -> None:
    have_kept(keeping, "a red circle")
    mine = httpx.get(keeping.url + kept(keeping)[0]["url"][1:]).content
    page = open_page(keeping.url)
    note = page.locator("#keep-note")
    drop(page, "mine.png", "image/png", mine)
    expect(control(page, "seed")).to_have_value("1")
    assert page.evaluate("window.veilSeen") == "Drop it: its settings fill the page"
    expect(page.locator("#keep-veil")).to_have_count(0)
    expect(note).to_contain_text("The settings of mine.png are in place.")
    page.locator("#generate").click()
    expect(tiles(page)).to_have_count(2)
    again = httpx.get(keeping.url + kept(keeping)[0]["url"][1:]).content
    assert Image.open(io.BytesIO(again)).tobytes() == Image.open(io.BytesIO(mine)).tobytes()
    assert keeping.service.requests[-1].seed == 1

    file = tmp_path / "theirs.png"
    told = PngInfo()
    told.add_text(
        "parameters",
        "a lighthouse <script>alert(1)</script>\nNegative prompt: fog\n"
        "Steps: 9, Sampler: Euler a, CFG scale: 2, Seed: 99, Size: 64x96, Clip skip: 2",
    )
    Image.new("RGB", (64, 96), "teal").save(file, pnginfo=told)
    page.locator("#share input[type=file]").set_input_files(file)
    expect(control(page, "prompt")).to_have_value("a lighthouse <script>alert(1)</script>")
    expect(control(page, "steps")).to_have_value("9")
    expect(note).to_contain_text("made by AUTOMATIC1111")
    expect(note).to_contain_text("Euler a")

    bare = io.BytesIO()
    Image.new("RGB", (8, 8)).save(bare, "png")
    drop(page, "bare.png", "image/png", bare.getvalue(), PASTE)
    expect(note).to_contain_text("No settings were read from bare.png.")
    drop(page, "broken.png", "image/png", b"\x89PNG but no more")
    expect(note).to_contain_text("No settings were read from broken.png.")
    drop(page, "notes.txt", "text/plain", b"hello")
    expect(note).to_contain_text("notes.txt is no PNG, WebP or JPEG")
    expect(control(page, "prompt")).to_have_value("a lighthouse <script>alert(1)</script>")


def test_a_grid_is_drawn_cell_by_cell_stopped_and_saved_as_one_sheet(
    keeping: PageServer, open_page: OpenPage
) -> None:
    page = open_page(keeping.url)
    grid = page.locator("#grid")
    told = grid.locator(".keep-told")
    grid.locator("summary").click()
    expect(told).to_have_text("4 pictures.")
    grid.get_by_role("button", name="Draw the grid").click()
    expect(told).to_have_text("Write in a few words what you want to see.")

    control(page, "prompt").fill("a red circle")
    control(page, "seed").fill("30")
    grid.get_by_role("button", name="Draw the grid").click()
    expect(told).to_have_text("All 4 pictures are drawn and kept.")
    assert [request.seed for request in keeping.service.requests] == [30, 31, 32, 33]
    expect(tiles(page)).to_have_count(4)

    grid.get_by_label("Steps and guidance").check()
    steps, guidance = grid.get_by_label("Steps", exact=True), grid.get_by_label("Guidance", exact=True)
    steps.fill("1,2,3,4,5,6")
    guidance.fill("1,1.2,1.4,1.6,1.8")
    expect(told).to_have_text("That would be 30 pictures; a grid has at most 25.")
    expect(grid.get_by_role("button", name="Draw the grid")).to_be_disabled()
    steps.fill("two")
    expect(told).to_contain_text("Steps are whole numbers from 1 to 100")
    steps.fill("2, 4")
    guidance.fill("1, 2.5")
    expect(told).to_have_text(re.compile(r"^4 pictures, about \d+ s\.$"))
    grid.get_by_role("button", name="Draw the grid").click()
    expect(told).to_have_text("All 4 pictures are drawn and kept.")
    assert [(r.num_inference_steps, r.guidance_scale, r.seed) for r in keeping.service.requests[4:]] == [
        (2, 1.0, 30),
        (4, 1.0, 30),
        (2, 2.5, 30),
        (4, 2.5, 30),
    ]
    assert grid.locator("th[scope=col]").all_inner_texts() == ["2 steps", "4 steps"]
    assert grid.locator("th[scope=row]").all_inner_texts() == ["CFG 1", "CFG 2.5"]
    grid.locator(".tile").nth(2).click()
    expect(page.locator("#viewer dl")).to_contain_text("2.5")
    page.keyboard.press("Escape")
    with page.expect_download() as download:
        grid.get_by_role("button", name="Download as one picture").click()
    assert download.value.suggested_filename == "zimage-grid-30.png"
    sheet = Image.open(Path(download.value.path())).convert("RGB")
    assert sheet.width > 2 * 256 and sheet.height > 2 * 256
    assert sheet.getpixel((120 + 12 + 128, 90 + 128)) == (255, 0, 0)

    keeping.service.step_seconds = 0.3
    drawn = len(keeping.service.requests)
    grid.get_by_role("button", name="Draw the grid").click()
    wait_until(page, lambda: len(keeping.service.requests) == drawn + 2)
    grid.get_by_role("button", name="Stop").click()
    expect(told).to_have_text("Stopped: 1 of 4 are drawn.")
    wait_until(page, lambda: keeping.service.cancelled == 1)
    expect(grid.get_by_role("button", name="Draw the grid")).to_be_focused()
    expect(tiles(page)).to_have_count(9)


def test_without_a_history_the_page_says_so_and_grids_are_drawn_all_the_same(open_page: OpenPage) -> None:
    with keeping_page(None, KeepingService(step_seconds=0.01)) as server:
        page = open_page(server.url)
        expect(page.locator("#gallery .keep-told")).to_have_text("This server does not keep pictures.")
        expect(page.get_by_placeholder("Search the prompts")).to_be_hidden()
        control(page, "prompt").fill("a red circle")
        page.locator("#grid summary").click()
        page.locator("#grid").get_by_role("button", name="Draw the grid").click()
        expect(page.locator("#grid .keep-told")).to_contain_text("All 4 pictures")
        page.locator("#grid .tile").first.click()
        with page.expect_download() as download:
            page.locator("#viewer").get_by_role("link", name="PNG").click()
        assert Path(download.value.path()).read_bytes() == server.service.replies[0].pictures[0]
