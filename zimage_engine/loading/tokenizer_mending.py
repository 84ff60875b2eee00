"""Decides what a tokenizer's folder must hold: its own files, or what a sibling and the family tell.

SDXL's two tokenizers have one vocabulary; what they pad with is all that they differ in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_engine.checkpoint.repair import AppliedRepair, Repair
from zimage_engine.checkpoint.tokenizer_files import (
    CHAT_TEMPLATE,
    CONFIG,
    WHOLE,
    TokenizerFiles,
    token_text,
)
from zimage_engine.errors import CheckpointDamaged

LEAVE_OUT = Repair(
    "leave-out-broken-file",
    "the stock tokenizer reads every file that it knows by name, and its others suffice",
)
REBUILD_VOCABULARY = Repair(
    "rebuild-vocabulary",
    "both tokenizers of this family have the same vocabulary, and the other one is whole",
)
WRITE_CONFIG = Repair(
    "write-tokenizer-config",
    "the family was published with one length and one set of special tokens, whatever the vocabulary's form",
)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """One tokenizer's folder as it was measured; `path` need not exist."""

    name: str
    path: Path
    files: TokenizerFiles

    @property
    def is_whole(self) -> bool:
        return bool(self.files.vocabulary and self.files.config) and not self.files.without_id


@dataclass(frozen=True, slots=True)
class TokenizerPlan:
    """What the mended folder holds: linked files by name, and texts. No `repairs`: it is healthy."""

    linked: Mapping[str, Path]
    texts: Mapping[str, str] = field(default_factory=dict, repr=False)
    repairs: tuple[AppliedRepair, ...] = ()


def plan_tokenizer(
    own: Tokenizer, sibling: Tokenizer | None, published: Mapping[str, Any], needs_template: bool
) -> TokenizerPlan:
    """The folder that the stock class makes the undamaged tokenizer of.

    `published` are the family's settings for this tokenizer ({}: it has none to tell), `sibling` a whole
    tokenizer with the same vocabulary. A sibling's tokenizer.json is read where it must be changed. Raises
    CheckpointDamaged, naming file and remedy, where nothing tells the vocabulary or the settings.
    """
    files = own.files
    linked = {name: own.path / name for name in files.names if name not in files.damage}
    texts: dict[str, str] = {}
    repairs: list[AppliedRepair] = []
    left_out = [f"{name} {files.damage[name]}" for name in sorted(files.damage) if name != CONFIG]
    if left_out and files.vocabulary:
        rest = " and ".join(files.vocabulary)
        repairs.append(AppliedRepair(LEAVE_OUT, own.name, f"{'; '.join(left_out)}; {rest} tell the same"))
    if not files.vocabulary:
        if sibling is None:
            raise CheckpointDamaged(_no_vocabulary(own, left_out))
        # Remnants of the own vocabulary would be read before the sibling's.
        linked = {name: path for name, path in linked.items() if name in (CONFIG, CHAT_TEMPLATE)}
        _take_vocabulary(sibling, published, linked, texts)
        taken = " and ".join(sibling.files.vocabulary)
        found = "; ".join(left_out) or "it has no vocabulary of its own"
        repairs.append(AppliedRepair(REBUILD_VOCABULARY, own.name, f"{found}; {taken} of {sibling.name}"))
    elif files.without_id:
        raise CheckpointDamaged(
            f"{own.path}: vocab.json has no id for {files.without_id[0]!r}, nor does any other file that is "
            "whole; fetch tokenizer.json or tokenizer_config.json again"
        )
    if not files.config:
        texts[CONFIG] = _config_text(own, sibling, published, needs_template)
        found = f"{CONFIG} {files.damage.get(CONFIG, 'is missing')}"
        told = sibling.name if sibling else "what the family was published with"
        repairs.append(AppliedRepair(WRITE_CONFIG, own.name, f"{found}; told by {told}"))
        linked.pop(CONFIG, None)
    return TokenizerPlan(linked, texts, tuple(repairs))


def _no_vocabulary(own: Tokenizer, left_out: list[str]) -> str:
    found = (
        "; ".join(left_out)
        or "there is neither tokenizer.json, nor vocab.json with merges.txt, nor spiece.model"
    )
    return f"{own.path}: {found}, so it lacks its vocabulary; fetch the tokenizer folder again"


def _take_vocabulary(
    sibling: Tokenizer, published: Mapping[str, Any], linked: dict[str, Path], texts: dict[str, str]
) -> None:
    surplus = _pad_to_drop(sibling.files.config, published)
    for name in sibling.files.vocabulary:
        if name == WHOLE and surplus:
            texts[name] = _without_added(sibling.path / name, surplus)
        else:
            linked[name] = sibling.path / name


def _pad_to_drop(config: Mapping[str, Any], published: Mapping[str, Any]) -> str:
    """The sibling's pad token, where it is special there for padding alone: here it is a word like others."""
    pad = token_text(config.get("pad_token"))
    others = {token_text(published.get(key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return "" if pad in others else pad


def _without_added(path: Path, token: str) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    added = content.get("added_tokens")
    if isinstance(added, list):
        content["added_tokens"] = [each for each in added if token_text(each) != token]
    return json.dumps(content)


def _config_text(
    own: Tokenizer, sibling: Tokenizer | None, published: Mapping[str, Any], needs_template: bool
) -> str:
    found = f"{CONFIG} {own.files.damage.get(CONFIG, 'is missing')}"
    if not published:
        raise CheckpointDamaged(f"{own.path}: {found}; fetch it again")
    if needs_template and CHAT_TEMPLATE not in own.files.names:
        raise CheckpointDamaged(
            f"{own.path}: {found}, and the chat template that prompts are framed with stands in it or in "
            f"{CHAT_TEMPLATE}; fetch {CONFIG} again"
        )
    if WHOLE not in own.files.vocabulary and sibling is None and needs_template:
        # Ids of special tokens stand in the settings or in tokenizer.json, not among the pieces.
        raise CheckpointDamaged(
            f"{own.path}: {found}, and with it the ids of its special tokens; fetch it again"
        )
    config: dict[str, Any] = dict(published)
    if sibling is not None:
        config = {**sibling.files.config, **published}
        surplus = _pad_to_drop(sibling.files.config, published)
        listed = config.get("added_tokens_decoder")
        if surplus and isinstance(listed, dict):
            config["added_tokens_decoder"] = {
                number: token for number, token in listed.items() if token_text(token) != surplus
            }
    return json.dumps(config, indent=2) + "\n"
