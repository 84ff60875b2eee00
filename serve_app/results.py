"""Keeps finished files for whoever has their unguessable id, for a time and within a size.

A file lies under its id in a folder of this machine, or in an object store such as S3's. There is no index:
the id itself says when it expires and what it is, so a restart, and several ingresses over one place, see the
same. Knows nothing of requests and pictures.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import Context
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

#: What may be kept; a file is never given out as anything but the type that its id ends in.
MEDIA_TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "webp": "image/webp",
    "json": "application/json",
}
_ENDINGS = {media_type: ending for ending, media_type in MEDIA_TYPES.items()}

#: When it expires, in seconds since 1970 and hexadecimal, then 144 random bits, then its type.
_ID = re.compile(rf"(?P<expires>[0-9a-f]{{9}})-[A-Za-z0-9_-]{{24}}\.(?P<ending>{'|'.join(MEDIA_TYPES)})")
_RANDOM_BYTES = 18
#: An empty file that says that one of this id was there.
_GONE = ".gone"
#: What is being written starts with a dot, so that no id is like it.
_UNFINISHED = "."

#: How long it is remembered that a file was there.
GONE_SECONDS = 7 * 24 * 3600
#: An unfinished file this old is one whose writer has died.
UNFINISHED_SECONDS = 3600
#: What others write into the same place is counted this often.
COUNT_SECONDS = 10.0

#: Places that are reached by a URL; the first is the one that is told as an example.
SCHEMES = ("s3", "gs", "az")
#: An object store that does not answer must not hold back a finished picture for long.
KEEP_SECONDS = 30.0
REQUEST_SECONDS = 10.0
RETRY_SECONDS = 10.0
RETRIES = 3
#: How many files are removed at the same moment.
REMOVED_AT_ONCE = 16


class ResultExpired(Exception):
    """The file was there, and has been removed for its age or for want of room."""


class ResultNotKept(Exception):
    """The file could not be written; the message says why, and names no place on the server."""


class ResultUnreachable(Exception):
    """Whether the file is there cannot be told now: the place does not answer."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that was kept; `expires_at` is in seconds since 1970."""

    data: bytes = field(repr=False)
    media_type: str
    expires_at: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file of a place: its name, its size, and when it was written in seconds since 1970."""

    name: str
    size_bytes: int
    written_at: float


class _Place(Protocol):
    """Where files lie. A name has no folders in it; `read` of one that is not there is FileNotFoundError."""

    #: More at once waste a disk's time, and fewer a network's.
    writes_at_once: int

    async def write(self, name: str, data: bytes) -> None:
        """Write it whole or not at all; when this returns it stays."""

    async def read(self, name: str) -> bytes: ...

    async def exists(self, name: str) -> bool: ...

    async def remove(self, name: str) -> None:
        """Remove it; one that is not there is no error."""

    async def entries(self) -> list[_Entry]: ...


class ResultStore:
    """Files under unguessable ids, for `seconds` each and with `most_bytes` in all: the oldest go first.

    Several stores may share one place, also from several machines; together they may exceed `most_bytes` by
    what they write within COUNT_SECONDS, and one by what it writes at the same moment. `now` is a clock in
    seconds since 1970.
    """

    def __init__(
        self,
        place: Path | str,
        seconds: float,
        most_bytes: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`place` is a folder, made when the first file is kept, or as text a URL as `check_place` takes."""
        self._place = place_at(place)
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._now = now
        self._writers = asyncio.Semaphore(self._place.writes_at_once)
        self._counting = asyncio.Lock()
        #: Sizes of what is being written, by name: a listing may or may not have it yet.
        self._unwritten: dict[str, int] = {}
        self._counted_at = float("-inf")
        self._counted_bytes = 0
        #: What is being removed for somebody who is gone; a task that nobody holds may vanish.
        self._taking_back: set[asyncio.Task[None]] = set()

    async def put(self, data: bytes, media_type: str) -> str:
        """Keep `data`, and return its id, which is safe in URLs; it stays from then on.

        Raises ResultNotKept where it cannot be written, and ValueError for another type than MEDIA_TYPES has.
        """
        if media_type not in _ENDINGS:
            raise ValueError(f"media_type must be one of {', '.join(_ENDINGS)}, got {media_type!r}")
        if len(data) > self._most_bytes:
            raise ResultNotKept(
                f"The file has {len(data)} bytes, and this server keeps {self._most_bytes} in all "
                "(setting result_bytes)."
            )
        expires = int(self._now() + self._seconds)
        name = f"{expires:09x}-{secrets.token_urlsafe(_RANDOM_BYTES)}.{_ENDINGS[media_type]}"
        try:
            async with asyncio.timeout(KEEP_SECONDS), self._writers:
                await self._write(name, data)
        except Exception as error:  # each place has its own kinds of failure
            logger.exception("a result could not be kept")
            raise ResultNotKept(
                "The file could not be kept on the server (its log says why); try again later, or ask for it "
                "in the answer itself."
            ) from error
        return name

    async def _write(self, name: str, data: bytes) -> None:
        self._unwritten[name] = len(data)
        try:
            async with self._counting:
                await self._make_room()
            await self._write_or_take_back(name, data)
            self._counted_bytes += len(data)
        finally:
            del self._unwritten[name]

    async def _write_or_take_back(self, name: str, data: bytes) -> None:
        """A thread cannot be cancelled: who is, leaves what it writes to be removed, as nobody has its id."""
        # In contexts of their own: Serve ends with a request whatever was begun in its context.
        writing = asyncio.create_task(self._place.write(name, data), context=Context())
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            taking_back = asyncio.create_task(self._take_back(name, writing), context=Context())
            self._taking_back.add(taking_back)
            taking_back.add_done_callback(self._taking_back.discard)
            raise

    async def _take_back(self, name: str, writing: asyncio.Task[None]) -> None:
        try:
            await asyncio.wait([writing])
            if not writing.cancelled() and writing.exception() is None:
                await self._place.remove(name)
        except Exception:  # as in `put`
            logger.exception("a result that nobody waits for could not be removed; it goes when it expires")

    async def get(self, id: str) -> StoredFile | None:
        """The file of this id, None where none ever was.

        Raises ResultExpired where it is there no more, ResultUnreachable where the place does not answer.
        """
        match = _ID.fullmatch(id)
        if match is None:
            return None
        expires = int(match["expires"], 16)
        try:
            if self._now() < expires:
                with contextlib.suppress(FileNotFoundError):
                    data = await self._place.read(id)
                    return StoredFile(data, MEDIA_TYPES[match["ending"]], expires)
            was_there = await self._place.exists(id) or await self._place.exists(id + _GONE)
        except Exception as error:  # as in `put`
            logger.exception("a result could not be read")
            raise ResultUnreachable(id) from error
        if was_there:
            raise ResultExpired(id)
        return None

    async def remove(self, id: str) -> None:
        """Remove the file for good; asking for it raises ResultExpired from then on. None there: no error.

        Where the place does not answer, it is left to expire.
        """
        if _ID.fullmatch(id) is None:
            return
        try:
            if await self._place.exists(id):
                await self._expire(id)
                self._counted_at = float("-inf")
        except Exception:  # as in `put`; whoever clears up after a failure must not fail of it
            logger.exception("a result could not be removed; it goes when it expires")

    async def _expire(self, name: str) -> None:
        await self._place.write(name + _GONE, b"")
        await self._place.remove(name)

    async def _make_room(self) -> None:
        """Remove what has expired, and the oldest until what is being written is within the bound too."""
        now = self._now()
        is_counted = now - self._counted_at < COUNT_SECONDS
        if is_counted and self._counted_bytes + sum(self._unwritten.values()) <= self._most_bytes:
            return
        # What is being written now may be done before the end of this, and the list may have it or not.
        writing = dict(self._unwritten)
        stale, expired = [], []
        kept: list[tuple[int, _Entry]] = []
        for entry in await self._place.entries():
            match = _ID.fullmatch(entry.name)
            if match is None:
                if now - entry.written_at > _seconds_left_alone(entry.name):
                    stale.append(entry.name)
            elif int(match["expires"], 16) <= now:
                expired.append(entry.name)
            elif entry.name not in writing:
                kept.append((int(match["expires"], 16), entry))
        total = sum(entry.size_bytes for _, entry in kept)
        most = self._most_bytes - sum({**writing, **self._unwritten}.values())
        # Those that were written in one second are told apart by the file's own time.
        for _, entry in sorted(kept, key=lambda each: (each[0], each[1].written_at)):
            if total <= most:
                break
            expired.append(entry.name)
            total -= entry.size_bytes
        await _each(self._place.remove, stale)
        await _each(self._expire, expired)
        written_since = sum(size for name, size in writing.items() if name not in self._unwritten)
        self._counted_bytes, self._counted_at = total + written_since, now


