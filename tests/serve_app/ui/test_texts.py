"""The page's sentences: both languages are there, and say the same fields."""

from __future__ import annotations

import string

import pytest

from serve_app.error_mapping import ROWS
from serve_app.ui.texts import (
    LABELS,
    MESSAGES,
    NOTICES_IN_CHINESE,
    REFUSALS_IN_CHINESE,
    SCRIPT_TEXTS,
    Text,
    language_of,
    notice_sentence,
    refusal_in_chinese,
    say,
    translations,
)
from tests.serve_app.ui.painting_service import MODEL
from zimage_engine import quality
from zimage_engine.sampling.plan import resolve
from zimage_engine.types import GenerationRequest, Notice

ALL = [
    pytest.param(text, id=f"{table}: {key}")
    for table, texts in (("label", LABELS), ("message", MESSAGES), ("script", SCRIPT_TEXTS))
    for key, text in texts.items()
]


def fields(sentence: str) -> set[str | None]:
    return {field for _, field, _, _ in string.Formatter().parse(sentence) if field}


@pytest.mark.parametrize("text", ALL)
def test_every_text_has_both_languages(text: Text) -> None:
    assert text.en.strip() and text.en.isprintable()
    assert any("\u4e00" <= sign <= "\u9fff" for sign in text.zh)
    assert not any("\u4e00" <= sign <= "\u9fff" for sign in text.en)


@pytest.mark.parametrize("text", ALL)
def test_both_languages_fill_in_the_same_fields(text: Text) -> None:
    assert fields(text.en) == fields(text.zh)


@pytest.mark.parametrize(
    ("locale", "language"),
    [("en", "en"), ("zh-CN", "zh"), ("zh-TW", "zh"), ("de", "en"), ("", "en"), (None, "en")],
)
def test_the_locale_chooses_the_language(locale: str | None, language: str) -> None:
    assert language_of(locale) == language


def test_the_browser_gets_every_label_for_every_locale() -> None:
    assert {locale: set(labels) for locale, labels in translations().items()} == {
        locale: set(LABELS) for locale in ("en", "zh-CN", "zh-TW")
    }


def test_fields_are_filled_in() -> None:
    assert say("detail", "en", step=6, steps=8) == "Step 6 of 8: detail"
    assert say("detail", "zh", step=6, steps=8) == "第 6/8 步：画细节"


def test_every_refusal_of_the_server_has_chinese_words() -> None:
    connection_still_open = {row.code for row in ROWS.values() if row.status != 499}
    assert connection_still_open <= set(REFUSALS_IN_CHINESE)
    assert refusal_in_chinese("never_heard_of") == ""


def test_the_plans_warnings_have_chinese_words() -> None:
    plan = resolve(GenerationRequest("a tree", num_inference_steps=20, guidance_scale=4.0), MODEL)
    assert len(plan.warnings) == 2
    assert {warning.code for warning in plan.warnings} <= set(NOTICES_IN_CHINESE)


def test_what_the_picture_check_tells_has_chinese_words() -> None:
    assert set(quality.CODES) <= set(NOTICES_IN_CHINESE)


def test_a_warning_that_we_have_no_chinese_for_is_told_as_it_came() -> None:
    unknown = Notice("moon_phase", "the moon is full")
    assert notice_sentence(unknown, "zh") == notice_sentence(unknown, "en") == "the moon is full"
