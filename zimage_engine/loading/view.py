"""Repaired views: folders in the user's cache that stand in for a checkpoint; knows no kind of damage.

    <cache folder>/<key>/                     a whole view: links, rewritten files, zimage-view.json
    <cache folder>/.unfinished-<key>-<word>/  being made, or left by a crash
    <cache folder>/.locks/<key>.lock          held while a view is made or removed

A view is made under another name and gets its own by one rename, so that what has a key for a name is
whole. The modification time of zimage-view.json is when the view was last used.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from zimage_engine.errors import CacheFull, CheckpointDamaged, EngineError
from zimage_engine.loading.view_key import FORMAT_VERSION, key_of
from zimage_engine.loading.view_plan import LinkedFile, ViewPlan, WrittenWeights

if TYPE_CHECKING:
    import torch

MANIFEST = "zimage-view.json"
#: Four or five rewritten models of Z-Image's size.
DEFAULT_MAX_BYTES = 100_000_000_000
#: Left free beside a new view: a full disk breaks more than this program.
DEFAULT_RESERVE_BYTES = 1_000_000_000
#: A view used so lately may still be being loaded, so that no other view's making removes it.
IN_USE_SECONDS = 600.0

#: What was read of a mapped file counts as this process's memory until the file is let go of; a container
#: with a limit would be near it after one large file.
_MAPPED_BYTES = 512_000_000
_KEY = re.compile(r"[0-9a-f]{32}")
_UNFINISHED = ".unfinished-"
_ABANDONED_SECONDS = 86_400.0
_COPIED_IN = "copied"

#: Ways to have a file in a second place, best first: the next is tried where the file system refuses one.
Link = Callable[[Path, Path], Any]
LINKS: tuple[Link, ...] = (os.symlink, os.link, shutil.copy2)


@dataclass(frozen=True, slots=True)
class View:
    """One view. `size_bytes` counts what it holds itself, not what it links to.

    `is_whole` is False where a file is missing or has another size, as when the original was moved away.
    """

    key: str
    path: Path
    title: str
    origin: str
    size_bytes: int
    made_at: float
    last_used_at: float
    is_whole: bool


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What zimage-view.json holds. `files` is target -> size; `copied` are targets that are no links."""

    format: int
    key: str
    title: str
    origin: str
    size_bytes: int
    made_at: float
    files: dict[str, int]
    copied: list[str]


def default_cache_folder() -> Path:
    """Where views are kept unless the caller says otherwise: in the user's own cache directory."""
    return user_cache_path("zimage-turbo", appauthor=False) / "views"


def ensure_view(
    plan: ViewPlan,
    cache_folder: Path | None = None,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    reserve_bytes: int = DEFAULT_RESERVE_BYTES,
) -> Path:
    """The folder that `plan` describes: the one made before if it is whole, else a new one.

    Of several processes at once one makes it and the others wait for it. Afterwards the views longest not
    used go until all hold at most `max_bytes`; this one stays, however large. The files that it is made
    from are only read. Raises CacheFull if fewer than `reserve_bytes` would stay free, CheckpointDamaged
    if a stored tensor does not fit.
    """
    cache = cache_folder or default_cache_folder()
    _check_targets(plan)
    key = key_of(plan)
    with _errors_of_the_disk(cache):
        (cache / ".locks").mkdir(parents=True, exist_ok=True)
        with _lock(cache, key):
            remove_leftovers(cache, made_here=key)
            view = cache / key
            _point_links_at_sources(view, plan)
            made_before = _read_view(view)
            if made_before is None or not made_before.is_whole:
                _discard(cache, view)
                _make(plan, cache, key, reserve_bytes)
            os.utime(view / MANIFEST)
            prune_views(cache, max_bytes=max_bytes, spare=(key,), unused_for_seconds=IN_USE_SECONDS)
    return view


def find_view(key: str, cache_folder: Path | None = None) -> Path | None:
    """The view of that key if it is whole, which counts as used now; None where it is not there."""
    cache = cache_folder or default_cache_folder()
    view = cache / key
    if not _KEY.fullmatch(key) or not view.is_dir():
        return None
    with _errors_of_the_disk(cache), _lock(cache, key):
        found = _read_view(view)
        if found is None or not found.is_whole:
            return None
        os.utime(view / MANIFEST)
    return view


def list_views(cache_folder: Path | None = None) -> tuple[View, ...]:
    """All views, the last used first, those that are no longer whole among them."""
    cache = cache_folder or default_cache_folder()
    if not cache.is_dir():
        return ()
    folders = [folder for folder in cache.iterdir() if _KEY.fullmatch(folder.name) and folder.is_dir()]
    views = [_read_view(folder) or _unreadable_view(folder) for folder in folders]
    return tuple(sorted(views, key=lambda view: (-view.last_used_at, view.key)))