async def _each(do: Callable[[str], Awaitable[None]], names: list[str]) -> None:
    """Do it with each name, some at a time: an object store answers many as soon as one."""
    for first in range(0, len(names), REMOVED_AT_ONCE):
        await asyncio.gather(*(do(name) for name in names[first : first + REMOVED_AT_ONCE]))


def expires_at(id: str) -> int:
    """When the file of an id that `put` returned expires, in seconds since 1970."""
    match = _ID.fullmatch(id)
    if match is None:
        raise ValueError(f"{id!r} is no id of a kept file")
    return int(match["expires"], 16)


def _seconds_left_alone(name: str) -> float:
    """How old a file that is no result may become; what others have put here stays for ever."""
    if name.endswith(_GONE) and _ID.fullmatch(name.removesuffix(_GONE)):
        return GONE_SECONDS
    if name.startswith(_UNFINISHED) and _ID.match(name.removeprefix(_UNFINISHED)):
        return UNFINISHED_SECONDS
    return float("inf")


class _Folder:
    """A folder of this machine, for its owner alone."""

    writes_at_once = 1

    def __init__(self, path: Path) -> None:
        self._path = path

    async def write(self, name: str, data: bytes) -> None:
        await asyncio.to_thread(self._write, name, data)

    async def read(self, name: str) -> bytes:
        return await asyncio.to_thread((self._path / name).read_bytes)

    async def exists(self, name: str) -> bool:
        return await asyncio.to_thread((self._path / name).is_file)

    async def remove(self, name: str) -> None:
        await asyncio.to_thread((self._path / name).unlink, missing_ok=True)

    async def entries(self) -> list[_Entry]:
        return await asyncio.to_thread(lambda: list(self._entries()))

    def _write(self, name: str, data: bytes) -> None:
        self._path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path.chmod(0o700)
        unfinished = self._path / f"{_UNFINISHED}{name}.{secrets.token_hex(4)}"
        try:
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._path / name)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        # The name is on the disk only with the folder.
        folder = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _entries(self) -> Iterator[_Entry]:
        if not self._path.is_dir():
            return
        with os.scandir(self._path) as found:
            for entry in found:
                # Another ingress may have removed it since.
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat(follow_symlinks=False)
                    if entry.is_file(follow_symlinks=False):
                        yield _Entry(entry.name, stat.st_size, stat.st_mtime)


