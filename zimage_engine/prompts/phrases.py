"""Reads the enhancer's words from the lexicon files and finds them in text, however they are written.

Knows nothing of what is done with a phrase that is found or missing.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from zimage_engine.types import Kind, Reason

#: One lexicon file each. The first is spoken where no other language fits.
LANGUAGES = ("en", "zh")

# Between the parts of a phrase may stand spaces of every kind, hyphens, underscores, or nothing.
GAP = r"[\s_\-\u00ad\u2010-\u2015\u2212\u200b-\u200d\ufeff]*"
# Latin words must match whole; Chinese ones have no edges, and may touch Latin words.
LATIN = "0-9a-z\u00df-\u024f"
_PART = re.compile(rf"[{LATIN}']+|[^\s_\-]")
# <lora:masterpiece_v2:0.8> names a file; it asks for nothing.
FILE_NAME = re.compile(r"<\w+:[^<>]*>")
#: Characters before a phrase in which a negator is looked for: the longest one and a few fillers.
_NEGATION_REACH = 32


@dataclass(frozen=True, slots=True)
class Rule:
    """When a phrase is left out: `said_by`, `yields_to` and `refused_by` name what words say (KIND.WHAT)."""

    kind: Kind
    said_by: tuple[str, ...]
    yields_to: tuple[str, ...]
    refused_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Phrase:
    """A phrase the enhancer may add, with what finds its meaning in any language."""

    meaning: str
    text: str
    why: str
    rule: Rule
    wordings: tuple[str, ...]
    _pattern: re.Pattern[str]

    def found_in(self, text: str) -> str | None:
        """How `text` words this meaning first, asked for or warned of; None where it does not."""
        folded = _folded(text)
        found = self._pattern.search(simplified(folded))
        return None if found is None else folded[found.start() : found.end()]

    def asked_for_in(self, text: str) -> str | None:
        """How `text` words this meaning first without a negator before it; None where it does not."""
        folded = _folded(text)
        plain = simplified(folded)
        return next(
            (
                folded[found.start() : found.end()]
                for found in self._pattern.finditer(plain)
                if not is_negated(plain, found.start()) and not is_joined_to_negated(plain, found.start())
            ),
            None,
        )


@dataclass(frozen=True, slots=True)
class Lexicon:
    """What the enhancer writes in one language, in the order in which it is added.

    `because` words the reasons; what stands in braces there is filled in.
    """

    language: str
    separator: str
    positive: tuple[Phrase, ...]
    negative: tuple[Phrase, ...]
    because: Mapping[Reason, str]


@cache
def lexicon(language: str) -> Lexicon:
    """The lexicon of one of LANGUAGES; its phrases know their wordings in all of them."""
    own = read_lexicon_file(language)

    def phrases(side: str) -> tuple[Phrase, ...]:
        return tuple(_phrase(row, side) for row in own[side])

    return Lexicon(language, own["separator"], phrases("positive"), phrases("negative"), own["because"])


def is_negated(folded: str, start: int) -> bool:
    """Whether what begins at `start` of a text without case is warned of there rather than asked for."""
    return _negation().search(folded, max(0, start - _NEGATION_REACH), start) is not None


def joins(between: str) -> bool:
    """Whether what stands between two words, without case, says of the second what is said of the first."""
    return _joining().fullmatch(between) is not None


def is_joined_to_negated(folded: str, start: int) -> bool:
    """Whether a word or two that are warned of are joined to what begins at `start`."""
    return _joined_negation().search(folded, max(0, start - _NEGATION_REACH), start) is not None


def is_thing(folded: str, start: int, end: int) -> bool:
    """Whether the noun there, a style by itself, is something in the picture: "holding a poster".

    `folded` is without case and traditional characters.
    """
    noun, placed, styled = _things()
    if noun.fullmatch(folded, start, end) is None or styled.match(folded, end) is not None:
        return False
    return placed.search(folded, max(0, start - _NEGATION_REACH), start) is not None


@cache
def _things() -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Finds one of the nouns, what places it at the end of a text, and what behind it makes it a style."""
    rows = read_lexicon_file("things")

    def any_of(name: str) -> str:
        return "|".join(_one(word) for language in LANGUAGES for word in rows[language][name])

    edge = f"(?![{LATIN}])"
    plurals = (f"{_one(word).removesuffix(edge)}(?:s|es)?{edge}" for word in rows["en"]["nouns"])
    nouns = "|".join((*plurals, *(_one(word) for word in rows["zh"]["nouns"])))
    between = rf"{GAP}(?:(?:{any_of('articles')}){GAP})?(?:[{LATIN}'-]+{GAP})?"
    return (
        re.compile(nouns),
        re.compile(rf"(?:{any_of('placed_by')}){between}\Z"),
        re.compile(rf"{GAP}(?:{any_of('styles')})"),
    )


