"""Counts a prompt's tokens as the text encoder will, and tells where its room ends, without torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zimage_engine.errors import CheckpointDamaged
from zimage_engine.types import Notice

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Longer words, and text without spaces such as Chinese, are told from where the room ends, this far.
_SHOWN_CHARACTERS = 24
#: What a word consists of where words have spaces between them; a Chinese character stands for itself.
_SPACED = re.compile(r"[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the room for a prompt ends: `word` at character `start` (from 0) is the first not read whole.

    `tokens` is what the whole prompt takes and `limit` what is read of it.
    """

    start: int
    word: str
    tokens: int
    limit: int


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A model's tokenizer as far as prompts need it. Special tokens that it adds are counted."""

    _tokenizer: Tokenizer = field(repr=False)

    def count(self, text: str) -> int:
        """How many tokens `text` takes."""
        return len(self._tokenizer.encode(text).ids)

    def cut(self, text: str, limit: int) -> Cut | None:
        """Where the room of `limit` tokens ends in `text`; None where all of it is read."""
        encoding = self._tokenizer.encode(text)
        if len(encoding.ids) <= limit:
            return None
        own = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
        room = max(0, limit - (len(encoding.ids) - len(own)))
        start, word = _word_at(text, encoding.offsets[own[room]][0])
        return Cut(start, word, len(encoding.ids), limit)


def prompt_tokens(tokenizer_json: str) -> PromptTokens:
    """The tokenizer in the text of a `tokenizer.json` file. Nothing is padded or cut off by it.

    Raises CheckpointDamaged where the file cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises nothing more precise than this
        raise CheckpointDamaged(
            f"Expected the contents of a tokenizer.json file, got {len(tokenizer_json)} characters that the "
            f"tokenizers library cannot read ({error}). Save the tokenizer again with save_pretrained()."
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return PromptTokens(tokenizer)


def token_counter(tokenizer_json: str) -> Callable[[str], int]:
    """A function that counts the tokens of a text, by the text of a `tokenizer.json` file.

    Tokens of a chat template are not counted. Raises CheckpointDamaged where the file cannot be read.
    """
    return prompt_tokens(tokenizer_json).count


def where_it_ends(parameter: str, cut: Cut) -> str:
    """A clause that says at which word a prompt is cut off."""
    return f"the room for {parameter} ends at {cut.word!r}, its character {cut.start + 1}"


def cut_notice(parameter: str, cut: Cut) -> Notice:
    """Says before anything is drawn that the end of a prompt will not be read, and from which word on."""
    return Notice(
        f"{parameter}_truncated",
        f"{parameter} takes {cut.tokens} tokens and this model has room for {cut.limit}: "
        f"{where_it_ends(parameter, cut)}, and the rest would be left out; shorten it",
    )


def _word_at(text: str, index: int) -> tuple[int, str]:
    """The word that character `index` is in and where it begins; of a long one the part from there on."""
    while index < len(text) and text[index].isspace():
        index += 1
    start = end = index
    while start > 0 and index < len(text) and _SPACED.match(text[index]) and _SPACED.match(text[start - 1]):
        start -= 1
    if index - start > _SHOWN_CHARACTERS:
        start = index
    spaced = index < len(text) and _SPACED.match(text[index]) is not None
    while end < len(text) and end - start < _SHOWN_CHARACTERS and not text[end].isspace():
        if spaced and not _SPACED.match(text[end]):
            break
        end += 1
    return start, text[start:end]