class _ObjectStore:
    """A place that obstore reaches, such as s3://bucket/prefix; an object is seen when it is whole.

    Where it is and by which key is told by the environment, as for other programs of that store:
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and AWS_ENDPOINT_URL for one that is not Amazon's.
    """

    writes_at_once = 8

    def __init__(self, url: str) -> None:
        self._objects: Any = _opened(url)

    async def write(self, name: str, data: bytes) -> None:
        # In one request: of several, those that came through before a crash would stay and be paid for.
        await self._objects.put_async(name, data, use_multipart=False)

    async def read(self, name: str) -> bytes:
        found = await self._objects.get_async(name)
        return bytes(await found.bytes_async())

    async def exists(self, name: str) -> bool:
        try:
            await self._objects.head_async(name)
        except FileNotFoundError:
            return False
        return True

    async def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            await self._objects.delete_async(name)

    async def entries(self) -> list[_Entry]:
        found = await self._objects.list_with_delimiter_async()
        return [
            _Entry(str(each["path"]).rpartition("/")[2], int(each["size"]), each["last_modified"].timestamp())
            for each in found["objects"]
        ]


def place_at(place: Path | str) -> _Place:
    """Where files are written and read: a folder, made with the first, or as text a URL."""
    return _Folder(place) if isinstance(place, Path) else _ObjectStore(place)


def _opened(url: str) -> Any:
    from obstore.store import from_url

    return from_url(
        url,
        # An endpoint without TLS is one that the operator has named as such, on a network of theirs.
        client_options={"timeout": timedelta(seconds=REQUEST_SECONDS), "allow_http": True},
        retry_config={"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
    )


def check_place(url: str) -> None:
    """Raise ValueError with a sentence where `url` is none that files can be kept under here.

    Nothing is asked of the place itself.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or not parts.netloc:
        others = " or ".join(f"{scheme}://" for scheme in SCHEMES[1:])
        raise ValueError(
            f"setting results_url must be a place such as {SCHEMES[0]}://bucket/prefix, also {others}, got "
            f"{url!r}; for a folder of this machine set data_dir"
        )
    try:
        _opened(url)
    except ImportError as missing:
        raise ValueError(
            f"setting results_url: {parts.scheme}:// needs the package obstore: pip install zimage-turbo[s3]"
        ) from missing
    except Exception as wrong:  # the library's own kinds; its first line is the sentence
        raise ValueError(
            f"setting results_url: {url!r} cannot be used: {str(wrong).splitlines()[0]}"
        ) from wrong
