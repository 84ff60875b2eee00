"""Tells what of a prompt has to be there again in what is made of it: quotations, weights, numbers, names.

Knows nothing of who rewrites, and judges nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from zimage_engine.prompts.analyzer import analyze
from zimage_engine.prompts.language import QUOTED
from zimage_engine.prompts.phrases import (
    FILE_NAME,
    LANGUAGES,
    is_joined_to_negated,
    is_negated,
    joins,
    read_lexicon_file,
    simplified,
)

#: The analyzer's quotations, and the marks that other languages and keyboards have.
_QUOTED = re.compile(
    rf"{QUOTED.pattern}|«[^«»]*»|„[^„“”]*[“”]|〝[^〝〞〟]*[〞〟]|＂[^＂]*＂|《[^《》]*》|〈[^〈〉]*〉"
)
#: (word:1.2), ((word)), [word]; a pair of plain brackets is also how people write an aside.
_WEIGHTED = re.compile(r"[(（][^()（）\[\]]*[:：]\s*[+-]?\d*\.?\d+\s*[)）]|\({2,}[^()]+\){2,}|\[[^\[\]]+\]")
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_LATIN = "A-Za-z\u00c0-\u024f"
_WORD = re.compile(rf"[{_LATIN}]+(?:['’][{_LATIN}]+)*|[0-9]+(?:[.,:/x×][0-9]+)*|[{_HAN}]")
_DIGITS = re.compile(r"(?<![\w.#])#[0-9A-Fa-f]{3,8}\b|\d+(?:[.,:/x×]\d+)*")
_CAPITALISED = re.compile(rf"(?<![\w'’])[A-Z\u00c0-\u00de][{_LATIN}0-9'’]*")
_SENTENCE_STARTS = re.compile(r"(?:\A|[.!?:;。！？：；\n]|--)[\s\"'“‘(\[]*\Z")
_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]{2,}")
#: How many words behind a number can be what it counts.
_COUNTED_WORDS = 4
_COUNTED_HAN = 8


@dataclass(frozen=True, slots=True)
class Count:
    """A number in a text, by its value as text, and the words behind it, the first of which it counts."""

    value: str
    shown: str
    counted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a text says that must not be lost; words without case and in simplified characters."""

    quoted: Counter[str]
    weighted: Counter[str]
    counts: tuple[Count, ...]
    names: frozenset[str]
    negated: Counter[str]
    #: What is said by KIND.WHAT of the lexicons, but for quality words, with the wording.
    said: Mapping[str, str]
    words: tuple[str, ...] = field(repr=False)


def kept_in(text: str) -> Kept:
    """What is to survive of `text`."""
    quoted = [each.group()[1:-1].strip() for each in _QUOTED.finditer(text)]
    plain = _blanked(text, _QUOTED)
    weighted = [each.group() for each in (*FILE_NAME.finditer(plain), *_WEIGHTED.finditer(plain))]
    # What has a weight still names and counts something; a file's name does not, nor a weight's own number.
    spoken = re.sub(r"[:：]\s*[+-]?\d*\.?\d+\s*(?=[)）])", "\0", _blanked(plain, FILE_NAME))
    spans = [span for span in analyze(spoken) if span.says and not span.says.startswith("phrase.")]
    return Kept(
        quoted=Counter(each for each in quoted if each),
        weighted=Counter(weighted),
        counts=tuple(_counts(spoken)),
        names=frozenset(_names(spoken)),
        negated=Counter(negated_words(spoken)),
        said={span.says: span.text for span in spans if not span.is_negated and span.kind != "quality"},
        words=tuple(words_of(spoken)),
    )


def words_of(text: str) -> list[str]:
    """Latin words in the singular, numbers and single Chinese characters, without case."""
    return [stem(each) for each in _WORD.findall(simplified(text))]


def tokens_of(text: str) -> frozenset[str]:
    """What can be a name, in quotation marks too, with its hyphens and without."""
    found = [*re.findall(rf"[{_LATIN}0-9'’]+", text), *re.findall(rf"[{_LATIN}0-9'’\-]+", text)]
    return frozenset(map(stem, [*found, *_LATIN_WORD.findall(text)]))


def stem(word: str) -> str:
    """The word without case and, roughly, in the singular."""
    word = word.casefold().replace("’", "'").removesuffix("'s")
    for ending, instead in (
        ("ies", "y"),
        ("ves", "f"),
        ("ses", "s"),
        ("xes", "x"),
        ("ches", "ch"),
        ("s", ""),
    ):
        if len(word) > len(ending) + 2 and word.endswith(ending) and not word.endswith("ss"):
            return word.removesuffix(ending) + instead
    return word


def without_quotations(text: str) -> str:
    """The text with spaces in the places of what is quoted in it."""
    return _blanked(text, _QUOTED, " ")


def _blanked(text: str, pattern: re.Pattern[str], sign: str = "\0") -> str:
    return pattern.sub(lambda found: sign * len(found.group()), text)


