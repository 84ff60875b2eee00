"""The analyzer tells what each word speaks of, in both languages, and quickly."""

from __future__ import annotations

import time
import tomllib
from collections import Counter
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_engine.prompts.analyzer import analyze
from zimage_engine.prompts.phrases import LANGUAGES, read_lexicon_file
from zimage_engine.types import Kind

ALL_KINDS = {"subject", "style", "material", "light", "scene", "quality", "quoted"}


#: Words that begin or end with a shorter one, or are one character, of another kind or of none.
NOT_ONE_CHARACTER = (
    *("冰箱", "玉米", "河马", "蜗牛", "海鸥", "牛油果", "山羊", "龙井茶", "风衣", "手链", "羊毛衫"),
    *("人", "男", "女", "墙", "石榴", "鞋"),
)


def vocabulary(language: str) -> dict[str, dict[str, list[str]]]:
    file = resources.files("zimage_engine.prompts") / "lexicon" / f"words_{language}.toml"
    return tomllib.loads(file.read_text("utf-8"))


def kinds(prompt: str) -> list[tuple[Kind, str]]:
    return [(span.kind, span.text) for span in analyze(prompt)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # However it is written.
        ("LOW-KEY portrait", [("light", "LOW-KEY"), ("subject", "portrait")]),
        ("lowkey, low_key, low  key", [("light", "lowkey"), ("light", "low_key"), ("light", "low  key")]),
        ("Ｗａｔｅｒｃｏｌｏｒ", [("style", "Ｗａｔｅｒｃｏｌｏｒ")]),
        (
            "butterflies, cities of glass",
            [("subject", "butterflies"), ("scene", "cities"), ("material", "glass")],
        ),
        ("極簡主義，電影海報", [("style", "極簡主義"), ("style", "電影海報")]),
        # The longest wording wins.
        ("studio lighting in a studio", [("light", "studio lighting"), ("scene", "studio")]),
        ("山水画里的山", [("style", "山水画"), ("scene", "山")]),
        ("一只长颈鹿和一只鹿", [("subject", "长颈鹿"), ("subject", "鹿")]),
        # A thing is no style.
        ("一座标志性建筑，包上的商标", [("subject", "建筑"), ("subject", "商标")]),
        ("笔记本电脑上贴满贴纸", [("subject", "笔记本电脑")]),
        ("拍立得相机，夜莺", [("subject", "拍立得相机"), ("subject", "夜莺")]),
        ("客厅里挂着抽象画", [("scene", "客厅")]),
        ("抽象的想法", []),
        ("低调的人，身材扁平", [("subject", "人")]),
        ("低调的光线", [("light", "低调的光线")]),
        ("a logo on his shirt", []),
        (
            "a fox logo on a white background",
            [("subject", "fox"), ("style", "logo"), ("scene", "white background")],
        ),
        ("a sticker on a laptop", []),
        ("VHS tapes, a polaroid camera", [("subject", "VHS tapes"), ("subject", "polaroid camera")]),
        ("a webcam on a desk", [("subject", "desk")]),
        # One character is not read out of another word.
        ("钢铁侠，马来西亚，马尾辫，江湖", []),
        *[(word, [("subject", word)]) for word in NOT_ONE_CHARACTER],
        ("手绘，水", [("style", "手绘"), ("scene", "水")]),
        ("牛肉麵，麵條", [("subject", "牛肉麵"), ("subject", "麵條")]),
        # Parts of other words are nothing.
        ("a flat tire, nightclub, catalog", []),
        ("马上就到上海", []),
        # Signs belong to no word, and nothing is found across them.
        ("(bokeh:1.2), [fog], {lace}", [("quality", "bokeh"), ("scene", "fog"), ("material", "lace")]),
        ("soft, light", []),
        ("<lora:sketch_watercolor:0.8> fox", [("subject", "fox")]),
        # Quoted text is a kind of its own, and only where the quotation is whole.
        ('a "night sketch" sign', [("quoted", '"night sketch"'), ("subject", "sign")]),
        ("招牌写着「夜景」", [("subject", "招牌"), ("quoted", "「夜景」")]),
        ("the cat's 'big' hat", [("quoted", "'big'"), ("subject", "hat")]),
        ('a sign saying "sketch', [("subject", "sign"), ("style", "sketch")]),
        ('a 27" monitor and a 13" laptop', [("subject", "laptop")]),
        ('"" and “ ”', []),
        # Both languages in one prompt.
        (
            "赛博朋克girl在neon lights下",
            [("style", "赛博朋克"), ("subject", "girl"), ("light", "neon lights")],
        ),
        ("", []),
    ],
)
def test_words_are_found_by_kind(prompt: str, expected: list[tuple[Kind, str]]) -> None:
    assert kinds(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "weight"),
    [
        ("fox", 1.0),
        ("(fox:1.3)", 1.3),
        ("((fox))", 1.21),
        ("[fox]", 0.909),
        ("((fox:1.5), cat)", 1.65),
        (r"\(fox\)", 1.0),
        ("[fox|cat]", 1.0),
        ("[fox:cat:0.5]", 1.0),
        ("(fox", 1.0),
        ("fox)", 1.0),
        ("(fox:0)", 1.0),
        ("(" * 2000 + "fox" + ")" * 2000, 100.0),
    ],
)
def test_brackets_weigh_what_they_hold(prompt: str, weight: float) -> None:
    assert analyze(prompt)[0].weight == weight


