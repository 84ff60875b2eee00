"""Who may do what: named keys with scopes, of which the server holds hashes alone.

A key is 256 random bits, so one round of SHA-256 keeps it: there is nothing to guess, and a slow hash would
only hold up whoever asks. Knows nothing of HTTP and of the settings.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from serve_app.queueing import Entry, Priority

logger = logging.getLogger(__name__)

DRAW, READ, ADMIN = "draw", "read", "admin"
#: What each scope lets a caller do.
SCOPES = {
    DRAW: "ask for pictures, by the API or on the page",
    READ: "read the models, the metrics and the API's description",
    ADMIN: "change the running server (the routes under /-/)",
}

#: Programs that look for leaked keys find ours by it.
KEY_PREFIX = "zit_"
#: The single key of the settings, where the log names who called.
SETTINGS_KEY = "api_key"
RECHECK_SECONDS = 1.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_HASH = re.compile(r"sha256-([0-9a-f]{64})", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
#: What others than the owner may not do with the file; its group may read it, as a mounted secret needs.
_OPEN_TO_OTHERS = stat.S_IWGRP | stat.S_IRWXO

#: The name of the key that the request in hand came with; "" where none was needed.
caller: ContextVar[str] = ContextVar("caller", default="")


class KeyFileWrong(ValueError):
    """The file of keys cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a key's line says of its share and limits; None: nothing, so that the settings' hold.

    0 is no limit, whatever the settings say.
    """

    priority: Priority | None = None
    pictures_at_once: int | None = None
    requests_a_minute: int | None = None

    def of(self, default: Entry) -> Entry:
        """What such a caller may where others may `default`."""
        return replace(default, **self.said())

    def said(self) -> dict[str, Any]:
        """What is said, by name."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.said().items())


@dataclass(frozen=True, slots=True)
class NamedKey:
    """A key as it is kept: its SHA-256 and never the key."""

    name: str
    scopes: frozenset[str]
    digest: bytes
    allowance: Allowance = Allowance()

    def line(self) -> str:
        """As it stands in the file."""
        said = f":{self.allowance}" if self.allowance.said() else ""
        return f"{self.name}:{','.join(sorted(self.scopes))}:sha256-{self.digest.hex()}{said}"


class KeyRing:
    """Every key of a server; those of the file are read again when it changes, so that a key can be revoked.

    A file that cannot be used raises KeyFileWrong at first; later the keys read before stay in force and the
    log says so.
    """

    def __init__(self, api_key: str | None = None, file: Path | None = None) -> None:
        everything = frozenset(SCOPES)
        self._own = () if api_key is None else (NamedKey(SETTINGS_KEY, everything, digest_of(api_key)),)
        self._file = file
        self._seen = _state_of(file)
        self._of_file = () if file is None else read_keys(file)
        self._checked_at = time.monotonic()

    def __bool__(self) -> bool:
        """Whether there is any key at all; without one nobody is asked for it."""
        return bool(self._own) or self._file is not None

    def owner_of(self, given: bytes) -> NamedKey | None:
        """The key that was given; each one is compared, in constant time, whichever it is."""
        self._read_again()
        digest = hashlib.sha256(given).digest()
        found = [key for key in (*self._own, *self._of_file) if secrets.compare_digest(key.digest, digest)]
        return found[0] if found else None

    def entry_of(self, name: str, default: Entry) -> Entry:
        """What the caller of that name may: as its key's line says, else `default`, as for an address."""
        self._read_again()
        return next((key.allowance.of(default) for key in self._of_file if key.name == name), default)

    def _read_again(self) -> None:
        if self._file is None or time.monotonic() - self._checked_at < RECHECK_SECONDS:
            return
        self._checked_at = time.monotonic()
        state = _state_of(self._file)
        if state == self._seen:
            return
        self._seen = state
        try:
            self._of_file = read_keys(self._file)
        except KeyFileWrong as wrong:
            logger.error("the keys read before stay in force: %s", wrong)
        else:
            logger.info("the keys were read again; there are %d", len(self._of_file))


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).digest()


def read_keys(file: Path) -> tuple[NamedKey, ...]:
    """The keys in a file, at least one; lines `name:scope,scope:sha256-HEX`, empty lines and `#` comments.

    Behind a third colon a line may say what the key's caller gets, such as
    `priority=high,pictures_at_once=4,requests_a_minute=60`.
    Raises KeyFileWrong, also where others than its owner and group may read the file.
    """
    try:
        mode = file.stat().st_mode
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise KeyFileWrong(
            f"the file of keys {file} cannot be read: {reason}; make one with: zimage-turbo keys add NAME"
        ) from error
    if mode & _OPEN_TO_OTHERS:
        raise KeyFileWrong(
            f"the file of keys {file} is open to others (mode {stat.S_IMODE(mode):04o}); "
            f"run: chmod 600 {file}"
        )
    keys: dict[str, NamedKey] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key = _read_line(line.strip(), f"line {number} of {file}")
        if key.name in keys:
            raise KeyFileWrong(
                f"line {number} of {file} has the name {key.name} a second time; give each key its own"
            )
        keys[key.name] = key
    if not keys:
        raise KeyFileWrong(f"there is no key in {file}; make one with: zimage-turbo keys add NAME")
    return tuple(keys.values())


