"""Who draws next: a bounded queue in front of the workers, fair between those who ask.

Each caller has a line of its own, first come first served. The next ticket is taken from the line that has
had the least work so far, by the weight of its priority; so a hundred pictures of one caller delay another's
one only by what the workers have in hand already, and no line waits for ever, whatever its priority. Work is
counted in megapixel-steps; what one takes in seconds is measured on the pictures that were drawn, and before
the first nothing is said of seconds. Each ingress has a queue of its own: with several of them the bounds and
limits hold for each one, and fairness among what came to the same one.

Knows nothing of Ray, HTTP and pictures; time comes from the clock that it is given.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from zimage_engine.errors import InvalidRequest

Priority = Literal["high", "normal", "low"]
#: What share of the workers a line gets beside others. No class waits for another's end.
WEIGHTS: Mapping[Priority, float] = {"high": 4.0, "normal": 1.0, "low": 0.25}

#: For each worker one that is drawn and one at hand, so that it goes on at once; and over all one more, whose
#: pictures are being packed into files.
TICKETS_A_WORKER = 2
SPARE_TICKETS = 1
#: What the pace is measured on.
DRAWINGS_KEPT = 32
#: What is said while no picture has been drawn yet, and nobody can know.
FIRST_RETRY_SECONDS = 5
#: How often one who waits is told the place anew.
PLACE_SECONDS = 2.0
#: Beyond so many lines those that nobody needs any more are looked for.
LINES_KEPT = 256


class QueueFull(Exception):
    """As many wait already as may, by number or by seconds; `headers` say when to come again."""

    def __init__(self, message: str, headers: Mapping[str, str]) -> None:
        super().__init__(message, headers)
        self.message = message
        self.headers = dict(headers)

    def __str__(self) -> str:
        return self.message


class CallerLimited(QueueFull):
    """This caller has had what one caller may; others may go on."""


#: One who waits outside of the queue for a place in it: caller, work, pictures.
Outside = tuple[str, float, int]


@dataclass(frozen=True, slots=True)
class Entry:
    """What one caller may: a share by its priority, so many pictures at once, so many requests a minute.

    0 is no limit.
    """

    priority: Priority = "normal"
    pictures_at_once: int = 0
    requests_a_minute: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a ticket stands, 1 for the next; `seconds` until its turn, None while nobody can know."""

    position: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Sharing:
    """What a worker draws beside others at the cost of less than a turn: `most` tickets of one `kind`."""

    kind: Hashable
    most: int


@dataclass(eq=False)
class Ticket:
    """One request in the queue or at the workers; made by `FairQueue.enter` alone."""

    caller: str
    work: float
    pictures: int
    priority: Priority
    number: int
    entered_at: float
    sharing: Sharing | None = None
    admitted_at: float | None = None
    refusal: QueueFull | None = None
    #: Set once it no longer waits: it is admitted, or refused after all.
    moved: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def waited_seconds(self) -> float:
        """From its coming to its turn; 0 before that."""
        return 0.0 if self.admitted_at is None else self.admitted_at - self.entered_at


class Pace:
    """The seconds that a unit of work takes one worker, from the last drawings."""

    def __init__(self) -> None:
        self._drawings: deque[tuple[float, float]] = deque(maxlen=DRAWINGS_KEPT)

    def learn(self, work: float, seconds: float) -> None:
        """A drawing of `work` took a worker `seconds`."""
        if work > 0 and seconds > 0:
            self._drawings.append((work, seconds))

    @property
    def seconds_a_unit(self) -> float | None:
        """None before the first drawing."""
        if not self._drawings:
            return None
        return sum(seconds for _, seconds in self._drawings) / sum(work for work, _ in self._drawings)


class _Minute:
    """Requests that one caller has left: as many as a minute's, coming back evenly."""

    def __init__(self, limit: int, now: float) -> None:
        self._limit = limit
        self._left = float(limit)
        self._at = now

    def _look(self, now: float) -> None:
        self._left = min(float(self._limit), self._left + (now - self._at) * self._limit / 60)
        self._at = now

    def take(self, now: float) -> bool:
        self._look(now)
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def seconds_to_next(self, now: float, ahead: int = 0) -> float:
        self._look(now)
        return max(0.0, (1 + ahead - self._left) * 60 / self._limit)

    def is_whole(self, now: float) -> bool:
        self._look(now)
        return self._left >= self._limit

    def headers(self, now: float) -> dict[str, str]:
        self._look(now)
        return {
            "x-ratelimit-limit-requests": str(self._limit),
            "x-ratelimit-remaining-requests": str(int(self._left)),
            "x-ratelimit-reset-requests": span((self._limit - self._left) * 60 / self._limit),
        }


