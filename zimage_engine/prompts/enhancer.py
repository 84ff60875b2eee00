"""Adds to a prompt what it lacks of quality and light, and the usual faults to its negative prompt, by rule.

Deterministic, and adds nothing to what it has already enhanced. Knows no model and no tokenizer:
whoever calls tells how tokens are counted. The words themselves stand in `lexicon/*.toml`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from zimage_engine.prompts.analyzer import analyze
from zimage_engine.prompts.language import language_of
from zimage_engine.prompts.phrases import LANGUAGES, Phrase, lexicon
from zimage_engine.types import EnhancedPrompt, PhraseChoice, Reason

# A single full stop at the end gives way to the comma that joins; an ellipsis or "U.S." keeps its own.
_FULL_STOP = re.compile(r"(?<=[^.。\s])(?<!\.\w)[.。]\Z")
# After these no comma is wanted; behind the full-width ones stands no space either.
_NARROW_MARKS = tuple(",;:!?.…")
_WIDE_MARKS = (*"，、；：！？。．", "……")


@dataclass(frozen=True, slots=True)
class _Extension:
    """One prompt with what was added to it, and what was not."""

    text: str
    added: tuple[PhraseChoice, ...]
    left_out: tuple[PhraseChoice, ...]

    def phrases(self) -> tuple[str, ...]:
        return tuple(choice.phrase for choice in self.added)


def enhance(
    prompt: str,
    negative_prompt: str | None,
    *,
    count_tokens: Callable[[str], int] | None = None,
    token_limit: int | None = None,
) -> EnhancedPrompt:
    """The prompt with quality words behind it, the negative prompt with common faults behind it.

    The caller's words come first and stay as they are, byte for byte, but for a full stop or white
    space at the very end, which give way to the joining comma. A phrase is not added where any wording
    of it, in any language, stands already; where the prompt says its own of that kind (a light, a
    resolution) or asks for something that the phrase would spoil (a flat style, a blurry background);
    where the negative prompt keeps it out; or where the text would then exceed `token_limit` by
    `count_tokens` (the last phrases go first, the caller's words never). Without both of these the length
    is unlimited. An empty prompt stays empty. Each phrase that was added or left out says why.
    """
    negative = negative_prompt or ""
    language = language_of(prompt)
    if not prompt.strip():
        return EnhancedPrompt(
            prompt, negative, language=language, because="Nothing was added: the prompt is empty."
        )

    def fits(text: str) -> bool:
        return count_tokens is None or token_limit is None or count_tokens(text) <= token_limit

    words = lexicon(language)
    said, warned = _said(prompt), _said(negative)

    def choice_of(phrase: Phrase) -> tuple[Reason, str]:
        return _choice(
            (
                ("said", phrase.found_in(prompt)),
                ("refused", phrase.found_in(negative) or _first(warned, phrase.rule.refused_by)),
                ("against", _first(said, phrase.rule.yields_to)),
                ("kind_said", _first(said, phrase.rule.said_by)),
            )
        )

    def choice_of_negative(phrase: Phrase) -> tuple[Reason, str]:
        return _choice(
            (
                ("said", phrase.found_in(negative)),
                ("against", _first(said, phrase.rule.yields_to) or phrase.asked_for_in(prompt)),
            )
        )

    more = _extend("prompt", prompt, words.positive, words.separator, choice_of, fits)
    less = _extend("negative_prompt", negative, words.negative, words.separator, choice_of_negative, fits)
    return EnhancedPrompt(
        prompt=more.text,
        negative_prompt=less.text,
        added=more.phrases(),
        added_negative=less.phrases(),
        language=language,
        because=_summary(more, less, token_limit),
        additions=more.added + less.added,
        left_out=more.left_out + less.left_out,
    )


def unchanged(prompt: str, negative_prompt: str | None) -> EnhancedPrompt:
    """The caller's prompts as they are: enhancement was turned off."""
    return EnhancedPrompt(
        prompt=prompt,
        negative_prompt=negative_prompt or "",
        language=language_of(prompt),
        because="Nothing was added: enhancement is turned off.",
    )


def because(choice: PhraseChoice, language: str) -> str:
    """Why the phrase was added or left out, in one of LANGUAGES."""
    return _because(_meaning_of(choice.phrase), choice.reason, choice.about, language)


def _because(meaning: str, reason: Reason, about: str, language: str) -> str:
    words = lexicon(language)
    why = next(phrase.why for phrase in words.positive + words.negative if phrase.meaning == meaning)
    return words.because[reason].format(why=why, about=about)


def _meaning_of(text: str) -> str:
    return next(
        phrase.meaning
        for words in map(lexicon, LANGUAGES)
        for phrase in words.positive + words.negative
        if phrase.text == text
    )


def _said(text: str) -> dict[str, str]:
    """What the text asks for, by what it says (`style.flat`), with its first wording of that."""
    said: dict[str, str] = {}
    for span in analyze(text):
        if not span.is_negated:
            said.setdefault(span.says, span.text)
    return said


def _first(said: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((said[name] for name in names if name in said), None)


def _choice(found: tuple[tuple[Reason, str | None], ...]) -> tuple[Reason, str]:
    """The first reason for which words were found, with these."""
    return next(((reason, words) for reason, words in found if words is not None), ("missing", ""))


def _extend(
    field: Literal["prompt", "negative_prompt"],
    text: str,
    phrases: tuple[Phrase, ...],
    separator: str,
    choice_of: Callable[[Phrase], tuple[Reason, str]],
    fits: Callable[[str], bool],
) -> _Extension:
    chosen = [(phrase, *choice_of(phrase)) for phrase in phrases]
    wanted = [phrase.text for phrase, reason, _ in chosen if reason == "missing"]
    extended, room = _longest(text, wanted, separator, fits)
    without_room = frozenset(wanted[room:])
    choices = [
        _explained(phrase, field, "no_room" if phrase.text in without_room else reason, about)
        for phrase, reason, about in chosen
    ]
    return _Extension(
        text=extended,
        added=tuple(choice for choice in choices if choice.reason == "missing"),
        left_out=tuple(choice for choice in choices if choice.reason != "missing"),
    )


def _explained(
    phrase: Phrase, field: Literal["prompt", "negative_prompt"], reason: Reason, about: str
) -> PhraseChoice:
    return PhraseChoice(
        phrase.text, field, phrase.rule.kind, reason, about, _because(phrase.meaning, reason, about, "en")
    )


def _longest(text: str, wanted: list[str], separator: str, fits: Callable[[str], bool]) -> tuple[str, int]:
    """The text with as many of the first wanted phrases as fit, and how many these are."""
    for room in range(len(wanted), 0, -1):
        extended = _join(text, wanted[:room], separator)
        if fits(extended):
            return extended, room
    return text, 0


def _join(text: str, phrases: list[str], separator: str) -> str:
    added = separator.join(phrases)
    start = _FULL_STOP.sub("", text.rstrip())
    if not start:
        return added
    if start.endswith(_WIDE_MARKS):
        return start + added
    return start + (" " if start.endswith(_NARROW_MARKS) else separator) + added


def _summary(more: _Extension, less: _Extension, token_limit: int | None) -> str:
    """One sentence: how much was added, and why the rest was not."""
    counts = Counter(choice.reason for choice in more.left_out + less.left_out)
    left_out = [
        f"{count} {words}"
        for count, words in (
            (counts["said"] + counts["kind_said"], "already there"),
            (counts["against"] + counts["refused"], "against what was asked for"),
            (counts["no_room"], f"without room in {token_limit} tokens"),
        )
        if count
    ]
    done = (
        f"Added {_phrases(len(more.added), 'quality')} and {_phrases(len(less.added), 'negative')}"
        if more.added or less.added
        else "Nothing was added"
    )
    return f"{done}; left out: {', '.join(left_out)}." if left_out else f"{done}."


def _phrases(count: int, kind: str) -> str:
    return f"{count} {kind} phrase{'' if count == 1 else 's'}"
