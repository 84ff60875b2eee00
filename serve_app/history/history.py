"""Keeps what is drawn on the page for whoever drew it: a file for each picture, and an index of them.

The index is a file below the data folder, or the PostgreSQL database of jobs; the files are in a folder, or
in the object store of results where the index is shared too, so that several servers have one history. A
picture's file is written before its row and removed after it: a row without a file is one that was lost, and
a file without a row one that a crash has left; both are cleared up. Knows no HTTP and nothing of drawing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import io
import logging
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from serve_app.database import StoreUnusable
from serve_app.error_mapping import SERVER, RequestRefused
from serve_app.history.index import Bounds, HistoryIndex, KeptPicture
from serve_app.history.tables import open_database
from serve_app.image_codec import read_receipt
from serve_app.results import UNFINISHED_SECONDS, place_at
from serve_app.settings import Settings

logger = logging.getLogger(__name__)

#: The longer side of a thumbnail, in pixels, and how it is packed.
THUMBNAIL_PX, THUMBNAIL_QUALITY = 256, 80
#: Calls that block at once: of the database, and of what reads pictures.
THREADS = 4
#: Between two tries to open a database that could not be opened.
REOPEN_SECONDS = 10.0
#: Between two looks for what has become too old, and for what a crash has left.
TIDY_SECONDS = 600.0
#: A file without a row is left alone for so long: it may be one whose row is being written.
ROWLESS_SECONDS = 300.0
#: How long whoever draws waits for a picture to be kept.
KEEP_SECONDS = 30.0
#: How long what is being kept is waited for at the end.
CLOSE_SECONDS = 10.0

#: When it was drawn, in microseconds since 1970 and hexadecimal, then 144 random bits.
_ID = re.compile(r"(?P<made_at>[0-9a-f]{14})-[A-Za-z0-9_-]{24}")
_RANDOM_BYTES = 18
_ENDING = ".png"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Where files of several folders share one database, this file of a folder has its name in there.
_NAME_FILE = "name-of-this-folder"
#: The place of a database that has one alone.
_ONLY_PLACE = "here"

Answer = TypeVar("Answer")


class HistoryUnavailable(RequestRefused):
    """The history cannot be read or changed at the moment."""

    def __init__(self) -> None:
        super().__init__(
            "The history cannot be read or changed at the moment; the server's log says why. Pictures are "
            "drawn all the same. Try again later.",
            None,
            "history_unavailable",
            503,
            SERVER,
            {"Retry-After": "10"},
        )


@dataclass(frozen=True, slots=True)
class _Looked:
    """What a picture's file tells of itself."""

    width: int
    height: int
    revised_prompt: str | None
    thumbnail: bytes = field(repr=False)


def history_of(settings: Settings, tell_failure: Callable[[], None] = lambda: None) -> History | None:
    """The history that the settings ask for, None where they want none."""
    if not settings.history:
        return None
    bounds = Bounds(settings.history_pictures, settings.history_bytes, settings.history_seconds)
    folder = settings.data_dir / "history"
    if settings.jobs_url is None:
        file = settings.data_dir / "history.sqlite3"
        return History(URL.create("sqlite", database=str(file)), folder, bounds, tell_failure)
    shared = settings.jobs_url.get_secret_value()
    place = folder if settings.results_url is None else f"{settings.results_url.rstrip('/')}/history"
    return History(shared, place, bounds, tell_failure)


def is_id(text: str) -> bool:
    """Whether a picture may have it for its id."""
    return _ID.fullmatch(text) is not None


