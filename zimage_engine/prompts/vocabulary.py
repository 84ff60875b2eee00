"""Finds the words of the lexicons in a text, the longest first; knows nothing of prompts' signs or of quotes.

What is known stands in `lexicon/words_*.toml` by kind and by what it says, beside the enhancer's own phrases.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from zimage_engine.prompts.phrases import (
    GAP,
    LANGUAGES,
    LATIN,
    is_negated,
    is_thing,
    joins,
    lexicon,
    read_lexicon_file,
    simplified_characters,
)

#: Words under this name are found and say nothing, so that what is within them is not found.
NOTHING = "nothing"

_WORD = rf"[{LATIN}]+(?:'[{LATIN}]+)*"
_UNIT = re.compile(rf"{_WORD}|[^\s_\-\u00ad\u2010-\u2015\u2212\u200b-\u200d\ufeff]")
_IS_WORD = re.compile(_WORD)
_IS_GAP = re.compile(GAP)
#: What a noun says that is a style elsewhere.
_THING = ("subject", "subject.thing")
#: Shorter words run together by chance: "at night" is not looked for as "atnight", "low key" is as "lowkey".
_SHORTEST_JOINED = 6


@dataclass(frozen=True, slots=True)
class Found:
    """One word or phrase of a lexicon in a text: where (from character, up to character) and what it says.

    `says` is KIND.WHAT as in the lexicon files; `is_negated` where the text warns of it ("not blurry").
    """

    start: int
    end: int
    kind: str
    says: str
    language: str
    is_negated: bool


@dataclass(slots=True)
class _Node:
    """A place in the tree of all wordings, unit by unit; `entry` where a wording ends here."""

    next: dict[str, _Node] = field(default_factory=dict)
    entry: tuple[str, str, str] | None = None


def find_words(text: str) -> Iterator[Found]:
    """Every known word in `text`, from left to right, none within another. Takes linear time."""
    folded, origin = _folded(text)
    units = [(unit.group(), unit.start(), unit.end()) for unit in _UNIT.finditer(folded)]
    # Whether unit i + 1 may go on with the phrase that unit i is in.
    joined = [_IS_GAP.fullmatch(folded, one[2], other[1]) is not None for one, other in pairwise(units)]
    root, index = _tree(), 0
    # Up to where a word reaches that is warned of: what is joined to it is warned of as well.
    denied: int | None = None
    while index < len(units):
        last, entry = _longest(root, units, joined, index)
        if entry is None:
            index += 1
            continue
        start, end = units[index][1], units[last][2]
        kind, says, language = entry
        if kind == "style" and is_thing(folded, start, end):
            kind, says = _THING
        index = last + 1
        carried = denied is not None and joins(folded[denied:start])
        negated = carried or is_negated(folded, start)
        denied = end if negated else None
        if kind != NOTHING:
            yield Found(origin[start], origin[end - 1] + 1, kind, says, language, negated)


def _longest(
    root: _Node, units: list[tuple[str, int, int]], joined: list[bool], first: int
) -> tuple[int, tuple[str, str, str] | None]:
    """The last unit of the longest wording that begins with unit `first`, and what it stands for."""
    node, found, last = root, None, first
    for index in range(first, len(units)):
        if index > first and not joined[index - 1]:
            break
        following = node.next.get(units[index][0])
        if following is None:
            break
        node = following
        if node.entry is not None:
            found, last = node.entry, index
    return last, found


def _folded(text: str) -> tuple[str, list[int]]:
    """The text without case, width and traditional forms, and for each of its characters that in `text`."""
    table = simplified_characters()
    pieces, origin = [], []
    for index, character in enumerate(text):
        piece = table.get(character)
        if piece is None:
            piece = (
                character.lower()
                if character.isascii()
                else unicodedata.normalize("NFKC", character).casefold()
            )
            piece = piece.replace("’", "'")
        pieces.append(piece)
        origin.extend([index] * len(piece))
    return "".join(pieces), origin


@cache
def _tree() -> _Node:
    root = _Node()
    for language in LANGUAGES:
        for kind, rows in read_lexicon_file(f"words_{language}").items():
            for what, wordings in rows.items():
                for wording in wordings:
                    _plant(root, wording, (kind, f"{kind}.{what}", language))
    for language in LANGUAGES:
        words = lexicon(language)
        for phrase in words.positive + words.negative:
            for wording in phrase.wordings:
                _plant(root, wording, (phrase.rule.kind, f"phrase.{phrase.meaning}", _language(wording)))
    return root


def _language(wording: str) -> str:
    return "en" if wording.isascii() else "zh"


def _plant(root: _Node, wording: str, entry: tuple[str, str, str]) -> None:
    """Put a wording into the tree with its plural and, where it has several Latin words, run together.

    What stands there already stays: a word means what its first line in the files says.
    """
    units = _UNIT.findall(_folded(wording)[0])
    lasts = _plurals(units[-1]) if _IS_WORD.fullmatch(units[-1]) else (units[-1],)
    for last in lasts:
        parts = [*units[:-1], last]
        ways = [parts]
        whole = "".join(parts)
        if len(parts) > 1 and len(whole) >= _SHORTEST_JOINED and all(map(_IS_WORD.fullmatch, parts)):
            ways.append([whole])
        for way in ways:
            node = root
            for unit in way:
                node = node.next.setdefault(unit, _Node())
            node.entry = node.entry or entry


def _plurals(word: str) -> tuple[str, ...]:
    if not word.isalpha() or len(word) < 3:
        return (word,)
    if word.endswith("y") and word[-2] not in "aeiou":
        return word, f"{word[:-1]}ies"
    return word, f"{word}s", f"{word}es"
