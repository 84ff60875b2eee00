"""The processes of a running server: found by their titles, measured, killed."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import psutil

from tests.chaos.serving.ledger import Kill, Ledger

#: Ray's titles of our two deployments' replicas; they go on while a method runs.
TITLES = {
    "worker": "ray::ServeReplica:default:ImageWorker",
    "ingress": "ray::ServeReplica:default:PromptEnhancer",
}
SAMPLE_SECONDS = 2.0
#: The first part of a run, in which caches fill.
WARM_UP = 0.2

Processes = Callable[[], Iterable[psutil.Process]]


def replicas(processes: Processes, what: str) -> list[psutil.Process]:
    """The worker or ingress processes that live now."""
    found = []
    for process in processes():
        try:
            if process.cmdline() and process.cmdline()[0].startswith(TITLES[what]):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@dataclass(frozen=True)
class Killing:
    """A worker or an ingress is killed every so often, `times` times at most."""

    what: str
    every_seconds: float
    times: int | None = None


async def kill_every(killing: Killing, processes: Processes, ledger: Ledger) -> None:
    """kill -9 one of them every so often, until cancelled. Where none lives there is none to kill."""
    began = time.monotonic()
    for number in itertools.count(1) if killing.times is None else range(1, killing.times + 1):
        await asyncio.sleep(max(0.0, began + number * killing.every_seconds - time.monotonic()))
        alive = await asyncio.to_thread(replicas, processes, killing.what)
        if alive:
            ledger.kills.append(Kill(killing.what, time.monotonic()))
            random.choice(alive).kill()


@dataclass
class Memory:
    """Samples of the replicas' memory: proportional set size, so that shared pages count once."""

    samples: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    async def watch(self, processes: Processes) -> None:
        """Sample until cancelled."""
        while True:
            for what in TITLES:
                used = await asyncio.to_thread(_used_bytes, processes, what)
                if used:
                    self.samples.setdefault(what, []).append((time.monotonic(), used))
            await asyncio.sleep(SAMPLE_SECONDS)

    def growth(self) -> dict[str, tuple[float, float]]:
        """Medians in MiB of the first and of the last third after the warm-up, by what they are of."""
        found = {}
        for what, samples in self.samples.items():
            sizes = [used / 2**20 for _, used in samples[int(len(samples) * WARM_UP) :]]
            third = len(sizes) // 3
            if third:
                found[what] = (statistics.median(sizes[:third]), statistics.median(sizes[-third:]))
        return found


def _used_bytes(processes: Processes, what: str) -> int:
    used = 0
    for process in replicas(processes, what):
        try:
            used += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return used