class History:
    """The pictures of one database and place of files; several may share them, also from several machines.

    All but `keep` raise HistoryUnavailable where the database or the place does not answer. `owner` is the
    name of a key, "" where there are none: nobody sees or removes what is another's.
    """

    def __init__(
        self,
        database: str | URL,
        place: Path | str,
        bounds: Bounds,
        tell_failure: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`tell_failure` is called of each picture that could not be kept. `now` tells seconds since 1970."""
        self._database = database
        self._where = place
        self._files = place_at(place)
        self._bounds = bounds
        self._tell_failure = tell_failure
        self._now = now
        self._last_made_at = 0
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="history")
        self._opening = asyncio.Lock()
        self._index: HistoryIndex | None = None
        self._tried_at = float("-inf")
        self._complained = ""
        self._tidying: asyncio.Task[None] | None = None
        #: A task that nobody holds may vanish.
        self._keeping: set[asyncio.Task[str | None]] = set()

    # --- life --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to clear up what is too old, too much, or left by a crash; now and every TIDY_SECONDS."""
        # In a context of its own: Serve ends with a request whatever was begun in its context.
        self._tidying = asyncio.create_task(self._tidy_for_ever(), context=Context())

    async def close(self) -> None:
        """What is being kept is kept; afterwards the history can be started once more."""
        if self._tidying is not None:
            self._tidying.cancel()
            await asyncio.wait([self._tidying])
            self._tidying = None
        if self._keeping:
            await asyncio.wait(self._keeping, timeout=CLOSE_SECONDS)
        if self._index is not None:
            self._index.close()
            self._index = None
        self._threads.shutdown(wait=False)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="history")
        self._tried_at = float("-inf")

    async def _tidy_for_ever(self) -> None:
        while True:
            try:
                await self.tidy()
            except HistoryUnavailable:
                pass
            except Exception:  # a process' edge: what clears up must not end of one failure
                logger.exception("the history could not be cleared up; trying again")
            await asyncio.sleep(TIDY_SECONDS)

    async def _opened(self) -> HistoryIndex:
        async with self._opening:
            if self._index is None:
                if time.monotonic() - self._tried_at <= REOPEN_SECONDS:
                    raise HistoryUnavailable
                self._tried_at = time.monotonic()
                try:
                    self._index = await self._in_thread(self._open)
                except (StoreUnusable, OSError, SQLAlchemyError) as error:
                    self._complain("the history's database cannot be opened", error)
                    raise HistoryUnavailable from error
                self._complained = ""
            return self._index

    def _open(self) -> HistoryIndex:
        engine = open_database(self._database)
        if engine.dialect.name == "sqlite":
            return HistoryIndex(engine, _ONLY_PLACE)
        try:
            return HistoryIndex(engine, _name_of(self._where))
        except BaseException:
            engine.dispose()
            raise

    def _complain(self, what: str, error: BaseException) -> None:
        """Once for each kind: a full disk would fill the log too."""
        sentence = f"{what}: {getattr(error, 'orig', None) or error}"
        if sentence != self._complained:
            logger.error("%s (settings data_dir, jobs_url, results_url; --no-history keeps none)", sentence)
        self._complained = sentence

    async def _in_thread(self, do: Callable[..., Answer], *given: Any) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(do, *given))

    async def _of_index(self, do: Callable[..., Answer], *given: Any) -> Answer:
        try:
            return await self._in_thread(do, *given)
        except SQLAlchemyError as error:
            self._complain("the history's database does not answer", error)
            raise HistoryUnavailable from error

    async def _of_files(self, doing: Awaitable[Answer]) -> Answer:
        """What the place of files answers; FileNotFoundError is an answer too."""
        try:
            return await doing
        except FileNotFoundError:
            raise
        except Exception as error:  # each place has its own kinds of failure
            self._complain("the place of the history's pictures does not answer", error)
            raise HistoryUnavailable from error

    # --- pictures ----------------------------------------------------------------------------------------

    async def keep(self, png: bytes, parameters: Mapping[str, Any], owner: str) -> str | None:
        """Keep a picture, and return its id; None where it cannot be kept, which is logged and told.

        `parameters` are the fields of POST /v1/images/generations as they were asked for, with the seed. It
        is kept also where whoever waits for this goes away. Never raises but for that.
        """
        keeping = asyncio.create_task(self._keep(png, parameters, owner), context=Context())
        self._keeping.add(keeping)
        keeping.add_done_callback(self._keeping.discard)
        return await asyncio.shield(keeping)

    async def _keep(self, png: bytes, parameters: Mapping[str, Any], owner: str) -> str | None:
        id = self._new_id()
        name = id + _ENDING
        try:
            if len(png) > self._bounds.size_bytes:
                raise ValueError(f"the picture has {len(png)} bytes, more than history_bytes")
            async with asyncio.timeout(KEEP_SECONDS):
                index = await self._opened()
                looked = await self._in_thread(_look_at, png)
                await self._files.write(name, png)
            asked = {key: value for key, value in parameters.items() if value is not None}
            picture = KeptPicture(
                id=id,
                made_at=_made_at(id),
                size_bytes=len(png),
                width=looked.width,
                height=looked.height,
                parameters=asked,
                revised_prompt=looked.revised_prompt or str(asked.get("prompt", "")),
            )
            await self._in_thread(index.add, picture, owner, looked.thumbnail)
            self._complained = ""
        except Exception as error:  # whatever it is, the picture itself is drawn and is not lost for it
            if not isinstance(error, HistoryUnavailable):
                self._complain("a picture could not be kept in the history", error)
            self._tell_failure()
            with contextlib.suppress(Exception):
                await self._files.remove(name)
            return None
        with contextlib.suppress(HistoryUnavailable):
            await self._evict(index)
        return id

    def _new_id(self) -> str:
        self._last_made_at = max(self._last_made_at + 1, int(self._now() * 1_000_000))
        return f"{self._last_made_at:014x}-{secrets.token_urlsafe(_RANDOM_BYTES)}"

    async def page(
        self, owner: str, limit: int, before: str | None = None, words: Collection[str] = ()
    ) -> tuple[list[KeptPicture], bool]:
        """The newest first, those behind the picture `before`, which need not be there any more, and whether
        there are more. Each of `words` stands in the prompt as it was asked for or drawn.

        Raises ValueError where `before` is no picture's id.
        """
        if before is not None and not is_id(before):
            raise ValueError(before)
        behind = None if before is None else (_made_at(before), before)
        index = await self._opened()
        return await self._of_index(index.page, owner, behind, words, limit)

    async def get(self, owner: str, id: str) -> KeptPicture | None:
        """None where there is none, or it is another's."""
        if not is_id(id):
            return None
        index = await self._opened()
        return await self._of_index(index.get, owner, id)

    async def picture(self, owner: str, id: str) -> bytes | None:
        """The PNG file as it was kept; None where there is none, or it is another's."""
        if await self.get(owner, id) is None:
            return None
        try:
            return await self._of_files(self._files.read(id + _ENDING))
        except FileNotFoundError:
            index = await self._opened()
            await self._of_index(index.forget, [id])
            return None

    async def thumbnail(self, owner: str, id: str) -> bytes | None:
        """A small WebP of it; None where there is none, or it is another's."""
        if not is_id(id):
            return None
        index = await self._opened()
        return await self._of_index(index.thumbnail, owner, id)

    async def remove(self, owner: str, id: str) -> bool:
        """Whether it was there. It is gone for good."""
        if not is_id(id):
            return False
        index = await self._opened()
        gone = await self._of_index(index.remove, owner, id)
        await self._remove_files(gone)
        return bool(gone)

    async def remove_all(self, owner: str) -> int:
        """How many of the owner's there were. They are gone for good."""
        index = await self._opened()
        gone = await self._of_index(index.remove, owner)
        await self._remove_files(gone)
        return len(gone)

    # --- clearing up -------------------------------------------------------------------------------------

    async def tidy(self) -> None:
        """Remove what is beyond the bounds, rows whose file was lost, and what a crash has left."""
        index = await self._opened()
        await self._evict(index)
        ids = await self._of_index(index.ids)
        # Behind the ids: the file of each was there before its row.
        entries = await self._of_files(self._files.entries())
        there = {entry.name for entry in entries}
        lost = [id for id in ids if id + _ENDING not in there]
        if lost:
            logger.warning(
                "%d pictures of the history have lost their file, and are left out of it", len(lost)
            )
            await self._of_index(index.forget, lost)
        now = time.time()
        rowless = [
            entry.name
            for entry in entries
            if entry.name.removesuffix(_ENDING) not in ids
            and now - entry.written_at > _seconds_left_alone(entry.name)
        ]
        for name in rowless:
            await self._of_files(self._files.remove(name))

    async def _evict(self, index: HistoryIndex) -> None:
        await self._remove_files(await self._of_index(index.evict, self._bounds, self._now()))

    async def _remove_files(self, ids: list[str]) -> None:
        """Of rows that are gone: a file that stays behind is removed when it is cleared up."""
        for id in ids:
            try:
                await self._files.remove(id + _ENDING)
            except Exception as error:  # as in `_of_files`
                self._complain("the place of the history's pictures does not answer", error)
                return


