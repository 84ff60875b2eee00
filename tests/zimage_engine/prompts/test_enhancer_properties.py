"""What holds of every enhancement, in both languages, however the prompt is made up."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_engine.prompts.enhancer import because, enhance
from zimage_engine.prompts.phrases import LANGUAGES, lexicon
from zimage_engine.prompts.tokens import PromptTokens, prompt_tokens

SUBJECTS = ["a fox", "an old man", "一只猫", "少女", "two boats", "红色圆形", 'a 27" monitor', "猫の絵", "🐈"]
SUBJECTS += ["Zoë's café", "U.S. mail", "１２ cats"]
WISHES = ["minimalist", "flat design", "blurry background", "夜景", "low key", "pixel art", "sketch", "bokeh"]
WISHES += [
    "golden hour",
    "柔光",
    "极简",
    "8k",
    "细节丰富",
    "masterpiece",
    "杰作",
    "Best-Quality",
    "VHS",
    "儿童画",
]
WISHES += [
    "cubist",
    "not blurry",
    "不要景深",
    "no bokeh",
    "neon lights",
    "霓虹灯",
    "deformed",
    "畸形",
    "水墨画",
]
WISHES += ["sharp focus", "电影级光影"]
QUOTED = ['"OPEN 24 HOURS"', "“春风又绿”", "「面馆」", "'FLAT'", '"blurry"', "“极简”"]
WEIGHED = [
    "(neon lights:1.3)",
    "[fog]",
    "((sketch))",
    "[red|blue]",
    "<lora:best_quality:1>",
    "{x}",
    "（雾:0.8）",
]
LOOSE = ["", " ", ".", "...", "U.S.", "不", "no", "without", '"', "“", "(", "\n", "。", "!", "！"]
JOINTS = [", ", "，", " ", "。", ". ", "\n", ""]


@st.composite
def prompts(draw: st.DrawFn) -> str:
    pieces = st.sampled_from(SUBJECTS + WISHES + QUOTED + WEIGHED + LOOSE) | st.text(max_size=5)
    text = draw(st.sampled_from(SUBJECTS))
    for piece in draw(st.lists(pieces, max_size=8)):
        text += draw(st.sampled_from(JOINTS)) + piece
    return text


@cache
def tokens() -> PromptTokens:
    """The demo model's own tokenizer."""
    file = resources.files("zimage_engine") / "demo" / "model" / "tokenizer" / "tokenizer.json"
    return prompt_tokens(file.read_text("utf-8"))


#: The same examples in every run, so that a fault is the change's own.
MANY = settings(max_examples=250, deadline=None, derandomize=True)
limits = st.none() | st.integers(1, 60)


@MANY
@given(prompts(), st.none() | prompts(), limits)
def test_enhancing_what_was_enhanced_changes_nothing(
    prompt: str, negative: str | None, limit: int | None
) -> None:
    once = enhance(prompt, negative, count_tokens=tokens().count, token_limit=limit)
    again = enhance(once.prompt, once.negative_prompt, count_tokens=tokens().count, token_limit=limit)
    assert (again.prompt, again.negative_prompt) == (once.prompt, once.negative_prompt)
    assert (again.additions, again.language) == ((), once.language)
    assert enhance(prompt, negative, count_tokens=tokens().count, token_limit=limit) == once


@MANY
@given(prompts(), st.none() | prompts(), limits)
def test_every_word_quote_and_weight_of_the_callers_stays_in_its_place(
    prompt: str, negative: str | None, limit: int | None
) -> None:
    enhanced = enhance(prompt, negative, count_tokens=tokens().count, token_limit=limit)
    for theirs, ours in ((prompt, enhanced.prompt), (negative or "", enhanced.negative_prompt)):
        assert ours.startswith(re.sub(r"[.。]?\s*\Z", "", theirs))
        for kept in QUOTED + WEIGHED:
            assert ours.count(kept) == theirs.count(kept)


@MANY
@given(prompts(), st.none() | prompts(), st.integers(1, 80))
def test_the_limit_is_kept_and_own_words_go_first(prompt: str, negative: str | None, limit: int) -> None:
    count = tokens().count
    free = enhance(prompt, negative)
    bound = enhance(prompt, negative, count_tokens=count, token_limit=limit)
    for theirs, ours, added, whole in (
        (prompt, bound.prompt, bound.added, free.added),
        (negative or "", bound.negative_prompt, bound.added_negative, free.added_negative),
    ):
        assert added == whole[: len(added)]
        assert count(ours) <= limit or ours == theirs
    cut = tokens().cut(bound.prompt, limit)
    assert (cut is None) == (count(bound.prompt) <= limit)


