"""Keeps LoRAs at hand on a pipeline and lets those act that a request wants; the others are idle there.

What acts depends on what was wanted last and on nothing before it. Knows no folder of LoRAs and no requests.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_engine.loading.lora import (
    LoraReport,
    activate_loras,
    adapted_components,
    adapter_bytes,
    apply_loras,
    delete_loras,
    remove_loras,
)
from zimage_engine.loading.lora_layouts import read_lora
from zimage_engine.loading.lora_weight import LoraWeight
from zimage_engine.loading.provenance import digest_of
from zimage_engine.types import LoraUse

#: So many stay on a pipeline, and so much of their files, while there are more that nobody wants now. One of
#: rank 32 for Z-Image is 0.2 GB, one for SDXL up to 0.8.
KEPT_LORAS = 8
KEPT_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class LoraKey:
    """The content of a file at a time; `copy` tells apart one file that is wanted several times at once."""

    path: Path
    size_bytes: int
    changed_ns: int
    inode: int
    copy: int


@dataclass(frozen=True, slots=True)
class WantedLora:
    """A LoRA as it was on the disk when it was asked for."""

    key: LoraKey
    lora: LoraWeight


@dataclass(frozen=True, slots=True)
class _Kept:
    report: LoraReport
    digest: str
    adapts_text: bool
    bytes: int


def wanted_loras(loras: Sequence[LoraWeight]) -> tuple[WantedLora, ...]:
    """What `put_on` takes; it looks at the files. Raises CheckpointError where there is no LoRA."""
    copies: Counter[Path] = Counter()
    wanted = []
    for lora in loras:
        seen = read_lora(lora.path).path.stat()
        key = LoraKey(lora.path, seen.st_size, seen.st_mtime_ns, seen.st_ino, copies[lora.path])
        wanted.append(WantedLora(key, lora))
        copies[lora.path] += 1
    return tuple(wanted)


class LoraShelf:
    """The LoRAs on one pipeline. `weights_change` is entered while weights come and go."""

    def __init__(self, pipeline: Any, weights_change: Callable[[], AbstractContextManager[None]]) -> None:
        self._pipeline = pipeline
        self._weights_change = weights_change
        #: The longest unused first.
        self._kept: OrderedDict[LoraKey, _Kept] = OrderedDict()
        #: What acts, None where that is not known for sure.
        self._in_force: tuple[tuple[LoraKey, float], ...] | None = ()

    def __len__(self) -> int:
        """How many are on the pipeline, acting or idle."""
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """What they take beside the model's own weights, acting or idle."""
        return sum(kept.bytes for kept in self._kept.values())

    @property
    def idle_bytes(self) -> int:
        """What of it does not act at the moment."""
        acting = {key for key, _ in self._in_force or ()}
        return sum(kept.bytes for key, kept in self._kept.items() if key not in acting)

    def put_on(
        self,
        wanted: Sequence[WantedLora],
        pinned: Collection[LoraKey] = (),
        keep_others: bool = True,
    ) -> bool:
        """Let `wanted` act in this order, and nothing else; True where that changes the text encoders.

        Of the others those in `pinned` stay idle at hand, with `keep_others` also those used last. Without
        any the pipeline is as before the first. Raises CheckpointNotFound or CheckpointDamaged where a file
        does not fit whole; what acts is then not known, so that another call has to follow before a drawing.
        """
        keys = [each.key for each in wanted]
        weights = tuple((each.key, each.lora.weight) for each in wanted)
        leaving = self._leaving({*keys, *pinned}, keep_others)
        if weights == self._in_force and not leaving:
            return False
        changes_text = self._adapts_text() is not False
        self._in_force = None
        missing = [each for each in wanted if each.key not in self._kept]
        if missing or leaving:
            with self._weights_change():
                self._load(missing)
                self._remove(self._leaving({*keys, *pinned}, keep_others))
                self._activate(weights)
        else:
            self._activate(weights)
        for key in keys:
            self._kept.move_to_end(key)
        self._in_force = weights
        return changes_text or bool(self._adapts_text())

    def uses(self) -> tuple[LoraUse, ...]:
        """What acts, as a report tells it."""
        return tuple(
            LoraUse(key.path.name, weight, self._kept[key].report.adapted_modules, self._kept[key].digest)
            for key, weight in self._in_force or ()
        )

    def _load(self, missing: Sequence[WantedLora]) -> None:
        reports = apply_loras(self._pipeline, [each.lora for each in missing])
        for each, report in zip(missing, reports, strict=True):
            components = adapted_components(self._pipeline, report.adapter_name)
            adapts_text = any(component.startswith("text_encoder") for component in components)
            taken_bytes = adapter_bytes(self._pipeline, report.adapter_name)
            self._kept[each.key] = _Kept(report, digest_of([each.lora.path]), adapts_text, taken_bytes)

    def _leaving(self, staying: Collection[LoraKey], keep_others: bool) -> list[LoraKey]:
        """Which of those that are kept are to go, with `staying` on the pipeline."""
        idle = [key for key in self._kept if key not in staying]
        if not keep_others:
            return idle
        many = len({*self._kept, *staying}) - KEPT_LORAS
        much = sum(key.size_bytes for key in {*self._kept, *staying}) - KEPT_BYTES
        leaving = []
        for key in idle:
            if many <= 0 and much <= 0:
                break
            leaving.append(key)
            many, much = many - 1, much - key.size_bytes
        return leaving

    def _remove(self, keys: Sequence[LoraKey]) -> None:
        if not keys:
            return
        names = [self._kept.pop(key).report.adapter_name for key in keys]
        if self._kept:
            delete_loras(self._pipeline, names)
        else:
            remove_loras(self._pipeline)

    def _activate(self, weights: Sequence[tuple[LoraKey, float]]) -> None:
        if self._kept:
            names = [self._kept[key].report.adapter_name for key, _ in weights]
            activate_loras(self._pipeline, names, [weight for _, weight in weights])

    def _adapts_text(self) -> bool | None:
        """Whether what acts changes the text encoders; None where that is not known."""
        if self._in_force is None:
            return None
        return any(self._kept[key].adapts_text for key, _ in self._in_force)