def add_key(file: Path, name: str, scopes: Collection[str], allowance: Allowance = Allowance()) -> str:
    """A new key, of which only the hash is written to the file (mode 0600 where it is made).

    Raises KeyFileWrong for a name that is taken or cannot be one, and for a scope that is none.
    """
    if _NAME.fullmatch(name) is None:
        raise KeyFileWrong(
            f"a key's name has letters, digits, '.', '_' and '-', at most 64, got {name[:80]!r}; "
            "choose another"
        )
    if name == SETTINGS_KEY:
        raise KeyFileWrong(f"the name {SETTINGS_KEY} means the key of the settings; choose another")
    _check_scopes(scopes, f"the key {name}")
    kept = read_keys(file) if _has_keys(file) else ()
    if name in {key.name for key in kept}:
        raise KeyFileWrong(
            f"there is a key {name} in {file} already; remove it first, or choose another name"
        )
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    _append(file, NamedKey(name, frozenset(scopes), digest_of(key), allowance).line())
    return key


def change_key(file: Path, name: str, allowance: Allowance) -> None:
    """Let the line of a key say what `allowance` says, beside what it said of the rest.

    Raises KeyFileWrong where there is none of that name.
    """
    key = _key_named(file, name)
    said = replace(key, allowance=replace(key.allowance, **allowance.said()))
    _rewrite(file, name, lambda line: said.line() + "\n")


def remove_key(file: Path, name: str) -> None:
    """Take a key out of the file; raises KeyFileWrong where there is none of that name, or no other."""
    key = _key_named(file, name)
    if read_keys(file) == (key,):
        raise KeyFileWrong(
            f"{name} is the only key in {file}, and a server with no key in its file does not start; add "
            "another first"
        )
    _rewrite(file, name, lambda line: "")


def _key_named(file: Path, name: str) -> NamedKey:
    for key in read_keys(file):
        if key.name == name:
            return key
    raise KeyFileWrong(f"there is no key {name} in {file}; `zimage-turbo keys ls` lists them")


def _rewrite(file: Path, name: str, changed: Callable[[str], str]) -> None:
    """The file with another line for the key of that name; comments and the other lines stay."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    is_its = [line.strip().partition(":")[0] == name for line in lines]
    _replace(file, "".join(changed(line) if its else line for line, its in zip(lines, is_its, strict=True)))


def _read_line(line: str, where: str) -> NamedKey:
    name, *rest = line.split(":")
    if (
        len(rest) not in (2, 3)
        or _NAME.fullmatch(name) is None
        or (kept := _HASH.fullmatch(rest[1].strip())) is None
    ):
        # The line itself is not told: someone may have written a key into it.
        raise KeyFileWrong(
            f"{where} is not of the form name:scope,scope:sha256-HEX; "
            "make it with: zimage-turbo keys add NAME"
        )
    scopes = frozenset(scope.strip() for scope in rest[0].split(","))
    _check_scopes(scopes, where)
    allowance = Allowance() if len(rest) == 2 else _read_allowance(rest[2], where)
    return NamedKey(name, scopes, bytes.fromhex(kept[1]), allowance)


def _read_allowance(text: str, where: str) -> Allowance:
    said: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (each.strip() for each in part.partition("="))
        if name in said or (read := _READ.get(name)) is None or (chosen := read(value)) is None:
            # As above, what stands there is not told.
            raise KeyFileWrong(
                f"{where} says behind its hash what is no share or limit, or one twice; expected any of "
                f"priority={'|'.join(get_args(Priority))}, pictures_at_once=NUMBER and "
                "requests_a_minute=NUMBER, with commas between"
            )
        said[name] = chosen
    return Allowance(**said)


def _priority(text: str) -> str | None:
    return text if text in get_args(Priority) else None


def _number(text: str) -> int | None:
    return int(text) if _NUMBER.fullmatch(text) else None


#: How each part of an allowance is read; None is what cannot be.
_READ: dict[str, Callable[[str], Any]] = {
    "priority": _priority,
    "pictures_at_once": _number,
    "requests_a_minute": _number,
}


def _check_scopes(scopes: Collection[str], where: str) -> None:
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise KeyFileWrong(
            f"{where} has the scope {', '.join(map(repr, unknown)) or 'none'}; scopes are {', '.join(SCOPES)}"
        )


def _has_keys(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _append(file: Path, line: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+b") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - 1))
        lead = "" if size == 0 or opened.read(1) == b"\n" else "\n"
        opened.write(f"{lead}{line}\n".encode())


def _replace(file: Path, text: str) -> None:
    """The file's content at once, with its mode, so that no server reads half of it."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(text)
        Path(temporary).chmod(stat.S_IMODE(file.stat().st_mode))
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _state_of(file: Path | None) -> tuple[int, ...]:
    """What changes when the file does; () where there is none."""
    try:
        found = file.stat() if file is not None else None
    except OSError:
        found = None
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode) if found else ()