def views_to_prune(views: Iterable[View], max_bytes: int, spare: Collection[str] = ()) -> tuple[View, ...]:
    """Those to remove, longest not used first, so that all together hold at most `max_bytes`.

    Views whose key is in `spare` stay, and count.
    """
    kept = sorted(views, key=lambda view: (view.last_used_at, view.key))
    total_bytes = sum(view.size_bytes for view in kept)
    chosen: list[View] = []
    for view in kept:
        if total_bytes <= max_bytes:
            break
        if view.key not in spare:
            chosen.append(view)
            total_bytes -= view.size_bytes
    return tuple(chosen)


def remove_views(views: Iterable[View]) -> tuple[View, ...]:
    """Remove each view that no process is making or removing just now; gives those that were removed."""
    removed = []
    for view in views:
        with suppress(Timeout), _lock(view.path.parent, view.key, wait=False):
            _discard(view.path.parent, view.path)
            removed.append(view)
    return tuple(removed)


def remove_leftovers(cache_folder: Path | None = None, made_here: str = "") -> None:
    """Remove what crashes left: whatever no process holds the lock of, or has held it for a day.

    The caller holds the lock of the key `made_here`, so all that is unfinished under that key is left over.
    """
    cache = cache_folder or default_cache_folder()
    for folder in cache.glob(f"{_UNFINISHED}*"):
        key = folder.name.removeprefix(_UNFINISHED).rpartition("-")[0]
        if key == made_here or _age_seconds(folder) > _ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        with suppress(Timeout), _lock(cache, key, wait=False):
            shutil.rmtree(folder, ignore_errors=True)


def prune_views(
    cache_folder: Path | None = None,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    spare: Collection[str] = (),
    unused_for_seconds: float = 0.0,
) -> tuple[View, ...]:
    """Remove what crashes left and the views longest not used, until all hold at most `max_bytes`.

    Those in `spare`, those being made, and those used within `unused_for_seconds` stay. Gives the removed.
    """
    cache = cache_folder or default_cache_folder()
    if not cache.is_dir():
        return ()
    remove_leftovers(cache)
    views = list_views(cache)
    oldest_in_use = time.time() - unused_for_seconds
    in_use = {view.key for view in views if unused_for_seconds and view.last_used_at >= oldest_in_use}
    return remove_views(views_to_prune(views, max_bytes, {*spare, *in_use}))


def _make(plan: ViewPlan, cache: Path, key: str, reserve_bytes: int) -> None:
    from zimage_engine.loading.tensor_writer import written_bytes

    needed_bytes = sum(
        written_bytes(weights.recipes, _facts(weights), weights.dtype) for weights in plan.weights
    ) + sum(len(text.text.encode()) for text in plan.texts)
    _check_room(cache, needed_bytes, reserve_bytes)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{key}-", dir=cache))
    try:
        copied = [
            link.target
            for link in plan.linked
            if _place(link, unfinished, lambda size: _check_room(cache, size, reserve_bytes), LINKS)
            == _COPIED_IN
        ]
        for text in plan.texts:
            _write_text(_room_for(unfinished, text.target), text.text)
        for weights in plan.weights:
            _write_weights(_room_for(unfinished, weights.target), weights)
        files = {target: (unfinished / target).stat().st_size for target in _targets(plan)}
        linked = {link.target for link in plan.linked} - set(copied)
        manifest = _Manifest(
            format=FORMAT_VERSION,
            key=key,
            title=plan.title,
            origin=str(plan.origin.absolute()),
            size_bytes=sum(size for target, size in files.items() if target not in linked),
            made_at=time.time(),
            files=files,
            copied=copied,
        )
        _write_text(unfinished / MANIFEST, json.dumps(asdict(manifest), ensure_ascii=False, indent=2))
        for folder in (*(path for path in unfinished.rglob("*") if path.is_dir()), unfinished):
            _sync(folder)
        # mkdtemp lets nobody else in, and a cache may be shared by a group: as open as the cache itself.
        unfinished.chmod(cache.stat().st_mode & 0o777)
        unfinished.rename(cache / key)
        _sync(cache)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_weights(target: Path, weights: WrittenWeights) -> None:
    # Here, so that listing and pruning need no torch.
    from zimage_engine.loading.tensor_files import TensorFiles
    from zimage_engine.loading.tensor_writer import write_safetensors

    with TensorFiles(weights.sources) as stored:
        read_bytes = 0

        def read(name: str) -> torch.Tensor:
            nonlocal read_bytes
            if read_bytes > _MAPPED_BYTES:
                stored.close()  # it opens again by itself
                read_bytes = 0
            tensor = stored.read(name)
            read_bytes += tensor.nbytes
            return tensor

        write_safetensors(target, weights.recipes, read, _facts(weights), weights.dtype)


def _facts(weights: WrittenWeights) -> list[Any]:
    return [tensor for source in weights.sources for tensor in source.tensors]


def _write_text(target: Path, text: str) -> None:
    with target.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _place(
    link: LinkedFile, folder: Path, before_copying: Callable[[int], None], ways: Sequence[Link]
) -> str:
    """Have `link.source` at its target by the first of `ways` that the file system grants; "copied" or ""."""
    target = _room_for(folder, link.target)
    source = link.source.resolve(strict=True)
    for way in ways[:-1]:
        # NotImplementedError: a platform without links; OSError: a file system or a user without.
        with suppress(OSError, NotImplementedError):
            way(source, target)
            return ""
    before_copying(source.stat().st_size)
    ways[-1](source, target)
    _sync(target)
    return _COPIED_IN


