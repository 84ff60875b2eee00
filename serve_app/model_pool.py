"""A worker's models: which are in memory, and how one comes in and the least recently used goes.

What a model needs of its files (fetched, recognised, mended, read from the disk) is done in threads of its
own while others are drawn. Only the rest, which takes the device and turns switches of torch that hold for
the whole process, takes a turn between two pictures. Knows no HTTP and no pictures.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from serve_app.model_list import DEFAULT_NAMES, ListedModel, ModelLoadFailed, ModelState, State
from zimage_engine.errors import (
    CacheFull,
    CheckpointDamaged,
    CheckpointNotFound,
    DeviceFailed,
    DoesNotFit,
    DownloadError,
    DtypeRefused,
    InvalidRequest,
    OutOfMemory,
    UnknownFamily,
)
from zimage_engine.loading.adapter import ModelLoaderAdapter
from zimage_engine.types import ModelDescription, ModelIdentity

if TYPE_CHECKING:
    from zimage_engine import Engine
    from zimage_engine.memory.oom import MemoryReport

logger = logging.getLogger(__name__)

#: A model that could not be loaded is tried again after this, then after twice as long, up to the second.
FIRST_RETRY_SECONDS = 10.0
MOST_RETRY_SECONDS = 600.0
#: Models whose files are looked at or fetched at the same time.
PREPARED_AT_ONCE = 2
#: Smaller files take no time to read.
READ_AHEAD_BYTES = 2**20

#: What callers are told of a failure; the log has the whole sentence, in which paths of the server may stand.
REASONS: dict[type[BaseException], str] = {
    CheckpointNotFound: "its files are not there",
    CheckpointDamaged: "its files are damaged or incomplete",
    UnknownFamily: "it is of no kind that can be drawn with here",
    DtypeRefused: "it cannot be computed with in the dtype that was chosen",
    DownloadError: "it could not be fetched",
    CacheFull: "there is no room on the disk to fetch it",
    DoesNotFit: "it does not fit into the memory",
    OutOfMemory: "it does not fit into the memory",
    MemoryError: "it does not fit into the memory",
    Exception: "loading it failed",
}


@dataclass(eq=False)
class _Slot:
    """One model of the list, loaded or not."""

    model: ListedModel
    engine: Engine | None = None
    #: The size of its weights when it was loaded last.
    bytes: int = 0
    #: Requests that draw with it or wait for their turn to; it is not unloaded under them.
    leases: int = 0
    used: int = 0
    #: It goes as soon as no request has it; who comes later waits until it is loaded again.
    is_leaving: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    loading: asyncio.Task[None] | None = None
    #: Each gets a lease at the moment at which the model is there, before another can take its place.
    waiters: list[asyncio.Future[None]] = field(default_factory=list)
    progress: float | None = None
    failures: int = 0
    retry_at: float = 0.0
    reason: str = ""
    family: str = ""
    dtype: str = ""
    identity: ModelIdentity = field(default_factory=ModelIdentity)
    description: ModelDescription | None = None

    @property
    def state(self) -> State:
        if self.engine is not None and not self.is_leaving:
            return "ready"
        if self.loading is not None:
            return "loading"
        return "failed" if self.reason else "not_loaded"


@dataclass
class PoolFigures:
    """What has come and gone since the worker began; memory events are those of engines that have gone."""

    loads: Counter[str] = field(default_factory=Counter)
    unloads: int = 0
    load_seconds: float = 0.0
    defrags: Counter[str] = field(default_factory=Counter)
    defrag_seconds: float = 0.0
    ooms: Counter[tuple[str, str]] = field(default_factory=Counter)

    def remember(self, report: MemoryReport) -> None:
        """What an engine counted until now."""
        self.defrags.update(report.defrags)
        self.defrag_seconds += report.defrag_seconds
        self.ooms.update({(str(stage), str(rung)): events for (stage, rung), events in report.ooms.items()})


class ModelPool:
    """The models of one worker, used in one event loop; engines draw in `device_thread` alone."""

    def __init__(
        self,
        default: Engine,
        models: Sequence[ListedModel],
        load: Callable[[ListedModel], Engine],
        turn: AbstractAsyncContextManager[None],
        device_thread: Executor,
        *,
        worker: str = "local",
        most: int | None = None,
        on_change: Callable[[], None] = lambda: None,
        on_device_failure: Callable[[DeviceFailed], None] = lambda failed: None,
    ) -> None:
        """`default` is loaded already. `turn` is held by whoever draws, and by the pool while it swaps.

        `most` models are in memory at a time, None: as many as fit by the size of their weights. `on_change`
        is called after each that has come or gone. Raises InvalidRequest where the list has the default's
        name.
        """
        from zimage_engine.unloading import weight_bytes

        self.default_id = default.description.id
        self._load_engine = load
        self._turn = turn
        self._device_thread = device_thread
        self._worker = worker
        self._most = most
        self._on_change = on_change
        self._on_device_failure = on_device_failure
        self._files = ThreadPoolExecutor(PREPARED_AT_ONCE, thread_name_prefix="files")
        self._swap = asyncio.Lock()
        self._uses = 0
        self.figures = PoolFigures()
        self._device = default.description.device
        taken = next((model for model in models if self.default_id in model.names), None)
        if taken is not None:
            raise InvalidRequest(
                f"setting models gives the name {self.default_id!r} to {taken.path}, and the default model "
                "is called so; choose another",
                "models",
            )
        first = _Slot(ListedModel(self.default_id, "", DEFAULT_NAMES), default, weight_bytes(default))
        _note_what_it_is(first, default)
        self._slots = {self.default_id: first, **{model.name: _Slot(model) for model in models}}
        self._names = {name: slot for slot in self._slots.values() for name in slot.model.names}
        self._looking = [
            asyncio.get_running_loop().run_in_executor(self._files, _look_at_files, slot)
            for slot in self._slots.values()
            if slot is not first
        ]

    @property
    def engines(self) -> list[Engine]:
        """Those in memory, the last used first."""
        return [slot.engine for slot in reversed(self._loaded()) if slot.engine is not None]

    def states(self) -> list[ModelState]:
        """What is to be told of each, the default model first."""
        return [
            ModelState(
                slot.model.name,
                slot.model.aliases,
                slot.state,
                self._worker,
                slot.progress if slot.state == "loading" else None,
                slot.reason if slot.state == "failed" else "",
                max(0.0, slot.retry_at - time.monotonic()) if slot.state == "failed" else 0.0,
                slot.family,
                slot.dtype,
                slot.identity,
                slot.description,
            )
            for slot in self._slots.values()
        ]

    def load_soon(self, name: str) -> None:
        """Begin to load it where it is not there, and has not failed just now."""
        slot = self._slot(name)
        if slot.engine is None and slot.loading is None and time.monotonic() >= slot.retry_at:
            self._begin_to_load(slot)

    @asynccontextmanager
    async def leased(self, name: str | None) -> AsyncIterator[Engine]:
        """The model's engine, loaded where it is not, which stays for as long as the lease does.

        Cancelling ends the wait; what is being loaded is loaded on, for the next who asks. Raises
        ModelLoadFailed.
        """
        slot = self._slot(name)
        if slot.engine is None or slot.is_leaving:
            await self._granted(slot)
        else:
            self._take(slot)
        assert slot.engine is not None
        try:
            yield slot.engine
        finally:
            self._let_go(slot)

    def _take(self, slot: _Slot) -> None:
        slot.leases += 1
        slot.idle.clear()
        self._uses += 1
        slot.used = self._uses

    def _let_go(self, slot: _Slot) -> None:
        slot.leases -= 1
        if not slot.leases:
            slot.idle.set()

    def _slot(self, name: str | None) -> _Slot:
        slot = self._names.get(name or self.default_id)
        if slot is None:
            raise InvalidRequest(f"this worker has no model {name!r} in its list", "model")
        return slot

    def _loaded(self) -> list[_Slot]:
        """The least recently used first."""
        there = [slot for slot in self._slots.values() if slot.engine is not None]
        return sorted(there, key=lambda slot: slot.used)

    async def _granted(self, slot: _Slot) -> None:
        """Returns with a lease on the slot, once it is loaded."""
        if slot.loading is None:
            left = slot.retry_at - time.monotonic()
            if left > 0:
                raise _refusal(slot, left)
            self._begin_to_load(slot)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        slot.waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.exception() is None:
                self._let_go(slot)
            raise

    def _grant(self, slot: _Slot) -> None:
        waiters, slot.waiters = slot.waiters, []
        for waiter in waiters:
            if not waiter.done():
                self._take(slot)
                waiter.set_result(None)

    def _refuse(self, slot: _Slot) -> None:
        waiters, slot.waiters = slot.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(_refusal(slot, slot.retry_at - time.monotonic()))

    def _begin_to_load(self, slot: _Slot) -> None:
        slot.loading = asyncio.create_task(self._load(slot))

    async def _load(self, slot: _Slot) -> None:
        """Whatever comes of it is noted in the slot; nothing is raised."""
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        slot.progress = None
        try:
            wanted_bytes = await loop.run_in_executor(self._files, _prepare, slot)
            async with self._swap:
                if slot.engine is None:
                    await self._swap_in(slot, wanted_bytes)
                slot.loading = None
                self._grant(slot)
        except Exception as error:
            slot.loading = None
            self._note_failure(slot, error)
            self._refuse(slot)
        else:
            slot.failures, slot.retry_at, slot.reason = 0, 0.0, ""
            seconds = time.perf_counter() - began
            self.figures.load_seconds = seconds
            logger.info("model %s is loaded after %.1f s", slot.model.name, seconds)
        self._on_change()

    async def _swap_in(self, slot: _Slot, wanted_bytes: int) -> None:
        loop = asyncio.get_running_loop()
        leaving = self._to_leave(wanted_bytes)
        try:
            for other in leaving:
                other.is_leaving = True
            for other in leaving:
                if other.leases:
                    await other.idle.wait()
            async with self._turn:
                for other in leaving:
                    await self._unload(other)
                slot.engine = await loop.run_in_executor(self._device_thread, self._load_engine, slot.model)
                _note_what_it_is(slot, slot.engine)
                self._uses += 1
                slot.used = self._uses
                self.figures.loads["ok"] += 1
        finally:
            for other in leaving:
                other.is_leaving = False

    async def _unload(self, slot: _Slot) -> None:
        from zimage_engine.unloading import unload

        assert slot.engine is not None
        engine, slot.engine = slot.engine, None
        self.figures.remember(engine.memory_report())
        await asyncio.get_running_loop().run_in_executor(self._device_thread, partial(unload, engine))
        self.figures.unloads += 1
        logger.info("model %s is unloaded: another takes its place", slot.model.name)

    def _to_leave(self, wanted_bytes: int) -> list[_Slot]:
        """Whose place is needed, the least recently used first."""
        from zimage_engine.unloading import can_stay, reachable_bytes

        loaded = self._loaded()
        if self._most is not None:
            return loaded[: max(0, len(loaded) + 1 - self._most)]
        staying = can_stay([slot.bytes for slot in loaded], wanted_bytes, reachable_bytes(self._device))
        return loaded[: len(loaded) - staying]

    def _note_failure(self, slot: _Slot, error: Exception) -> None:
        slot.failures += 1
        wait = min(MOST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2 ** (slot.failures - 1))
        slot.retry_at = time.monotonic() + wait
        slot.reason = next(REASONS[cls] for cls in type(error).__mro__ if cls in REASONS)
        self.figures.loads["failed"] += 1
        logger.error("model %s cannot be loaded: %s", slot.model.name, error, exc_info=_trace_of(error))
        if isinstance(error, DeviceFailed):
            self._on_device_failure(error)


def _trace_of(error: Exception) -> Exception | None:
    """The error where nobody foresaw it; it is not kept, because its frames hold what was being loaded."""
    foreseen = tuple(cls for cls in REASONS if cls is not Exception)
    return None if isinstance(error, foreseen) else error


def _refusal(slot: _Slot, seconds: float) -> ModelLoadFailed:
    seconds = max(1.0, seconds)
    return ModelLoadFailed(
        f"The model {slot.model.name} cannot be loaded: {slot.reason}; the server's log says more. It is "
        f"tried again in {seconds:.0f} seconds at the earliest; other models can be drawn with.",
        seconds,
    )


def _note_what_it_is(slot: _Slot, engine: Engine) -> None:
    from zimage_engine.unloading import weight_bytes

    slot.bytes = weight_bytes(engine)
    slot.description, slot.identity = engine.description, engine.identity
    slot.family, slot.dtype = engine.description.family, engine.description.dtype


def _adapter(model: ListedModel, fetch: bool) -> ModelLoaderAdapter:
    return ModelLoaderAdapter(
        model.path, model.family, base=model.base, dtype=_plain(model.dtype), fetch=fetch
    )


def _plain(dtype: str | None) -> str | None:
    """What the files are looked at for; which one auto is, loading tells."""
    return None if dtype == "auto" else dtype


def _look_at_files(slot: _Slot) -> None:
    """What can be told of a model before it is loaded; of one that is still to be fetched, nothing."""
    try:
        adapter = _adapter(slot.model, fetch=False)
        family, identity = adapter.family, adapter.identity
    except Exception as error:  # what is wrong with it is told when it is loaded
        logger.warning(
            "model %s was looked at, and nothing can be told of it yet: %s", slot.model.name, error
        )
        return
    if slot.description is None:
        slot.family, slot.dtype, slot.identity = family.name, family.dtype, identity


def _prepare(slot: _Slot) -> int:
    """Whatever of loading needs no torch: afterwards its files are here, mended, and read once.

    What its weights will take, in bytes.
    """
    from zimage_engine.unloading import read_through, weight_bytes_of_files

    if not slot.model.path:  # the default model, which the worker has loaded before
        return slot.bytes
    adapter = _adapter(slot.model, fetch=True)
    adapter.check()
    paths = [adapter.model_path] if adapter.model_path.is_file() else sorted(adapter.model_path.rglob("*"))
    files = [path for path in paths if path.is_file() and path.stat().st_size >= READ_AHEAD_BYTES]

    def on_read(part: float) -> None:
        slot.progress = part

    read_through(files, on_read)
    return weight_bytes_of_files(adapter.features, adapter.family)
