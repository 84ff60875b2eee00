"""What is kept, for whom and for how long; what crashes, full disks and other ingresses do to it.

On SQLite; on an empty PostgreSQL database too, which loses its history, where JOBS_POSTGRESQL_URL names one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import URL, text

from serve_app.database import StoreUnusable
from serve_app.history.history import History, HistoryUnavailable, _name_of, history_of
from serve_app.history.index import Bounds, HistoryIndex, KeptPicture
from serve_app.history.tables import metadata, open_database
from serve_app.settings import Settings, SettingsError, load_settings
from tests.serve_app.history.conftest import ASKED, MANY, Clock, database_of, picture
from tests.serve_app.object_store import BUCKET, object_store

POSTGRESQL = os.environ.get("JOBS_POSTGRESQL_URL")
NOT_KEPT = "0" * 14 + "-" + "a" * 24


@pytest.fixture(params=["sqlite", *(["postgresql"] if POSTGRESQL else [])])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str | URL:
    if request.param == "sqlite" or POSTGRESQL is None:
        return database_of(tmp_path)
    engine = open_database(POSTGRESQL)
    metadata.drop_all(engine)
    engine.dispose()
    return POSTGRESQL


@pytest.fixture
async def both(database: str | URL, tmp_path: Path, clock: Clock) -> AsyncIterator[tuple[History, History]]:
    """The history as two ingresses have it."""
    histories = (
        History(database, tmp_path / "history", MANY, now=clock),
        History(database, tmp_path / "history", MANY, now=clock),
    )
    yield histories
    for history in histories:
        await history.close()


def with_bounds(history: History, **changed: float) -> History:
    history._bounds = replace(MANY, **changed)
    return history


async def keep(history: History, prompt: str = "a red circle", owner: str = "", size: int = 0) -> str:
    id = await history.keep(picture(prompt) + b"\0" * size, {**ASKED, "prompt": prompt}, owner)
    assert id is not None
    return id


async def prompts(history: History, owner: str = "", **asked: object) -> list[str]:
    found, _ = await history.page(owner, 100, **asked)  # type: ignore[arg-type]
    return [each.parameters["prompt"] for each in found]


def files(folder: Path) -> set[str]:
    return {file.name for file in (folder / "history").glob("*.png")}


# --- keeping and finding -----------------------------------------------------------------------------------


async def test_what_one_ingress_keeps_the_other_shows(both: tuple[History, History]) -> None:
    one, other = both
    png = picture("a fox, sharp", "orange", (640, 320))
    id = await one.keep(png, {**ASKED, "prompt": "a fox", "model": None}, "ann")
    assert id is not None
    kept = await other.get("ann", id)
    assert kept is not None
    assert (kept.width, kept.height, kept.revised_prompt) == (640, 320, "a fox, sharp")
    assert kept.parameters == {**ASKED, "prompt": "a fox"}
    assert await other.picture("ann", id) == png
    thumbnail = await other.thumbnail("ann", id)
    assert thumbnail is not None and thumbnail[8:12] == b"WEBP" and len(thumbnail) < 2000
    assert await other.remove("ann", id) and not await one.remove("ann", id)
    assert await one.picture("ann", id) is None and await one.thumbnail("ann", id) is None


async def test_pages_are_newest_first_and_go_on_where_a_picture_has_been_removed(
    both: tuple[History, History],
) -> None:
    one, other = both
    # In one and the same moment of the clock: those of one ingress stay in order.
    ids = [await keep(one, f"picture {number}") for number in range(5)]
    assert await prompts(other) == [f"picture {number}" for number in (4, 3, 2, 1, 0)]
    first, has_more = await other.page("", 2)
    assert ([each.id for each in first], has_more) == ([ids[4], ids[3]], True)
    await one.remove("", ids[3])
    rest, has_more = await other.page("", 3, before=ids[3])
    assert ([each.id for each in rest], has_more) == ([ids[2], ids[1], ids[0]], False)
    with pytest.raises(ValueError):
        await other.page("", 2, before="../../etc/passwd")


async def test_words_are_looked_for_in_what_was_asked_for_and_in_what_was_drawn(
    both: tuple[History, History],
) -> None:
    history = both[0]
    await history.keep(picture("A Fox in the SNOW, sharp"), {"prompt": "a fox"}, "")
    await history.keep(picture("雪中的狐狸，清晰"), {"prompt": "雪中的狐狸"}, "")
    await history.keep(picture("100% wool_socks"), {"prompt": "100% wool_socks"}, "")
    for words, found in {
        ("FOX",): ["a fox"],
        ("snow", "fox"): ["a fox"],
        ("snow", "wolf"): [],
        ("狐狸", "清晰"): ["雪中的狐狸"],
        # Signs of a pattern are themselves.
        ("0%",): ["100% wool_socks"],
        ("%",): ["100% wool_socks"],
        ("l_s",): ["100% wool_socks"],
        ("a\0x",): [],
        ("\ud800",): [],
        ("' OR 1=1 --",): [],
    }.items():
        assert await prompts(history, words=words) == found, words


@pytest.mark.parametrize(
    "prompt", ["a\0b", "half a \ud800 character", "' ; DROP TABLE x", "\u202e" * 9, "x" * 32_000]
)
async def test_every_prompt_can_be_kept(both: tuple[History, History], prompt: str) -> None:
    await both[0].keep(picture(), {"prompt": prompt}, "")
    assert await prompts(both[1]) == [prompt]


async def test_nobody_sees_or_removes_what_is_anothers(both: tuple[History, History]) -> None:
    history = both[0]
    anns, bobs = await keep(history, "ann's", "ann"), await keep(history, "bob's", "bob")
    assert await prompts(history, "ann") == ["ann's"] and await prompts(history, "") == []
    assert await history.get("ann", bobs) is None
    assert await history.picture("ann", bobs) is None
    assert await history.thumbnail("ann", bobs) is None
    assert await history.remove("ann", bobs) is False
    assert await history.remove_all("ann") == 1
    assert await history.picture("bob", bobs) is not None
    assert await history.get("ann", anns) is None


@pytest.mark.parametrize("id", ["", "x", NOT_KEPT, NOT_KEPT + "\n", "../" + NOT_KEPT, "\0", "%2e%2e"])
async def test_an_id_of_nothing_finds_nothing(history: History, id: str) -> None:
    assert await history.get("", id) is None
    assert await history.picture("", id) is None
    assert await history.thumbnail("", id) is None
    assert await history.remove("", id) is False


async def test_the_files_are_their_owners_alone(history: History, tmp_path: Path) -> None:
    id = await keep(history)
    modes = {
        path: stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "history", tmp_path / "history" / f"{id}.png", tmp_path / "history.sqlite3")
    }
    assert list(modes.values()) == [0o700, 0o600, 0o600]


# --- bounds ------------------------------------------------------------------------------------------------


async def test_beyond_the_number_the_oldest_of_that_owner_go(
    both: tuple[History, History], tmp_path: Path
) -> None:
    await keep(both[0], "bob's", "bob")
    history = with_bounds(both[1], pictures=2)
    for number in range(4):
        await keep(history, str(number), "ann")
    assert await prompts(history, "ann") == ["3", "2"] and await prompts(history, "bob") == ["bob's"]
    assert len(files(tmp_path)) == 3


async def test_beyond_the_size_the_oldest_of_all_go(both: tuple[History, History], tmp_path: Path) -> None:
    history = with_bounds(both[0], size_bytes=30_000)
    for number, owner in enumerate(["ann", "ann", "bob", "bob"]):
        await keep(history, str(number), owner, size=9_000)
    assert await prompts(history, "ann") == ["1"] and await prompts(history, "bob") == ["3", "2"]
    assert sum((tmp_path / "history" / name).stat().st_size for name in files(tmp_path)) <= 30_000
    # One that would take the room of all others, and more, is not kept.
    assert await history.keep(picture() + b"\0" * 30_000, ASKED, "ann") is None
    assert len(files(tmp_path)) == 3


async def test_what_is_too_old_goes_with_the_next_and_at_the_start(
    both: tuple[History, History], clock: Clock, tmp_path: Path
) -> None:
    history = with_bounds(both[0], seconds=100.0)
    await keep(history, "old")
    clock.now += 60
    await keep(history, "middle")
    clock.now += 60
    await keep(history, "new")
    assert await prompts(history) == ["new", "middle"]
    clock.now += 60
    await history.start()
    while await prompts(history) != ["new"] or len(files(tmp_path)) != 1:
        await asyncio.sleep(0.01)


async def test_two_ingresses_that_keep_at_once_keep_the_bounds_together(
    both: tuple[History, History], tmp_path: Path
) -> None:
    for history in both:
        with_bounds(history, pictures=5)
    kept = await asyncio.gather(*(both[number % 2].keep(picture(), ASKED, "") for number in range(24)))
    assert None not in kept and len(set(kept)) == 24
    assert len(await prompts(both[0])) == 5
    assert files(tmp_path) == {f"{each.id}.png" for each in (await both[1].page("", 100))[0]}


# --- what goes wrong ---------------------------------------------------------------------------------------


async def test_a_row_whose_file_is_lost_is_left_out(both: tuple[History, History], tmp_path: Path) -> None:
    history = both[0]
    lost, there = await keep(history, "lost"), await keep(history, "there")
    (tmp_path / "history" / f"{lost}.png").unlink()
    assert await both[1].picture("", lost) is None
    assert await prompts(history) == ["there"]
    (tmp_path / "history" / f"{there}.png").unlink()
    await history.tidy()
    assert await prompts(history) == []


async def test_what_a_crash_has_left_is_removed_and_what_is_being_written_is_not(
    both: tuple[History, History], tmp_path: Path
) -> None:
    history = both[0]
    kept = await keep(history)
    folder, old = tmp_path / "history", time.time() - 7200
    names = {f"{NOT_KEPT}.png": old, f".{NOT_KEPT}.png.12345678": old, "theirs.png": old}
    fresh = NOT_KEPT.replace("a", "b")
    for name, written_at in {**names, f"{fresh}.png": time.time()}.items():
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (written_at, written_at))
    await history.tidy()
    there = {file.name for file in folder.iterdir() if not file.name.startswith("name-")}
    assert there == {f"{kept}.png", f"{fresh}.png", "theirs.png"}


async def test_in_a_shared_database_a_folder_that_is_not_there_for_now_loses_nothing(
    database: str | URL, tmp_path: Path, clock: Clock
) -> None:
    engine = open_database(database)
    places = {folder: _name_of(tmp_path / folder) for folder in ("one", "other")}
    assert len(set(places.values())) == 2 and _name_of(tmp_path / "one") == places["one"]
    one, other = (HistoryIndex(engine, places[folder]) for folder in ("one", "other"))
    kept = KeptPicture(NOT_KEPT, 1, 1, 16, 16, {"prompt": "a fox"}, "a fox")
    one.add(kept, "ann", b"")
    assert other.ids() == set() and other.page("ann", None, (), 9) == ([], False)
    other.forget([NOT_KEPT])
    assert other.remove("ann") == [] and one.get("ann", NOT_KEPT) == kept
    # Of a folder that never comes back the rows are forgotten when they are too old.
    assert other.evict(replace(MANY, seconds=1.0), clock()) == [] and one.ids() == set()
    engine.dispose()


def test_those_who_name_a_folder_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        for number in range(8):
            assert len(set(threads.map(_name_of, [tmp_path / f"folder {number}"] * 8))) == 1


async def test_a_picture_that_cannot_be_written_is_counted_and_nothing_of_it_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failures: list[None] = []
    (tmp_path / "history").write_text("a file where the folder should be")
    history = History(database_of(tmp_path), tmp_path / "history", MANY, lambda: failures.append(None))
    for _ in range(3):
        assert await history.keep(picture(), ASKED, "") is None
    assert len(failures) == 3 and await prompts(history) == []
    assert caplog.text.count("could not be kept") == 1
    (tmp_path / "history").unlink()
    assert await keep(history)
    await history.close()


@pytest.mark.parametrize("png", [b"", b"no picture", picture()[:60], b"\x89PNG\r\n\x1a\n"])
async def test_what_is_no_picture_is_not_kept(history: History, tmp_path: Path, png: bytes) -> None:
    assert await history.keep(png, ASKED, "") is None
    assert files(tmp_path) == set() and await prompts(history) == []


async def test_without_a_database_pictures_are_not_kept_and_asking_is_refused(tmp_path: Path) -> None:
    failures: list[None] = []
    database_of(tmp_path)
    (tmp_path / "history.sqlite3").write_bytes(b"no database" * 1000)
    history = History(database_of(tmp_path), tmp_path / "history", MANY, lambda: failures.append(None))
    assert await history.keep(picture(), ASKED, "") is None
    assert len(failures) == 1 and files(tmp_path) == set()
    for asking in (history.page("", 1), history.get("", NOT_KEPT), history.remove_all("")):
        with pytest.raises(HistoryUnavailable) as refused:
            await asking
        assert refused.value.status == 503
    await history.close()


def test_a_database_of_another_version_is_not_touched(tmp_path: Path) -> None:
    engine = open_database(database_of(tmp_path))
    with engine.begin() as connection:
        connection.execute(text("UPDATE zimage_history_versions SET version = 99"))
    engine.dispose()
    with pytest.raises(StoreUnusable, match="version 99"):
        open_database(database_of(tmp_path))


async def test_whoever_goes_away_meanwhile_finds_the_picture_later(history: History) -> None:
    keeping = asyncio.create_task(history.keep(picture(), ASKED, ""))
    await asyncio.sleep(0)
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping
    await history.close()
    assert await prompts(history) == ["a red circle"]


KEEPING = """
import asyncio, sys
from pathlib import Path
from serve_app.history.history import History
from tests.serve_app.history.conftest import ASKED, MANY, database_of, picture