@cache
def simplified_characters() -> Mapping[str, str]:
    """For each traditional character that is known the simplified one in which the lexicons have it."""
    return {pair[0]: pair[1] for pair in read_lexicon_file("traditional")["pairs"].split()}


@lru_cache(maxsize=4)
def simplified(text: str) -> str:
    """The text with simplified characters in the places of traditional ones; none moves."""
    return text.translate({ord(each): plain for each, plain in simplified_characters().items()})


@cache
def read_lexicon_file(name: str) -> dict[str, Any]:
    """The contents of one file of the folder `lexicon`; not to be changed."""
    file = resources.files("zimage_engine.prompts") / "lexicon" / f"{name}.toml"
    return tomllib.loads(file.read_text("utf-8"))


def _phrase(row: dict[str, Any], side: str) -> Phrase:
    rule = read_lexicon_file("rules")[row["meaning"]]
    same = [
        other
        for language in LANGUAGES
        for other in read_lexicon_file(language)[side]
        if other["meaning"] == row["meaning"]
    ]
    wordings = tuple(wording for other in same for wording in (other["phrase"], *other["also"]))
    return Phrase(
        meaning=row["meaning"],
        text=row["phrase"],
        why=row["why"],
        rule=Rule(rule["kind"], tuple(rule["said_by"]), tuple(rule["yields_to"]), tuple(rule["refused_by"])),
        wordings=wordings,
        _pattern=_any_of(wordings),
    )


@lru_cache(maxsize=4)  # every phrase looks at the same two prompts
def _folded(text: str) -> str:
    """The text without case, width, curly apostrophes and names of files, ready for comparison."""
    return FILE_NAME.sub(" ", unicodedata.normalize("NFKC", text).casefold().replace("’", "'"))


def _any_of(wordings: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(_one(wording) for wording in wordings))


def _one(wording: str) -> str:
    folded = simplified(_folded(wording))
    before = rf"(?<![{LATIN}])" if re.match(f"[{LATIN}]", folded) else ""
    behind = rf"(?![{LATIN}])" if re.search(f"[{LATIN}]$", folded) else ""
    return before + GAP.join(re.escape(part) for part in _PART.findall(folded)) + behind


@cache
def _negation() -> re.Pattern[str]:
    """Finds a negator at the very end of a text, with nothing but fillers behind it."""
    return re.compile(rf"{_denial()}\Z")


@cache
def _denial() -> str:
    """Matches a negator and the fillers behind it."""
    rows = [read_lexicon_file(language)["negation"] for language in LANGUAGES]
    within = [word for row in rows for word in row["within"]]
    negators = "|".join(_negator(word, within) for row in rows for word in row["negators"])
    fillers = "|".join(_one(word) for row in rows for word in row["fillers"])
    return rf"(?:{negators})(?:{GAP}(?:{fillers}))*{GAP}"


def _negator(word: str, within: Iterable[str]) -> str:
    """Finds the word where it is not the end of one of those."""
    begins = [other.removesuffix(word) for other in within if other.endswith(word)]
    return "".join(f"(?<!{re.escape(begin)})" for begin in begins) + _one(word)


@cache
def _joining() -> re.Pattern[str]:
    words = "|".join(
        _one(word) for name in LANGUAGES for word in read_lexicon_file(name)["negation"]["joining"]
    )
    return re.compile(rf"{GAP}(?:{words}){GAP}")


@cache
def _joined_negation() -> re.Pattern[str]:
    """Finds at the end of a text a negator, a word that need not be known, and what joins another to it."""
    word = rf"(?:[{LATIN}']+|[\u4e00-\u9fff]{{1,4}})"
    return re.compile(rf"{_denial()}{word}{_joining().pattern}\Z")
