"""Reads the text that AUTOMATIC1111, Forge, and this program put into pictures: prompts, then settings.

In time that grows with its length, whatever is in it: the text comes from files of strangers. Knows no
pictures and no request.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

NEGATIVE = "Negative prompt:"
#: What the line of settings begins with in all that write one.
_FIRST_SETTING = "Steps:"
_QUOTED = json.JSONDecoder(strict=False)
#: `<lora:NAME:WEIGHT>`, also with a second weight for the text encoder; no part may hold what ends it.
_LORA = re.compile(r"<lora:([^<>:]{1,300})(?::([^<>:]{0,40}))?[^<>]{0,200}>", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DrawnText:
    """The parts of such a text; of a setting that stands twice the first counts."""

    prompt: str
    negative_prompt: str
    settings: dict[str, str]


@dataclass(frozen=True, slots=True)
class LoraTag:
    """A LoRA as a tag names it; `weight` is as it stands there, "" where none does."""

    name: str
    weight: str


def read_text(text: str) -> DrawnText:
    """The parts of the text; without a line of settings all of it is prompts."""
    lines = text.strip("\r\n").split("\n")
    settings: dict[str, str] = {}
    if lines and lines[-1].lstrip().startswith(_FIRST_SETTING):
        settings = _read_settings(lines.pop())
    prompt: list[str] = []
    negative: list[str] = []
    into = prompt
    for line in lines:
        if into is prompt and line.lstrip().startswith(NEGATIVE):
            into = negative
            line = line.lstrip().removeprefix(NEGATIVE).lstrip()
        into.append(line)
    return DrawnText("\n".join(prompt), "\n".join(negative), settings)


def _read_settings(line: str) -> dict[str, str]:
    """`Name: value, Name: value`, where a value with a comma or colon stands in JSON quotes."""
    settings: dict[str, str] = {}
    at = 0
    while (colon := line.find(":", at)) >= 0:
        name = line[at:colon].strip(" ,")
        at = colon + 1
        while line[at : at + 1] == " ":
            at += 1
        try:
            value, end = _QUOTED.raw_decode(line, at) if line[at : at + 1] == '"' else (None, at)
        except ValueError:
            value, end = None, at
        comma = line.find(",", end)
        comma = len(line) if comma < 0 else comma
        settings.setdefault(name, value if isinstance(value, str) else line[at:comma].strip())
        at = comma + 1
    return settings


def take_lora_tags(text: str) -> tuple[str, list[LoraTag]]:
    """The text without the tags of LoRAs in it, and what they name."""
    tags = [LoraTag(found[1].strip(), (found[2] or "").strip()) for found in _LORA.finditer(text)]
    return (_LORA.sub("", text).strip() if tags else text), tags
