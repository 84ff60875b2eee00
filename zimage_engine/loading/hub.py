"""Fetch a model from a hub, whole and checked, or say in a sentence why not.

Knows nothing of what the files mean beyond their indexes. Importing it imports neither torch nor
huggingface_hub.

A file is shown under its name only after its size and hash were right, and the cache's name for the
revision (`refs/main`) is written last of all: what broke off or is damaged is never offered as a model.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zimage_engine.errors import DownloadError, DownloadIncomplete
from zimage_engine.loading import hub_listing, hub_transfer
from zimage_engine.loading.hub_listing import Listing, RemoteFile
from zimage_engine.loading.hub_places import Cache, Folder, Place
from zimage_engine.loading.hub_refusals import hub_errors_as_sentences, refuse_bad_id

#: Files at once. More than a few only share the same line and break off together.
PARALLEL_TRANSFERS = 4

#: Left free on the disk beyond what the model needs, for locks, links and the file system's own use.
SPARE_BYTES = 64 * 1024 * 1024

LISTING_TIMEOUT_SECONDS = 30.0
LISTING_WAITS_SECONDS = (0.5, 2.0)


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """How far one stage is: bytes of files already on the disk checked, or bytes arrived."""

    stage: Literal["checking", "fetching"]
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class DownloadReport:
    """What a download did. `path` is the folder that `from_pretrained` takes.

    `fetched_bytes` came over the line in this run; `left_out` are the files that were not wanted,
    each with the reason.
    """

    model_id: str
    revision: str
    commit: str
    path: Path
    file_count: int
    total_bytes: int
    fetched_bytes: int
    seconds: float
    left_out: tuple[tuple[str, str], ...]


#: Called often, from several threads but never from two at once.
OnProgress = Callable[[DownloadProgress], None]


def download_model(
    model_id: str,
    revision: str | None = None,
    dest: Path | None = None,
    endpoint: str | None = None,
    on_progress: OnProgress | None = None,
    cache_dir: Path | None = None,
) -> DownloadReport:
    """Fetch `model_id` ("owner/name") at `revision` (None: main) and return where it lies, all of it checked.

    With `dest` it becomes a plain folder there; otherwise it goes into the Hugging Face cache
    (`cache_dir`; None: HF_HUB_CACHE, else HF_HOME/hub). `endpoint` None means HF_ENDPOINT, else the
    public hub. What is there already and right is not fetched again; what broke off is gone on with.

    Raises DownloadError (id, revision, access, network, disk), DownloadIncomplete (what arrived, or
    what the hub holds, is not a whole model) and InvalidRequest (not an id). On KeyboardInterrupt the
    transfers are ended first; their parts stay and the next call goes on from there.
    """
    from huggingface_hub import constants

    started = time.perf_counter()
    revision = revision or constants.DEFAULT_REVISION
    endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    with hub_errors_as_sentences(model_id, revision, endpoint):
        listing = _read_listing(model_id, revision, endpoint)
        place: Place = (
            Folder(dest.expanduser(), model_id)
            if dest is not None
            else Cache(Path(cache_dir or constants.HF_HUB_CACHE).expanduser(), listing, endpoint)
        )
        with place.reserved():
            transfers = _Transfers(listing, place, endpoint, on_progress)
            choice = hub_listing.choose(listing.files)
            transfers.refuse_if_disk_too_small(choice.wanted)
            indexes = [file for file in choice.wanted if hub_listing.is_index(file)]
            transfers.bring(indexes)
            choice = hub_listing.choose(listing.files, _shards_of(listing, place, indexes))
            transfers.bring(choice.wanted)
            path = place.publish(listing, choice.wanted)
    return DownloadReport(
        model_id=model_id,
        revision=revision,
        commit=listing.commit,
        path=path,
        file_count=len(choice.wanted),
        total_bytes=sum(file.size_bytes for file in choice.wanted),
        fetched_bytes=transfers.fetched_bytes,
        seconds=time.perf_counter() - started,
        left_out=tuple((file.path, because) for file, because in choice.left_out),
    )


def _read_listing(model_id: str, revision: str, endpoint: str) -> Listing:
    """Ask the hub what the model is made of; tries again when the line, not the hub, says no."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=endpoint, library_name="zimage-turbo")
    for wait_seconds in (*LISTING_WAITS_SECONDS, None):
        try:
            commit = api.model_info(model_id, revision=revision, timeout=LISTING_TIMEOUT_SECONDS).sha
            if not isinstance(commit, str):
                raise ValueError("it named no commit")
            entries = api.list_repo_tree(model_id, revision=commit, recursive=True)
            files = tuple(_remote_file(entry) for entry in entries if isinstance(entry, RepoFile))
            break
        except HTTPError as failed:
            passing = (
                failed.response.status_code in hub_transfer.PASSING_STATUS_CODES
                if isinstance(failed, HfHubHTTPError)
                else True
            )
            if wait_seconds is None or not passing:
                raise
            time.sleep(wait_seconds)
        except (ValueError, KeyError, TypeError) as not_a_hub:
            refuse_bad_id(model_id, not_a_hub)
            raise DownloadError(
                f"{endpoint} does not answer like a model hub ({not_a_hub}); HF_ENDPOINT should be the"
                " address of the hub or of a mirror of it, such as https://huggingface.co"
            ) from not_a_hub
    listing = Listing(model_id, revision, commit, files)
    hub_listing.refuse_paths_that_lead_outside(listing)
    if not files:
        raise DownloadError(f"{model_id} holds no files at revision {revision}; choose another revision")
    return listing


