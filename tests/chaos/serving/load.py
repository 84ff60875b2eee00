"""Twice what the server can draw, for a while: with nothing else, with kills, and to a server that is ended.

Requests come at random moments, whatever became of those before; three keys ask for unequal parts, each for
more than a third of what can be drawn, so a fair server draws the same work for each.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from serve_app.keys import DRAW, READ, add_key
from tests.chaos.serving.clients import Caller, random_kind
from tests.chaos.serving.faults import Killing, Memory, Processes, kill_every
from tests.chaos.serving.ledger import SEEN_SECONDS, Ledger, spread
from tests.chaos.serving.pictures import THREADS, Drawing, drawn, random_drawings
from tests.running_server import RunningServer, running_server

#: What is asked for, as a multiple of what can be drawn.
OVERLOAD = 2.0
#: So small that it is full all the time, and no request waits long.
PLACES = 24
CLIENTS_WHILE_MEASURING = 6
#: The first part of a run, in which the queue fills.
FILLING = 0.15
#: How far the work of one key may be from another's.
FAIR_WITHIN = 0.15
#: What a replica's memory may grow by between the first and the last third.
FLAT_WITHIN_MIB = 32.0
#: After SIGTERM clients go on asking for so long.
ASKING_AFTER_SIGTERM_SECONDS = 3.0
END_SECONDS = 60.0

KILLS = (Killing("worker", 20.0), Killing("ingress", 45.0))


@dataclass(frozen=True)
class Target:
    """A running server, the keys of its callers, and the pictures that are asked of it."""

    base_url: str
    keys: dict[str, str]
    drawings: tuple[Drawing, ...]
    processes: Processes
    process: psutil.Process | None = None


@dataclass
class Result:
    """What a run found: a table of figures, and everything that is wrong in words."""

    title: str
    figures: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def must(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.wrong.append(sentence)

    def __str__(self) -> str:
        lines = [f"## {self.title}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_shown(value)} |" for name, value in self.figures.items()]
        lines += ["", *(f"WRONG {each}" for each in self.wrong[:40]), f"{len(self.wrong)} wrong"]
        return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(_shown(each) for each in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def pictures(count: int, seed: int) -> tuple[Drawing, ...]:
    """The table of what will be asked for, with the pixels that must come."""
    return drawn(list(random_drawings(count, random.Random(seed))))


@contextmanager
def serving(
    drawings: tuple[Drawing, ...], keys: int = 3, **environment: str
) -> Iterator[tuple[Target, RunningServer]]:
    """A server of our own with so many keys, ready."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        named = {
            f"key-{number}": add_key(file, f"key-{number}", [DRAW, READ]) for number in range(1, keys + 1)
        }
        chosen = {
            "ZIMAGE_API_KEYS_FILE": str(file),
            "ZIMAGE_CPU_THREADS": str(THREADS),
            "ZIMAGE_DEVICE": "cpu",
            "ZIMAGE_MAX_QUEUED_REQUESTS": str(PLACES),
            **environment,
        }
        with running_server(environment=chosen) as server:
            target = Target(
                server.base_url, named, drawings, server.processes, psutil.Process(server.process.pid)
            )
            yield target, server


@asynccontextmanager
async def callers(target: Target, ledger: Ledger, chance: random.Random) -> AsyncIterator[list[Caller]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(Caller(target.base_url, name, key, ledger, chance))
            for name, key in target.keys.items()
        ]


async def capacity(target: Target, seconds: float) -> float:
    """Pictures of the table that the server draws a second when it always has the next at hand."""
    ledger, chance = Ledger(), random.Random(0)
    in_turn = itertools.cycle(target.drawings)
    async with callers(target, ledger, chance) as asking:
        until = time.monotonic() + seconds

        async def one_after_another(caller: Caller) -> None:
            while time.monotonic() < until:
                await caller.ask("plain", next(in_turn))

        began = time.monotonic()
        clients = itertools.islice(itertools.cycle(asking), CLIENTS_WHILE_MEASURING)
        await asyncio.gather(*map(one_after_another, clients))
    if ledger.count("answered") != len(ledger.entries):
        raise RuntimeError(f"the server draws nothing that could be measured: {ledger.endings()}")
    return ledger.count("answered") / (time.monotonic() - began)


