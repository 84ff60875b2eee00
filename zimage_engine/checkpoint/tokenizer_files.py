"""Measures a tokenizer's folder: which of its files can be read, and from which its vocabulary can come.

The vocabulary is read and let go of: a published one takes 100 MB as Python objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG = "tokenizer_config.json"
WHOLE = "tokenizer.json"
PIECES, MERGES = "vocab.json", "merges.txt"
SENTENCE_PIECES = "spiece.model"
CHAT_TEMPLATE = "chat_template.jinja"

#: The largest published one, of Qwen, has 11 MB.
_MAX_BYTES = 64 * 2**20
#: A piece of CLIP that ends a word is written so.
_END_OF_WORD = "</w>"
#: In a tokenizer's settings, what is named under these must have an id.
_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token")
_MORE_SPECIALS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer's files. `damage` is file -> a clause about what is wrong with it.

    `vocabulary` are the files that the stock class can make the whole vocabulary of, best first: one of
    `(WHOLE,)`, `(PIECES, MERGES)`, `(SENTENCE_PIECES,)`, or empty. `without_id` are special tokens that the
    settings name and those files have no id for.
    """

    names: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    vocabulary: tuple[str, ...] = ()
    damage: Mapping[str, str] = field(default_factory=dict)
    without_id: tuple[str, ...] = ()


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Measure the files in `folder`; there need not be any."""
    names = tuple(sorted(child.name for child in folder.iterdir() if child.is_file()))
    damage: dict[str, str] = {}
    small = {
        name: _object_in(folder / name, damage)
        for name in names
        if name.endswith(".json") and name not in (WHOLE, PIECES)
    }
    config = small.get(CONFIG, {})
    if WHOLE in names and _has_pieces(_object_in(folder / WHOLE, damage), damage):
        return TokenizerFiles(names, config, (WHOLE,), damage)
    if PIECES in names and MERGES in names:
        pieces = _object_in(folder / PIECES, damage)
        cut = _cut_short(folder / MERGES, pieces) if pieces else ""
        if cut:
            damage[MERGES] = cut
        elif pieces:
            known = {*pieces, *small.get("added_tokens.json", {}), *_with_id(config)}
            without = tuple(sorted(special_tokens(config) - known))
            return TokenizerFiles(names, config, (PIECES, MERGES), damage, without)
    if SENTENCE_PIECES in names:
        if (folder / SENTENCE_PIECES).stat().st_size:
            return TokenizerFiles(names, config, (SENTENCE_PIECES,), damage)
        damage[SENTENCE_PIECES] = "is empty"
    return TokenizerFiles(names, config, (), damage)


def special_tokens(config: Mapping[str, Any]) -> set[str]:
    """The special tokens that a tokenizer's settings name."""
    named = [config.get(key) for key in _SPECIAL_KEYS]
    for key in _MORE_SPECIALS:
        more = config.get(key)
        named += more if isinstance(more, list) else []
    return {text for each in named if (text := token_text(each))}


def token_text(token: object) -> str:
    """A token as settings write it: its text, or an object that has it under "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _with_id(config: Mapping[str, Any]) -> set[str]:
    listed = config.get("added_tokens_decoder")
    return {token_text(token) for token in listed.values()} if isinstance(listed, dict) else set()


def _object_in(path: Path, damage: dict[str, str]) -> dict[str, Any]:
    """The object in the file, or nothing and an entry in `damage`."""
    wrong = ""
    content: Any = None
    if path.stat().st_size > _MAX_BYTES:
        wrong = f"has more than {_MAX_BYTES} bytes, as no tokenizer's file does"
    else:
        try:
            text = path.read_text(encoding="utf-8")
            if text.strip():
                content = json.loads(text)
            else:
                wrong = "is empty"
        except (ValueError, RecursionError) as error:
            wrong = f"is not valid JSON ({error})"
    if not wrong and not isinstance(content, dict):
        wrong = f"should hold a JSON object, got a {type(content).__name__}"
    if wrong:
        damage[path.name] = wrong
        return {}
    return dict(content)


def _has_pieces(tokenizer: Mapping[str, Any], damage: dict[str, str]) -> bool:
    model = tokenizer.get("model")
    if isinstance(model, dict) and isinstance(model.get("vocab"), dict | list) and model["vocab"]:
        return True
    damage.setdefault(WHOLE, "holds no vocabulary")
    return False


def _cut_short(merges: Path, pieces: Mapping[str, Any]) -> str:
    """What is wrong with the list of merges; "" where it makes the last of the pieces that need one.

    Pieces are numbered in the order of the merges that make them, so a list that was cut off leaves the
    last one unmade.
    """
    if merges.stat().st_size > _MAX_BYTES:
        return f"has more than {_MAX_BYTES} bytes, as no tokenizer's file does"
    try:
        lines = merges.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        return f"is not text ({error})"
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        return "is no list of pairs"
    made = {"".join(pair) for pair in pairs}
    numbered = [(number, piece) for piece, number in pieces.items() if isinstance(number, int)]
    composed = [
        (number, piece)
        for number, piece in numbered
        if len(piece.removesuffix(_END_OF_WORD)) > 1 and not (piece.startswith("<|") and piece.endswith("|>"))
    ]
    if composed and (last := max(composed)[1]) not in made:
        return f"is cut short: nothing in it makes {last!r}, the last piece of {PIECES}"
    return ""
