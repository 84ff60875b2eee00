"""The controls of the page in a real browser: what they show while one writes, and what they ask for."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from serve_app.live_settings import at_start
from serve_app.model_list import ModelState
from serve_app.settings import load_settings
from tests.browser.board import ask, wait_for_picture, wait_until
from tests.browser.conftest import DESKTOP, PHONE, OpenPage, PageServer
from tests.serve_app.ui.painting_service import MODEL
from zimage_engine.prompts.tokens import PromptTokens
from zimage_engine.types import LoraChoice, LoraOffer

pytestmark = pytest.mark.browser

#: What a page does at once when somebody looks at it again, and every few seconds else.
_LOOK_AT_IT_AGAIN = "document.dispatchEvent(new Event('visibilitychange'))"


def prompt_of(page: Page) -> Any:
    return page.locator("#prompt textarea")


def words_of(page: Page, kind: str) -> Any:
    return page.locator(f"#keywords .{kind} span")


def look_until_it_says(page: Page, place: str, words: str) -> None:
    """Instead of waiting for the page's own next look at the server, which is seconds away."""

    def says() -> bool:
        page.evaluate(_LOOK_AT_IT_AGAIN)
        return page.locator(place).inner_text().strip() == words

    wait_until(page, says, 10)


def a_word_a_token() -> PromptTokens:
    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PromptTokens(tokenizer)


def test_what_is_written_is_recognised_and_what_will_be_added_is_explained(
    page_server: PageServer, open_page: OpenPage
) -> None:
    page_server.service.tokens = a_word_a_token()
    page_server.service.model = replace(MODEL, token_limit=12)
    page = open_page(page_server.url)
    prompt_of(page).press_sequentially("🎨 minimalist poster of a red fox, oil painting")
    expect(words_of(page, "style").last).to_have_text("oil painting")
    expect(words_of(page, "subject").first).to_have_text("fox")
    expect(prompt_of(page)).to_be_focused()
    assert page.locator("#keywords [aria-live], #keywords [role=status]").count() == 0
    summary = page.locator("#enhance-preview summary")
    expect(summary).to_contain_text("Will add: masterpiece")
    summary.click()
    expect(page.locator("#enhance-preview .respected")).to_contain_text("minimalist")
    assert page_server.service.requests == []
    # Too long: the words behind the twelfth token are told, whatever stands before them.
    prompt_of(page).fill("🎨 " + "fox " * 11 + "lighthouse sea")
    expect(page.locator("#keywords .room")).to_contain_text("It will not read: “lighthouse sea”")
    page.locator("#enhance input[type=checkbox]").uncheck()
    expect(summary).to_have_text("Drawn from your words as they are.")
    prompt_of(page).fill("")
    expect(page.locator("#keywords li")).to_have_count(0)


def test_an_input_method_is_left_alone_until_its_text_stands(
    page_server: PageServer, open_page: OpenPage
) -> None:
    page = open_page(page_server.url, locale="zh-CN")
    asked: list[str] = []
    page.on(
        "request", lambda request: asked.append(request.post_data or "") if "analyze" in request.url else 0
    )
    prompt_of(page).focus()
    keyboard = page.context.new_cdp_session(page)
    keyboard.send("Input.imeSetComposition", {"text": "ye jing", "selectionStart": 7, "selectionEnd": 7})
    expect(prompt_of(page)).to_have_value("ye jing")
    keyboard.send("Input.insertText", {"text": "夜景，“春风”招牌"})
    expect(words_of(page, "scene")).to_have_text("夜景")
    expect(words_of(page, "quoted")).to_have_text("“春风”")
    expect(page.locator("#keywords .scene b")).to_have_text("场景")
    expect(prompt_of(page)).to_have_value("夜景，“春风”招牌")
    assert not [body for body in asked if "ye jing" in body]
    expect(page.locator("#enhance-preview summary")).to_contain_text("将补充")


