"""A worker's turns at the device: one request after another, or several at once that can share its work.

Whoever has the turn draws in the device's thread. A request that could be drawn beside those at work joins
them at their next step, without waiting for its turn; but nobody joins while another waits for it, so that a
stream of small pictures never keeps a large one waiting.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from zimage_engine.sampling.control import DrawingControl
from zimage_engine.types import GenerationRequest, GenerationResult, ModelDescription

if TYPE_CHECKING:
    from zimage_engine import Engine
    from zimage_engine.sampling.company import Verdicts
    from zimage_engine.together import Asked, Together

#: So long after the first began others may join; then the turn goes round, whoever comes.
JOINING_SECONDS = 20.0


def most_together(asked: int, model: ModelDescription) -> int:
    """How many requests share a forward pass: as asked for, where the model can."""
    return asked if model.shares_passes else 1


class Turn:
    """A lock whose line can be seen."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._line: list[object] = []

    @property
    def waiting(self) -> int:
        """How many wait for it."""
        return len(self._line)

    def is_next(self, who: object) -> bool:
        """Whether nobody waits for it longer."""
        return bool(self._line) and self._line[0] is who

    def skip(self, who: object) -> None:
        """Who waits needs it no more; it is still to be cancelled."""
        self._line.remove(who)

    async def acquire(self, who: object = None) -> None:
        """Returns with the lock; first come, first served. `who` stands for the caller in the line."""
        who = object() if who is None else who
        self._line.append(who)
        try:
            await self._lock.acquire()
        finally:
            if who in self._line:
                self._line.remove(who)

    def release(self) -> None:
        """Whoever waits longest is next."""
        self._lock.release()

    def locked(self) -> bool:
        """Whether somebody has it."""
        return self._lock.locked()

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@dataclass(frozen=True)
class ToDraw:
    """One request, how it is held, and what hears of its engine just before it is drawn."""

    request: GenerationRequest
    control: DrawingControl
    begins: Callable[[Engine], None]
    #: It is drawn when it has the turn for itself, beside nobody.
    alone: bool = False


@dataclass(eq=False)
class _Waiter:
    """One who waits for the turn, or for being taken along by who has it."""

    engine: Engine
    todo: ToDraw
    end: asyncio.Future[GenerationResult]
    joined: asyncio.Future[None]