def negated_words(text: str) -> list[str]:
    """What stands behind each negator, and what is joined to it: a word, of Chinese two characters or one."""
    folded = simplified(text.casefold().replace("’", "'"))
    found, denied = [], None
    for each in re.finditer(rf"[{_LATIN.lower()}A-Z']+", folded):
        carried = denied is not None and joins(folded[denied : each.start()])
        if each.group() not in _fillers() and (is_negated(folded, each.start()) or carried):
            found.append(stem(each.group()))
            denied = each.end()
    for each in re.finditer(rf"(?=([{_HAN}]{{1,2}}))", folded):
        place = each.start()
        is_denied = is_negated(folded, place) or is_joined_to_negated(folded, place)
        if is_denied and not folded.startswith(tuple(_fillers()), place):
            found.append(each.group(1))
    return found


@cache
def _fillers() -> frozenset[str]:
    """The words that may stand between a negator and what it denies, and the negators."""
    rows = [read_lexicon_file(language)["negation"] for language in LANGUAGES]
    return frozenset(word for row in rows for word in (*row["fillers"], *row["negators"]))


def _counts(text: str) -> list[Count]:
    rows = _table()["numbers"]
    plain = simplified(text)
    measures = f"[{simplified(rows['measures'])}]"
    numerals = "".join(rows["zh"])
    found: list[tuple[int, int, str]] = [
        (each.start(), each.end(), each.group()) for each in _DIGITS.finditer(plain)
    ]
    for each in re.finditer(rf"[{_LATIN}]+", plain):
        value = rows["en"].get(each.group().casefold()) or rows["en"].get(stem(each.group()))
        if value is not None:
            found.append((each.start(), each.end(), str(value)))
    for each in re.finditer(rf"(?<!第)([{numerals}]+)(?={measures})|([{''.join(rows['joined'])}])", plain):
        value = _value_of(each.group(1)) if each.group(1) else rows["joined"][each.group(2)]
        found.append((each.start(), each.end(), str(value)))
    return [
        Count(_canonical(value), plain[start:end], _counted(plain, end, measures))
        for start, end, value in sorted(found)
    ]


def _counted(text: str, end: int, measures: str) -> tuple[str, ...]:
    """The words that a number ending at `end` may count: up to a sign, another number, or too many words."""
    behind = re.sub(rf"\A\s*{measures}", " ", text[end : end + 80])
    behind = re.split(
        r"[,.;:!?，。；：！？、()\[\]\0\n]|\b(?:and|or|with|on|in|at|of)\b|[和与及在]|\d", behind
    )[0]
    words = words_of(behind)
    numbers = _table()["numbers"]["en"]
    limit = _COUNTED_HAN if any(re.match(f"[{_HAN}]", word) for word in words) else _COUNTED_WORDS
    return tuple(word for word in words[:limit] if word not in numbers and word not in _common())


def _canonical(value: str) -> str:
    return value.casefold().replace("×", "x").lstrip("0") or "0"


def _value_of(numeral: str) -> int:
    """What a Chinese numeral is worth: 二十三 is 23, 三千 is 3000; digits in a row are read as such."""
    values = _table()["numbers"]["zh"]
    if not any(values[each] >= 10 for each in numeral):
        return int("".join(str(values[each]) for each in numeral))
    total = below = 0
    for each in numeral:
        value = values[each]
        if value < 10:
            below = value
        elif value < 10_000:
            total += (below or 1) * value
            below = 0
        else:
            total = ((total + below) or 1) * value
            below = 0
    return total + below


def _names(text: str) -> list[str]:
    """Capitalised words that are no mere beginnings, what is called something, and Latin words in Chinese."""
    table = _table()["names"]
    found = []
    for each in _CAPITALISED.finditer(text):
        word = each.group()
        begins = _SENTENCE_STARTS.search(text, max(0, each.start() - 8), each.start()) is not None
        if word in ("I", "A") or (begins and _is_no_name(word)):
            continue
        found.append(stem(word))
    for words, name in ((table["before"]["en"], rf"[{_LATIN}0-9'’\-]+"), (table["before"]["zh"], None)):
        if name is not None:
            pattern = rf"\b(?:{'|'.join(words)})\s+({name})"
            found += [stem(each) for each in re.findall(pattern, text, re.IGNORECASE)]
        else:
            # How long a Chinese name is, nobody tells: two characters of it are asked for.
            found += re.findall(rf"(?:{'|'.join(words)})([{_HAN}]{{2}})", simplified(text))
    if re.search(f"[{_HAN}]", text):
        found += [stem(each) for each in _LATIN_WORD.findall(text)]
    return found


def _is_no_name(word: str) -> bool:
    return word.casefold() in _no_names() or bool(analyze(word))


@cache
def _no_names() -> frozenset[str]:
    return frozenset(_table()["names"]["no_names"].split())


@cache
def _common() -> frozenset[str]:
    common = _table()["common"]
    return frozenset((*common["en"].split(), *common["zh"]))


def content_of(words: tuple[str, ...]) -> frozenset[str]:
    """Those of the words that carry something."""
    return frozenset(words) - _common()


def _table() -> dict[str, Any]:
    return read_lexicon_file("rewriting")