def test_sizes_snap_visibly_profiles_set_the_sliders_and_warnings_stop_nobody(
    page_server: PageServer, open_page: OpenPage
) -> None:
    page_server.service.loaded = False
    page = open_page(page_server.url)
    expect(page.locator("#status .status")).to_have_text("The model is loading…")
    size, note = page.locator("#size input"), page.locator("#size-note .note")
    size.fill("640x480")
    page_server.service.loaded = True
    expect(page.locator("#badge")).to_have_text("Steps: 8 | CFG: 1.8 | bfloat16")
    expect(size).to_have_value("640x480")
    size.fill("1000 x 250")
    expect(note).to_contain_text("1000 → 992, 250 → 256")
    size.press("Enter")
    expect(size).to_have_value("992 × 256")
    expect(note).to_contain_text("1000 → 992, 250 → 256: the model draws in multiples of 32")
    page.locator("#aspect").get_by_role("radio", name="16:9").check()
    expect(size).to_have_value("352 × 192")

    page.locator("#profile").get_by_role("radio", name="Draft").check()
    expect(page.locator("#badge")).to_have_text("Steps: 4 | CFG: 1.0 | bfloat16")
    expect(page.locator("#refine input[type=checkbox]")).not_to_be_checked()
    expect(page.locator("#guidance-note")).to_contain_text("Guidance is off")
    expect(page.locator("#steps-note .note.warning")).to_have_count(0)
    page.locator("#steps input[type=number]").fill("14")
    page.locator("#guidance input[type=number]").fill("4")
    expect(page.locator("#steps-note .note.warning")).to_contain_text("Above 12")
    expect(page.locator("#guidance-note .note.warning")).to_contain_text("Above 2.5")
    expect(page.locator("#profile input:checked")).to_have_count(0)
    good = "(e) => [e.style.getPropertyValue('--good-from'), e.style.getPropertyValue('--good-to')]"
    assert page.locator("#steps").evaluate(good) == ["0.1579", "0.5789"]
    prompt_of(page).fill("a fox")
    prompt_of(page).press("Control+Enter")
    wait_for_picture(page)
    (request,) = page_server.service.requests
    assert (request.width, request.height, request.num_inference_steps) == (352, 192, 14)
    assert request.guidance_scale == 4.0


def test_several_pictures_dice_and_lock(page_server: PageServer, open_page: OpenPage) -> None:
    page = open_page(page_server.url)
    seed = page.locator("#seed input")
    page.evaluate(
        "window.drawn = []; window.addEventListener('zimage:drawn', (event) => drawn.push(event.detail))"
    )
    page.locator("#count").get_by_role("radio", name="4").check()
    page.locator("#seed-tools .dice").click()
    expect(seed).to_have_value(re.compile(r"^\d+$"))
    first = int(seed.input_value())
    ask(page, "a red circle")
    wait_for_picture(page)
    expect(page.locator("#pictures figure")).to_have_count(4)
    expect(page.locator("#pictures figcaption b")).to_have_text([str(first + number) for number in range(4)])
    expect(page.locator("#picture")).to_be_hidden()
    told = page.evaluate("window.drawn")
    assert [each["parameters"]["seed"] for each in told] == [first + number for number in range(4)]
    with page.expect_download() as download:
        page.locator("#pictures figure a").nth(2).click()
    assert download.value.suggested_filename == f"zimage-{first + 2}.png"
    page.locator("#pictures .larger").nth(1).click()
    expect(page.locator("#pictures figure:visible")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator("#pictures figure:visible")).to_have_count(4)
    page.locator("#pictures .use-seed").nth(3).click()
    expect(seed).to_have_value(str(first + 3))

    seed.fill("")
    page.locator("#count").get_by_role("radio", name="1", exact=True).check()
    page.locator("#seed-tools .lock").click()
    expect(seed).to_have_value(str(first))
    page.locator("#generate").click()
    wait_until(page, lambda: len(page_server.service.replies) == 2)
    expect(page.locator("#picture")).to_be_visible()
    page.locator("#seed-tools .lock").click()
    expect(seed).to_have_value("")
    assert [(request.n, request.seed) for request in page_server.service.requests] == [(4, first), (1, first)]