async def traffic(
    asking: Sequence[Caller],
    drawings: Sequence[Drawing],
    pictures_a_second: float,
    seconds: float,
    chance: random.Random,
    insistent: bool = False,
) -> None:
    """Requests of every kind at random moments, so many a second in all; returns when the last has ended.

    `insistent` callers ask again after a failure.
    """
    under_way: set[asyncio.Task[Any]] = set()
    until = time.monotonic() + seconds

    async def at_random(caller: Caller, rate: float) -> None:
        while True:
            await asyncio.sleep(chance.expovariate(rate))
            if time.monotonic() >= until:
                return
            kind, drawing = random_kind(chance), chance.choice(drawings)
            once: Coroutine[Any, Any, Any] = (
                caller.ask_until_answered(kind, drawing) if insistent else caller.ask(kind, drawing)
            )
            task = asyncio.create_task(once)
            under_way.add(task)
            task.add_done_callback(under_way.discard)

    parts = list(_parts(len(asking)))
    await asyncio.gather(
        *(at_random(each, pictures_a_second * part) for each, part in zip(asking, parts, strict=True))
    )
    if under_way:
        await asyncio.gather(*under_way)


def _parts(callers: int) -> Iterator[float]:
    """Unequal parts of one, the largest half as large again as the smallest."""
    weights = [1 + 0.5 * number / max(1, callers - 1) for number in range(callers)]
    return (weight / sum(weights) for weight in weights)


@asynccontextmanager
async def meanwhile(*tasks: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
    """They run for as long as the block does; what one of them raises comes out at its end."""
    running = [asyncio.create_task(each) for each in tasks]
    try:
        yield
    finally:
        for each in running:
            each.cancel()
        for each in running:
            with suppress(asyncio.CancelledError):
                await each


async def load(target: Target, seconds: float, seed: int, grain: float = 0.0) -> Result:
    """Twice the capacity, nothing broken: everything is accounted for, fair, and memory stays.

    In a run so short that single pictures count, keys may be apart by `grain` of the largest pictures more.
    """
    found, ledger, memory, chance = Result("Load"), Ledger(), Memory(), random.Random(seed)
    rate = await capacity(target, min(10.0, seconds / 4))
    began, drawn_before = time.monotonic(), await _drawn_so_far(target)
    async with callers(target, ledger, chance) as asking, meanwhile(memory.watch(target.processes)):
        await traffic(asking, target.drawings, OVERLOAD * rate, seconds, chance)
    ledger.judge(lambda entry: False)
    full_at = min((entry.ended_at for entry in ledger.entries if "queue_full" in entry.told), default=began)
    shares = ledger.work_by_key(max(full_at, began + FILLING * seconds), began + seconds)
    a_picture = max(drawing.work for drawing in target.drawings) * len(shares) / (sum(shares.values()) or 1)
    account(found, ledger, seconds, rate)
    found.figures |= {
        "work answered by key, megapixel-steps": shares,
        "spread between keys": spread(list(shares.values())),
        "pictures drawn by the server's count": await _drawn_so_far(target) - drawn_before,
        "memory, MiB (first third, last third)": memory.growth(),
    }
    found.must(
        spread(list(shares.values())) <= FAIR_WITHIN + grain * a_picture,
        f"the keys' work differs by more than {FAIR_WITHIN:.0%} and {grain:g} pictures",
    )
    surplus = found.figures["pictures drawn by the server's count"] - ledger.count("answered")
    found.must(
        0 <= surplus <= ledger.count("cut off"),
        f"the server drew {surplus} pictures more than were answered; {ledger.count('cut off')} were cut off",
    )
    for what, (first, last) in memory.growth().items():
        found.must(
            last - first <= FLAT_WITHIN_MIB, f"the {what}'s memory grew from {first:.0f} to {last:.0f} MiB"
        )
    return found


async def chaos(target: Target, seconds: float, seed: int, kills: Sequence[Killing] = KILLS) -> Result:
    """Twice the capacity, and every so often one of the processes is killed."""
    found, ledger, chance = Result("Chaos"), Ledger(), random.Random(seed)
    rate = await capacity(target, min(10.0, seconds / 4))
    killing = [kill_every(each, target.processes, ledger) for each in kills]
    async with callers(target, ledger, chance) as asking:
        async with meanwhile(*killing):
            sending = asyncio.create_task(
                traffic(asking, target.drawings, OVERLOAD * rate, seconds, chance, insistent=True)
            )
            await asyncio.wait({sending}, timeout=seconds)
        await sending
        # So that what came last can be seen to have been recovered from.
        await asking[0].ask_until_answered("plain", target.drawings[0])
    ledger.judge(ledger.killed_just_before)
    account(found, ledger, seconds, rate)
    account_of_kills(found, ledger)
    return found


def account(found: Result, ledger: Ledger, seconds: float, rate: float) -> None:
    found.figures |= {
        "seconds": seconds,
        "pictures a second that can be drawn": rate,
        "requests": len(ledger.entries),
        "answered": ledger.count("answered"),
        "failed, and told so": ledger.count("failed"),
        "cut off by the client": ledger.count("cut off"),
        "lost": ledger.count("lost"),
        "duplicated": len(ledger.duplicated),
        "wrong pictures or answers": len(ledger.wrong),
        "how they ended": ledger.endings(),
    }
    found.wrong += [*ledger.lost, *ledger.wrong]
    found.wrong += [f"request {entry.number} ended {entry.endings} times" for entry in ledger.duplicated]
    found.must(ledger.is_balanced, "sent is not answered + failed + cut off")
    found.must(ledger.count("answered") > 0, "nothing was answered")


def account_of_kills(found: Result, ledger: Ledger) -> None:
    recoveries = ledger.recoveries()
    found.figures |= {
        "kills": {what: sum(kill.what == what for kill in ledger.kills) for what in recoveries},
        "seconds to the next picture": {what: sorted(each) for what, each in recoveries.items()},
        "last client to see an ingress' end, seconds": ledger.slowest_to_see,
        "callers that ask again": ledger.askings(),
    }
    found.must(bool(ledger.kills), "nothing was killed")
    found.must(not ledger.without_recovery, "no picture came after a kill")
    found.must(ledger.slowest_to_see <= SEEN_SECONDS, "what a killed ingress held hung")
    found.must(not ledger.askings()["never answered"], "a caller that asked again never had its picture")


async def _drawn_so_far(target: Target) -> int:
    """Requests that ended well by the server's own count."""
    key = next(iter(target.keys.values()))
    async with httpx.AsyncClient(timeout=30, headers={"authorization": f"Bearer {key}"}) as client:
        text = (await client.get(f"{target.base_url}/metrics")).raise_for_status().text
    return int(
        sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith("zimage_requests_total{") and 'outcome="ok"' in line
        )
    )


