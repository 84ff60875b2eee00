"""A server under load, with cancels and kills: short forms of `python -m tests.chaos.serving`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.chaos.serving.cancel import cancel
from tests.chaos.serving.faults import Killing
from tests.chaos.serving.load import Target, chaos, load, pictures, serving

pytestmark = pytest.mark.server

#: A machine that runs other tests beside this one is no place to measure tenths of a second.
SLACK_SECONDS = 1.0
#: At both ends of a short run, and where a client went away in the middle, a key may be a picture behind.
PICTURES_APART = 3


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with serving(pictures(16, seed=0)) as (target, _):
        yield target


def test_at_twice_the_capacity_every_request_is_accounted_for_and_every_picture_is_right(
    target: Target,
) -> None:
    found = asyncio.run(load(target, 15.0, seed=0, grain=PICTURES_APART))

    assert not found.wrong, found
    assert found.figures["answered"] >= 15 and found.figures["cut off by the client"] >= 1
    told = found.figures["how they ended"]
    assert any("queue_full" in each for each in told) and any("400" in each for each in told)


def test_a_cancelled_request_frees_the_worker_and_the_next_picture_is_as_from_a_fresh_engine(
    target: Target,
) -> None:
    found = asyncio.run(cancel(target, 20, seed=0, slack_seconds=SLACK_SECONDS))

    assert not found.wrong, found
    assert found.figures["tries"] == 20


def test_a_killed_worker_and_a_killed_ingress_lose_nothing_in_silence(target: Target) -> None:
    kills = (Killing("worker", 2.0, times=1), Killing("ingress", 16.0, times=1))

    found = asyncio.run(chaos(target, 18.0, seed=0, kills=kills))

    assert not found.wrong, found
    assert found.figures["kills"] == {"worker": 1, "ingress": 1}