def test_models_loras_and_defaults_of_the_server_reach_the_open_page(
    page_server: PageServer, open_page: OpenPage
) -> None:
    service = page_server.service
    sketch = replace(MODEL, id="sketch", default_steps=4, native_width=512, native_height=512)
    service.others = (ModelState("sketch", (), "not_loaded", "a"),)
    service.loras = (
        LoraOffer("ink", 1000, trigger_words=("inked",)),
        LoraOffer("of-another-model", 1000, refusal="it is made for another model"),
    )
    page = open_page(page_server.url)
    chosen = page.locator("#model select")
    expect(chosen.locator("option")).to_have_text(
        ["disc-painter (loaded)", "sketch (loaded when it first draws)"]
    )
    expect(page.locator("#loras .lora")).to_have_count(1)
    expect(page.locator("#loras .lora")).to_contain_text("inked")
    page.locator("#loras").get_by_role("checkbox", name="ink").check()
    page.locator("#loras").get_by_role("slider", name="Weight of ink").fill("0.6")
    chosen.select_option("sketch")
    service.others = (ModelState("sketch", (), "ready", "a", description=sketch),)
    look_until_it_says(page, "#model option:last-child", "sketch (loaded)")
    expect(page.locator("#size input")).to_have_value("512 × 512")
    expect(page.locator("#badge")).to_have_text("Steps: 4 | CFG: 1.8 | bfloat16")
    chosen.select_option("disc-painter")
    expect(page.locator("#size input")).to_have_value("256 × 256")

    # The operator changes defaults: what was moved stays, the rest follows.
    page.locator("#guidance input[type=number]").fill("2.2")
    service.model = replace(MODEL, default_steps=6, default_guidance_scale=2.0)
    service.live = at_start(load_settings()).model_copy(update={"default_enhance": False})
    service.waiting, service.drawing, service.workers = 2, 3, 2
    look_until_it_says(page, "#badge", "Steps: 6 | CFG: 2.2 | bfloat16")
    expect(page.locator("#enhance input[type=checkbox]")).not_to_be_checked()
    expect(page.locator("#status .workers")).to_have_text("2 workers")
    expect(page.locator("#status .queue")).to_have_text("drawing 3, 2 waiting")
    ask(page, "a fox")
    wait_for_picture(page)
    (request,) = service.requests
    assert (request.loras, request.model) == ((LoraChoice("ink", 0.6),), None)


def test_all_is_set_and_read_in_one_way_and_stays_over_a_reload(
    page_server: PageServer, open_page: OpenPage
) -> None:
    page = open_page(page_server.url)
    expect(page.locator("#size input")).to_have_value("256 × 256")
    fields = {
        "prompt": "一只狐狸",
        "negative_prompt": "文字",
        "size": "320x224",
        "num_inference_steps": 5,
        "guidance_scale": 2.1,
        "seed": 0,
        "enhance": False,
        "refine": False,
        "n": 2,
        "exact": True,
    }
    page.evaluate(
        "(detail) => window.dispatchEvent(new CustomEvent('zimage:parameters', {detail}))",
        {**fields, "loras": ["ink=0.5"]},
    )
    expect(page.locator("#size input")).to_have_value("320 × 224")
    read = {**fields, "loras": [{"name": "ink", "weight": 0.5}]}
    assert page.evaluate("window.zimageParameters()") == read
    # What is absent stays, null empties.
    page.evaluate(
        "window.dispatchEvent(new CustomEvent('zimage:parameters', {detail: {seed: null, loras: null}}))"
    )
    expect(page.locator("#seed input")).to_have_value("")
    page.locator("#language-switch button").click()
    expect(page.locator("#generate")).to_have_text("开始画")
    expect(page.locator("#count legend")).to_have_text("张数")
    expect(page.locator("#size input")).to_have_value("320 × 224")
    assert page.evaluate("window.zimageParameters()") == {
        key: value for key, value in fields.items() if key != "seed"
    }
    page.locator("#generate").click()
    wait_for_picture(page)
    (request,) = page_server.service.requests
    assert (request.prompt, request.width, request.num_inference_steps, request.n) == ("一只狐狸", 320, 5, 2)
    assert request.exact
    exact = page.locator("#count .exact")
    expect(exact).to_contain_text("逐位一致")
    exact.get_by_role("checkbox").click()  # and it is gone
    expect(exact).to_have_count(0)
    assert "exact" not in page.evaluate("window.zimageParameters()")
    page.locator("#language-switch button").click()
    expect(page.locator("#generate")).to_have_text("Draw")


