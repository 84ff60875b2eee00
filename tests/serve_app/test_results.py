"""Files that are kept for a time: what comes back, what goes first, and what a dead writer leaves."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app import results
from serve_app.results import ResultExpired, ResultNotKept, ResultStore, ResultUnreachable, expires_at
from tests.ports import free_ports
from tests.serve_app.object_store import BUCKET, ObjectStoreServer, object_store

PNG = "image/png"


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.seconds = time.time()

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStoreServer]:
    """An S3 server of which the environment tells."""
    with object_store() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


URL = f"s3://{BUCKET}/kept/here"


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """A folder of this machine, and an object store."""
    if request.param == "folder":
        return tmp_path / "results"
    request.getfixturevalue("bucket")
    return URL


async def test_a_file_comes_back_as_it_was_kept(place: Path | str) -> None:
    store = ResultStore(place, seconds=60, most_bytes=1000)
    before = time.time()
    id = await store.put(b"a picture", "image/webp")
    kept = await store.get(id)
    assert kept is not None
    assert (kept.data, kept.media_type) == (b"a picture", "image/webp")
    assert before + 59 <= kept.expires_at <= time.time() + 60
    assert kept.expires_at == expires_at(id)


async def test_another_store_over_the_same_place_finds_it(place: Path | str) -> None:
    id = await ResultStore(place, 60, 1000).put(b"a picture", PNG)
    again = await ResultStore(place, 60, 1000).get(id)
    assert again is not None and again.data == b"a picture"


async def test_ids_differ_and_have_more_than_128_random_bits(place: Path | str) -> None:
    store = ResultStore(place, 60, 10_000)
    ids = [await store.put(b"x", PNG) for _ in range(50)]
    assert len(set(ids)) == 50
    assert all(re.fullmatch(r"[0-9a-f]{9}-[A-Za-z0-9_-]{24}\.png", id) for id in ids)


@pytest.mark.parametrize(
    "id",
    [
        "",
        "picture.png",
        "../secret",
        "../../../../etc/passwd",
        "0123456789-" + "A" * 24 + ".png",
        "f23456789-" + "A" * 24 + ".png",
        "f23456789-" + "A" * 24 + ".exe",
        "f23456789-" + "A" * 24 + ".png\n",
        "f23456789-" + "A" * 24 + ".png/../x.png",
        "f23456789-" + "A" * 24 + ".png.gone",
        "000000001-" + "A" * 24 + ".png",
    ],
)
async def test_an_id_that_was_never_given_is_nothing(place: Path | str, id: str) -> None:
    store = ResultStore(place, 60, 1000)
    await store.put(b"another", PNG)
    assert await store.get(id) is None
    await store.remove(id)


async def test_what_has_expired_is_told_as_such_before_and_after_it_is_removed(place: Path | str) -> None:
    clock = Clock()
    store = ResultStore(place, 60, 1000, clock)
    id = await store.put(b"a picture", PNG)
    clock.seconds += 61
    with pytest.raises(ResultExpired):
        await store.get(id)
    await store.put(b"another", PNG)
    if isinstance(place, Path):
        assert not (place / id).exists()
    with pytest.raises(ResultExpired):
        await store.get(id)


async def test_the_oldest_go_when_there_is_no_room(place: Path | str) -> None:
    clock = Clock()
    store = ResultStore(place, 60, 100, clock)
    ids = []
    for number in range(5):
        clock.seconds += 1
        ids.append(await store.put(bytes([number]) * 40, PNG))
    for gone in ids[:3]:
        with pytest.raises(ResultExpired):
            await store.get(gone)
    assert [(await store.get(id)).data[0] for id in ids[3:]] == [3, 4]  # type: ignore[union-attr]


async def test_the_bound_holds_over_a_restart(place: Path | str) -> None:
    first = await ResultStore(place, 60, 100).put(b"x" * 60, PNG)
    await ResultStore(place, 60, 100).put(b"y" * 60, PNG)
    with pytest.raises(ResultExpired):
        await ResultStore(place, 60, 100).get(first)


async def test_many_at_once_are_all_kept_within_the_bound(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results", 60, 1000)
    ids = await asyncio.gather(*(store.put(b"x" * 100, PNG) for _ in range(30)))
    files = list((tmp_path / "results").glob("*.png"))
    assert sum(file.stat().st_size for file in files) == 1000
    assert {file.name for file in files} < set(ids)


async def test_what_is_removed_is_gone_for_good(place: Path | str) -> None:
    store = ResultStore(place, 60, 1000)
    id = await store.put(b"a picture", PNG)
    await store.remove(id)
    await store.remove(id)
    with pytest.raises(ResultExpired):
        await store.get(id)


async def test_a_file_that_is_larger_than_all_the_room_is_refused(place: Path | str) -> None:
    store = ResultStore(place, 60, 100)
    kept = await store.put(b"a picture", PNG)
    with pytest.raises(ResultNotKept, match="101 bytes"):
        await store.put(b"x" * 101, PNG)
    assert await store.get(kept) is not None


async def test_who_is_cancelled_while_it_is_written_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    sync = os.fsync

    def slow(descriptor: int) -> None:
        begun.set()
        may_end.wait(30)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    store = ResultStore(tmp_path / "results", 60, 1000)
    putting = asyncio.create_task(store.put(b"a picture", PNG))
    await asyncio.to_thread(begun.wait, 30)
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    may_end.set()
    async with asyncio.timeout(30):
        while store._taking_back:
            await asyncio.sleep(0.01)
    assert list((tmp_path / "results").iterdir()) == []
    assert await store.get(await store.put(b"another", PNG)) is not None


async def test_a_type_that_is_not_known_is_refused(place: Path | str) -> None:
    with pytest.raises(ValueError, match="text/html"):
        await ResultStore(place, 60, 100).put(b"<script>", "text/html")


async def test_the_folder_is_the_owners_alone_and_nothing_is_written_before_it_is_needed(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "data" / "results"
    store = ResultStore(folder, 60, 1000)
    assert not folder.exists()
    id = await store.put(b"a picture", PNG)
    assert (folder.stat().st_mode & 0o777, (folder / id).stat().st_mode & 0o777) == (0o700, 0o600)


async def test_a_disk_without_room_is_told_without_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    folder = tmp_path / "results"
    with pytest.raises(ResultNotKept) as told:
        await ResultStore(folder, 60, 1000).put(b"a picture", PNG)
    assert str(tmp_path) not in str(told.value)
    assert list(folder.iterdir()) == []


async def test_a_writer_that_is_killed_leaves_no_half_file_under_an_id(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    program = (
        "import asyncio, sys, pathlib; from serve_app.results import ResultStore\n"
        "async def main():\n"
        "    store = ResultStore(pathlib.Path(sys.argv[1]), 60, 2**30)\n"
        "    while True: print(await store.put(b'x' * 300_000, 'image/png'), flush=True)\n"
        "asyncio.run(main())"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    told = [writer.stdout.readline().strip() for _ in range(10)]
    writer.send_signal(signal.SIGKILL)
    told += [line.strip() for line in writer.stdout.readlines() if line.endswith("\n")]
    writer.stdout.close()
    writer.wait()
    assert {file.stat().st_size for file in folder.glob("[0-9a-f]*.png")} == {300_000}
    store = ResultStore(folder, 60, 2**30)
    for id in told:
        assert await store.get(id) is not None, id


async def test_what_a_dead_writer_left_is_cleared_and_what_others_put_there_stays(tmp_path: Path) -> None:
    folder, clock = tmp_path / "results", Clock()
    store = ResultStore(folder, 60, 1000, clock)
    id = await store.put(b"a picture", PNG)
    dead, foreign = folder / f".{id}.0a1b2c3d", folder / "notes.txt"
    dead.write_bytes(b"half")
    foreign.write_bytes(b"mine")
    clock.seconds += results.UNFINISHED_SECONDS + 1
    await store.put(b"another", PNG)
    assert (dead.exists(), foreign.exists()) == (False, True)
    with pytest.raises(ResultExpired):
        await store.get(id)
    clock.seconds += results.GONE_SECONDS
    await store.put(b"a third", PNG)
    assert await store.get(id) is None


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("pictures", "must be a place such as s3://"),
        ("s3://", "must be a place such as s3://"),
        ("nowhere://bucket/prefix", "must be a place such as s3://"),
        ("https://bucket/prefix", "also gs:// or az://"),
    ],
)
def test_a_place_that_cannot_be_is_refused_with_the_reason(url: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        results.check_place(url)


def test_an_object_store_without_its_package_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ValueError, match=r"pip install zimage-turbo\[s3\]"):
        results.check_place(URL)


# --- an object store


async def test_an_object_lies_below_the_prefix_and_every_request_is_signed(bucket: ObjectStoreServer) -> None:
    store = ResultStore(URL, 60, 1000)
    id = await store.put(b"a picture", PNG)
    assert await store.get(id) is not None
    await store.remove(id)
    assert list(bucket.objects) == [f"kept/here/{id}.gone"]
    assert ("PUT", f"kept/here/{id}") in bucket.asked
    assert bucket.refused == 0


async def test_many_objects_are_kept_within_the_bound_and_those_of_others_stay(
    bucket: ObjectStoreServer,
) -> None:
    bucket.objects |= {"kept/here/notes.txt": (b"mine", 0.0), "kept/here/below/x.png": (b"mine", 0.0)}
    clock = Clock()
    store = ResultStore(URL, 60, 1000, clock)
    ids = await asyncio.gather(*(store.put(b"x" * 100, PNG) for _ in range(30)))
    there = [id for id in ids if f"kept/here/{id}" in bucket.objects]
    assert len(there) == 10
    assert {"kept/here/notes.txt", "kept/here/below/x.png"} < bucket.objects.keys()
    clock.seconds += 61
    last = await store.put(b"x" * 100, PNG)
    pictures = [key for key in bucket.objects if key.endswith(".png") and "below" not in key]
    assert pictures == [f"kept/here/{last}"]


async def test_a_store_that_fails_for_a_moment_is_asked_again(bucket: ObjectStoreServer) -> None:
    store = ResultStore(URL, 60, 1000)
    bucket.failures = 2
    id = await store.put(b"a picture", PNG)
    bucket.failures = 2
    kept = await store.get(id)
    assert kept is not None and kept.data == b"a picture"


async def test_a_store_that_fails_is_told_without_its_place_and_holds_nobody_up(
    bucket: ObjectStoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(results, "RETRY_SECONDS", 0.3)
    store = ResultStore(URL, 60, 1000)
    id = await store.put(b"a picture", PNG)
    for bucket.failures, bucket.seconds in ((-1, 0.0), (0, 3.0)):
        began = time.monotonic()
        with pytest.raises(ResultNotKept) as told:
            await store.put(b"another", PNG)
        assert BUCKET not in str(told.value) and "kept/here" not in str(told.value)
        with pytest.raises(ResultUnreachable):
            await store.get(id)
        await store.remove(id)
        assert time.monotonic() - began < 30
    bucket.seconds = 0.0
    assert await store.get(id) is not None
    assert await store.get(await store.put(b"another", PNG)) is not None


@pytest.mark.parametrize("changed", [{"AWS_SECRET_ACCESS_KEY": "wrong"}, {"AWS_ENDPOINT_URL": "nobody"}])
async def test_a_wrong_key_or_nobody_there_is_told(
    bucket: ObjectStoreServer, changed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    for name, value in changed.items():
        monkeypatch.setenv(name, nobody if value == "nobody" else value)
    with pytest.raises(ResultNotKept, match="could not be kept"):
        await ResultStore(URL, 60, 1000).put(b"a picture", PNG)
    assert bucket.objects == {}


async def test_a_picture_waits_for_a_silent_store_no_longer_than_told(
    bucket: ObjectStoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "KEEP_SECONDS", 0.5)
    store = ResultStore(URL, 60, 1000)
    bucket.seconds = 5.0
    began = time.monotonic()
    kept = await asyncio.gather(*(store.put(b"x", PNG) for _ in range(20)), return_exceptions=True)
    assert {type(each) for each in kept} == {ResultNotKept}
    assert time.monotonic() - began < 4
    bucket.seconds = 0.0
    assert await store.get(await store.put(b"another", PNG)) is not None


async def test_what_a_slow_store_is_writing_counts_for_the_bound(bucket: ObjectStoreServer) -> None:
    store = ResultStore(URL, 60, 1000)
    bucket.seconds = 0.2
    began = time.monotonic()
    await asyncio.gather(*(store.put(b"x" * 300, PNG) for _ in range(3)))
    bucket.seconds = 0.0
    id = await store.put(b"x" * 300, PNG)
    assert time.monotonic() - began < 5
    pictures = {key: len(content) for key, (content, _) in bucket.objects.items() if key.endswith(".png")}
    assert sum(pictures.values()) <= 1000 and f"kept/here/{id}" in pictures