@dataclass(eq=False)
class _Line:
    """One caller's tickets. `had` is its work so far by weight, on the scale of the queue's own progress."""

    entry: Entry
    minute: _Minute | None
    had: float = 0.0
    waiting: deque[Ticket] = field(default_factory=deque)
    waiting_work: float = 0.0
    held: int = 0
    pictures: int = 0

    @property
    def weight(self) -> float:
        return WEIGHTS[self.entry.priority]


class FairQueue:
    """The tickets of one ingress: at most `places` wait, and none that would wait longer than `seconds`.

    `entry_of` tells what a caller may. Without `seconds` only their number is bounded.
    """

    def __init__(
        self,
        places: int,
        seconds: float | None = None,
        entry_of: Callable[[str], Entry] = lambda name: Entry(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pace = Pace()
        self._places = places
        self._seconds = seconds
        self._entry_of = entry_of
        self._clock = clock
        self._lines: dict[str, _Line] = {}
        self._workers = 1
        self._admitted: dict[Ticket, None] = {}
        self._admitted_work = 0.0
        self._waiting = 0
        self._waiting_work = 0.0
        self._progress = 0.0
        self._entered = 0
        self._moved_at = clock()
        self._places_now: dict[Ticket, tuple[int, float]] | None = None

    @property
    def waiting(self) -> int:
        """Tickets that wait."""
        return self._waiting

    @property
    def admitted(self) -> int:
        """Tickets that are at the workers."""
        return len(self._admitted)

    @property
    def workers(self) -> int:
        """Workers that the queue goes by."""
        return self._workers

    @property
    def room(self) -> int:
        """Tickets that may be at the workers at once, beside those that share a drawing with one of them."""
        return self._workers * TICKETS_A_WORKER + SPARE_TICKETS

    def room_for(self, sharing: Sharing | None) -> int:
        """Tickets that may be at the workers at once where all are of that kind."""
        return self.room if sharing is None else max(self.room, self._workers * sharing.most + SPARE_TICKETS)

    def set_workers(self, workers: int) -> None:
        """So many draw now. While none does, tickets go through as to one, and wait for it where they are."""
        self._workers = max(1, workers)
        self._admit()

    def set_bounds(self, places: int, seconds: float | None) -> None:
        """Other bounds for those who come from now on; who waits already stays."""
        self._places, self._seconds = places, seconds

    def enter(self, name: str, work: float, pictures: int = 1, sharing: Sharing | None = None) -> Ticket:
        """A ticket for `pictures` of `work` in all; it is admitted already where there is room.

        With `sharing` there is room also beside admitted tickets of its kind.

        Raises CallerLimited where the caller has had its part, InvalidRequest where it never may have so
        much, and QueueFull. One who has less in a full queue than another takes the place of the other's
        youngest.
        """
        now = self._clock()
        line = self._line(name, now)
        self._check_limits(line, pictures, now)
        ticket = Ticket(name, work, pictures, line.entry.priority, self._entered, now, sharing)
        if self._waiting or not self._is_room(sharing):
            tickets, _ = self._going_for(line, name, work)
            self._refuse(tickets)
        if line.minute is not None:
            line.minute.take(now)
        self._entered += 1
        if not line.waiting:
            # Who comes back has no claim on what was drawn in the meantime.
            line.had = max(line.had, self._progress)
        line.waiting.append(ticket)
        line.waiting_work += work
        line.held += 1
        line.pictures += pictures
        self._waiting += 1
        self._waiting_work += work
        self._admit()
        return ticket

    def check(
        self,
        name: str,
        work: float,
        pictures: int = 1,
        ahead: Sequence[Outside] = (),
        sharing: Sharing | None = None,
    ) -> None:
        """Raise what `enter` would if those `ahead` had entered before. Nobody enters or goes."""
        now = self._clock()
        own = [pictures_ahead for caller, _, pictures_ahead in ahead if caller == name]
        line = self._line(name, now)
        self._check_limits(line, pictures, now, own)
        if ahead or self._waiting or not self._is_room(sharing):
            self._going_for(line, name, work, ahead)

    def displace(
        self, name: str, work: float, ahead: Sequence[Outside], sharing: Sharing | None = None
    ) -> list[tuple[int, QueueFull]]:
        """Let those go who must for one that waits outside behind those `ahead`, as `enter` does.

        Tickets are refused here; who of `ahead` has to go is returned, with what to tell them. Nobody goes
        where the place has gone to others meanwhile.
        """
        if not (ahead or self._waiting) and self._is_room(sharing):
            return []
        try:
            tickets, outside = self._going_for(self._line(name, self._clock()), name, work, ahead)
        except QueueFull:
            return []
        self._refuse(tickets)
        return [(number, self._made_room()) for number in outside]

    def leave(self, ticket: Ticket) -> None:
        """The ticket is no longer needed: drawn, failed, or nobody waits for it any more. Twice is once."""
        if ticket in self._admitted:
            del self._admitted[ticket]
            self._admitted_work = sum(each.work for each in self._admitted)
            self._moved_at = self._clock()
            self._let_go(ticket)
        elif ticket.admitted_at is None and ticket.refusal is None:
            ticket.refusal = QueueFull("the ticket was given back", {})
            self._take_out(ticket)
        self._admit()

    def place_of(self, ticket: Ticket) -> Place | None:
        """Where a ticket stands if nobody else came; None where it does not wait."""
        if self._places_now is None:
            self._places_now = dict(self._in_order())
        if ticket not in self._places_now:
            return None
        position, work_ahead = self._places_now[ticket]
        return Place(position, self._seconds_for(self._admitted_work + work_ahead))

    def headers_of(self, name: str) -> dict[str, str]:
        """OpenAI's headers about the caller's requests a minute; none where they have no limit."""
        now = self._clock()
        line = self._line(name, now)
        return {} if line.minute is None else line.minute.headers(now)

    # --- lines -------------------------------------------------------------------------------------------

    def _line(self, name: str, now: float) -> _Line:
        entry = self._entry_of(name)
        line = self._lines.get(name)
        if line is None:
            if len(self._lines) >= LINES_KEPT:
                self._forget_idle_lines(now)
            line = self._lines[name] = _Line(entry, _minute(entry, now), self._progress)
        elif line.entry != entry:
            if line.entry.requests_a_minute != entry.requests_a_minute:
                line.minute = _minute(entry, now)
            line.entry = entry
        return line

    def _forget_idle_lines(self, now: float) -> None:
        """Those without a ticket and without a past that would still count."""
        for name, line in list(self._lines.items()):
            counts = line.had > self._progress or not (line.minute is None or line.minute.is_whole(now))
            if not line.held and not counts:
                del self._lines[name]

    def _check_limits(self, line: _Line, pictures: int, now: float, ahead: Sequence[int] = ()) -> None:
        """`ahead`: the pictures of each request of this caller's that comes first."""
        under_way = line.pictures + sum(ahead)
        at_once = line.entry.pictures_at_once
        if at_once and pictures > at_once:
            raise InvalidRequest(
                f"n must be at most {at_once}, the pictures that one caller may have at once, got {pictures}",
                "n",
            )
        if at_once and under_way + pictures > at_once:
            raise CallerLimited(
                f"You have {under_way} pictures under way, and may have {at_once} at once; "
                "wait for one of them.",
                self._come_again(0.0),
            )
        if line.minute is not None and (seconds := line.minute.seconds_to_next(now, len(ahead))) > 0:
            raise CallerLimited(
                f"You may send {line.entry.requests_a_minute} requests a minute; the next is free in "
                f"{math.ceil(seconds)} s.",
                {"Retry-After": str(math.ceil(seconds)), **line.minute.headers(now)},
            )

    def _let_go(self, ticket: Ticket) -> None:
        line = self._lines[ticket.caller]
        line.held -= 1
        line.pictures -= ticket.pictures
        if not self._admitted and not self._waiting:
            # All is drawn: whoever comes next begins level with everybody.
            self._progress = max(line.had for line in self._lines.values())

    def _take_out(self, ticket: Ticket) -> None:
        """Out of its line, before its turn."""
        line = self._lines[ticket.caller]
        line.waiting.remove(ticket)
        self._uncount(line, ticket)
        self._let_go(ticket)

    def _uncount(self, line: _Line, ticket: Ticket) -> None:
        self._places_now = None
        line.waiting_work = line.waiting_work - ticket.work if line.waiting else 0.0
        self._waiting -= 1
        self._waiting_work = self._waiting_work - ticket.work if self._waiting else 0.0

    # --- bounds ------------------------------------------------------------------------------------------

    def _going_for(
        self, line: _Line, name: str, work: float, ahead: Sequence[Outside] = ()
    ) -> tuple[list[Ticket], list[int]]:
        """Who must go for a newcomer: tickets, and those of `ahead` by their place there.

        Who has most loses the youngest; one outside is younger than the caller's tickets. Raises QueueFull
        where it is the newcomer itself.
        """
        waiting = self._waiting + len(ahead) - max(0, self.room - len(self._admitted))
        waiting_work = self._waiting_work + sum(each[1] for each in ahead)
        if waiting < 0 or self._fits(waiting, waiting_work):
            return [], []
        now = self._clock()
        lines = {caller: self._line(caller, now) for caller, _, _ in ahead} | self._lines | {name: line}
        outside: dict[str, list[int]] = {caller: [] for caller in lines}
        for number, (caller, _, _) in enumerate(ahead):
            outside[caller].append(number)
        left = {
            caller: each.waiting_work + sum(ahead[number][1] for number in outside[caller])
            for caller, each in lines.items()
        }
        inside = {caller: len(each.waiting) for caller, each in lines.items()}
        wanted = (left[name] + work) / line.weight
        tickets: list[Ticket] = []
        going: list[int] = []
        while waiting >= 0 and not self._fits(waiting, waiting_work):
            heaviest = max(lines, key=lambda caller: left[caller] / lines[caller].weight)
            youngest = outside[heaviest][-1] if outside[heaviest] else None
            last = lines[heaviest].waiting[inside[heaviest] - 1] if inside[heaviest] else None
            its_work = ahead[youngest][1] if youngest is not None else 0.0 if last is None else last.work
            is_nobody = youngest is None and last is None
            if is_nobody or (left[heaviest] - its_work) / lines[heaviest].weight < wanted:
                raise self._full("this request came too late for a place", len(ahead))
            if youngest is not None:
                going.append(outside[heaviest].pop())
            elif last is not None:
                tickets.append(last)
                inside[heaviest] -= 1
            left[heaviest] -= its_work
            waiting, waiting_work = waiting - 1, waiting_work - its_work
        return tickets, going

    def _refuse(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            ticket.refusal = self._made_room()
            self._take_out(ticket)
            ticket.moved.set()

    def _made_room(self) -> QueueFull:
        return self._full("others, who have fewer pictures in it, came for a place")

    def _fits(self, waiting: int, waiting_work: float) -> bool:
        """Whether one more may wait behind those."""
        seconds = self._seconds_for(self._admitted_work + waiting_work)
        return waiting < self._places and (
            self._seconds is None or seconds is None or seconds <= self._seconds
        )

    def _full(self, because: str, ahead: int = 0) -> QueueFull:
        seconds = self._seconds_for(self._admitted_work + self._waiting_work)
        lasts = "" if seconds is None else f", about {math.ceil(seconds)} s of work"
        headers = self._come_again(0.0 if self._seconds is None else (seconds or 0.0) - self._seconds)
        again = headers["Retry-After"]
        headers |= {"X-Queue-Position": str(self._waiting + ahead + 1)}
        headers |= {} if seconds is None else {"X-Queue-Seconds": str(math.ceil(seconds))}
        return QueueFull(
            f"The queue is full ({self._waiting + ahead} requests wait{lasts}), and {because}; send it again "
            f"in about {again} s.",
            headers,
        )

    def _come_again(self, excess_seconds: float) -> dict[str, str]:
        """When a place is free again: the next drawing has ended, and what is too much is drawn."""
        pace = self.pace.seconds_a_unit
        if pace is None or not self._admitted:
            return {"Retry-After": str(FIRST_RETRY_SECONDS)}
        one = self._admitted_work / len(self._admitted) * pace / self._workers
        return {"Retry-After": str(max(1, math.ceil(one + max(0.0, excess_seconds))))}

    def _seconds_for(self, work: float) -> float | None:
        """How long the workers take for `work`, less what passed since the last drawing ended."""
        pace = self.pace.seconds_a_unit
        if pace is None:
            return None
        # Of what is being drawn no more can be done than all of it.
        done = min(self._clock() - self._moved_at, self._admitted_work * pace / self._workers)
        return max(0.0, work * pace / self._workers - max(0.0, done))

    # --- turns -------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        self._places_now = None
        while self._waiting:
            line = min(
                (each for each in self._lines.values() if each.waiting),
                key=lambda each: (each.had, each.waiting[0].number),
            )
            # Strictly in this order: who could share what is drawn overtakes nobody.
            if not self._is_room(line.waiting[0].sharing):
                return
            ticket = line.waiting.popleft()
            self._uncount(line, ticket)
            self._progress = max(self._progress, line.had)
            line.had += ticket.work / line.weight
            if not self._admitted:
                self._moved_at = self._clock()
            ticket.admitted_at = self._clock()
            self._admitted[ticket] = None
            self._admitted_work = sum(each.work for each in self._admitted)
            ticket.moved.set()

    def _is_room(self, sharing: Sharing | None) -> bool:
        """Whether one more of that kind could be at the workers now, if it were its turn."""
        if len(self._admitted) < self.room:
            return True
        if sharing is None or len(self._admitted) >= self.room_for(sharing):
            return False
        alike = [each.sharing for each in self._admitted].count(sharing)
        return len(self._admitted) - alike < self.room and alike > 0

    def _in_order(self) -> Iterator[tuple[Ticket, tuple[int, float]]]:
        """Each waiting ticket with its place and the waiting work before it."""
        heads = [(line.had, line.waiting[0].number, 0, line) for line in self._lines.values() if line.waiting]
        heapq.heapify(heads)
        position, work_ahead = 0, 0.0
        while heads:
            had, _, index, line = heapq.heappop(heads)
            ticket = line.waiting[index]
            position += 1
            yield ticket, (position, work_ahead)
            work_ahead += ticket.work
            if index + 1 < len(line.waiting):
                following = line.waiting[index + 1].number
                heapq.heappush(heads, (had + ticket.work / line.weight, following, index + 1, line))


def _minute(entry: Entry, now: float) -> _Minute | None:
    return _Minute(entry.requests_a_minute, now) if entry.requests_a_minute else None


def span(seconds: float) -> str:
    """A length of time as OpenAI writes it: 20ms, 1s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


OnPlace = Callable[[Place], None]


@asynccontextmanager
async def turn(
    queue: FairQueue,
    name: str,
    work: float,
    pictures: int = 1,
    on_place: OnPlace | None = None,
    sharing: Sharing | None = None,
) -> AsyncIterator[Ticket]:
    """Inside it is one's turn. `on_place` is told where one stands, at once and then as it changes.

    Whoever is cancelled leaves the queue at once. Raises as `FairQueue.enter`, and QueueFull also for one who
    waited and had to make room.
    """
    ticket = queue.enter(name, work, pictures, sharing)
    try:
        await _until_moved(queue, ticket, on_place)
        if ticket.refusal is not None:
            raise ticket.refusal
        yield ticket
    finally:
        queue.leave(ticket)


async def _until_moved(queue: FairQueue, ticket: Ticket, on_place: OnPlace | None) -> None:
    if on_place is None:
        await ticket.moved.wait()
        return
    told: tuple[int, int | None] | None = None
    while (place := queue.place_of(ticket)) is not None:
        seen = (place.position, None if place.seconds is None else round(place.seconds))
        if seen != told:
            on_place(place)
            told = seen
        try:
            async with asyncio.timeout(PLACE_SECONDS):
                await ticket.moved.wait()
        except TimeoutError:
            continue
