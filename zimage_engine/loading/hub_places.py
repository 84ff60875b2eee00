"""Where the files of one model lie on the disk: the Hugging Face cache, or a plain folder.

Knows paths, links and locks; asks no hub for anything but through its own linking code.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from zimage_engine.errors import DownloadError, DownloadIncomplete, InvalidRequest
from zimage_engine.loading import hub_transfer
from zimage_engine.loading.hub_listing import Listing, RemoteFile

#: Each link costs one question to the hub and no bytes.
PARALLEL_LINKS = 8


class Place(Protocol):
    """Where the files of one model lie on the disk."""

    root: Path

    def reserved(self) -> AbstractContextManager[None]:
        """Hold the place for one download; DownloadError if another holds it."""

    def holds(self, file: RemoteFile) -> Path | None:
        """Where the file lies now, checked or not; None if it does not."""

    def part(self, file: RemoteFile) -> Path:
        """Where the file grows until it is whole."""

    def accept(self, file: RemoteFile) -> None:
        """Move the file's part, whole and checked, to its place."""

    def publish(self, listing: Listing, wanted: Iterable[RemoteFile]) -> Path:
        """Make the model visible now that every file is there and right, and return its folder."""


class Folder:
    """A plain folder: the files under their own names, parts in a folder that goes at the end."""

    def __init__(self, dest: Path, model_id: str) -> None:
        if dest.exists() and not dest.is_dir():
            raise InvalidRequest(f"--dest must be a folder, got the file {dest}", "dest")
        self.root = dest
        self.model_id = model_id
        self.parts = dest / ".incomplete"

    @contextmanager
    def reserved(self) -> Iterator[None]:
        try:
            with _reserved(self.parts / "download.lock", self.model_id):
                yield
        finally:
            # Where nothing has arrived, nothing should be left lying about.
            with suppress(OSError):
                if [entry.name for entry in self.parts.iterdir()] == ["download.lock"]:
                    shutil.rmtree(self.parts)
                self.root.rmdir()

    def holds(self, file: RemoteFile) -> Path | None:
        path = self.root / file.path
        return path if path.is_file() else None

    def part(self, file: RemoteFile) -> Path:
        return self.parts / file.hash_hex

    def accept(self, file: RemoteFile) -> None:
        path = self.root / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.part(file).replace(path)

    def publish(self, listing: Listing, wanted: Iterable[RemoteFile]) -> Path:
        shutil.rmtree(self.parts)
        return self.root


class Cache:
    """The Hugging Face cache: blobs/ by hash, snapshots/COMMIT with the names, refs/ with the revisions."""

    def __init__(self, cache_dir: Path, listing: Listing, endpoint: str) -> None:
        from huggingface_hub.file_download import repo_folder_name

        folder_name = repo_folder_name(repo_id=listing.model_id, repo_type="model")
        self.cache_dir = cache_dir
        self.root = cache_dir / folder_name
        self.endpoint = endpoint
        self.model_id = listing.model_id
        self.snapshot = self.root / "snapshots" / listing.commit
        self.lock_path = cache_dir / ".locks" / folder_name / "zimage-turbo-download.lock"

    @contextmanager
    def reserved(self) -> Iterator[None]:
        with _reserved(self.lock_path, self.model_id):
            yield

    def holds(self, file: RemoteFile) -> Path | None:
        # On a file system without links the content itself stands in the snapshot.
        places = (self.root / "blobs" / file.hash_hex, self.snapshot / file.path)
        return next((place for place in places if place.is_file()), None)

    def part(self, file: RemoteFile) -> Path:
        return self.root / "blobs" / f"{file.hash_hex}.incomplete"

    def accept(self, file: RemoteFile) -> None:
        self.part(file).replace(self.root / "blobs" / file.hash_hex)

    def publish(self, listing: Listing, wanted: Iterable[RemoteFile]) -> Path:
        """The hub's own code links the snapshot to the blobs; then the revision gets its name."""
        from huggingface_hub import hf_hub_download

        # Not snapshot_download: it also keeps a list of all files of the commit, and without a network
        # it then calls a snapshot broken that lacks those that were left out on purpose.
        def link(file: RemoteFile) -> None:
            hf_hub_download(
                listing.model_id,
                file.path,
                revision=listing.commit,
                cache_dir=self.cache_dir,
                endpoint=self.endpoint,
            )

        with ThreadPoolExecutor(PARALLEL_LINKS) as executor:
            list(executor.map(link, wanted))
        for file in wanted:
            named = self.snapshot / file.path
            if not named.is_file():
                raise DownloadIncomplete(f"{file.path} is not in {self.snapshot}; run the download again")
            if named.resolve().name != file.hash_hex:
                # A mirror that names content otherwise than the hub made the link lead elsewhere.
                try:
                    hub_transfer.check(file, named, threading.Event())
                except DownloadIncomplete:
                    named.resolve().unlink()
                    named.unlink(missing_ok=True)
                    raise
        if listing.revision != listing.commit:
            ref = self.root / "refs" / listing.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            new_ref = ref.with_name(f".{ref.name}.{os.getpid()}")
            new_ref.write_text(listing.commit, encoding="utf-8")
            new_ref.replace(ref)
        return self.snapshot


@contextmanager
def _reserved(lock_path: Path, model_id: str) -> Iterator[None]:
    """Hold the lock for one download of a model into one place; refuse rather than wait for another."""
    from huggingface_hub.utils import WeakFileLock

    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = WeakFileLock(lock_path, timeout=0.5)
    try:
        lock.__enter__()
    except TimeoutError as taken:
        raise DownloadError(
            f"another download of {model_id} to the same place is running; wait until it is done, or stop it"
            " and run this again"
        ) from taken
    try:
        yield
    finally:
        lock.__exit__(None, None, None)
