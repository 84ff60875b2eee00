"""Reads the enhancer's words from the lexicon files and finds them in text, however they are written.

Knows nothing of what is done with a phrase that is found or missing.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

#: One lexicon file each. The first is spoken where no other language fits.
LANGUAGES = ("en", "zh")

# Between the parts of a phrase may stand spaces of every kind, hyphens, underscores, or nothing.
_GAP = r"[\s_\-\u00ad\u2010-\u2015\u2212\u200b-\u200d\ufeff]*"
# Latin words must match whole; Chinese ones have no edges, and may touch Latin words.
_LATIN = "0-9a-z\u00df-\u024f"
_PART = re.compile(rf"[{_LATIN}']+|[^\s_\-]")
# <lora:masterpiece_v2:0.8> names a file; it asks for nothing.
_FILE_NAME = re.compile(r"<\w+:[^<>]*>")
#: Characters before a phrase in which a negator is looked for: the longest one and a few fillers.
_NEGATION_REACH = 32


@dataclass(frozen=True, slots=True)
class Phrase:
    """A phrase the enhancer may add, with what finds its meaning in any language."""

    meaning: str
    text: str
    _wordings: re.Pattern[str]
    _opposites: re.Pattern[str] | None
    _negation: re.Pattern[str]

    def is_in(self, text: str) -> bool:
        """Whether `text` has this meaning in any wording, asked for or warned of."""
        return self._wordings.search(_folded(text)) is not None

    def is_asked_for_in(self, text: str) -> bool:
        """Whether `text` has this meaning at least once without a negator before it."""
        return self._asked(self._wordings, text)

    def works_against(self, text: str) -> bool:
        """Whether `text` asks for something that this phrase would spoil."""
        return self._opposites is not None and self._asked(self._opposites, text)

    def _asked(self, wordings: re.Pattern[str], text: str) -> bool:
        folded = _folded(text)
        return any(
            self._negation.search(folded, max(0, found.start() - _NEGATION_REACH), found.start()) is None
            for found in wordings.finditer(folded)
        )


@dataclass(frozen=True, slots=True)
class Lexicon:
    """What the enhancer writes in one language, in the order in which it is added."""

    language: str
    separator: str
    positive: tuple[Phrase, ...]
    negative: tuple[Phrase, ...]


@cache
def lexicon(language: str) -> Lexicon:
    """The lexicon of one of LANGUAGES; its phrases know their wordings in all of them."""
    files = _files()
    own = files[language]
    negation = _negation(files.values())

    def phrases(side: str) -> tuple[Phrase, ...]:
        return tuple(_phrase(row, _of_meaning(row["meaning"], side, files), negation) for row in own[side])

    return Lexicon(language, own["separator"], phrases("positive"), phrases("negative"))


@cache
def _files() -> dict[str, dict[str, Any]]:
    folder = resources.files("zimage_engine.prompts") / "lexicon"
    return {name: tomllib.loads((folder / f"{name}.toml").read_text("utf-8")) for name in LANGUAGES}


def _of_meaning(meaning: str, side: str, files: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for file in files.values() for row in file[side] if row["meaning"] == meaning]


def _phrase(row: dict[str, Any], same: list[dict[str, Any]], negation: re.Pattern[str]) -> Phrase:
    opposites = [wording for other in same for wording in other["yields_to"]]
    return Phrase(
        meaning=row["meaning"],
        text=row["phrase"],
        _wordings=_any_of(wording for other in same for wording in (other["phrase"], *other["also"])),
        _opposites=_any_of(opposites) if opposites else None,
        _negation=negation,
    )


def _folded(text: str) -> str:
    """The text without case, width, curly apostrophes and names of files, ready for comparison."""
    return _FILE_NAME.sub(" ", unicodedata.normalize("NFKC", text).casefold().replace("’", "'"))


def _any_of(wordings: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(_one(wording) for wording in wordings))


def _one(wording: str) -> str:
    folded = _folded(wording)
    before = rf"(?<![{_LATIN}])" if re.match(f"[{_LATIN}]", folded) else ""
    behind = rf"(?![{_LATIN}])" if re.search(f"[{_LATIN}]$", folded) else ""
    return before + _GAP.join(re.escape(part) for part in _PART.findall(folded)) + behind


def _negation(files: Iterable[dict[str, Any]]) -> re.Pattern[str]:
    """Finds a negator at the very end of a text, with nothing but fillers behind it."""
    rows = list(files)
    negators = "|".join(_one(word) for file in rows for word in file["negators"])
    fillers = "|".join(_one(word) for file in rows for word in file["fillers"])
    return re.compile(rf"(?:{negators})(?:{_GAP}(?:{fillers}))*{_GAP}\Z")
