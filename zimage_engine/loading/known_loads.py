"""Remembers how a model of this very content was loaded and that it was found sound; knows no pipeline.

To recognise, plan and verify costs a fraction of a second for a warm folder, most of it for measuring the
tokenizer and looking through the weights, which on a cold disk means reading them. It is done once for a
content, an answer and a set of libraries. What a disk loses afterwards is met when a picture is drawn. A note
that cannot be read or written is one that is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from zimage_engine.loading.view_key import content_of

#: Raise it when a model that was loaded before should be looked at again.
FORMAT_VERSION = 1
#: A note is some hundred bytes; the oldest go when there are more.
MOST_NOTES = 500
#: A folder with more files than this is no model alone; it is measured each time.
MOST_FILES = 400
_LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True)
class KnownLoad:
    """What a load came to: the family, the stock call's words, the view's key ("" for the files themselves)
    and the names of the repairs."""

    family: str
    dtype: str
    use_safetensors: bool | None
    variant: str | None
    view: str
    repairs: tuple[str, ...]


class KnownLoads:
    """The notes beside the views of `cache_folder`, in a folder that is made when the first is written."""

    def __init__(self, cache_folder: Path) -> None:
        self._folder = cache_folder.parent / "loads"

    def recall(self, key: str) -> KnownLoad | None:
        """What was noted under `key`."""
        try:
            said = json.loads((self._folder / key).read_text(encoding="utf-8"))
            return KnownLoad(**{**said, "repairs": tuple(said["repairs"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def remember(self, key: str, load: KnownLoad) -> None:
        """Note it whole or not at all."""
        unfinished = self._folder / f".{key}.{secrets.token_hex(4)}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(asdict(load)), encoding="utf-8")
            unfinished.replace(self._folder / key)
            self._forget_the_oldest()
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()

    def forget(self) -> int:
        """Remove every note, so that each model is looked at anew; how many there were."""
        notes = (
            [entry for entry in self._folder.iterdir() if entry.is_file()] if self._folder.is_dir() else []
        )
        for note in notes:
            note.unlink(missing_ok=True)
        return len(notes)

    def _forget_the_oldest(self) -> None:
        notes = [entry for entry in os.scandir(self._folder) if entry.is_file()]
        for entry in sorted(notes, key=lambda entry: entry.stat().st_mtime)[:-MOST_NOTES]:
            Path(entry.path).unlink(missing_ok=True)


def key_of_load(sources: Mapping[str, Path | None], asked: Mapping[str, str | None]) -> str | None:
    """32 hex digits for the content of `sources` where they stand, what was asked, and the libraries.

    None where a source cannot be read or is more than a model: then nothing is remembered.
    """
    try:
        content = {
            name: None if source is None else [str(source.resolve(strict=True)), _content(source)]
            for name, source in sources.items()
        }
    except (OSError, _TooMany):
        return None
    facts = {
        "format": FORMAT_VERSION,
        "content": content,
        "asked": dict(asked),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class _TooMany(Exception):
    """More files than a model has."""


def _content(source: Path) -> list[list[str]]:
    """Each file's place and content; what lies in folders with a dot before their name is no model's."""
    if source.is_file():
        return [["", content_of(source)]]
    found = []
    for folder, folders, files in os.walk(source):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder) / name for name in sorted(files)]
        if len(found) > MOST_FILES:
            raise _TooMany
    return [[str(file.relative_to(source)), content_of(file)] for file in found]
