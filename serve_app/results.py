"""Keeps finished files for whoever has their unguessable id, for a time and within a size.

A file lies under its id in a folder of this machine, or in any place that fsspec reaches by a URL. There
is no
index: the id itself says when it expires and what it is, so a restart, and several ingresses over one folder,
see the same. Knows no HTTP and no pictures.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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


class ResultExpired(Exception):
    """The file was there, and has been removed for its age or for want of room."""


class ResultNotKept(Exception):
    """The file could not be written; the message says why, and names no place on the server."""


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

    def write(self, name: str, data: bytes) -> None:
        """Write it whole or not at all."""

    def read(self, name: str) -> bytes: ...

    def exists(self, name: str) -> bool: ...

    def remove(self, name: str) -> None:
        """Remove it; one that is not there is no error."""

    def entries(self) -> Iterable[_Entry]: ...


class ResultStore:
    """Files under unguessable ids, for `seconds` each and with `most_bytes` in all: the oldest go first.

    Several stores may share one place, also from several machines; together they may exceed `most_bytes` by
    what they write within COUNT_SECONDS. `now` is a clock in seconds since 1970.
    """

    def __init__(
        self,
        place: Path | str,
        seconds: float,
        most_bytes: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`place` is a folder, made when the first file is kept, or as text a URL for fsspec."""
        self._place: _Place = _Folder(place) if isinstance(place, Path) else _Remote(place)
        self._seconds = seconds
        self._most_bytes = most_bytes
        self._now = now
        self._turn = asyncio.Lock()
        self._counted_at = float("-inf")
        self._counted_bytes = 0

    async def put(self, data: bytes, media_type: str) -> str:
        """Keep `data`, and return its id, which is safe in URLs; it is on the disk by then.

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
        async with self._turn:
            try:
                await asyncio.to_thread(self._make_room, len(data))
                await asyncio.to_thread(self._place.write, name, data)
            except Exception as error:  # each place has its own kinds of failure
                logger.exception("a result could not be kept")
                raise ResultNotKept(
                    "The file could not be kept on the server (its log says why); try again later, or "
                    "ask for "
                    "it in the answer itself."
                ) from error
            self._counted_bytes += len(data)
        return name

    async def get(self, id: str) -> StoredFile | None:
        """The file of this id, None where none ever was. Raises ResultExpired where it is there no more."""
        match = _ID.fullmatch(id)
        if match is None:
            return None
        expires = int(match["expires"], 16)
        if self._now() < expires:
            with contextlib.suppress(FileNotFoundError):
                data = await asyncio.to_thread(self._place.read, id)
                return StoredFile(data, MEDIA_TYPES[match["ending"]], expires)
        if await asyncio.to_thread(self._was_there, id):
            raise ResultExpired(id)
        return None

    async def remove(self, id: str) -> None:
        """Remove the file for good; asking for it raises ResultExpired from then on. None there: no error."""
        is_id = _ID.fullmatch(id) is not None
        if is_id and await asyncio.to_thread(self._place.exists, id):
            await asyncio.to_thread(self._expire, id)
            self._counted_at = float("-inf")

    def _was_there(self, id: str) -> bool:
        return self._place.exists(id) or self._place.exists(id + _GONE)

    def _expire(self, name: str) -> None:
        self._place.write(name + _GONE, b"")
        self._place.remove(name)

    def _make_room(self, size_bytes: int) -> None:
        """Remove what has expired, and the oldest until `size_bytes` more are within the bound."""
        now = self._now()
        is_counted = now - self._counted_at < COUNT_SECONDS
        if is_counted and self._counted_bytes + size_bytes <= self._most_bytes:
            return
        kept: list[tuple[int, _Entry]] = []
        for entry in self._place.entries():
            match = _ID.fullmatch(entry.name)
            if match is None:
                if now - entry.written_at > _seconds_left_alone(entry.name):
                    self._place.remove(entry.name)
            elif int(match["expires"], 16) <= now:
                self._expire(entry.name)
            else:
                kept.append((int(match["expires"], 16), entry))
        total = sum(entry.size_bytes for _, entry in kept)
        # Those that were written in one second are told apart by the file's own time.
        for _, entry in sorted(kept, key=lambda each: (each[0], each[1].written_at)):
            if total + size_bytes <= self._most_bytes:
                break
            self._expire(entry.name)
            total -= entry.size_bytes
        self._counted_bytes, self._counted_at = total, now


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

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, name: str, data: bytes) -> None:
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

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def exists(self, name: str) -> bool:
        return (self._path / name).is_file()

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def entries(self) -> Iterable[_Entry]:
        if not self._path.is_dir():
            return
        with os.scandir(self._path) as found:
            for entry in found:
                # Another ingress may have removed it since.
                with contextlib.suppress(FileNotFoundError):
                    stat = entry.stat(follow_symlinks=False)
                    if entry.is_file(follow_symlinks=False):
                        yield _Entry(entry.name, stat.st_size, stat.st_mtime)


class _Remote:
    """A place that fsspec reaches, such as s3://bucket/prefix; a write is one object, seen when it is
    whole."""

    def __init__(self, url: str) -> None:
        import fsspec

        # Without the listings that fsspec keeps: others write there too.
        self._files: Any
        self._files, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self._path = path.rstrip("/")

    def write(self, name: str, data: bytes) -> None:
        try:
            self._files.pipe_file(self._at(name), data)
        except FileNotFoundError:  # a place with real folders, which is empty yet
            self._files.makedirs(self._path, exist_ok=True)
            self._files.pipe_file(self._at(name), data)

    def read(self, name: str) -> bytes:
        data: bytes = self._files.cat_file(self._at(name))
        return data

    def exists(self, name: str) -> bool:
        return bool(self._files.isfile(self._at(name)))

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._at(name))

    def entries(self) -> Iterable[_Entry]:
        with contextlib.suppress(FileNotFoundError):
            for found in self._files.ls(self._path, detail=True):
                if found["type"] == "file":
                    yield _Entry(Path(found["name"]).name, int(found["size"] or 0), _written_at(found))

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"


#: What file systems of fsspec call the time of the last write: S3, the memory's, a disk's, and the web's.
_TIMES = ("LastModified", "created", "mtime", "last_modified")


def _written_at(found: dict[str, Any]) -> float:
    """In seconds since 1970; where the place does not tell, the future, so that nothing is removed for it."""
    told = next((found[name] for name in _TIMES if found.get(name) is not None), None)
    if told is None:
        return float("inf")
    return float(told if isinstance(told, (int, float)) else told.timestamp())


def check_place(url: str) -> None:
    """Raise ValueError with a sentence where `url` is none that files can be kept under here."""
    import fsspec
    from fsspec.registry import known_implementations

    scheme, separator, rest = url.partition("://")
    if not separator or not rest.strip("/"):
        raise ValueError(
            f"setting results_url must be a place such as s3://bucket/prefix, got {url!r}; for a folder of "
            "this machine set data_dir"
        )
    known = known_implementations.get(scheme)
    if known is None:
        raise ValueError(
            f"setting results_url: fsspec knows no {scheme}://; s3://bucket/prefix is one it does"
        )
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as missing:
        extra = known.get("err", str(missing))
        raise ValueError(
            f"setting results_url: {scheme}:// needs a package that is not installed here: {extra}"
        ) from missing