@MANY
@given(prompts(), st.none() | prompts(), limits)
def test_every_phrase_of_the_enhancers_says_why(prompt: str, negative: str | None, limit: int | None) -> None:
    enhanced = enhance(prompt, negative, count_tokens=tokens().count, token_limit=limit)
    words = lexicon(enhanced.language)
    choices = enhanced.additions + enhanced.left_out
    assert sorted(choice.phrase for choice in choices) == sorted(
        phrase.text for phrase in words.positive + words.negative
    )
    assert enhanced.added + enhanced.added_negative == tuple(choice.phrase for choice in enhanced.additions)
    for choice in choices:
        assert (choice.reason == "missing") == (choice in enhanced.additions)
        assert bool(choice.about) == (choice.reason not in ("missing", "no_room"))
        assert because(choice, "en") == choice.because
        assert re.search("[\u4e00-\u9fff]", because(choice, "zh"))


#: What a person asks for, and what must then not be put into the prompt or the negative prompt.
AGAINST = [
    ("minimalist poster", {"ultra-detailed"}, set()),
    ("极简海报", {"ultra-detailed"}, set()),
    ("flat illustration", {"ultra-detailed", "cinematic lighting"}, set()),
    ("扁平插画", {"ultra-detailed", "cinematic lighting"}, set()),
    ("rough sketch", {"ultra-detailed", "cinematic lighting"}, set()),
    ("素描", {"ultra-detailed", "cinematic lighting"}, set()),
    ("pixel art", {"ultra-detailed", "cinematic lighting"}, set()),
    ("像素画", {"ultra-detailed", "cinematic lighting"}, set()),
    ("blurry background", {"sharp focus"}, {"blurry"}),
    ("背景模糊", {"sharp focus"}, {"blurry"}),
    ("creamy bokeh", {"sharp focus"}, {"blurry"}),
    ("背景虚化", {"sharp focus"}, {"blurry"}),
    ("out of focus", {"sharp focus"}, {"blurry"}),
    ("长曝光", {"sharp focus"}, {"blurry"}),
    ("night scene", {"cinematic lighting"}, set()),
    ("夜景", {"cinematic lighting"}, set()),
    ("low key", {"cinematic lighting"}, set()),
    ("低调", {"cinematic lighting"}, set()),
    ("soft window light", {"cinematic lighting"}, set()),
    ("逆光", {"cinematic lighting"}, set()),
    ("golden hour", {"cinematic lighting"}, set()),
    ("黄昏", {"cinematic lighting"}, set()),
    ("水墨画", {"sharp focus", "cinematic lighting", "ultra-detailed"}, {"blurry"}),
    ("a distorted face", set(), {"deformed", "bad anatomy", "disfigured", "poorly drawn face"}),
    ("扭曲的脸", set(), {"deformed", "bad anatomy", "disfigured", "poorly drawn face"}),
    ("CCTV still", {"masterpiece", "best quality", "ultra-detailed", "sharp focus"}, {"blurry"}),
    ("录像带画面", {"masterpiece", "best quality", "ultra-detailed", "sharp focus"}, {"blurry"}),
    ("a deformed monster", set(), {"deformed"}),
]
NEUTRAL = ["a fox", "一只猫", "two boats", "红色的房子", '"OPEN"', "“营业中”", "(hat:1.2)", "neon lights"]


@pytest.mark.parametrize(
    ("wish", "unwanted", "never_negative"), AGAINST, ids=[wish for wish, _, _ in AGAINST]
)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(NEUTRAL), max_size=4), st.lists(st.sampled_from(NEUTRAL), max_size=4))
def test_nothing_is_added_against_what_is_asked_for(
    wish: str, unwanted: set[str], never_negative: set[str], before: list[str], behind: list[str]
) -> None:
    for separator, ours in ((", ", wish), ("，", f"({wish}:1.2)")):
        enhanced = enhance(separator.join([*before, ours, *behind]), None)
        assert not unwanted & meanings(enhanced.added)
        assert not never_negative & meanings(enhanced.added_negative)


@pytest.mark.parametrize("wish", [wish for wish, unwanted, never in AGAINST if wish.isascii()])
def test_what_is_quoted_is_drawn_and_asks_for_nothing(wish: str) -> None:
    enhanced = enhance(f'a poster that says "{wish}"', None)
    assert len(enhanced.added) == 5
    # What stands in the picture is not put into the negative prompt either.
    assert [phrase for phrase in enhanced.added_negative if phrase in wish] == []


@pytest.mark.parametrize(
    ("negative", "unwanted"),
    [
        ("dramatic lighting, text", {"cinematic lighting"}),
        ("戏剧性光线", {"cinematic lighting"}),
        ("intricate details", {"ultra-detailed"}),
        ("masterpiece", {"masterpiece"}),
        ("text, watermark", set()),
    ],
)
def test_the_negative_prompt_keeps_phrases_out(negative: str, unwanted: set[str]) -> None:
    enhanced = enhance("a fox", negative)
    assert meanings(enhanced.added) == {phrase.meaning for phrase in lexicon("en").positive} - unwanted
    assert {choice.reason for choice in enhanced.left_out if choice.field == "prompt"} <= {"refused"}


def meanings(phrases: tuple[str, ...]) -> set[str]:
    return {
        phrase.meaning
        for language in LANGUAGES
        for phrase in lexicon(language).positive + lexicon(language).negative
        if phrase.text in phrases
    }
