"""The LoRAs that may be asked for by name: a folder's files, and those that the model was started with.

A name is looked up among the files that are there, and never made into a path. Knows no torch; what fits the
model is for `check` to say.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zimage_engine.errors import CheckpointError
from zimage_engine.loading.lora_choice import SUFFIX, chosen, name_key
from zimage_engine.loading.lora_description import describe_lora
from zimage_engine.loading.lora_layouts import LoraFeatures, read_lora
from zimage_engine.loading.lora_weight import LoraWeight
from zimage_engine.loading.provenance import digest_of
from zimage_engine.types import LoraChoice, LoraOffer

#: So much of an author's words is passed on.
_HINT_CHARACTERS = 300
_TRIGGER_WORDS = 20

#: Where authors put the words that wake their LoRA up, and how it is to be used (ModelSpec, kohya, A1111).
_TRIGGERS = ("modelspec.trigger_phrase", "trigger_words", "activation text")
_HINTS = ("modelspec.usage_hint", "ss_training_comment")


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    stamp: tuple[int, int, int]
    #: It is a link that leads out of the folder.
    leads_out: bool = False


class LoraFolder:
    """What is offered now: the folder is looked at each time, and a file is read when it is new or changed.

    For any thread.
    """

    def __init__(self, folder: Path | None, check: Callable[[LoraFeatures], None]) -> None:
        """None: no folder. `check` raises CheckpointError for a file that does not fit the model."""
        self._folder = folder
        self._check = check
        self._started: tuple[Path, ...] = ()
        self._read: dict[_File, LoraOffer] = {}
        self._lock = threading.Lock()

    def also(self, loras: Iterable[LoraWeight]) -> None:
        """Offer these too, by the names of their files; they go before the folder's."""
        self._started = tuple(lora.path for lora in loras)

    def offers(self) -> tuple[LoraOffer, ...]:
        """All that there are, by name, also those that cannot be used."""
        return tuple(offer for _, offer in self._looked().values())

    def find(self, choices: Sequence[LoraChoice]) -> tuple[LoraWeight, ...]:
        """The files of the choices. Raises InvalidRequest as `chosen`."""
        looked = self._looked()
        offers = chosen([offer for _, offer in looked.values()], choices)
        return tuple(
            LoraWeight(looked[offer.name][0], choice.weight)
            for offer, choice in zip(offers, choices, strict=True)
        )

    def _looked(self) -> dict[str, tuple[Path, LoraOffer]]:
        with self._lock:
            files = dict([*self._listed(), *self._started_files()])
            self._read = {
                file: self._read.get(file) or self._measured(name, file) for name, file in files.items()
            }
            return {name: (files[name].path, self._read[files[name]]) for name in sorted(files)}

    def _listed(self) -> list[tuple[str, _File]]:
        if self._folder is None:
            return []
        inside = self._folder.resolve()
        try:
            with os.scandir(inside) as opened:
                entries = [(name, entry) for entry in opened if (name := _name_of(entry.name)) is not None]
        except OSError:  # not there at the moment
            return []
        files = ((name, _seen(entry, inside)) for name, entry in entries)
        return [(name, file) for name, file in files if file is not None]

    def _started_files(self) -> list[tuple[str, _File]]:
        files = []
        for path in self._started:
            try:
                seen = path.stat()
            except OSError:
                continue
            name = name_key(path.name.removesuffix(SUFFIX))
            files.append((name, _File(path, (seen.st_size, seen.st_mtime_ns, seen.st_ino))))
        return files

    def _measured(self, name: str, file: _File) -> LoraOffer:
        size_bytes = file.stamp[0]
        if file.leads_out:
            return LoraOffer(name, size_bytes, f"{name!r} is a link that leads out of the folder of LoRAs")
        try:
            features = read_lora(file.path)
            size_bytes = features.path.stat().st_size
            described = describe_lora(file.path)
            about = _metadata(features.path)
        except (CheckpointError, OSError) as error:
            return LoraOffer(name, size_bytes, reason_without_path(error, name, file.path))
        refusal = ""
        try:
            self._check(features)
        except CheckpointError as error:
            refusal = reason_without_path(error, name, file.path)
        triggers = next((about[key] for key in _TRIGGERS if about.get(key)), "")
        return LoraOffer(
            name=name,
            size_bytes=size_bytes,
            refusal=refusal,
            made_for=described.made_for,
            digest=digest_of([file.path]),
            trigger_words=tuple(word.strip()[:100] for word in triggers.split(",") if word.strip())[
                :_TRIGGER_WORDS
            ],
            usage_hint=next((about[key] for key in _HINTS if about.get(key)), "")[:_HINT_CHARACTERS],
        )


def reason_without_path(error: Exception, name: str, path: Path) -> str:
    """What is wrong with a LoRA, told to somebody who must not learn where it lies."""
    if isinstance(error, OSError):
        return f"{name!r} cannot be read on the server"
    text = str(error)
    for place in (path, path.resolve()):
        text = text.replace(str(place / "adapter_model.safetensors"), repr(name)).replace(
            str(place), repr(name)
        )
    for folder in (path.parent, path.resolve().parent):
        text = text.replace(str(folder), "the folder") if len(folder.parts) > 1 else text
    return text


def _name_of(file_name: str) -> str | None:
    """The name that a file is offered by; None for what is no LoRA's file, or has a name that is no text."""
    if not file_name.endswith(SUFFIX) or file_name.startswith("."):
        return None
    name = name_key(file_name.removesuffix(SUFFIX))
    try:
        name.encode()
    except UnicodeEncodeError:
        return None
    return name if name.isprintable() else None


def _seen(entry: os.DirEntry[str], folder: Path) -> _File | None:
    """The file as it is now; None for a folder, and for one that went while it was looked at."""
    try:
        leads_out = entry.is_symlink() and not _is_within(Path(entry.path), folder)
        seen = entry.stat(follow_symlinks=not leads_out)
        if not leads_out and not entry.is_file():
            return None
    except OSError:
        return None
    return _File(folder / entry.name, (seen.st_size, seen.st_mtime_ns, seen.st_ino), leads_out)


def _is_within(link: Path, folder: Path) -> bool:
    try:
        return link.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # links in a ring
        return False


def _metadata(file: Path) -> Mapping[str, str]:
    """The author's words in the header, which was found to be whole before."""
    with file.open("rb") as start:
        header = json.loads(start.read(int.from_bytes(start.read(8), "little")))
    return {str(key): str(value) for key, value in (header.get("__metadata__") or {}).items()}