@pytest.mark.parametrize(
    ("prompt", "negated"),
    [
        ("no bokeh, soft focus", [True, False]),
        ("without any fog", [True]),
        ("not too sharp", [True]),
        ("不要景深，柔焦", [True, False]),
        ("没有任何雾", [True]),
        ("特别模糊", [False]),
        ("别模糊", [True]),
        ("未模糊", [True]),
        ("非模糊", [True]),
        ("非常朦胧，南非草原", [False, False]),
        ("去除模糊，拒绝景深，去掉雾", [True, True, True]),
        ("don't make it blurry", [True]),
        ("Don’t blur", [True]),
        ("no blur or distortion", [True, True]),
        ("不要模糊和变形", [True, True]),
        ("不要模糊、雾或者景深，柔焦", [True, True, True, False]),
        ("no blur, soft focus and fog", [True, False, False]),
        ("没有人的花园和湖", [True, False, False]),
        ("piano, fog", [False, False]),
    ],
)
def test_what_is_warned_of_is_told_apart(prompt: str, negated: list[bool]) -> None:
    assert [span.is_negated for span in analyze(prompt)] == negated


@pytest.mark.parametrize(
    ("prompt", "word", "kind"),
    [
        ("a girl holding a poster", "poster", "subject"),
        ("a girl holding her old comic books", "comic books", "subject"),
        ("moonlight on a van with logos", "logos", "subject"),
        ("a dress with a floral pattern", "pattern", "subject"),
        ("two people looking at an oil painting", "oil painting", "subject"),
        ("男孩拿着一张海报", "海报", "subject"),
        ("墙上挂着油画", "油画", "subject"),
        ("sticker of a fox", "sticker", "style"),
        ("a boy in a hat, comic book", "comic book", "style"),
        ("a fox with a poster design", "poster", "style"),
        ("kawaii sticker", "sticker", "style"),
        ("海报，男孩", "海报", "style"),
        ("拿着海报风格的书", "海报", "style"),
    ],
)
def test_a_noun_is_a_style_where_it_is_no_thing_in_the_picture(prompt: str, word: str, kind: Kind) -> None:
    assert kind in [span.kind for span in analyze(prompt) if span.text == word]


def test_nouns_that_are_things_at_times_are_styles_of_the_lexicons() -> None:
    for language in LANGUAGES:
        rows = read_lexicon_file("things")[language]
        for noun in rows["nouns"]:
            assert "style" in [span.kind for span in analyze(noun)], noun
            assert "style" not in [span.kind for span in analyze(f"{rows['placed_by'][0]} {noun}")], noun


def test_both_lexicons_speak_of_the_same_things_and_no_word_stands_in_two_places() -> None:
    places = []
    for language in LANGUAGES:
        words = vocabulary(language)
        places.append({(kind, what) for kind, rows in words.items() for what in rows})
        joined = Counter(
            wording.replace(" ", "").replace("-", "").lower()
            for rows in words.values()
            for wordings in rows.values()
            for wording in wordings
        )
        assert [wording for wording, count in joined.items() if count > 1] == []
    assert places[0] == places[1]
    assert {kind for kind, _ in places[0]} == (ALL_KINDS - {"quoted"}) | {"nothing"}


def test_every_word_of_the_lexicons_is_found_as_what_it_is() -> None:
    for language in LANGUAGES:
        for kind, rows in vocabulary(language).items():
            for what, wordings in rows.items():
                for wording in wordings:
                    said = [(span.kind, span.says, span.text) for span in analyze(f"，{wording}，")]
                    expected = [] if kind == "nothing" else [(kind, f"{kind}.{what}", wording)]
                    assert said == expected, wording


PIECES = [
    "fox",
    "shallow depth of field",
    "夜景",
    "水墨",
    "不",
    "no ",
    "“",
    "”",
    '"',
    "'",
    "(",
    ")",
    "[",
    "]",
    "|",
]
PIECES += [
    ":1.2",
    "\\",
    "<lora:a:1>",
    "<",
    ", ",
    "，",
    " ",
    "\n",
    "ß",
    "ﬁ",
    "İ",
    "👩‍🚀",
    "\0",
    "f/1.4",
    "K",
    "１",
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=30).map("".join))
def test_spans_are_in_order_apart_and_true_to_the_prompt(prompt: str) -> None:
    end = 0
    for span in analyze(prompt):
        assert end <= span.start < span.end <= len(prompt)
        assert span.text == prompt[span.start : span.end]
        assert span.kind in ALL_KINDS and span.language in LANGUAGES
        assert 0 < span.weight <= 100
        end = span.end
    assert analyze(prompt) == analyze(prompt)


@pytest.mark.parametrize(
    "sentence",
    [
        "一位穿汉服的少女，在江南水乡的夜晚，浅景深，柔光，白色背景，",
        "cyberpunk girl, neon lights, rainy street, shallow depth of field, ",
        "夜",
        "no ",
        "((",
        "“",
    ],
)
def test_2000_characters_take_a_few_milliseconds(sentence: str) -> None:
    prompt = (sentence * 2000)[:2000]
    analyze(prompt)
    fastest = min(_seconds(prompt) for _ in range(5))
    # Some 2 to 13 ms on an idle core; the bound leaves room for one whose caches are shared.
    assert fastest < 0.1


@pytest.mark.parametrize("piece", ["“", "(", "[:", '["', "<a:", "不", "best ", "夜", "\\("])
def test_the_longest_prompts_take_time_in_line_with_their_length(piece: str) -> None:
    assert _seconds((piece * 32_000)[:32_000]) < 3


def _seconds(prompt: str) -> float:
    """Of this thread's own work: other processes do not count."""
    started = time.thread_time()
    analyze(prompt)
    return time.thread_time() - started