async def keep_for_ever():
    folder = Path(sys.argv[1])
    history = History(database_of(folder), folder / "history", MANY)
    while True:
        print(await history.keep(picture(size=(512, 512)), ASKED, ""), flush=True)

asyncio.run(keep_for_ever())
"""


async def test_what_was_told_as_kept_is_there_after_a_kill(tmp_path: Path) -> None:
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPING, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert keeper.stdout is not None
    told = [keeper.stdout.readline().strip() for _ in range(5)]
    keeper.send_signal(signal.SIGKILL)
    told += keeper.stdout.read().split()
    keeper.wait()
    history = History(database_of(tmp_path), tmp_path / "history", MANY)
    await history.tidy()
    kept = [each.id for each in (await history.page("", 1000))[0]]
    assert set(told) <= set(kept)
    whole = picture(size=(512, 512))
    assert [await history.picture("", id) for id in kept] == [whole] * len(kept)
    await history.close()


async def test_two_machines_with_one_database_and_one_object_store_have_one_history(
    database: str | URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    with object_store() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        place = f"s3://{BUCKET}/kept/history"
        one, other = History(database, place, MANY), History(database, place, MANY)
        ids = [await keep(one, str(number)) for number in range(3)]
        assert await prompts(other) == ["2", "1", "0"] and await other.picture("", ids[0]) == picture("0")
        assert await other.remove("", ids[0])
        del bucket.objects[f"kept/history/{ids[1]}.png"]
        await one.tidy()
        assert await prompts(other) == ["2"] and set(bucket.objects) == {f"kept/history/{ids[2]}.png"}
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        stranger = History(database, place, MANY)
        with pytest.raises(HistoryUnavailable):
            await stranger.picture("", ids[2])
        for history in (one, other, stranger):
            await history.close()


# --- settings ----------------------------------------------------------------------------------------------


def test_the_settings_say_where_and_how_much(settings: Settings, tmp_path: Path) -> None:
    chosen = settings.model_copy(update={"data_dir": tmp_path})
    history = history_of(chosen)
    assert history is not None
    assert history._where == tmp_path / "history"
    assert history._bounds == Bounds(5_000, 10 * 2**30, 365 * 24 * 3600)
    assert history_of(chosen.model_copy(update={"history": False})) is None


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"history_bytes": "1MiB"}, "history_bytes"),
        ({"history_bytes": "much"}, "history_bytes"),
        ({"history_pictures": 0}, "history_pictures"),
        ({"history_seconds": 0}, "history_seconds"),
    ],
)
def test_bounds_that_are_none_are_refused(chosen: dict[str, object], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        load_settings(**chosen)


def test_the_environment_bounds_the_history_and_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_HISTORY", "0")
    monkeypatch.setenv("ZIMAGE_HISTORY_BYTES", "2GiB")
    chosen = load_settings()
    assert (chosen.history, chosen.history_bytes) == (False, 2 * 2**30)


def test_with_both_shared_places_the_history_is_there(settings: Settings, tmp_path: Path) -> None:
    places = {}
    for results_url in (None, "s3://pictures/x/"):
        shared = {
            "data_dir": tmp_path,
            "jobs_url": SecretStr("postgresql://db/x"),
            "results_url": results_url,
        }
        history = history_of(settings.model_copy(update={**shared, "results_url": results_url}))
        assert history is not None
        places[results_url] = (history._database, history._where)
    assert places == {
        None: ("postgresql://db/x", tmp_path / "history"),
        "s3://pictures/x/": ("postgresql://db/x", "s3://pictures/x/history"),
    }
