"""The account of a run: how each request ended, and whether the answers were the right ones."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tests.chaos.serving.pictures import Drawing

#: "broken": the connection ended without a word; `Ledger.judge` makes it a failure or a loss.
Ending = Literal["answered", "failed", "cut off", "broken", "lost"]

#: What an ingress held when it was killed must have failed so soon.
SEEN_SECONDS = 5.0
#: An answer this soon after a kill was on its way already.
ON_ITS_WAY_SECONDS = 0.5


@dataclass(eq=False)
class Entry:
    """One request. Times are of the monotonic clock; `told` says in words how it ended."""

    number: int
    key: str
    kind: str
    drawing: Drawing | None
    sent_at: float
    #: Of which request this is another attempt.
    again: Entry | None = None
    ending: Ending | None = None
    ended_at: float = 0.0
    told: str = ""
    #: How often an ending came; more than once is a duplicate.
    endings: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Its X-Request-ID, which the answer must carry."""
        return f"load-{self.number}"

    @property
    def seconds(self) -> float:
        return self.ended_at - self.sent_at

    @property
    def is_final(self) -> bool:
        """Whether a caller asks no further: it has its picture, wants none, or is refused."""
        is_refused = self.ending == "failed" and self.told.startswith(("4", "event queue_full"))
        return self.ending in ("answered", "cut off") or is_refused

    def end(self, ending: Ending, told: str = "") -> None:
        self.endings += 1
        if self.ending is None:
            self.ending, self.told, self.ended_at = ending, told, time.monotonic()


@dataclass(frozen=True)
class Kill:
    """A process that was killed: what it was, and when."""

    what: str
    at: float


class Ledger:
    """Every request that was sent, and every kill."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.kills: list[Kill] = []
        self._numbers = itertools.count()

    def sent(self, key: str, kind: str, drawing: Drawing | None, again: Entry | None = None) -> Entry:
        entry = Entry(next(self._numbers), key, kind, drawing, time.monotonic(), again)
        self.entries.append(entry)
        return entry

    def judge(self, is_excused: Callable[[Entry], bool]) -> None:
        """A connection that broke is a visible failure where a kill excuses it, else a loss."""
        for entry in self.entries:
            if entry.ending is None:
                entry.end("lost", "the run ended before it")
            if entry.ending == "broken":
                entry.ending = "failed" if is_excused(entry) else "lost"
                entry.told = f"connection closed ({entry.told})"

    def killed_just_before(self, entry: Entry) -> bool:
        """Whether something that held connections was killed so shortly before this one ended."""
        return any(kill.at <= entry.ended_at <= kill.at + SEEN_SECONDS for kill in self._ingress_kills)

    @property
    def slowest_to_see(self) -> float:
        """Seconds until the last client that had a request at a killed ingress knew that it had failed."""
        return max(
            (
                entry.ended_at - kill.at
                for kill in self._ingress_kills
                for entry in self.entries
                if entry.sent_at < kill.at < entry.ended_at and entry.ending in ("failed", "lost")
            ),
            default=0.0,
        )

    @property
    def _ingress_kills(self) -> list[Kill]:
        return [kill for kill in self.kills if kill.what != "worker"]

    def count(self, ending: Ending) -> int:
        return sum(entry.ending == ending for entry in self.entries)

    @property
    def is_balanced(self) -> bool:
        """sent = answered + failed + cut off, none lost, none answered twice."""
        accounted = self.count("answered") + self.count("failed") + self.count("cut off")
        return accounted == len(self.entries) and not self.duplicated

    @property
    def duplicated(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.endings > 1]

    @property
    def wrong(self) -> list[str]:
        return [
            f"request {entry.number} ({entry.kind}): {each}" for entry in self.entries for each in entry.wrong
        ]

    @property
    def lost(self) -> list[str]:
        return [
            f"request {entry.number} ({entry.kind}) after {entry.seconds:.1f} s: {entry.told}"
            for entry in self.entries
            if entry.ending == "lost"
        ]

    def endings(self) -> dict[str, int]:
        """How many ended how, with the failures by what the client was told."""
        counted = Counter(
            entry.ending if entry.ending in ("answered", "cut off") else f"{entry.ending}: {entry.told}"
            for entry in self.entries
        )
        return {str(ending): number for ending, number in sorted(counted.items(), key=str)}

    def answered_pictures(self) -> Iterator[Entry]:
        return (entry for entry in self.entries if entry.ending == "answered" and entry.drawing is not None)

    def work_by_key(self, since: float, until: float) -> dict[str, float]:
        """Megapixel-steps that were answered in that time, by key."""
        work = dict.fromkeys(sorted({entry.key for entry in self.entries}), 0.0)
        for entry in self.answered_pictures():
            if since <= entry.ended_at <= until and entry.drawing is not None:
                work[entry.key] += entry.drawing.work
        return work

    def recoveries(self) -> dict[str, list[float]]:
        """Seconds from each kill to the next picture that was answered, by what was killed.

        A kill that no picture followed is left out: `without_recovery` counts those.
        """
        found: dict[str, list[float]] = {}
        for kill in self.kills:
            after = [
                entry.ended_at - kill.at
                for entry in self.answered_pictures()
                if entry.ended_at > kill.at + ON_ITS_WAY_SECONDS
            ]
            found.setdefault(kill.what, []).extend([min(after)] if after else [])
        return found

    @property
    def without_recovery(self) -> int:
        return len(self.kills) - sum(map(len, self.recoveries().values()))

    def askings(self) -> dict[str, int]:
        """What callers that try again came to: answered at once, after more attempts, or never."""
        last: dict[Entry, Entry] = {}
        attempts: Counter[Entry] = Counter()
        for entry in self.entries:
            first = entry
            while first.again is not None:
                first = first.again
            last[first] = entry
            attempts[first] += 1
        answered = [first for first, end in last.items() if end.ending == "answered"]
        return {
            "askings": len(last),
            "answered at once": sum(attempts[first] == 1 for first in answered),
            "answered after more attempts": sum(attempts[first] > 1 for first in answered),
            "refused or cut off": sum(end.is_final and end.ending != "answered" for end in last.values()),
            "never answered": sum(not end.is_final for end in last.values()),
        }


def spread(values: Sequence[float]) -> float:
    """The largest less the smallest, as a part of their mean."""
    mean = statistics.fmean(values)
    return (max(values) - min(values)) / mean if mean else float("inf")