def _room_for(folder: Path, target: str) -> Path:
    path = folder / target
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _point_links_at_sources(view: Path, plan: ViewPlan) -> None:
    """Links of an older view may lead to a place that has since moved or changed, with the same content here.

    The key says that the content is the same, so only the links are set anew, not the weights.
    """
    manifest = _read_manifest(view)
    if manifest is None:
        return
    for link in plan.linked:
        target = view / link.target
        if link.target in manifest.copied or (target.exists() and target.samefile(link.source)):
            continue
        fresh = LinkedFile(f"{link.target}.{os.getpid()}", link.source)
        if not target.parent.is_dir() or _place(fresh, view, lambda _: None, (*LINKS[:-1], _refuse)):
            return
        (view / fresh.target).replace(target)


def _refuse(_source: Path, _target: Path) -> None:
    """In place of a copy: the view is made anew instead."""


def _check_room(cache: Path, needed_bytes: int, reserve_bytes: int) -> None:
    free_bytes = shutil.disk_usage(cache).free
    if needed_bytes + reserve_bytes > free_bytes:
        raise CacheFull(
            f"a repaired copy needs {needed_bytes} bytes in {cache}, and {reserve_bytes} more must stay free;"
            f" {free_bytes} are free. Make room, or run `zimage-turbo cache prune`"
        )


def _check_targets(plan: ViewPlan) -> None:
    """Names come from files that anybody may have written: none may lead out of the view."""
    targets = _targets(plan)
    for target in targets:
        path = PurePosixPath(target)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in target or ":" in target:
            raise CheckpointDamaged(f"{plan.origin} names a file {target!r}, which leads out of its folder")
    if len({*targets, MANIFEST}) != len(targets) + 1:
        raise ValueError(f"two files of the view {plan.title!r} have one name, or that of {MANIFEST}")


def _targets(plan: ViewPlan) -> list[str]:
    return [
        *(link.target for link in plan.linked),
        *(text.target for text in plan.texts),
        *(weights.target for weights in plan.weights),
    ]


def _read_view(folder: Path) -> View | None:
    """The view in `folder`; None where there is none, or nothing says what it should hold."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return None
    try:
        last_used_at = (folder / MANIFEST).stat().st_mtime
    except FileNotFoundError:  # removed by another process since
        return None
    return View(
        key=manifest.key,
        path=folder,
        title=manifest.title,
        origin=manifest.origin,
        size_bytes=manifest.size_bytes,
        made_at=manifest.made_at,
        last_used_at=last_used_at,
        is_whole=all(_size_of(folder / target) == size for target, size in manifest.files.items()),
    )


def _unreadable_view(folder: Path) -> View:
    """A view whose manifest is damaged or of another version: no use any more, but it takes room."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    used_at = folder.stat().st_mtime if folder.exists() else 0.0
    return View(
        key=folder.name,
        path=folder,
        title="of another version",
        origin="",
        size_bytes=sum(_size_of(path) or 0 for path in files),
        made_at=used_at,
        last_used_at=used_at,
        is_whole=False,
    )


def _size_of(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:  # gone, or a link whose end is gone or may not be reached
        return None


def _read_manifest(folder: Path) -> _Manifest | None:
    try:
        manifest = _Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return manifest if (manifest.format, manifest.key) == (FORMAT_VERSION, folder.name) else None


def _discard(cache: Path, view: Path) -> None:
    """Remove a view in such a way that a half removed one is never taken for whole."""
    if not view.exists():
        return
    gone = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{view.name}-", dir=cache))
    view.rename(gone / view.name)
    shutil.rmtree(gone, ignore_errors=True)


def _age_seconds(folder: Path) -> float:
    try:
        return time.time() - folder.stat().st_mtime
    except FileNotFoundError:  # another process was faster
        return 0.0


@contextmanager
def _lock(cache: Path, key: str, wait: bool = True) -> Iterator[None]:
    """Hold the lock of one view. It is the kernel's, so a process that dies lets go of it."""
    locks = cache / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{key}.lock", timeout=-1 if wait else 0):
        yield


def _sync(path: Path) -> None:
    # Some platforms cannot open a folder, and some file systems cannot sync one: their names are safe as is.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _errors_of_the_disk(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failed:
        if failed.errno in (errno.ENOSPC, errno.EDQUOT):
            free_bytes = shutil.disk_usage(cache).free
            raise CacheFull(
                f"the disk of {cache} filled up while a repaired copy was written ({free_bytes} bytes are"
                " free now). Make room, or run `zimage-turbo cache prune`"
            ) from failed
        if failed.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise EngineError(
                f"a repaired copy must be written to {cache}, which is refused ({failed.strerror});"
                " make that folder writable or choose another"
            ) from failed
        raise