def _remote_file(entry: Any) -> RemoteFile:
    if entry.lfs is not None:
        return RemoteFile(entry.path, entry.lfs.size, "sha256", entry.lfs.sha256)
    return RemoteFile(entry.path, entry.size, "git-sha1", entry.blob_id)


def _shards_of(listing: Listing, place: Place, indexes: Iterable[RemoteFile]) -> tuple[str, ...]:
    """Every shard that the indexes name; asked before the heavy files, so that a hole costs nothing."""
    shards: list[str] = []
    for index in indexes:
        index_path = place.holds(index)
        if index_path is None:
            raise DownloadIncomplete(f"{index.path} is not there although it was fetched; run it again")
        named = hub_listing.shards_named(index.path, index_path.read_text(encoding="utf-8"))
        hub_listing.refuse_missing_shards(listing, index.path, named)
        shards.extend(named)
    return tuple(shards)


class _Transfers:
    """Brings files to a place, several at once, and counts what came over the line."""

    def __init__(self, listing: Listing, place: Place, endpoint: str, on_progress: OnProgress | None) -> None:
        from huggingface_hub.utils import build_hf_headers

        self.listing = listing
        self.place = place
        self.endpoint = endpoint
        self.headers: dict[str, str] = build_hf_headers(library_name="zimage-turbo")
        self.on_progress = on_progress
        self.fetched_bytes = 0
        self.right: set[RemoteFile] = set()
        self.stop = threading.Event()

    def refuse_if_disk_too_small(self, wanted: Iterable[RemoteFile]) -> None:
        """Raise DownloadError if what is still missing does not fit on the disk."""
        needed_bytes = SPARE_BYTES + sum(
            file.size_bytes - self._part_bytes(file) for file in wanted if self.place.holds(file) is None
        )
        nearest = next(folder for folder in (self.place.root, *self.place.root.parents) if folder.exists())
        free_bytes = shutil.disk_usage(nearest).free
        if needed_bytes > free_bytes:
            raise DownloadError(
                f"{self.listing.model_id} needs {gigabytes(needed_bytes)} more on the disk of {nearest}, and"
                f" {gigabytes(free_bytes)} are free: free {gigabytes(needed_bytes - free_bytes)}, or choose"
                " another place with --dest or HF_HOME"
            )

    def bring(self, wanted: Iterable[RemoteFile]) -> None:
        """Every wanted file is at its place and right when this returns."""
        unchecked = [file for file in wanted if file not in self.right]
        present = [file for file in unchecked if self.place.holds(file) is not None]
        self._in_parallel("checking", present, self._check_present, 0)
        # Files of equal content share a part in the cache: one of each is fetched, the rest find it there.
        missing = list({file.hash_hex: file for file in unchecked if file not in self.right}.values())
        begun_bytes = sum(self._part_bytes(file) for file in missing)
        self._in_parallel("fetching", missing, self._fetch_missing, begun_bytes)
        twins = [file for file in unchecked if file not in self.right]
        if twins:
            self.bring(twins)

    def _check_present(self, file: RemoteFile, on_bytes: Callable[[int], None]) -> None:
        path = self.place.holds(file)
        if path is None:
            return
        try:
            hub_transfer.check(file, path, self.stop, on_bytes)
        except DownloadIncomplete:
            path.unlink(missing_ok=True)  # an older revision's, or damaged: it is fetched anew
        else:
            self.right.add(file)

    def _fetch_missing(self, file: RemoteFile, on_bytes: Callable[[int], None]) -> None:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(
            self.listing.model_id, file.path, revision=self.listing.commit, endpoint=self.endpoint
        )
        hub_transfer.fetch(file, url, self.headers, self.place.part(file), self.stop, on_bytes)
        self.place.accept(file)
        self.right.add(file)

    def _in_parallel(
        self,
        stage: Literal["checking", "fetching"],
        files: list[RemoteFile],
        act: Callable[[RemoteFile, Callable[[int], None]], None],
        done_bytes: int,
    ) -> None:
        """Do `act` for each file; the first that fails, or Ctrl-C, ends the others and is raised."""
        if not files:
            return
        total_bytes = sum(file.size_bytes for file in files)
        lock = threading.Lock()

        def on_bytes(count: int) -> None:
            nonlocal done_bytes
            with lock:
                done_bytes += count
                if stage == "fetching":
                    self.fetched_bytes += max(count, 0)
                if self.on_progress is not None:
                    self.on_progress(DownloadProgress(stage, done_bytes, total_bytes))

        on_bytes(0)
        with ThreadPoolExecutor(PARALLEL_TRANSFERS, thread_name_prefix="download") as executor:
            largest_first = sorted(files, key=lambda file: -file.size_bytes)
            futures = [executor.submit(act, file, on_bytes) for file in largest_first]
            try:
                finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                if any(not future.done() or future.exception() is not None for future in futures):
                    self.stop.set()
                    executor.shutdown(wait=True, cancel_futures=True)
        failures = [failure for future in finished if (failure := future.exception()) is not None]
        for failure in failures:
            if not isinstance(failure, hub_transfer.Stopped):
                raise failure

    def _part_bytes(self, file: RemoteFile) -> int:
        part = self.place.part(file)
        return min(part.stat().st_size, file.size_bytes) if part.is_file() else 0


def gigabytes(count_bytes: int) -> str:
    """A size as people write it: "20.5 GB", "4.1 MB", "812 bytes"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count_bytes >= unit:
            return f"{count_bytes / unit:.1f} {name}"
    return f"{count_bytes} bytes"
