"""Tells what each word of a prompt speaks of: subject, style, material, light, scene, quality, quoted text.

Quick enough to follow someone who types. Knows nothing of what is made of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

from zimage_engine.prompts.language import QUOTED, language_of
from zimage_engine.prompts.phrases import FILE_NAME
from zimage_engine.prompts.vocabulary import find_words
from zimage_engine.types import Kind

#: What (word) and [word] mean to readers of weights; (word:1.3) says its own.
BRACKET_WEIGHT = 1.1

_SIGN = re.compile(r"\\[()\[\]]|[()\[\]|]|:(?=\s*[+-]?\d*\.?\d+\s*\))")
_NUMBER = re.compile(r"\s*([+-]?\d*\.?\d+)\s*")
#: A thousand brackets must not make a number that cannot be written.
_MOST_LOG_WEIGHT = math.log(100.0)


@dataclass(frozen=True, slots=True)
class Span:
    """One word, phrase or quotation of a prompt, from character `start` up to character `end`.

    A quotation's marks belong to it, and nothing within it is told apart. `says` is finer than the kind
    (`style.flat`), "" for quotations. `weight` is what brackets around it make of 1, `is_negated` whether the
    prompt warns of it ("no blur"). Characters are Unicode's, as Python counts them.
    """

    start: int
    end: int
    kind: Kind
    text: str
    language: str
    says: str = ""
    weight: float = 1.0
    is_negated: bool = False


def analyze(prompt: str) -> tuple[Span, ...]:
    """What is recognised in `prompt`, from left to right, no two overlapping.

    The longest wording wins, in both languages alike. The names of files (<lora:name:0.8>) and the numbers of
    weights are passed over. Takes time in line with the prompt's length.
    """
    weights = _weights(prompt)
    quotations = list(QUOTED.finditer(prompt))
    spans = [
        Span(
            found.start(),
            found.end(),
            "quoted",
            found.group(),
            language_of(found.group()[1:-1]),
            weight=weights[found.start()],
        )
        for found in quotations
        if found.group()[1:-1].strip()
    ]
    spans += [
        Span(
            found.start,
            found.end,
            cast(Kind, found.kind),
            prompt[found.start : found.end],
            found.language,
            found.says,
            weights[found.start],
            found.is_negated,
        )
        for found in find_words(_without(prompt, [*quotations, *FILE_NAME.finditer(prompt)]))
    ]
    return tuple(sorted(spans, key=lambda span: span.start))


def _without(text: str, passages: list[re.Match[str]]) -> str:
    """The text with a sign that is in no word in place of each character of the passages."""
    characters = list(text)
    for passage in passages:
        characters[passage.start() : passage.end()] = "\0" * (passage.end() - passage.start())
    return "".join(characters)


def _weights(text: str) -> list[float]:
    """For each character what the brackets around it make of 1; those without a partner count for nothing."""
    steps = [0.0] * (len(text) + 1)
    for start, end, factor in _bracketed(text):
        steps[start] += math.log(factor)
        steps[end] -= math.log(factor)
    bounded = (max(-_MOST_LOG_WEIGHT, min(_MOST_LOG_WEIGHT, each)) for each in accumulate(steps))
    return [round(math.exp(each), 3) for each in bounded] if any(steps) else [1.0] * (len(text) + 1)


def _bracketed(text: str) -> Iterator[tuple[int, int, float]]:
    """Each pair of brackets that weighs: from, up to, by which factor. [a|b] takes turns, and does not."""
    opened: list[tuple[str, int, bool]] = []
    for sign in _SIGN.finditer(text):
        mark = sign.group()
        if mark in "([":
            opened.append((mark, sign.start(), True))
        elif mark == "|" and opened:
            opened[-1] = (*opened[-1][:2], False)
        elif mark == ")" and opened and opened[-1][0] == "(":
            _, start, _ = opened.pop()
            factor = _said_factor(text, sign.start())
            if factor is None or factor > 0:
                yield start, sign.start(), BRACKET_WEIGHT if factor is None else factor
        elif mark == "]" and opened and opened[-1][0] == "[":
            _, start, weighs = opened.pop()
            if weighs and ":" not in text[start : sign.start()]:
                yield start, sign.start(), 1 / BRACKET_WEIGHT


def _said_factor(text: str, end: int) -> float | None:
    """The number behind the colon right before `end`; None where there is none."""
    colon = text.rfind(":", max(0, end - 16), end)
    number = _NUMBER.fullmatch(text, colon + 1, end) if colon >= 0 else None
    return None if number is None else float(number[1])
