"""Who draws next, on a clock that only the tests move: no Ray, no worker, no waiting."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.queueing import (
    FIRST_RETRY_SECONDS,
    WEIGHTS,
    CallerLimited,
    Entry,
    FairQueue,
    Place,
    Priority,
    QueueFull,
    Sharing,
    Ticket,
    span,
    turn,
)
from zimage_engine.errors import InvalidRequest

CALLERS = ("ann", "bob", "cem")


@dataclass
class World:
    """A queue and its workers, who draw in the order in which they are handed tickets; `now` is the time."""

    places: int = 64
    seconds: float | None = None
    workers: int = 1
    entries: dict[str, Entry] = field(default_factory=dict)
    pace: float = 1.0
    now: float = 0.0
    order: list[Ticket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queue = FairQueue(self.places, self.seconds, self.entry_of, lambda: self.now)
        self.queue.set_workers(self.workers)
        self.tickets: list[Ticket] = []

    def entry_of(self, name: str) -> Entry:
        return self.entries.get(name, Entry())

    def enter(self, name: str, work: float = 1.0, pictures: int = 1) -> Ticket:
        ticket = self.queue.enter(name, work, pictures)
        self.tickets.append(ticket)
        return ticket

    def draw_one(self) -> Ticket | None:
        """The workers end the ticket that they have had longest; None where there is none."""
        at_work = [ticket for ticket in self.tickets if ticket.admitted_at is not None]
        if not at_work:
            return None
        ticket = min(at_work, key=lambda each: (each.admitted_at, each.number))
        self.now += ticket.work * self.pace / self.workers
        self.queue.pace.learn(ticket.work, ticket.work * self.pace)
        self.tickets.remove(ticket)
        self.queue.leave(ticket)
        self.order.append(ticket)
        return ticket

    def draw_all(self) -> list[str]:
        while self.draw_one():
            pass
        return [ticket.caller for ticket in self.order]


def waits(ticket: Ticket) -> bool:
    return ticket.admitted_at is None and ticket.refusal is None


def test_one_picture_is_drawn_soon_whoever_has_a_hundred_waiting() -> None:
    world = World(places=200)
    for _ in range(100):
        world.enter("ann")
    mine = world.enter("bob")
    assert world.queue.place_of(mine) == Place(1, None)
    assert world.draw_all().index("bob") == world.queue.room, "behind what the workers had in hand, no more"


def test_a_worker_has_the_next_picture_at_hand() -> None:
    world = World(workers=4)
    for _ in range(20):
        world.enter("ann")
    assert world.queue.admitted == 9 and world.queue.waiting == 11
    world.queue.set_workers(1)
    assert world.queue.admitted == 9, "what they have they keep"
    world.draw_one()
    assert world.queue.admitted == 8 and world.queue.waiting == 11
    world.queue.set_workers(0)
    assert world.queue.room == 3, "tickets wait for a worker that comes back where it is looked for"


WORKS = st.sampled_from([0.1, 0.5, 1.0, 2.0, 4.0])
LINES = st.lists(WORKS, min_size=40, max_size=80)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(LINES, LINES, LINES),
    st.permutations(CALLERS),
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from(CALLERS), WORKS), max_size=30),
)
def test_three_callers_with_much_to_do_get_the_same_however_they_came(
    lines: tuple[list[float], ...],
    order: list[str],
    workers: int,
    before: list[tuple[str, float]],
) -> None:
    """While all three wait; whatever was asked and drawn before, and though one came after all of another."""
    world = World(places=1000, workers=workers)
    for name, work in before:
        world.enter(name, work)
        world.draw_one()
    for name, works in zip(order, lines, strict=True):
        for work in works:
            world.enter(name, work)
    entered = list(world.tickets)
    started = {ticket for ticket in entered if not waits(ticket)}
    had: dict[str, float] = defaultdict(float)
    while all(any(waits(ticket) for ticket in entered if ticket.caller == name) for name in CALLERS):
        for ticket in entered:
            if not waits(ticket) and ticket not in started:
                started.add(ticket)
                had[ticket.caller] += ticket.work
        world.draw_one()
    shares = [had[name] for name in CALLERS]
    most_at_once = max(work for works in lines for work in works)
    # A picture is not cut in two: after `before`, what one had more than another is a picture of each.
    assert max(shares) - min(shares) <= max(0.15 * max(shares), 2 * most_at_once + 1e-9)


def test_over_many_pictures_three_callers_are_within_fifteen_percent() -> None:
    world = World(places=10_000, workers=2)
    for index, (name, works) in enumerate(zip(CALLERS, ((0.5, 2.0), (4.0,), (0.1,)), strict=True)):
        for number in range(2000 // (index + 1) if name != "cem" else 9000):
            world.enter(name, works[number % len(works)])
    had: dict[str, float] = defaultdict(float)
    for _ in range(4000):
        ticket = world.draw_one()
        assert ticket is not None
        had[ticket.caller] += ticket.work
    assert all(any(waits(ticket) for ticket in world.tickets if ticket.caller == name) for name in CALLERS)
    assert max(had.values()) <= 1.15 * min(had.values()), had


@pytest.mark.parametrize("priority", ["high", "low"])
def test_a_priority_is_a_share_and_nobody_waits_for_ever(priority: Priority) -> None:
    world = World(places=10_000, entries={"ann": Entry(priority)})
    for _ in range(1000):
        world.enter("ann")
        world.enter("bob")
    for _ in range(500):
        world.draw_one()
    had = [ticket.caller for ticket in world.order]
    wanted = WEIGHTS[priority] / (WEIGHTS[priority] + WEIGHTS["normal"])
    assert had.count("ann") / 500 == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize("workers", [1, 3])
def test_three_priorities_share_as_their_weights_do_and_the_low_one_never_starves(workers: int) -> None:
    """One has hundreds from the start, the others always some; pictures are of different sizes."""
    priorities: dict[str, Priority] = {"ann": "high", "bob": "normal", "cem": "low"}
    entries = {name: Entry(priority) for name, priority in priorities.items()}
    world = World(places=10_000, entries=entries, workers=workers)
    sizes = {"ann": (0.5, 4.0, 1.0), "bob": (2.0, 0.1), "cem": (1.0, 2.0)}
    asked: dict[str, int] = defaultdict(int)

    def ask(name: str) -> None:
        world.enter(name, sizes[name][asked[name] % len(sizes[name])])
        asked[name] += 1

    for _ in range(700):
        ask("bob")
    had: dict[str, float] = defaultdict(float)
    last_low, longest_gap = 0.0, 0.0
    for _ in range(3000):
        for name in CALLERS:
            while not any(waits(ticket) for ticket in world.tickets if ticket.caller == name):
                ask(name)
        ticket = world.draw_one()
        assert ticket is not None
        had[ticket.caller] += ticket.work
        if ticket.caller == "cem":
            longest_gap, last_low = max(longest_gap, world.now - last_low), world.now
    shares = {name: had[name] / WEIGHTS[priorities[name]] for name in CALLERS}
    assert max(shares.values()) <= 1.15 * min(shares.values()), had
    # Its share is 1 in 21: its largest picture comes again after the time of as many, and what is in hand.
    assert longest_gap <= (2.0 * sum(WEIGHTS.values()) / WEIGHTS["low"] + 3 * 4.0) / workers


ASKS = st.tuples(st.sampled_from(CALLERS), WORKS)
STEPS = st.lists(
    st.one_of(
        ASKS,
        ASKS,
        ASKS,
        st.just("draw"),
        st.integers(0, 10),  # the ticket with that index is given up
        st.floats(0.1, 3.0),  # the pace changes
    ),
    min_size=15,
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(1, 5), st.sampled_from([None, 0.5, 3.0, 20.0]), st.integers(1, 2))
def test_whatever_happens_the_bounds_hold_and_every_ticket_ends(
    steps: list[tuple[str, float] | str | int | float], places: int, seconds: float | None, workers: int
) -> None:
    world = World(places=places, seconds=seconds, workers=workers)
    asked: list[Ticket] = []
    for step in steps:
        if isinstance(step, tuple):
            try:
                ticket = world.enter(*step)
            except QueueFull as full:
                assert int(full.headers["Retry-After"]) >= 1
            else:
                asked.append(ticket)
                place = world.queue.place_of(ticket)
                if place is not None and place.seconds is not None and seconds is not None:
                    assert place.seconds <= seconds + 1e-6
        elif step == "draw":
            world.draw_one()
        elif isinstance(step, int):
            if step < len(world.tickets):
                world.queue.leave(world.tickets.pop(step))
        elif isinstance(step, float):
            world.pace = step
        world.tickets = [ticket for ticket in world.tickets if ticket.refusal is None]
        assert world.queue.waiting == sum(waits(ticket) for ticket in world.tickets) <= places
        assert world.queue.admitted == len(world.tickets) - world.queue.waiting <= world.queue.room
        assert not world.queue.waiting or world.queue.admitted == world.queue.room, "nobody waits for nothing"
        places_told = [world.queue.place_of(ticket) for ticket in world.tickets if waits(ticket)]
        assert sorted(place.position for place in places_told if place) == [*range(1, len(places_told) + 1)]
    world.draw_all()
    assert world.queue.waiting == world.queue.admitted == 0
    for name in CALLERS:
        admitted = [ticket for ticket in asked if ticket.caller == name and ticket.admitted_at is not None]
        numbers = [ticket.number for ticket in sorted(admitted, key=_admission)]
        assert numbers == sorted(numbers), "a caller's own tickets keep their order"
    world.enter("ann")
    assert world.draw_all()[-1] == "ann"


def _admission(ticket: Ticket) -> tuple[float, int]:
    assert ticket.admitted_at is not None
    return ticket.admitted_at, ticket.number


def test_the_places_told_are_the_order_in_which_they_come() -> None:
    world = World(entries={"cem": Entry("high")})
    for number in range(12):
        world.enter(CALLERS[number % 3], 1.0 + number % 2)
    told = {world.queue.place_of(ticket): ticket for ticket in world.tickets if waits(ticket)}
    expected = [told[place] for place in sorted(told, key=lambda place: place.position if place else 0)]
    world.draw_all()
    assert world.order[world.queue.room :] == expected


def test_seconds_are_told_from_the_first_picture_on() -> None:
    world = World(pace=2.0)
    tickets = [world.enter("ann") for _ in range(6)]
    assert world.queue.place_of(tickets[-1]) == Place(3, None)
    world.draw_one()
    assert world.queue.place_of(tickets[-1]) == Place(2, 8.0), "three at the worker, one before it"
    world.now += 1.5
    assert world.queue.place_of(tickets[-1]) == Place(2, 6.5)
    assert world.queue.place_of(tickets[1]) is None, "it is at the worker"


def test_over_the_number_a_caller_is_refused_and_told_when_to_come_again() -> None:
    world = World(places=2, pace=7.0)
    world.enter("ann")
    world.draw_one()
    for _ in range(world.queue.room + 2):
        world.enter("ann")
    with pytest.raises(QueueFull, match=r"2 requests wait, about 35 s of work") as full:
        world.enter("ann")
    assert full.value.headers == {"Retry-After": "7", "X-Queue-Position": "3", "X-Queue-Seconds": "35"}


def test_before_the_first_picture_nothing_is_said_of_seconds() -> None:
    world = World(places=1, seconds=1.0)
    for _ in range(world.queue.room + 1):
        world.enter("ann", 1000.0)
    with pytest.raises(QueueFull) as full:
        world.enter("ann")
    assert full.value.headers == {"Retry-After": str(FIRST_RETRY_SECONDS), "X-Queue-Position": "2"}


def test_over_the_seconds_a_caller_is_refused_and_told_when_to_come_again() -> None:
    world = World(seconds=30.0, pace=10.0)
    world.enter("ann")
    world.draw_one()
    for _ in range(world.queue.room + 1):
        world.enter("ann")
    with pytest.raises(QueueFull) as full:
        world.enter("ann")
    assert full.value.headers["Retry-After"] == "20", "10 s too much, and then the one being drawn"
    world.draw_one()
    world.enter("ann")


def test_a_picture_that_takes_longer_than_the_bound_is_drawn_where_nobody_waits() -> None:
    world = World(seconds=5.0, pace=1.0)
    world.enter("ann")
    world.draw_one()
    world.enter("ann", 1000.0)
    assert world.draw_all() == ["ann", "ann"]


def test_in_a_full_queue_who_has_less_takes_the_place_of_who_has_more() -> None:
    world = World(places=4)
    anns = [world.enter("ann") for _ in range(world.queue.room + 4)]
    bobs = [world.enter("bob"), world.enter("bob")]
    assert [ticket.refusal is not None for ticket in anns] == [False] * (world.queue.room + 2) + [True] * 2
    assert all(ticket.moved.is_set() for ticket in anns[-2:])
    with pytest.raises(QueueFull, match="this request came too late"):
        world.enter("bob")
    assert not any(ticket.refusal for ticket in bobs)
    assert world.draw_all().count("bob") == 2


def test_who_waits_outside_takes_the_same_places_and_loses_them_first() -> None:
    world = World(places=5)
    anns = [world.enter("ann") for _ in range(world.queue.room + 3)]
    ahead = [("ann", 1.0, 1), ("bob", 1.0, 1)]
    world.queue.check("bob", 1.0, 1, ahead)
    assert not any(ticket.refusal for ticket in anns), "a look alone"
    assert [number for number, _ in world.queue.displace("bob", 1.0, ahead)] == [0]
    ahead = [("bob", 1.0, 1), ("bob", 1.0, 1)]
    with pytest.raises(QueueFull, match="this request came too late"):
        world.queue.check("bob", 1.0, 1, ahead)
    assert world.queue.displace("bob", 1.0, ahead) == []
    world.queue.check("eve", 1.0, 1, ahead)
    assert world.queue.displace("eve", 1.0, ahead) == []
    assert [ticket.refusal is not None for ticket in anns] == [False] * (world.queue.room + 2) + [True]
    assert anns[-1].moved.is_set()


def test_nobody_is_sent_away_for_one_who_is_refused_all_the_same() -> None:
    world = World(places=3, seconds=100.0)
    world.enter("ann")
    world.draw_one()
    anns = [world.enter("ann", 10.0) for _ in range(world.queue.room + 3)]
    world.enter("bob", 10.0)
    with pytest.raises(QueueFull):
        world.enter("bob", 50.0)
    assert sum(ticket.refusal is not None for ticket in anns) == 1


def test_one_caller_may_have_so_many_pictures_at_once() -> None:
    world = World(entries={"ann": Entry(pictures_at_once=4)})
    world.enter("ann", pictures=3)
    with pytest.raises(CallerLimited, match="3 pictures under way, and may have 4 at once") as limited:
        world.enter("ann", pictures=2)
    assert int(limited.value.headers["Retry-After"]) > 0
    with pytest.raises(InvalidRequest, match="n must be at most 4") as invalid:
        world.enter("ann", pictures=5)
    assert invalid.value.parameter == "n"
    world.enter("bob", pictures=5)
    world.draw_one()
    world.enter("ann", pictures=4)


def test_requests_a_minute_come_back_evenly_and_are_told() -> None:
    world = World(entries={"ann": Entry(requests_a_minute=6)})
    assert world.queue.headers_of("bob") == {}
    for left in (5, 4, 3, 2, 1, 0):
        world.enter("ann")
        headers = world.queue.headers_of("ann")
        assert headers["x-ratelimit-remaining-requests"] == str(left)
    assert headers["x-ratelimit-limit-requests"] == "6" and headers["x-ratelimit-reset-requests"] == "1m0s"
    with pytest.raises(CallerLimited, match="6 requests a minute; the next is free in 10 s") as limited:
        world.enter("ann")
    assert limited.value.headers["Retry-After"] == "10"
    assert limited.value.headers["x-ratelimit-remaining-requests"] == "0"
    world.enter("bob")
    world.now += 10.0
    world.enter("ann")
    with pytest.raises(CallerLimited):
        world.enter("ann")
    world.now += 3600.0
    assert world.queue.headers_of("ann")["x-ratelimit-reset-requests"] == "0ms"


def test_what_a_full_queue_refuses_is_not_counted_against_the_minute() -> None:
    world = World(places=1, entries={"ann": Entry(requests_a_minute=10)})
    for _ in range(world.queue.room + 1):
        world.enter("ann")
    with pytest.raises(QueueFull) as full:
        world.enter("ann")
    assert not isinstance(full.value, CallerLimited)
    assert world.queue.headers_of("ann")["x-ratelimit-remaining-requests"] == "6"


def test_many_callers_who_came_once_are_forgotten() -> None:
    world = World()
    for number in range(5000):
        world.enter(f"address {number}")
        world.draw_one()
    assert len(world.queue._lines) <= 257


@pytest.mark.parametrize(
    ("seconds", "written"), [(0.0, "0ms"), (0.02, "20ms"), (1.0, "1s"), (59.2, "1m0s"), (360.0, "6m0s")]
)
def test_a_span_is_written_as_openai_writes_it(seconds: float, written: str) -> None:
    assert span(seconds) == written


# --- tasks that wait -------------------------------------------------------------------------------------


@dataclass
class Visitors:
    """Tasks that ask for a turn and keep it until they are told to go."""

    queue: FairQueue
    served: list[str] = field(default_factory=list)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    done: dict[str, asyncio.Event] = field(default_factory=dict)

    async def come(self, name: str, caller: str, on_place: Callable[[Place], None] | None = None) -> None:
        self.done[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._visit(name, caller, on_place))
        await settle()

    async def _visit(self, name: str, caller: str, on_place: Callable[[Place], None] | None) -> None:
        async with turn(self.queue, caller, 1.0, on_place=on_place):
            self.served.append(name)
            await self.done[name].wait()

    async def go(self, name: str) -> None:
        self.done[name].set()
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def full_house(places: int = 64) -> Visitors:
    visitors = Visitors(FairQueue(places))
    for number in range(visitors.queue.room):
        await visitors.come(f"first {number}", "ann")
    return visitors


async def test_a_turn_comes_when_another_ends() -> None:
    visitors = await full_house()
    await visitors.come("late", "ann")
    assert "late" not in visitors.served
    await visitors.go("first 0")
    assert "late" in visitors.served


async def test_who_is_cancelled_leaves_the_queue_at_once() -> None:
    visitors = await full_house()
    await visitors.come("leaving", "ann")
    await visitors.come("staying", "ann")
    visitors.tasks["leaving"].cancel()
    await settle()
    assert visitors.queue.waiting == 1 and visitors.tasks["leaving"].cancelled()
    await visitors.go("first 0")
    assert visitors.served[-1] == "staying"


async def test_who_is_cancelled_as_the_turn_comes_takes_it_from_nobody() -> None:
    visitors = await full_house()
    await visitors.come("leaving", "ann")
    await visitors.come("staying", "ann")
    visitors.done["first 0"].set()
    await asyncio.sleep(0)  # the turn is given, and not yet taken
    visitors.tasks["leaving"].cancel()
    await settle()
    assert visitors.queue.admitted == visitors.queue.room and visitors.queue.waiting == 0
    assert visitors.served[-1] == "staying"


async def test_who_fails_in_its_turn_lets_the_next_in() -> None:
    queue = FairQueue(1)
    for _ in range(2 * queue.room):
        with pytest.raises(RuntimeError, match="broken"):
            async with turn(queue, "ann", 1.0):
                raise RuntimeError("broken")
    assert queue.admitted == 0


async def test_who_has_to_make_room_hears_of_it_at_once() -> None:
    visitors = await full_house(places=2)
    await visitors.come("one", "ann")
    await visitors.come("two", "ann")
    await visitors.come("other", "bob")
    assert isinstance(visitors.tasks["two"].exception(), QueueFull)
    assert not visitors.tasks["one"].done() and not visitors.tasks["other"].done()


async def test_the_place_is_told_at_once_and_as_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.queueing.PLACE_SECONDS", 0.01)
    visitors, told = await full_house(), list[Place]()
    await visitors.come("one", "ann")
    await visitors.come("two", "ann", told.append)
    await asyncio.sleep(0.05)
    await visitors.go("first 0")
    await asyncio.sleep(0.05)
    await visitors.go("first 1")
    assert [place.position for place in told] == [2, 1]
    assert "two" in visitors.served


SMALL = Sharing("small", 4)


def test_who_shares_what_is_drawn_has_room_beside_it() -> None:
    queue = FairQueue(64)
    small = [queue.enter("ann", 1.0, 1, SMALL) for _ in range(8)]
    assert [ticket.admitted_at is not None for ticket in small] == [True] * 5 + [False] * 3
    assert queue.room_for(SMALL) == 5
    queue.leave(small[0])
    assert small[5].admitted_at is not None and small[6].admitted_at is None


def test_who_waits_outside_could_share_as_well() -> None:
    queue = FairQueue(places=0)
    for _ in range(queue.room):
        queue.enter("ann", 1.0, 1, SMALL)
    queue.check("bob", 1.0, 1, (), SMALL)
    assert queue.displace("bob", 1.0, (), SMALL) == []
    for sharing in (None, Sharing("other", 4)):
        with pytest.raises(QueueFull):
            queue.check("bob", 1.0, 1, (), sharing)
    with pytest.raises(QueueFull):
        queue.check("bob", 1.0, 1, [("ann", 1.0, 1)], SMALL)
    assert queue.waiting == 0
    queue.enter("bob", 1.0, 1, SMALL)
    assert queue.admitted == queue.room + 1


def test_who_could_share_overtakes_nobody() -> None:
    queue = FairQueue(64)
    for _ in range(3):
        queue.enter("ann", 1.0, 1, SMALL)
    large = queue.enter("bob", 1.0)
    small = queue.enter("bob", 1.0, 1, SMALL)
    other = queue.enter("cem", 1.0, 1, Sharing("other", 4))
    assert [each.admitted_at for each in (large, small, other)] == [None] * 3


def test_room_for_company_is_not_given_to_others() -> None:
    queue = FairQueue(64)
    small = [queue.enter("ann", 1.0, 1, SMALL) for _ in range(5)]
    large = queue.enter("ann", 1.0)
    queue.leave(small[0])
    queue.leave(small[1])
    assert large.admitted_at is None
    queue.leave(small[2])
    assert large.admitted_at is not None


def test_a_newcomer_that_could_share_is_bound_by_the_places_too() -> None:
    queue = FairQueue(1)
    for _ in range(3):
        queue.enter("ann", 1.0, 1, SMALL)
    queue.enter("bob", 1.0)
    with pytest.raises(QueueFull):
        queue.enter("bob", 1.0, 1, SMALL)
