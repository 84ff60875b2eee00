"""The operator's list of models beside the default one, and what is told of each; knows no torch, no Ray."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from zimage_engine.types import ModelDescription, ModelIdentity

#: Names that always mean the default model, for clients that must send some name.
DEFAULT_NAMES = ("zimage-turbo", "default")

State = Literal["ready", "loading", "not_loaded", "failed"]
#: Of several workers' states the first of these is told.
STATES: tuple[State, ...] = ("ready", "loading", "failed", "not_loaded")

_NAME = re.compile(r"[A-Za-z0-9][\w.:/-]{0,99}", re.ASCII)
_OPTIONS = ("path", "aliases", "family", "base", "dtype")


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model that requests can name; what is None is as the files tell, `dtype` as of the default model."""

    name: str
    path: str
    aliases: tuple[str, ...] = ()
    family: str | None = None
    base: str | None = None
    dtype: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class ModelState:
    """What a worker tells of one model. `description` is None until it was loaded there once.

    `family` and `dtype` are known before from its files, "" where they are not; `progress` is the part of its
    files that was read, 0 to 1, None where that is not known. `reason` is why it could not be loaded.
    """

    id: str
    aliases: tuple[str, ...]
    state: State
    worker: str
    progress: float | None = None
    reason: str = ""
    retry_seconds: float = 0.0
    family: str = ""
    dtype: str = ""
    identity: ModelIdentity = field(default_factory=ModelIdentity)
    description: ModelDescription | None = None


class ModelLoadFailed(Exception):
    """A model of the list could not be loaded; others can be drawn with. It is tried again later."""

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message, retry_seconds)
        self.message = message
        self.headers = {"Retry-After": str(max(1, round(retry_seconds)))}

    def __str__(self) -> str:
        return self.message


def read_models(value: Any) -> tuple[ListedModel, ...]:
    """The list as the settings give it: a mapping of names to a path or to options, or as text `NAME=PATH`
    with commas between, or that mapping in JSON. Raises ValueError with a sentence.
    """
    if isinstance(value, str):
        value = _read_text(value)
    if isinstance(value, Mapping):
        models = tuple(_read_entry(str(name), options) for name, options in value.items())
    elif isinstance(value, Sequence) and all(isinstance(each, ListedModel) for each in value):
        models = tuple(value)
    elif isinstance(value, Sequence) and all(isinstance(each, str) for each in value):
        models = tuple(_read_entry(*_split(each)) for each in value)
    else:
        raise ValueError(
            "setting models must be a mapping of names to folders, files or hub ids, or NAME=PATH with "
            f"commas between, got {value!r}"
        )
    _refuse_doubles(models)
    return models


def merged_states(states: Iterable[ModelState]) -> list[ModelState]:
    """One state a model, of what all workers tell: ready where one has it, and what any knows of it."""
    by_id: dict[str, list[ModelState]] = {}
    for state in states:
        by_id.setdefault(state.id, []).append(state)
    best = [min(group, key=lambda each: STATES.index(each.state)) for group in by_id.values()]
    return [_with_what_others_know(state, by_id[state.id]) for state in best]


def _with_what_others_know(state: ModelState, group: list[ModelState]) -> ModelState:
    if state.description is not None:
        return state
    return next(
        (
            ModelState(
                **{
                    **{each.name: getattr(state, each.name) for each in fields(state)},
                    "description": other.description,
                    "family": other.family,
                    "dtype": other.dtype,
                    "identity": other.identity,
                }
            )
            for other in group
            if other.description is not None
        ),
        state,
    )


def _read_text(text: str) -> Any:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError as wrong:
            raise ValueError(f"setting models starts with a brace but is no JSON object ({wrong})") from None
    return [part.strip() for part in text.split(",") if part.strip()]


def _split(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals:
        raise ValueError(f"setting models must be NAME=PATH, such as sketch=models/sdxl-turbo, got {text!r}")
    return name.strip(), path.strip()


def _read_entry(name: str, given: Any) -> ListedModel:
    options: Any = {"path": given} if isinstance(given, str) else given
    if not isinstance(options, Mapping) or not isinstance(options.get("path"), str):
        raise ValueError(f"setting models must give {name!r} a path, or a mapping with a path, got {given!r}")
    if unknown := [str(each) for each in options if each not in _OPTIONS]:
        raise ValueError(
            f"setting models has {', '.join(unknown)} for {name!r}, which is no option of a model; known are "
            + ", ".join(_OPTIONS)
        )
    aliases = options.get("aliases") or ()
    aliases = (aliases,) if isinstance(aliases, str) else tuple(aliases)
    texts = {key: options.get(key) or None for key in ("family", "base", "dtype")}
    if not all(isinstance(each, str) for each in (*aliases, *(text for text in texts.values() if text))):
        raise ValueError(f"setting models must give {name!r} texts for its options, got {given!r}")
    if not options["path"].strip():
        raise ValueError(f"setting models names no path for {name!r}; give a folder, a file or a hub id")
    if texts["dtype"] not in (None, "auto", "bfloat16", "float32", "float16"):
        raise ValueError(
            f"setting models must give {name!r} the dtype auto, bfloat16, float32 or float16, "
            f"got {texts['dtype']!r}"
        )
    for each in (name, *aliases):
        if not _NAME.fullmatch(each):
            raise ValueError(
                "setting models must have names of letters, digits and . _ : / -, up to 100 of them, "
                f"got {each!r}"
            )
    return ListedModel(name, options["path"].strip(), aliases, **texts)


def _refuse_doubles(models: Iterable[ListedModel]) -> None:
    taken = dict.fromkeys(DEFAULT_NAMES, "the default model")
    for model in models:
        for name in model.names:
            if name in taken:
                raise ValueError(
                    f"setting models gives the name {name!r} to {model.name!r}, and it means {taken[name]} "
                    "already; choose another"
                )
            taken[name] = repr(model.name)
