"""Adds quality words to a short prompt and the usual faults to its negative prompt, by rule.

Deterministic, and adds nothing to what it has already enhanced. Knows no model and no tokenizer:
whoever calls tells how tokens are counted. The words themselves stand in `lexicon/*.toml`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from zimage_engine.prompts.language import language_of
from zimage_engine.prompts.phrases import Phrase, lexicon
from zimage_engine.types import EnhancedPrompt

# A single full stop at the end gives way to the comma that joins; an ellipsis or "U.S." keeps its own.
_FULL_STOP = re.compile(r"(?<=[^.。\s])(?<!\.\w)[.。]\Z")
# After these no comma is wanted; behind the full-width ones stands no space either.
_NARROW_MARKS = tuple(",;:!?.…")
_WIDE_MARKS = (*"，、；：！？。．", "……")


@dataclass(frozen=True, slots=True)
class _Extension:
    """One prompt with what was added to it, and how many phrases were not, for which reason."""

    text: str
    added: tuple[str, ...]
    already_there: int
    unwanted: int
    without_room: int


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
    of it, in any language, stands already; where the caller's other prompt speaks against it; or
    where the text would then exceed `token_limit` by `count_tokens` (the last phrases go first, the
    caller's words never). Without both of these the length is unlimited. An empty prompt stays empty.
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
    more = _extend(
        prompt,
        words.positive,
        words.separator,
        lambda phrase: phrase.is_in(negative) or phrase.works_against(prompt),
        fits,
    )
    less = _extend(
        negative,
        words.negative,
        words.separator,
        lambda phrase: phrase.is_asked_for_in(prompt) or phrase.works_against(prompt),
        fits,
    )
    return EnhancedPrompt(
        prompt=more.text,
        negative_prompt=less.text,
        added=more.added,
        added_negative=less.added,
        language=language,
        because=_because(more, less, token_limit),
    )


def unchanged(prompt: str, negative_prompt: str | None) -> EnhancedPrompt:
    """The caller's prompts as they are: enhancement was turned off."""
    return EnhancedPrompt(
        prompt=prompt,
        negative_prompt=negative_prompt or "",
        language=language_of(prompt),
        because="Nothing was added: enhancement is turned off.",
    )


def _extend(
    text: str,
    phrases: tuple[Phrase, ...],
    separator: str,
    is_unwanted: Callable[[Phrase], bool],
    fits: Callable[[str], bool],
) -> _Extension:
    missing = [phrase for phrase in phrases if not phrase.is_in(text)]
    wanted = [phrase.text for phrase in missing if not is_unwanted(phrase)]
    extended, room = _longest(text, wanted, separator, fits)
    return _Extension(
        text=extended,
        added=tuple(wanted[:room]),
        already_there=len(phrases) - len(missing),
        unwanted=len(missing) - len(wanted),
        without_room=len(wanted) - room,
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


def _because(more: _Extension, less: _Extension, token_limit: int | None) -> str:
    """One sentence: how much was added, and why the rest was not."""
    already_there = more.already_there + less.already_there
    unwanted = more.unwanted + less.unwanted
    without_room = more.without_room + less.without_room
    left_out = [
        reason
        for count, reason in (
            (already_there, f"{already_there} already there"),
            (unwanted, f"{unwanted} against what was asked for"),
            (without_room, f"{without_room} without room in {token_limit} tokens"),
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