async def sigterm(target: Target, seconds: float, seed: int) -> Result:
    """SIGTERM to `launch` under load: what was accepted is answered or told to have failed; nothing stays."""
    found, ledger, chance = Result("SIGTERM under load"), Ledger(), random.Random(seed)
    assert target.process is not None
    rate = await capacity(target, 3.0)
    processes = list(target.processes())
    async with callers(target, ledger, chance) as asking:
        sending = asyncio.create_task(
            traffic(asking, target.drawings, OVERLOAD * rate, seconds + ASKING_AFTER_SIGTERM_SECONDS, chance)
        )
        await asyncio.sleep(seconds)
        processes = list({*processes, *target.processes()})
        at = time.monotonic()
        target.process.send_signal(signal.SIGTERM)
        _, alive = await asyncio.to_thread(psutil.wait_procs, processes, END_SECONDS)
        ended = time.monotonic() - at
        await sending
    ledger.judge(lambda entry: entry.sent_at > at)
    before = [entry for entry in ledger.entries if entry.sent_at <= at]
    held = [entry for entry in before if entry.ended_at > at]
    account(found, ledger, seconds, rate)
    found.figures |= {
        "under way at SIGTERM": len(held),
        "of these answered": sum(entry.ending == "answered" for entry in held),
        "of these failed, and told so": sum(entry.ending == "failed" for entry in held),
        "of these lost": sum(entry.ending == "lost" for entry in held),
        "seconds to the end of every process": ended,
    }
    found.must(not alive, f"{len(alive)} processes still run {END_SECONDS:g} s after SIGTERM")
    return found


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
