"""Condition words about a checkpoint: they compose with `&`, print as written, say what they found.

pipeline_class("ZImagePipeline") & config_has("transformer", "cap_feat_dim")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from zimage_engine.checkpoint.features import CheckpointFeatures


@dataclass(frozen=True, slots=True)
class Word:
    """One question about the value at one address; `text` is the word as it is written in a table."""

    text: str
    address: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Condition:
    """Holds where every one of its words does; their order decides only which failure is told."""

    words: tuple[Word, ...]

    def __and__(self, other: Condition) -> Condition:
        return Condition(self.words + other.words)

    def __str__(self) -> str:
        return " & ".join(word.text for word in self.words)

    @property
    def addresses(self) -> frozenset[str]:
        """Every key that this condition reads, as `component.key`."""
        return frozenset(word.address for word in self.words)

    def first_failure(self, features: CheckpointFeatures) -> str | None:
        """The first word that does not hold and what stands there, or None where all hold."""
        for word in self.words:
            value = features.value(word.address)
            if not word.accepts(value):
                found = "nothing" if value is None else repr(value)
                return f"{word.text} fails: {word.address} is {found}"
        return None


def pipeline_class(*names: str) -> Condition:
    """model_index.json names one of these pipeline classes."""
    listed = ", ".join(repr(name) for name in names)
    return _one(f"pipeline_class({listed})", "model_index._class_name", lambda value: value in names)


def config_class(component: str, *names: str) -> Condition:
    """The component's own config names one of these classes."""
    listed = ", ".join(repr(name) for name in (component, *names))
    return _one(f"config_class({listed})", f"{component}._class_name", lambda value: value in names)


def config_has(component: str, key: str) -> Condition:
    """The component's config has a value other than null under `key`."""
    return _one(f"config_has({component!r}, {key!r})", f"{component}.{key}", lambda value: value is not None)


def config_lacks(component: str, key: str) -> Condition:
    """The component's config has nothing, or null, under `key`."""
    return _one(f"config_lacks({component!r}, {key!r})", f"{component}.{key}", lambda value: value is None)


def config_is(component: str, key: str, *values: Any) -> Condition:
    """The component's config has one of these values under `key`; None among them is nothing at all."""
    listed = ", ".join(repr(value) for value in (component, key, *values))
    return _one(f"config_is({listed})", f"{component}.{key}", lambda value: value in values)


def config_is_not(component: str, key: str, *values: Any) -> Condition:
    """The component's config has none of these values under `key`."""
    listed = ", ".join(repr(value) for value in (component, key, *values))
    return _one(f"config_is_not({listed})", f"{component}.{key}", lambda value: value not in values)


def _one(text: str, address: str, accepts: Callable[[Any], bool]) -> Condition:
    return Condition((Word(text, address, accepts),))
