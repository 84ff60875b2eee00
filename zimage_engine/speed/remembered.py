"""Remembers on disk which levers were found worth it, for what, and which ended a process; chooses nothing.

    <cache folder>/<key>.json           what was measured for one model's shape on one device
    <cache folder>/<key>.<word>.trying  a lever that a process is trying right now, or that ended one

A note that cannot be read or written is one that is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from zimage_engine.loading.view import default_cache_folder
from zimage_engine.speed.levers import LEVER_NAMES, Choices

logger = logging.getLogger(__name__)

#: Raise it when what was measured before should be measured anew.
FORMAT_VERSION = 1
#: A process may be ended by a person in the middle of a trial; twice the same is no chance.
MOST_DEATHS = 2
#: Deaths of one lever in such a while count once.
TOGETHER_SECONDS = 60.0


def remembered_choices() -> RememberedChoices:
    """What was measured on this machine, in the user's cache folder."""
    return RememberedChoices(default_cache_folder().parent / "levers")


def key_of_choice(facts: Mapping[str, Any]) -> str:
    """32 hex digits for the device, the versions and the model's shape: what was measured for other ones says
    nothing here."""
    told = json.dumps({"format": FORMAT_VERSION, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:32]


class RememberedChoices:
    """The notes in `folder`, which is made when the first is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def recall(self, key: str) -> Choices:
        """The levers by size bucket; without those that ended a process too often, nothing where none are."""
        sizes = self._read(key).get("sizes", {})
        barred = self.barred(key)
        if barred:
            logger.warning(
                "left out, because a process ended while it was being made ready, several times: %s; "
                "`zimage-turbo tune --forget` forgets that",
                ", ".join(sorted(barred)),
            )
        try:
            return {
                int(bucket): tuple(
                    name for name in LEVER_NAMES if name in said["levers"] and name not in barred
                )
                for bucket, said in sizes.items()
            }
        except (TypeError, ValueError, KeyError, AttributeError):
            return {}

    def remember(
        self, key: str, facts: Mapping[str, Any], bucket: int, levers: Sequence[str], measured: Any
    ) -> bool:
        """Note it whole or not at all, beside what is known of other sizes; False where it could not be."""
        said = self._read(key)
        known = said.get("sizes")
        known = known if isinstance(known, dict) else {}
        sizes = {size: row for size, row in known.items() if size.isdecimal()}
        sizes[str(bucket)] = {"levers": list(levers), "measured": measured}
        unfinished = self._folder / f".{key}.{secrets.token_hex(4)}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            told = json.dumps({"facts": dict(facts), "sizes": sizes}, indent=1, default=str)
            unfinished.write_text(told, encoding="utf-8")
            unfinished.replace(self._folder / f"{key}.json")
        except OSError as error:
            logger.warning("what was measured cannot be kept: %s", error.strerror)
            with contextlib.suppress(OSError):
                unfinished.unlink()
            return False
        return True

    def forget(self) -> int:
        """Remove every note; how many models' there were."""
        notes = list(self._folder.glob("*.json"))
        for note in [*notes, *self._folder.glob("*.trying")]:
            note.unlink(missing_ok=True)
        return len(notes)

    def known(self) -> list[dict[str, Any]]:
        """Every note: its `facts`, and by size what acts and what was measured."""
        found = [self._read(note.stem) for note in sorted(self._folder.glob("*.json"))]
        return [said for said in found if said]

    @contextmanager
    def trying(self, key: str, lever: str) -> Iterator[None]:
        """While it runs, the disk tells that this lever is being tried, also after the process has ended.

        A trial that comes to its end takes back what is told of earlier ones.
        """
        note = self._folder / f"{key}.{secrets.token_hex(4)}.trying"
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            said = {"lever": lever, "at": time.time(), **_this_process()}
            note.write_text(json.dumps(said), encoding="utf-8")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                note.unlink(missing_ok=True)
        for other, said in self._trials(key):
            if said["lever"] == lever and _has_ended(said):
                with contextlib.suppress(OSError):
                    other.unlink(missing_ok=True)

    def barred(self, key: str) -> frozenset[str]:
        """The levers whose trial ended a process too often to be tried again."""
        # Workers that begin together are ended together, by a person as a rule.
        deaths = {
            (said["lever"], said["at"] // TOGETHER_SECONDS)
            for _, said in self._trials(key)
            if _has_ended(said)
        }
        counts = Counter(lever for lever, _ in deaths)
        return frozenset(lever for lever, count in counts.items() if count >= MOST_DEATHS)

    def _trials(self, key: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        for note in self._folder.glob(f"{key}.*.trying"):
            with contextlib.suppress(OSError, ValueError):
                said = json.loads(note.read_text(encoding="utf-8"))
                if isinstance(said, dict) and said.keys() >= {"lever", "at", *_this_process()}:
                    yield note, said

    def _read(self, key: str) -> dict[str, Any]:
        try:
            said = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}


def _this_process() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid(), "began": psutil.Process().create_time()}


def _has_ended(said: Mapping[str, Any]) -> bool:
    """Of another host's processes, whose notes lie on a volume that both have, nothing is known. A container
    numbers its processes alike at each start, so the number alone tells nothing."""
    if said["host"] != platform.node():
        return False
    try:
        return abs(psutil.Process(said["pid"]).create_time() - said["began"]) >= 1.0
    except psutil.Error:
        return True
