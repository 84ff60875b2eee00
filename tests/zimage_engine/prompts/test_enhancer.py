"""The enhancer keeps what the caller wrote, adds what is missing, and never adds it twice."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from zimage_engine.prompts.analyzer import analyze
from zimage_engine.prompts.enhancer import enhance, unchanged
from zimage_engine.prompts.phrases import LANGUAGES, Phrase, lexicon

EN = "masterpiece, best quality, ultra-detailed, cinematic lighting, sharp focus"
EN_NEGATIVE = "deformed, blurry, bad anatomy, disfigured, poorly drawn face"
ZH = "杰作，最佳质量，超精细，电影级光照，锐利对焦"
ZH_NEGATIVE = "畸形，模糊，糟糕的解剖结构，毁容，画得糟糕的脸"


def words_of(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("cyberpunk girl, neon lights, rainy street", f"cyberpunk girl, neon lights, rainy street, {EN}"),
        ("白色背景上的红色圆形", f"白色背景上的红色圆形，{ZH}"),
        # How the end of the prompt joins.
        ("a cat.", f"a cat, {EN}"),
        ("a cat ", f"a cat, {EN}"),
        ("a cat\n", f"a cat, {EN}"),
        ("a cat,", f"a cat, {EN}"),
        ("a cat , ", f"a cat , {EN}"),
        ("a cat; ", f"a cat; {EN}"),
        ("a cat!", f"a cat! {EN}"),
        ("a cat...", f"a cat... {EN}"),
        ("a street in the U.S.", f"a street in the U.S. {EN}"),
        ('a sign that says "Open."', f'a sign that says "Open.", {EN}'),
        ("一只猫。", f"一只猫，{ZH}"),
        ("一只猫，", f"一只猫，{ZH}"),
        ("一只猫！", f"一只猫！{ZH}"),
        ("一只猫……", f"一只猫……{ZH}"),
        ("招牌上写着“你好。”", f"招牌上写着“你好。”，{ZH}"),
        # What the caller says by signs stays as it is.
        ("a (neon:1.2) city, [red|blue], {x}", f"a (neon:1.2) city, [red|blue], {{x}}, {EN}"),
        ("<lora:masterpiece_v2:0.8> a cat", f"<lora:masterpiece_v2:0.8> a cat, {EN}"),
        ("  a   cat\n\twith a hat", f"  a   cat\n\twith a hat, {EN}"),
        # Languages that have no lexicon are answered in English.
        ("猫の絵、美しい夕焼け", f"猫の絵、美しい夕焼け, {EN}"),
        ("고양이 한 마리", f"고양이 한 마리, {EN}"),
        ("un château au bord de l'eau", f"un château au bord de l'eau, {EN}"),
        ("🐈", f"🐈, {EN}"),
    ],
)
def test_quality_words_are_joined_behind_the_prompt(prompt: str, expected: str) -> None:
    assert enhance(prompt, None).prompt == expected


def test_the_negative_prompt_comes_in_the_language_of_the_prompt() -> None:
    assert enhance("a cat", None).negative_prompt == EN_NEGATIVE
    assert enhance("一只猫", None).negative_prompt == ZH_NEGATIVE
    assert enhance("一只猫", "text").negative_prompt == f"text，{ZH_NEGATIVE}"


@pytest.mark.parametrize(
    ("prompt", "left_out"),
    [
        ("a cat, masterpiece", "masterpiece"),
        ("MASTERPIECE of a cat", "masterpiece"),
        ("a cat, (masterpiece:1.2)", "masterpiece"),
        ("a cat, [masterpiece|study]", "masterpiece"),
        ("一幅masterpiece", "杰作"),
        ("a cat, 杰作", "masterpiece"),
        ("a cat, 傑作", "masterpiece"),
        ("ｍａｓｔｅｒｐｉｅｃｅ cat", "masterpiece"),
        ("a cat, best  quality", "best quality"),
        ("a cat, best\nquality", "best quality"),
        ("a cat, Best-Quality", "best quality"),
        ("a cat, best_quality", "best quality"),
        ("a cat, bestquality", "best quality"),
        ("a cat, 最佳质量", "best quality"),
        ("一只猫，最 佳 质 量", "最佳质量"),
        ("一只猫，最佳画质", "最佳质量"),
        ("一只白色的猫，Best Quality", "最佳质量"),
        ("a cat, Ultra Detailed", "ultra-detailed"),
        ("a cat, ultra‑detailed", "ultra-detailed"),
        ("a cat, ultradetailed", "ultra-detailed"),
        ("a cat, highly detailed", "ultra-detailed"),
        ("一只超精细的猫", "超精细"),
        ("一只猫，电影级光影", "电影级光照"),
        ("a cat in Cinematic Light", "cinematic lighting"),
        ("一只猫，对焦清晰", "锐利对焦"),
        ("a cat, in sharp focus", "sharp focus"),
        # Against what is asked for.
        ("a cat in soft focus", "sharp focus"),
        ("a cat in flat lighting", "cinematic lighting"),
        ("一只猫，柔焦", "锐利对焦"),
    ],
)
def test_a_quality_phrase_is_left_out_where_the_prompt_has_it_or_its_opposite(
    prompt: str, left_out: str
) -> None:
    enhanced = enhance(prompt, None)
    assert left_out not in enhanced.added
    assert len(enhanced.added) == 4
    assert enhanced.prompt.startswith(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "a masterpiecemaker at work",
        "the best, quality wood",
        "ultra cat, detailed hat",
        "a sharp knife in focus",
    ],
)
def test_parts_of_phrases_are_not_taken_for_them(prompt: str) -> None:
    assert len(enhance(prompt, None).added) == 5


@pytest.mark.parametrize(
    ("negative", "left_out"),
    [
        ("blurry", "blurry"),
        ("BLURRED, text", "blurry"),
        ("(blurry:1.4), watermark", "blurry"),
        ("模糊", "blurry"),
        ("Bad-Anatomy", "bad anatomy"),
        ("人体结构错误", "bad anatomy"),
        ("毁容", "disfigured"),
        ("poorly  drawn\nface", "poorly drawn face"),
        ("画得不好的脸", "poorly drawn face"),
        ("malformed hands", "deformed"),
    ],
)
def test_the_callers_negative_words_come_first_and_are_not_doubled(negative: str, left_out: str) -> None:
    enhanced = enhance("a cat", negative)
    assert enhanced.negative_prompt == ", ".join((negative, *enhanced.added_negative))
    assert left_out not in enhanced.added_negative
    assert len(enhanced.added_negative) == 4


@pytest.mark.parametrize(
    ("prompt", "left_out"),
    [
        ("portrait, blurry background", "blurry"),
        ("motion blur, a racing car", "blurry"),
        ("a portrait with creamy bokeh", "blurry"),
        ("portrait, shallow depth of field", "blurry"),
        ("肖像，背景模糊", "模糊"),
        ("一张特别模糊的照片", "模糊"),
        ("肖像，背景虚化", "模糊"),
        ("a deformed monster", "deformed"),
        ("a disfigured zombie", "disfigured"),
        ("一个畸形的怪物", "畸形"),
    ],
)
def test_what_the_prompt_asks_for_is_not_put_into_the_negative_prompt(prompt: str, left_out: str) -> None:
    enhanced = enhance(prompt, None)
    assert left_out not in enhanced.added_negative
    assert len(enhanced.added_negative) == 4


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat, not blurry",
        "a cat without any blurry parts",
        "a cat, don't make it blurry",
        "a cat, no fog or blur",
        "一只猫，不模糊",
        "一只猫，没有任何模糊",
        "一只猫，别模糊",
        "一只猫，去除模糊",
        "一只猫，不要模糊和变形",
        "一隻貓，無模糊",
    ],
)
def test_what_the_prompt_itself_warns_of_stays_in_the_negative_prompt(prompt: str) -> None:
    assert len(enhance(prompt, None).added_negative) == 5


@pytest.mark.parametrize("prompt", ["a piano, blurry", "a snow blur", "无人机，模糊的背景"])
def test_the_end_of_another_word_is_no_negation(prompt: str) -> None:
    assert len(enhance(prompt, None).added_negative) == 4


def test_traditional_wordings_count_as_the_simplified_ones() -> None:
    enhanced = enhance("電影光影，清晰對焦，最好質量的貓", "面部殘缺")
    assert enhanced.added == ("杰作", "超精细")
    told = {choice.phrase: choice.about for choice in enhanced.left_out}
    assert told == {
        "最佳质量": "最好質量",
        "电影级光照": "電影光影",
        "锐利对焦": "清晰對焦",
        "毁容": "面部殘缺",
    }


@pytest.mark.parametrize("negative", ["cinematic lighting", "Cinematic-Lighting, text", "电影级光影"])
def test_what_the_caller_does_not_want_is_not_put_into_the_prompt(negative: str) -> None:
    enhanced = enhance("a cat", negative)
    assert enhanced.added == ("masterpiece", "best quality", "ultra-detailed", "sharp focus")


def test_words_are_dropped_from_the_last_until_the_text_fits() -> None:
    # A cat is two words; the five phrases are 1, 2, 1, 2 and 2.
    lengths = {2: 0, 3: 1, 4: 1, 5: 2, 6: 3, 7: 3, 8: 4, 9: 4, 10: 5, 11: 5}
    for limit, kept in lengths.items():
        enhanced = enhance("a cat", None, count_tokens=words_of, token_limit=limit)
        assert enhanced.added == tuple(EN.split(", "))[:kept], limit
        assert words_of(enhanced.prompt) <= limit


def test_the_callers_words_stay_even_where_they_alone_are_too_long() -> None:
    enhanced = enhance("a very long prompt.", "text and more", count_tokens=words_of, token_limit=2)
    assert (enhanced.prompt, enhanced.negative_prompt) == ("a very long prompt.", "text and more")
    assert (enhanced.added, enhanced.added_negative) == ((), ())
    assert enhanced.because == "Nothing was added; left out: 10 without room in 2 tokens."


def test_both_prompts_have_the_whole_limit_to_themselves() -> None:
    enhanced = enhance("a cat", "text", count_tokens=words_of, token_limit=10)
    assert len(enhanced.added) == 5
    assert len(enhanced.added_negative) == 5


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_stays_empty(prompt: str) -> None:
    enhanced = enhance(prompt, "text")
    assert (enhanced.prompt, enhanced.negative_prompt) == (prompt, "text")
    assert enhanced.because == "Nothing was added: the prompt is empty."


def test_unchanged_gives_the_prompts_back() -> None:
    off = unchanged("一只猫。 ", None)
    assert (off.prompt, off.negative_prompt) == ("一只猫。 ", "")
    assert (off.added, off.added_negative, off.language) == ((), (), "zh")
    assert off.because == "Nothing was added: enhancement is turned off."


@pytest.mark.parametrize(
    ("prompt", "negative", "because"),
    [
        ("a cat", None, "Added 5 quality phrases and 5 negative phrases."),
        (
            "masterpiece, blurry background",
            "text, deformed",
            "Added 3 quality phrases and 3 negative phrases; left out: 2 already there, "
            "2 against what was asked for.",
        ),
        (EN, EN_NEGATIVE, "Nothing was added; left out: 10 already there."),
    ],
)
def test_because_tells_in_one_sentence_what_was_done(prompt: str, negative: str | None, because: str) -> None:
    assert enhance(prompt, negative).because == because


PIECES = (
    "a cat",
    "一只猫",
    "masterpiece",
    "杰作",
    "Ultra Detailed",
    "最佳画质",
    "blurry background",
    "not blurry",
    "不模糊",
    "soft focus",
    "(best quality:1.3)",
    "[day|night]",
    "a sign saying “sharp focus”",
    '"open."',
    "<lora:best_quality:1>",
    "U.S.",
    "no cinematic lighting",
    "畸形",
    "deformed",
    "画得不好的脸",
    "夕焼けの絵",
    "without",
    "不",
    "😀",
)
JOINTS = (", ", "，", " ", "。", ". ", "\n", "")
ENDS = ("", ".", "。", ",", "，", "!", "…", "...", " ", "\n", ")", "“”")


def some_prompts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [
        rng.choice(JOINTS).join(rng.choices(PIECES, k=rng.randint(1, 5))) + rng.choice(ENDS)
        for _ in range(count)
    ]


def occurrences(text: str, phrase: str) -> int:
    return len(re.findall(rf"(?<![a-z]){re.escape(phrase)}(?![a-z])", text, re.IGNORECASE))


def test_enhancing_twice_adds_nothing_and_no_phrase_stands_twice() -> None:
    singles = [piece + end for piece, end in itertools.product(PIECES, ENDS)]
    prompts = singles + some_prompts(600, seed=1)
    negatives = [None, *some_prompts(len(prompts) - 1, seed=2)]
    for prompt, negative in zip(prompts, negatives, strict=True):
        for limit in (None, 6, 12):
            once = enhance(prompt, negative, count_tokens=words_of, token_limit=limit)
            again = enhance(once.prompt, once.negative_prompt, count_tokens=words_of, token_limit=limit)
            where = (prompt, negative, limit)
            assert (again.added, again.added_negative) == ((), ()), where
            assert (again.prompt, again.negative_prompt) == (once.prompt, once.negative_prompt), where
            assert again.language == once.language, where
            assert enhance(once.prompt, negative, count_tokens=words_of, token_limit=limit).added == (), where
            for phrase in once.added:
                written = once.prompt.replace("<lora:best_quality:1>", "")
                assert occurrences(written, phrase) == 1, where
            for phrase in once.added_negative:
                assert occurrences(once.negative_prompt, phrase) == 1, where


def test_what_the_caller_wrote_always_begins_the_result() -> None:
    for prompt in some_prompts(600, seed=3):
        kept = re.sub(r"[.。]?\s*\Z", "", prompt)
        assert enhance(prompt, prompt).prompt.startswith(kept), prompt
        assert enhance(prompt, prompt).negative_prompt.startswith(kept), prompt


def test_no_phrase_of_the_lexicons_is_taken_for_another_or_against_another() -> None:
    for language in LANGUAGES:
        words = lexicon(language)
        every = words.positive + words.negative
        for phrase, other in itertools.product(every, every):
            for text in (entry.text for name in LANGUAGES for entry in _same(name, other.meaning)):
                found = phrase.found_in(text) is not None
                assert found == (phrase.meaning == other.meaning), (phrase.text, text)
                if other in words.positive:
                    said = {span.says for span in analyze(text)}
                    assert not said.intersection(phrase.rule.yields_to + phrase.rule.said_by), (
                        phrase.text,
                        text,
                    )


def _same(language: str, meaning: str) -> list[Phrase]:
    words = lexicon(language)
    return [phrase for phrase in words.positive + words.negative if phrase.meaning == meaning]


def test_all_lexicons_have_the_same_meanings_in_the_same_order() -> None:
    first, *others = (lexicon(language) for language in LANGUAGES)
    for other in others:
        assert [phrase.meaning for phrase in other.positive] == [phrase.meaning for phrase in first.positive]
        assert [phrase.meaning for phrase in other.negative] == [phrase.meaning for phrase in first.negative]


def test_a_huge_prompt_is_enhanced_in_reasonable_time() -> None:
    # Repeated beginnings and gaps are what would make a careless pattern slow.
    prompt = "best " * 20_000 + " " * 50_000 + "不 " * 20_000 + "a cat"
    assert len(enhance(prompt, prompt).added) == 5
