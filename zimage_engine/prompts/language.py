"""Tells which language a prompt is written in; knows nothing of what is said in it."""

from __future__ import annotations

import re

#: A Chinese character says about as much as three Latin letters, so a prompt that is half Chinese
#: by content is about a third Chinese by letters.
_CHINESE_FROM_SHARE = 0.3
#: Japanese text is a third kana or more; a lone の on a Chinese shop sign does not make it Japanese.
_JAPANESE_FROM_KANA_PER_HAN = 0.2

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa\uff66-\uff9d]")
# Words that shall stand in the picture, and names of files, are not the language that is spoken.
#: A quotation with its marks. Behind a digit " means inches, within a word ' is an apostrophe.
QUOTED = re.compile(r"(?<!\d)\"[^\"]*\"|“[^“”]*”|‘[^‘’]*’|「[^「」]*」|『[^『』]*』|(?<!\w)'[^']*'(?!\w)")
_NOT_SPOKEN = re.compile(rf"{QUOTED.pattern}|<\w+:[^<>]*>")


def language_of(prompt: str) -> str:
    """Chinese ("zh") where at least three letters in ten are Chinese characters, else English ("en").

    Quoted words count only where nothing else is said. Japanese, told by its kana, and every other
    language counts as English: the enhancer has no words of its own for them.
    """
    return _by_letters(_NOT_SPOKEN.sub(" ", prompt)) or _by_letters(prompt) or "en"


def _by_letters(text: str) -> str | None:
    letters = sum(character.isalpha() for character in text)
    if letters == 0:
        return None
    han = len(_HAN.findall(text))
    if len(_KANA.findall(text)) > _JAPANESE_FROM_KANA_PER_HAN * han:
        return "en"
    return "zh" if han >= _CHINESE_FROM_SHARE * letters else "en"