class SharedTurns:
    """Who draws when; to be used in one event loop, while engines draw in `device_thread` alone."""

    def __init__(
        self,
        turn: Turn,
        device_thread: Executor,
        most: int,
        on_busy: Callable[[bool], None] = lambda busy: None,
        on_pass: Callable[[int], None] = lambda drawings: None,
        on_failed: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """`most` share a forward pass. `on_busy` hears whether anything is being drawn when that may have
        changed; `on_pass` of each forward pass that could be shared, in the device's thread, how many
        drawings it was for; `on_failed` each error that a drawing ends with, also where nobody waits for it.
        """
        self._turn = turn
        self._device_thread = device_thread
        self._most = most
        self._on_busy = on_busy
        self._on_pass = on_pass
        self._on_failed = on_failed
        self._open: _Table | None = None
        self._waiters: deque[_Waiter] = deque()
        self._under_way = 0
        self._verdicts: WeakKeyDictionary[Engine, Verdicts] = WeakKeyDictionary()

    def most_for(self, engine: Engine) -> int:
        """How many requests of one engine's are drawn at once at most."""
        return most_together(self._most, engine.description)

    async def draw(
        self, engine: Engine, todo: ToDraw, on_turn: Callable[[], Awaitable[None]]
    ) -> GenerationResult:
        """The drawn pictures; `on_turn` is awaited when it begins, and what it raises is raised instead.

        Cancelling stops this drawing after its current step, and returns when it has stopped.
        """
        loop = asyncio.get_running_loop()
        waiter = _Waiter(engine, todo, loop.create_future(), loop.create_future())
        if not self._turn.waiting and self._joins(waiter):
            return await self._drawn(waiter, on_turn)
        self._waiters.append(waiter)
        turn = asyncio.ensure_future(self._turn.acquire(waiter))
        try:
            await asyncio.wait({turn, waiter.joined}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._forget(waiter)
            await self._give_back(turn)
            if waiter.joined.done():
                todo.control.cancel()
                await until_done(waiter.end)
            raise
        self._forget(waiter)
        if waiter.joined.done():
            await self._give_back(turn)
            return await self._drawn(waiter, on_turn)
        try:
            await on_turn()
            self._begin(waiter)
        except BaseException:
            self._turn.release()
            raise
        return await _ended(waiter.end, todo.control)

    def _forget(self, waiter: _Waiter) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)

    async def _give_back(self, turn: asyncio.Future[None]) -> None:
        """Wait for the turn no more; who had it by now lets it go."""
        turn.cancel()
        while not turn.done():
            try:
                await asyncio.wait({turn})
            except asyncio.CancelledError:
                continue
        if not turn.cancelled() and turn.exception() is None:
            self._turn.release()

    async def _drawn(self, waiter: _Waiter, on_turn: Callable[[], Awaitable[None]]) -> GenerationResult:
        """What is drawn beside others, which do not wait for what is done when it begins."""
        try:
            await on_turn()
        except BaseException:
            waiter.todo.control.cancel()
            await until_done(waiter.end)
            raise
        return await _ended(waiter.end, waiter.todo.control)

    def _begin(self, waiter: _Waiter) -> None:
        """Draw it, and whoever of those next in line can be drawn beside it; then the turn is given back."""
        table = _Table(waiter.engine, waiter.todo, self._together(waiter))
        self._sit_down(table, waiter)
        self._open = table
        self._take_along()
        working = asyncio.get_running_loop().run_in_executor(self._device_thread, self._work, table)
        working.add_done_callback(lambda _: self._close(table, working))

    def _close(self, table: _Table, working: asyncio.Future[None]) -> None:
        error = None if working.cancelled() else working.exception()
        for end in tuple(table.members):  # none, but for an error of ours: nobody waits for ever
            self._tell(table, end, error or RuntimeError("the drawing ended without an answer"))
        self._open = None
        self._turn.release()

    def _together(self, waiter: _Waiter) -> Together | None:
        """None: it is drawn beside nobody."""
        engine = waiter.engine
        if waiter.todo.alone or self.most_for(engine) < 2:
            return None
        from zimage_engine.together import Together

        # What a person asked for on a device with memory of its own is not compared bit by bit.
        is_exact = engine.description.device == "cpu"
        verdicts = self._verdicts.setdefault(engine, {}) if is_exact else None
        return Together(engine, self.most_for(engine), verdicts, self._on_pass)

    def _joins(self, waiter: _Waiter) -> bool:
        """Whether it has a place among those being drawn now, and has taken it."""
        table = self._open
        if table is None or waiter.todo.alone or not table.takes(waiter.engine, waiter.todo.request):
            return False
        return self._sit_down(table, waiter)

    def _take_along(self) -> None:
        """Those at the head of the line who can be drawn beside those at work."""
        while self._waiters:
            waiter = self._waiters[0]
            if not self._turn.is_next(waiter) or not self._joins(waiter):
                return
            self._waiters.popleft()
            self._turn.skip(waiter)
            waiter.joined.set_result(None)

    def _sit_down(self, table: _Table, waiter: _Waiter) -> bool:
        from zimage_engine.together import Asked

        loop = asyncio.get_running_loop()
        todo, end = waiter.todo, waiter.end

        def ended(outcome: GenerationResult | BaseException) -> None:
            loop.call_soon_threadsafe(self._tell, table, end, outcome)

        context = contextvars.copy_context()
        if not table.add(Asked(todo.request, todo.control, ended, context, todo.begins), end):
            return False
        self._count(1)
        return True

    def _count(self, change: int) -> None:
        self._under_way += change
        self._on_busy(self._under_way > 0)

    def _tell(
        self,
        table: _Table,
        end: asyncio.Future[GenerationResult],
        outcome: GenerationResult | BaseException,
    ) -> None:
        if end.done():
            return
        table.members.pop(end, None)
        self._count(-1)
        if isinstance(outcome, BaseException):
            end.set_exception(outcome)
            self._on_failed(outcome)
        else:
            end.set_result(outcome)
        self._take_along()

    def _work(self, table: _Table) -> None:
        """In the device's thread."""
        from zimage_engine.together import draw_into

        while (asked := table.next_or_close()) is not None:
            if table.together is None:
                asked.context.run(draw_into, table.engine, asked)
            else:
                table.together.run(asked, table.newcomers)


@dataclass(eq=False)
class _Table:
    """Those who are drawn at once; who comes when all have gone, or when it is full, takes a turn."""

    engine: Engine
    first: ToDraw
    together: Together | None
    #: Who has not ended yet, and how many pictures it asked for.
    members: dict[asyncio.Future[GenerationResult], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._coming: deque[Asked] = deque()
        self._is_closed = False
        self._began = time.monotonic()
        self._most = 1 if self.together is None else self.together.most_beside(self.first.request)

    @property
    def _pictures(self) -> int:
        """Those that are being drawn or about to be."""
        return sum(self.members.values())

    def takes(self, engine: Engine, request: GenerationRequest) -> bool:
        """Whether it could be drawn beside the first who came."""
        return (
            engine is self.engine
            and self.together is not None
            and self._pictures < self._most
            and time.monotonic() - self._began < JOINING_SECONDS
            and self.together.may_join(self.first.request, request)
        )

    def add(self, asked: Asked, end: asyncio.Future[GenerationResult]) -> bool:
        """False where all have gone."""
        with self._lock:
            if self._is_closed:
                return False
            self._coming.append(asked)
        self.members[end] = asked.request.n
        return True

    def newcomers(self) -> list[Asked]:
        """Those who came since it was asked last."""
        with self._lock:
            coming = list(self._coming)
            self._coming.clear()
        return coming

    def next_or_close(self) -> Asked | None:
        """Somebody who came when the others had ended; None closes the table."""
        with self._lock:
            if self._coming:
                return self._coming.popleft()
            self._is_closed = True
            return None


async def _ended(end: asyncio.Future[GenerationResult], control: DrawingControl) -> GenerationResult:
    """What the drawing ends with; being cancelled stops it, and waits until it has stopped."""
    try:
        return await asyncio.shield(end)
    except asyncio.CancelledError:
        control.cancel()
        await until_done(end)
        raise


async def until_done(future: asyncio.Future[Any]) -> None:
    """Wait for the end of `future` whatever it is, also while being cancelled again."""
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()
