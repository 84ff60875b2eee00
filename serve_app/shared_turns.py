"""A worker's turns at the device: one request after another, or several at once that can share its work.

Whoever has the turn draws in the device's thread. A request that could be drawn beside those at work joins
them at their next step, without waiting for its turn; but nobody joins while another waits for it, so that a
stream of small pictures never keeps a large one waiting.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
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

#: How many share a forward pass on a CPU, where each picture comes out bit for bit as alone.
MOST_ON_A_CPU = 8


def most_together(asked: int | None, model: ModelDescription) -> int:
    """How many requests share a forward pass: as asked for, else as many as gain by it for nothing.

    On a CPU in a half precision a pass for eight takes clearly less than eight passes, and the pictures stay
    the same. Elsewhere they may change in their last bits, so there it has to be asked for.
    """
    if not model.shares_passes:
        return 1
    if asked is not None:
        return asked
    return MOST_ON_A_CPU if model.device == "cpu" and model.dtype == "bfloat16" else 1


class Turn:
    """A lock that tells whether somebody waits for it."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self.waiting = 0

    async def acquire(self) -> None:
        """Returns with the lock; first come, first served."""
        self.waiting += 1
        try:
            await self._lock.acquire()
        finally:
            self.waiting -= 1

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


class SharedTurns:
    """Who draws when; to be used in one event loop, while engines draw in `device_thread` alone."""

    def __init__(
        self,
        turn: Turn,
        device_thread: Executor,
        most: int | None,
        on_busy: Callable[[bool], None] = lambda busy: None,
        on_pass: Callable[[int], None] = lambda drawings: None,
        on_failed: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """`most` share a forward pass, None: `most_together`. `on_busy` hears whether anything is being
        drawn when that may have changed; `on_pass` of each forward pass, in the device's thread, how many
        drawings it was for; `on_failed` each error that a drawing ends with, also where nobody waits for it.
        """
        self._turn = turn
        self._device_thread = device_thread
        self._most = most
        self._on_busy = on_busy
        self._on_pass = on_pass
        self._on_failed = on_failed
        self._open: _Table | None = None
        self._under_way = 0
        self._verdicts: WeakKeyDictionary[Engine, Verdicts] = WeakKeyDictionary()
        self._tasks: set[asyncio.Task[None]] = set()

    async def draw(
        self, engine: Engine, todo: ToDraw, on_turn: Callable[[], Awaitable[None]]
    ) -> GenerationResult:
        """The drawn pictures; `on_turn` is awaited when it begins, and what it raises is raised instead.

        Cancelling stops this drawing after its current step, and returns when it has stopped.
        """
        end: asyncio.Future[GenerationResult] = asyncio.get_running_loop().create_future()
        table = self._open
        if (
            table is not None
            and not (todo.alone or self._turn.waiting)
            and table.takes(engine, todo)
            and table.add(self._asked(todo, end), end)
        ):
            self._count(1)
            return await self._drawn(end, todo, on_turn)
        await self._turn.acquire()
        try:
            await on_turn()
            table = _Table(engine, todo, self._together(engine))
            table.add(self._asked(todo, end), end)
            self._count(1)
            task = asyncio.create_task(self._serve(table))
        except BaseException:
            self._turn.release()
            raise
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await _ended(end, todo.control)

    async def _drawn(
        self, end: asyncio.Future[GenerationResult], todo: ToDraw, on_turn: Callable[[], Awaitable[None]]
    ) -> GenerationResult:
        """What is drawn beside others, which do not wait for what is done when it begins."""
        try:
            await on_turn()
        except BaseException:
            todo.control.cancel()
            await until_done(end)
            raise
        return await _ended(end, todo.control)

    def _together(self, engine: Engine) -> Together:
        from zimage_engine.together import Together

        most = most_together(self._most, engine.description)
        # What a person asked for on a device with memory of its own is not compared bit by bit.
        is_exact = engine.description.device == "cpu"
        verdicts = self._verdicts.setdefault(engine, {}) if is_exact else None
        return Together(engine, most, verdicts, self._on_pass)

    def _asked(self, todo: ToDraw, end: asyncio.Future[GenerationResult]) -> Asked:
        from zimage_engine.together import Asked

        loop = asyncio.get_running_loop()

        def ended(outcome: GenerationResult | BaseException) -> None:
            loop.call_soon_threadsafe(self._tell, end, outcome)

        return Asked(todo.request, todo.control, ended, contextvars.copy_context(), todo.begins)

    async def _serve(self, table: _Table) -> None:
        """Draw until nobody is left at the table; the turn, which the first came with, is given back then."""
        self._open = table
        try:
            await asyncio.get_running_loop().run_in_executor(self._device_thread, self._work, table)
        except BaseException as error:  # of ours: whoever waits must not wait for ever
            for end in table.members:
                self._tell(end, error)
        finally:
            self._open = None
            self._turn.release()

    def _count(self, change: int) -> None:
        self._under_way += change
        self._on_busy(self._under_way > 0)

    def _tell(self, end: asyncio.Future[GenerationResult], outcome: GenerationResult | BaseException) -> None:
        if end.done():
            return
        self._count(-1)
        if isinstance(outcome, BaseException):
            end.set_exception(outcome)
            self._on_failed(outcome)
        else:
            end.set_result(outcome)

    def _work(self, table: _Table) -> None:
        """In the device's thread."""
        while (asked := table.next_or_close()) is not None:
            table.together.run(asked, table.newcomers)


@dataclass(eq=False)
class _Table:
    """Those who are drawn at once; who comes when all have gone is told so, and takes a turn."""

    engine: Engine
    first: ToDraw
    together: Together
    members: list[asyncio.Future[GenerationResult]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._coming: deque[Asked] = deque()
        self._is_closed = False

    def takes(self, engine: Engine, todo: ToDraw) -> bool:
        """Whether it could be drawn beside the first who came."""
        return (
            engine is self.engine
            and not self.first.alone
            and self.together.may_join(self.first.request, todo.request)
        )

    def add(self, asked: Asked, end: asyncio.Future[GenerationResult]) -> bool:
        """False where all have gone."""
        with self._lock:
            if self._is_closed:
                return False
            self._coming.append(asked)
        self.members.append(end)
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
