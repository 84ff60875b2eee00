"""Judges what a language model wrote in place of a prompt: whether it is still the caller's picture.

What cannot be told for sure counts against the text, since the rules are always there to fall back on.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from zimage_engine.prompts.language import language_of
from zimage_engine.prompts.llm_kept import Kept, content_of, kept_in, tokens_of, without_quotations, words_of
from zimage_engine.prompts.phrases import read_lexicon_file, simplified
from zimage_engine.types import RewriteOutcome

#: What share of the prompt's words that carry something has to be there again.
_KEPT_SHARE = 0.5
#: One stretch of words may come again so often; longer stretches less.
_REPEATS = 4
_STRETCH = 6
_STRETCH_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Objection:
    """Why a text is not used: a code of a closed set, and in a clause what was found."""

    outcome: RewriteOutcome
    because: str


def objection_to(
    prompt: str,
    written: str,
    *,
    count_tokens: Callable[[str], int] | None = None,
    token_limit: int | None = None,
) -> Objection | None:
    """The first thing that is wrong with `written` as another wording of `prompt`; None where it can be used.

    The prompt itself can always be used in its own place, as long as it is within the limit.
    """
    if not written.strip():
        return Objection("empty", "it wrote nothing")
    if count_tokens is not None and token_limit is not None:
        taken = count_tokens(written)
        if taken > token_limit:
            return Objection("too_long", f"it wrote {taken} tokens, and this model reads {token_limit}")
    asked, got = kept_in(prompt), kept_in(written)
    for outcome, look in _LOOKS:
        found = look(prompt, written, asked, got)
        if found is not None:
            return Objection(outcome, found)
    return None


def _talk(prompt: str, written: str, asked: Kept, got: Kept) -> str | None:
    rows = read_lexicon_file("rewriting")["talk"]
    said, before = written.strip().casefold(), prompt.strip().casefold()
    for words in rows["begins"]:
        is_whole = not words[-1].isalpha() or not words.isascii() or not said[len(words) :][:1].isalnum()
        if said.startswith(words) and is_whole and not before.startswith(words):
            return f"it begins with {words!r}, which speaks of the task"
    for words in rows["anywhere"]:
        if words in said and words not in before:
            return f"it says {words.strip()!r}, which speaks of the task"
    return None


def _language(prompt: str, written: str, asked: Kept, got: Kept) -> str | None:
    was, now = language_of(prompt), language_of(written)
    if was != now:
        return f"the prompt is {_NAMES[was]}, and it wrote {_NAMES[now]}"
    if was == "en" and _script(prompt) != _script(written):
        return "it wrote in another script than the prompt's"
    return None


_NAMES = {"en": "not Chinese", "zh": "Chinese"}


def _quoted(prompt: str, written: str, asked: Kept, got: Kept) -> str | None:
    for text, times in asked.quoted.items():
        if got.quoted[text] < times:
            return f"the quoted text {_shown(text)} is not there as it was"
    folded = prompt.casefold()
    for text in got.quoted:
        if text.casefold() not in folded:
            return f"it added the quoted text {_shown(text)}, which would be written into the picture"
    return None


def _weight(prompt: str, written: str, asked: Kept, got: Kept) -> str | None:
    for text, times in asked.weighted.items():
        if got.weighted[text] < times:
            return f"{_shown(text)} is not there as it was"
    new = next((text for text in got.weighted if text not in asked.weighted), None)
    return None if new is None else f"it added {_shown(new)}"


def _number(prompt: str, written: str, asked: Kept, got: Kept) -> str | None:
    needed = Counter(count.value for count in asked.counts if count.value != "1")
    there = Counter(count.value for count in got.counts)
    for value, times in needed.items():
        if there[value] < times:
            return f"the number {value} is not there as it was"
    counted = _counted(got)
    for count in asked.counts:
        if count.value != "1" and count.counted and not counted[count.value] & set(count.counted):
            return f"{count.shown!r} no longer counts what it did"
    counted, named = _counted(asked), content_of(asked.words)
    # A number that counts nothing that can be told may count anything.
    loose = {count.value for count in asked.counts if not count.counted}
    for count in got.counts:
        words = set(count.counted)
        is_new = count.value not in loose and not counted[count.value] & words
        if count.value != "1" and is_new and named & words:
            return f"it counts {count.shown!r} where the prompt does not"
    return None


def _counted(kept: Kept) -> defaultdict[str, set[str]]:
    """For each number the words that it counts somewhere."""
    counted: defaultdict[str, set[str]] = defaultdict(set)
    for count in kept.counts:
        counted[count.value].update(count.counted)
    return counted


def _name(prompt: str, written: str, asked: Kept, got: Kept) -> str | None:
    there, plain = tokens_of(written), simplified(written)
    lost = [
        name for name in sorted(asked.names) if name not in there and (name.isascii() or name not in plain)
    ]
    return f"the name {_shown(lost[0])} is lost" if lost else None


def _negation(prompt: str, written: str, asked: Kept, got: Kept) -> str | None:
    lost = [word for word in sorted(asked.negated) if not _is_among(word, got.negated)]
    if lost:
        return f"{_shown(lost[0])} is no longer denied"
    for word in sorted(asked.negated):
        if _is_asked_for(word, written, got) and not _is_asked_for(word, prompt, asked):
            return f"{_shown(word)} is denied in the prompt, and it asks for it"
    new = sorted(
        word for word in got.negated if word not in asked.negated and word in _asked_for(asked, prompt)
    )
    return f"it denies {_shown(new[0])}, which is asked for" if new else None


def _is_asked_for(word: str, text: str, kept: Kept) -> bool:
    """Whether it stands there without a negator. A single Chinese character is part of too many words."""
    if word.isascii():
        return kept.words.count(word) > kept.negated[word]
    return len(word) > 1 and simplified(text).count(word) > kept.negated[word]


def _is_among(word: str, words: Collection[str]) -> bool:
    """Whether it is one of the words; of Chinese, where nobody tells where words end, also a part of one."""
    return word in words or (not word.isascii() and any(each.startswith(word[:1]) for each in words))


def _asked_for(asked: Kept, prompt: str) -> frozenset[str]:
    """The words that carry something, and of Chinese each two characters beside one another."""
    plain = simplified(without_quotations(prompt))
    pairs = {plain[place : place + 2] for place in range(len(plain) - 1)}
    return content_of(asked.words) | frozenset(pairs)


def _style(prompt: str, written: str, asked: Kept, got: Kept) -> str | None:
    folded = simplified(written.casefold())
    lost = [
        text
        for says, text in asked.said.items()
        if says not in got.said and simplified(text.casefold()) not in folded
    ]
    return f"{_shown(lost[0])} is no longer said" if lost else None


def _drift(prompt: str, written: str, asked: Kept, got: Kept) -> str | None:
    named = content_of(asked.words)
    if named and len(named & set(got.words)) < _KEPT_SHARE * len(named):
        return "it speaks of another picture: most of the prompt's words are gone"
    return None


def _loop(prompt: str, written: str, asked: Kept, got: Kept) -> str | None:
    before, now = words_of(prompt), words_of(written)
    for length in range(1, _STRETCH + 1):
        if _longest_run(now, length) >= max(_REPEATS, 1 + _longest_run(before, length)):
            return "it says the same over and over"
    known = Counter(_stretches(before, _STRETCH + 2))
    for stretch, times in Counter(_stretches(now, _STRETCH + 2)).items():
        if times >= max(_STRETCH_REPEATS, 1 + known[stretch]):
            return "it says the same over and over"
    return None


#: The order is that of how much each says to a person; the first that finds something is told.
_LOOKS: tuple[tuple[RewriteOutcome, Callable[[str, str, Kept, Kept], str | None]], ...] = (
    ("talk", _talk),
    ("loop", _loop),
    ("language", _language),
    ("quoted", _quoted),
    ("weight", _weight),
    ("number", _number),
    ("name", _name),
    ("negation", _negation),
    ("style", _style),
    ("drift", _drift),
)


def _script(text: str) -> str:
    """The script of most letters outside of quotations, by the first word of their Unicode names."""
    spoken = without_quotations(text)
    letters = [each for each in spoken if each.isalpha()] or [each for each in text if each.isalpha()]
    names = Counter(unicodedata.name(each, "").split(" ")[0] for each in letters[:2000])
    return names.most_common(1)[0][0] if names else ""


def _stretches(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def _longest_run(words: Sequence[str], length: int) -> int:
    """How often in a row some stretch of `length` words comes at most."""
    longest = run = 0
    for place in range(length, len(words)):
        run = run + 1 if words[place] == words[place - length] else 0
        longest = max(longest, run)
    return 1 + longest // length if words else 0


def _shown(text: str) -> str:
    return repr(re.sub(r"\s+", " ", text)[:40])
