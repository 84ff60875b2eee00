"""A table of prompts as people write them, each with what is recognised in it and what is left out of it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from zimage_engine.prompts.analyzer import analyze
from zimage_engine.prompts.enhancer import enhance
from zimage_engine.prompts.language import language_of
from zimage_engine.prompts.llm_check import objection_to
from zimage_engine.prompts.phrases import Phrase, lexicon

ROWS: list[dict[str, Any]] = tomllib.loads((Path(__file__).parent / "real_prompts.toml").read_text("utf-8"))[
    "prompt"
]


def joined(own: str, phrases: tuple[Phrase, ...], left_out: set[str], separator: str) -> str:
    added = [phrase.text for phrase in phrases if phrase.meaning not in left_out]
    return separator.join([own, *added] if own else added)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["text"][:40])
def test_a_real_prompt_is_read_and_enhanced_as_a_person_would(row: dict[str, Any]) -> None:
    spans = analyze(row["text"])
    assert [f"{'not ' * span.is_negated}{span.kind}: {span.text}" for span in spans] == row["speaks_of"]

    enhanced = enhance(row["text"], None)
    words = lexicon(enhanced.language)
    meanings = {phrase.text: phrase.meaning for phrase in words.positive + words.negative}
    told = [f"{meanings[choice.phrase]}: {choice.about}" for choice in enhanced.left_out]
    assert told == row["leaves_out"]

    left_out = {line.partition(": ")[0] for line in row["leaves_out"]}
    assert enhanced.prompt == joined(row["text"], words.positive, left_out, words.separator)
    assert enhanced.negative_prompt == joined("", words.negative, left_out, words.separator)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["text"][:40])
def test_what_the_rules_make_of_it_a_language_model_might_have_written_too(row: dict[str, Any]) -> None:
    assert objection_to(row["text"], row["text"]) is None
    assert objection_to(row["text"], enhance(row["text"], None).prompt) is None


def test_the_table_is_as_broad_as_it_has_to_be() -> None:
    languages = [language_of(row["text"]) for row in ROWS]
    assert min(languages.count("en"), languages.count("zh")) >= 60
    assert len({row["text"] for row in ROWS}) == len(ROWS)
    said = {line.partition(": ")[0] for row in ROWS for line in row["speaks_of"]}
    assert said >= {"subject", "style", "material", "light", "scene", "quality", "quoted"}
    meanings = {line.partition(": ")[0] for row in ROWS for line in row["leaves_out"]}
    words = lexicon("en")
    assert meanings == {phrase.meaning for phrase in words.positive + words.negative}
