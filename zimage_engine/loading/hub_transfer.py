"""Bring one announced file onto the disk, whole and checked, over a connection that may break off.

Knows nothing of models, folders or revisions: one address, one file, its size and its hash.

huggingface_hub 2.x throws away what it has of a file when a download ends early, so that a shard of
10 GB begins again from nothing. Here the part stays beside its place and the next attempt, in this
run or a later one, asks for the rest with a Range header.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zimage_engine.errors import DownloadError, DownloadIncomplete
from zimage_engine.loading.hub_listing import HashKind, RemoteFile

#: Seconds to wait before each further attempt. They count attempts in a row that brought little, so
#: a long file over a bad line may break off often, as long as it gets on.
WAITS_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)

#: An attempt that brought at least this much was worth it: the waits begin again.
WORTH_IT_BYTES = 1024 * 1024

#: Answers that mean "not now" rather than "no".
PASSING_STATUS_CODES = frozenset({408, 429, 500, 502, 503, 504})

#: A server may ask for a longer wait than ours; more than this is not obeyed.
LONGEST_WAIT_SECONDS = 60.0

_RANGE_NOT_SATISFIABLE = 416
_PARTIAL_CONTENT = 206
_HASH_BLOCK_BYTES = 8 * 1024 * 1024


class Stopped(Exception):
    """The transfer was told to stop; what has arrived is kept."""


class _BrokenOff(Exception):
    """An attempt ended before the file was whole; `wait_seconds` is what the server asked for, if it did."""

    def __init__(self, reason: str, wait_seconds: float = 0.0) -> None:
        super().__init__(reason, wait_seconds)
        self.reason = reason
        self.wait_seconds = wait_seconds


def fetch(
    file: RemoteFile,
    url: str,
    headers: Mapping[str, str],
    part: Path,
    stop: threading.Event,
    on_bytes: Callable[[int], None],
) -> None:
    """Fill `part` with the file from where it ends now, and check it; return when size and hash are right.

    `on_bytes` is told how many bytes arrived, a negative number when some had to be thrown away.
    Raises DownloadIncomplete (and removes `part`) if the content is not what was announced,
    DownloadError if the line broke off too often (`part` stays), Stopped when `stop` is set.
    """
    left_from_before = _size_of(part) > 0
    _fetch_all_bytes(file, url, headers, part, stop, on_bytes)
    try:
        check(file, part, stop)
    except DownloadIncomplete:
        on_bytes(-_size_of(part))
        part.unlink()
        if not left_from_before:
            raise
        # The part of an earlier run may be of another content; whole and from one piece it may be right.
        _fetch_all_bytes(file, url, headers, part, stop, on_bytes)
        try:
            check(file, part, stop)
        except DownloadIncomplete:
            part.unlink()
            raise


def check(
    file: RemoteFile, path: Path, stop: threading.Event, on_bytes: Callable[[int], None] = lambda _: None
) -> None:
    """Raise DownloadIncomplete unless the file at `path` has the announced size and hash."""
    size_bytes = _size_of(path)
    if size_bytes != file.size_bytes:
        raise DownloadIncomplete(
            f"{file.path}: expected {file.size_bytes} bytes, got {size_bytes}; it was removed, run the"
            " download again to fetch it anew"
        )
    got_hex = hash_of(path, file.hash_kind, stop, on_bytes)
    if got_hex != file.hash_hex:
        raise DownloadIncomplete(
            f"{file.path}: expected {file.hash_kind} {file.hash_hex}, got {got_hex}; it was removed, run the"
            " download again to fetch it anew, and if that does not help the mirror or the line alters files"
        )


def hash_of(
    path: Path,
    kind: HashKind,
    stop: threading.Event | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> str:
    """The hash of a file's content as a hub announces it; git puts "blob SIZE\\0" before the content."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "git-sha1":
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as content:
        while block := content.read(_HASH_BLOCK_BYTES):
            if stop is not None and stop.is_set():
                raise Stopped
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def _fetch_all_bytes(
    file: RemoteFile,
    url: str,
    headers: Mapping[str, str],
    part: Path,
    stop: threading.Event,
    on_bytes: Callable[[int], None],
) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    attempts_in_vain = 0
    while True:
        size_before_bytes = _size_of(part)
        if size_before_bytes >= file.size_bytes:
            part.touch()  # an empty file is whole before anything was asked for
            return
        try:
            _attempt(file, url, headers, part, stop, on_bytes)
        except _BrokenOff as broken_off:
            got_on = _size_of(part) - size_before_bytes >= WORTH_IT_BYTES
            attempts_in_vain = 0 if got_on else attempts_in_vain
            if attempts_in_vain == len(WAITS_SECONDS):
                raise DownloadError(
                    f"{file.path}: the connection broke off {attempts_in_vain + 1} times in a row"
                    f" ({broken_off.reason}); {_size_of(part)} of {file.size_bytes} bytes are kept, run the"
                    " download again to go on from there"
                ) from broken_off
            wait_seconds = max(WAITS_SECONDS[attempts_in_vain], broken_off.wait_seconds)
            attempts_in_vain += 1
            if stop.wait(wait_seconds):
                raise Stopped from broken_off


def _attempt(
    file: RemoteFile,
    url: str,
    headers: Mapping[str, str],
    part: Path,
    stop: threading.Event,
    on_bytes: Callable[[int], None],
) -> None:
    """One request for what is missing; every byte that arrives is in `part`, whatever happens then."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.utils import get_session, hf_raise_for_status

    have_bytes = _size_of(part)
    # Compressed on the way, byte positions would mean nothing.
    request_headers = {**headers, "Accept-Encoding": "identity"}
    if have_bytes:
        request_headers["Range"] = f"bytes={have_bytes}-"
    try:
        with get_session().stream(
            "GET", url, headers=request_headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response:
            if response.status_code == _RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
                on_bytes(-have_bytes)
                raise _BrokenOff("the server did not have the range that was missing")
            if response.status_code in PASSING_STATUS_CODES:
                raise _BrokenOff(f"the server answered {response.status_code}", _wait_asked_for(response))
            hf_raise_for_status(response)
            goes_on = response.status_code == _PARTIAL_CONTENT
            if goes_on and not _begins_at(response, have_bytes):
                raise _BrokenOff("the server sent another range than the one that was missing")
            if have_bytes and not goes_on:
                on_bytes(-have_bytes)  # a server without ranges begins again from the first byte
            with part.open("ab" if goes_on else "wb") as content:
                for block in response.iter_bytes():
                    content.write(block)
                    on_bytes(len(block))
                    if stop.is_set():
                        raise Stopped
    except HfHubHTTPError:
        raise
    except HTTPError as lost:
        raise _BrokenOff(str(lost) or type(lost).__name__) from lost
    if _size_of(part) < file.size_bytes:
        raise _BrokenOff("the server ended its answer early")


def _begins_at(response: Any, position: int) -> bool:
    return str(response.headers.get("Content-Range", "")).startswith(f"bytes {position}-")


def _wait_asked_for(response: Any) -> float:
    asked = str(response.headers.get("Retry-After", ""))
    return min(float(asked), LONGEST_WAIT_SECONDS) if asked.isdecimal() else 0.0


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