def _made_at(id: str) -> int:
    return int(id.partition("-")[0], 16)


def _seconds_left_alone(name: str) -> float:
    """How old a file without a row may become; what others have put here stays for ever."""
    if name.endswith(_ENDING) and is_id(name.removesuffix(_ENDING)):
        return ROWLESS_SECONDS
    if name.startswith(".") and _ID.match(name[1:]):
        return float(UNFINISHED_SECONDS)
    return float("inf")


def _look_at(png: bytes) -> _Looked:
    from PIL import Image

    if not png.startswith(_PNG_SIGNATURE):
        raise ValueError("it is no PNG")
    receipt = read_receipt(png) or {}
    prompt = receipt.get("prompt")
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        width, height = image.size
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, format="webp", quality=THUMBNAIL_QUALITY)
    return _Looked(width, height, prompt if isinstance(prompt, str) else None, file.getvalue())


def _name_of(place: Path | str) -> str:
    """What a place of files is called in a database that may have several.

    A folder's name is a file in it: of another machine, or of a disk that is not there at the moment, the
    same path is another folder, and none of its pictures are taken for lost.
    """
    if isinstance(place, str):
        return hashlib.sha256(place.encode()).hexdigest()[:32]
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = place / _NAME_FILE
    with contextlib.suppress(FileNotFoundError):
        return file.read_text("ascii")
    unfinished = place / f".{_NAME_FILE}.{secrets.token_hex(4)}"
    unfinished.write_text(secrets.token_hex(16), "ascii")
    try:
        # Of two who do this at once the second fails, and takes the first's.
        with contextlib.suppress(FileExistsError):
            os.link(unfinished, file)
    finally:
        unfinished.unlink()
    return file.read_text("ascii")
