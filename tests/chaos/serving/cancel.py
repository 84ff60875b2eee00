"""Requests that are given up at a random moment: how soon the worker draws for the next, and what."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import statistics
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.chaos.serving.clients import URL, Caller
from tests.chaos.serving.ledger import Ledger
from tests.chaos.serving.load import Result, Target, callers
from tests.chaos.serving.pictures import ENDLESS, Drawing

#: What the next picture may wait for beyond the step that is being computed.
BEYOND_A_STEP_SECONDS = 0.1
BASELINE_PICTURES = 20
STEPS_MEASURED = 12
#: The latest moment of a plain request, and the last step of a stream, at which it is given up.
LAST_SECONDS = 1.2
LAST_STEP = 12
STEP = re.compile(r": step (\d+)/")


@dataclass
class Waits:
    """Seconds from giving up to the control picture, less what that takes of a server that is idle."""

    by_way: dict[str, list[float]] = field(default_factory=dict)

    @property
    def all(self) -> list[float]:
        return sorted(each for waits in self.by_way.values() for each in waits)


async def cancel(target: Target, tries: int, seed: int, slack_seconds: float = 0.0) -> Result:
    """Give up `tries` requests, each at another moment, and ask at once for a small picture.

    The worker is free within one step and 0.1 s, and the small picture is the one that a fresh engine draws.
    `slack_seconds` more are allowed on a machine that is busy with other things.
    """
    found, ledger, chance, waits = Result("Cancel"), Ledger(), random.Random(seed), Waits()
    control = min(target.drawings, key=lambda drawing: drawing.work)
    async with callers(target, ledger, chance) as (caller, *_):
        baseline = [await _control(caller, control) for _ in range(BASELINE_PICTURES)]
        usual = statistics.median(baseline)
        step = await _step_seconds(caller.http)
        for number in range(tries):
            way = list(WAYS)[number % len(WAYS)]
            await WAYS[way](caller.http, chance)
            waits.by_way.setdefault(way, []).append(max(0.0, await _control(caller, control) - usual))
    ledger.judge(lambda entry: False)
    bound = step + BEYOND_A_STEP_SECONDS + slack_seconds
    late = [each for each in waits.all if each > bound]
    found.figures |= {
        "tries": len(waits.all),
        "one step, seconds": step,
        "a control picture of an idle server, seconds": [usual, max(baseline)],
        "bound, seconds": bound,
        "later than the bound": len(late),
        "until the worker was free, seconds (median, 90 %, 99 %, most)": {
            way: _quantiles(each) for way, each in {**waits.by_way, "all": waits.all}.items() if each
        },
        "control pictures that are those of a fresh engine": ledger.count("answered"),
    }
    found.wrong += [*ledger.lost, *ledger.wrong]
    found.wrong += [
        f"the worker was free only after {each:.3f} s, at most {bound:.3f} s are allowed" for each in late
    ]
    found.must(len(waits.all) == tries, "not every try was counted")
    found.must(ledger.count("answered") == len(ledger.entries), f"control pictures: {ledger.endings()}")
    return found


async def _control(caller: Caller, drawing: Drawing) -> float:
    """Seconds that the control picture takes; its pixels are looked at too."""
    return (await caller.ask("plain", drawing)).seconds


async def _step_seconds(http: httpx.AsyncClient) -> float:
    """One step of the picture that is given up."""
    at: list[float] = []
    async with http.stream("POST", URL, json=ENDLESS.fields() | {"stream": True}) as response:
        async for line in response.aiter_lines():
            if STEP.match(line):
                at.append(time.monotonic())
            if len(at) > STEPS_MEASURED:
                break
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(at))


async def _plain(http: httpx.AsyncClient, chance: random.Random) -> None:
    """The connection is closed, whatever the request waits for."""
    asking = asyncio.create_task(http.post(URL, json=ENDLESS.fields()))
    await asyncio.wait({asking}, timeout=chance.uniform(0, LAST_SECONDS))
    asking.cancel()
    await asyncio.wait({asking})


async def _stream(http: httpx.AsyncClient, chance: random.Random) -> None:
    """The stream is closed after a step, or somewhere within the next."""
    last = chance.randint(1, LAST_STEP)
    fields = ENDLESS.fields() | {"stream": True, "partial_images": chance.randint(0, 3)}
    async with http.stream("POST", URL, json=fields) as response:
        async for line in response.aiter_lines():
            step = STEP.match(line)
            if step and int(step[1]) >= last:
                await asyncio.sleep(chance.uniform(0, 0.1))
                break


#: How a request is given up; each returns at the moment at which it was.
WAYS: dict[str, Callable[[httpx.AsyncClient, random.Random], Coroutine[Any, Any, None]]] = {
    "plain request, connection closed": _plain,
    "stream, closed": _stream,
}


def _quantiles(seconds: list[float]) -> list[float]:
    in_order = sorted(seconds)
    return [in_order[min(len(in_order) - 1, int(len(in_order) * part))] for part in (0.5, 0.9, 0.99)] + [
        in_order[-1]
    ]