def test_colours_follow_the_system_until_a_person_chooses(
    page_server: PageServer, open_page: OpenPage
) -> None:
    page = open_page(page_server.url)
    body, switch = page.locator("body"), page.locator("#theme-switch button")
    expect(body).not_to_have_class(re.compile(r"\bdark\b"))
    page.emulate_media(color_scheme="dark")
    expect(body).to_have_class(re.compile(r"\bdark\b"))
    expect(switch).to_have_accessible_name("Colours: as the system")
    switch.click()
    expect(switch).to_have_accessible_name("Colours: light")
    expect(body).not_to_have_class(re.compile(r"\bdark\b"))
    page.reload()
    page.locator("#badge .badge").wait_for()
    expect(body).not_to_have_class(re.compile(r"\bdark\b"))
    page.emulate_media(color_scheme="light")
    page.locator("#theme-switch button").click()
    expect(body).to_have_class(re.compile(r"\bdark\b"))
    expect(page.locator("html")).to_have_css("color-scheme", "dark")


@pytest.mark.parametrize(("viewport", "phone"), [(DESKTOP, False), (PHONE, True)], ids=["desktop", "phone"])
def test_nothing_jumps_while_one_writes_and_the_bar_stands_in_the_corner(
    page_server: PageServer, open_page: OpenPage, viewport: dict[str, int], phone: bool
) -> None:
    page = open_page(page_server.url, viewport=viewport, phone=phone)
    expect(page.locator("#size input")).to_have_value("256 × 256")
    top = page.locator("#generate").bounding_box()
    prompt_of(page).fill("a fox")
    expect(words_of(page, "subject")).to_have_text("fox")
    assert page.locator("#generate").bounding_box() == top
    bar = page.locator("#status").bounding_box()
    assert bar is not None
    assert 0 <= viewport["width"] - (bar["x"] + bar["width"]) <= 24 and bar["x"] >= 0
    assert 0 <= viewport["height"] - (bar["y"] + bar["height"]) <= 24
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


#: Eight hours have 7,200 looks at the server; what one of them left behind would show after a few hundred.
LOOKS = 300


def test_an_open_page_that_looks_again_and_again_changes_and_gathers_nothing(
    page_server: PageServer, open_page: OpenPage
) -> None:
    page = open_page(page_server.url)
    expect(page.locator("#size input")).to_have_value("256 × 256")
    prompt_of(page).fill("a fox, oil painting")
    expect(words_of(page, "style")).to_have_text("oil painting")
    expect(page.locator("#enhance-preview summary")).to_contain_text("Will add")
    look = f"""async (times) => {{
      const shown = () => new Promise((done) => addEventListener("zimage:status", done, {{once: true}}));
      let changes = 0;
      const watching = new MutationObserver((found) => (changes += found.length));
      watching.observe(document.querySelector(".gradio-container"), {{
        subtree: true, childList: true, attributes: true, characterData: true,
      }});
      for (let time = 0; time < times; time++) {{ const done = shown(); {_LOOK_AT_IT_AGAIN}; await done; }}
      watching.disconnect();
      return changes;
    }}"""
    inside = page.context.new_cdp_session(page)
    inside.send("Performance.enable")

    def gathered() -> dict[str, float]:
        inside.send("HeapProfiler.collectGarbage")
        metrics = inside.send("Performance.getMetrics")["metrics"]
        counted = ("Nodes", "JSEventListeners")
        return {each["name"]: each["value"] for each in metrics if each["name"] in counted}

    page.evaluate(look, 10)
    before = gathered()
    # Nothing that is the same is written again: it neither flickers nor is read out.
    assert page.evaluate(look, LOOKS) == 0
    after = gathered()
    assert after["Nodes"] <= before["Nodes"] + 50
    assert after["JSEventListeners"] <= before["JSEventListeners"] + 10
