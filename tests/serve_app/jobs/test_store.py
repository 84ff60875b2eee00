"""The store: what two processes do to the same jobs, and what time does.

On SQLite; on an empty PostgreSQL database too, which loses its jobs, where JOBS_POSTGRESQL_URL names one.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import URL, text

from serve_app.jobs.store import (
    DEATHS,
    KEY_SECONDS,
    JobStore,
    KeyReused,
    Limits,
    NewJob,
    NoRoomForSources,
    Seen,
    TooManyJobs,
)
from serve_app.jobs.tables import StoreUnusable, metadata, open_database
from tests.serve_app.jobs.conftest import file_of

NEW = NewJob(owner="ann", asked_by="ann", model="m", request="{}", work=1.0)
MANY = Limits(1000, 1000)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


POSTGRESQL = os.environ.get("JOBS_POSTGRESQL_URL")


@pytest.fixture(params=["sqlite", *(["postgresql"] if POSTGRESQL else [])])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str | URL:
    if request.param == "sqlite" or POSTGRESQL is None:
        return file_of(tmp_path)
    engine = open_database(POSTGRESQL)
    metadata.drop_all(engine)
    engine.dispose()
    return POSTGRESQL


@pytest.fixture
def stores(url: str | URL, clock: Clock) -> Iterator[tuple[JobStore, JobStore]]:
    """Two connections' worth of the same database, as two ingresses have it."""
    both = (JobStore(open_database(url), clock), JobStore(open_database(url), clock))
    yield both
    for store in both:
        store.close()


def accept(store: JobStore, new: NewJob = NEW) -> str:
    return store.accept(new, MANY)[0].id


def types(store: JobStore, id: str) -> list[str]:
    return [event.type for event in store.events_after(id, 0)]


def test_the_file_is_for_its_owner_alone(store: JobStore, tmp_path: Path) -> None:
    accept(store)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("jobs.sqlite3*")}
    assert set(modes.values()) == {0o600}, modes


def test_each_job_is_claimed_once_by_threads_of_two_stores(stores: tuple[JobStore, JobStore]) -> None:
    ids = {accept(stores[0]) for _ in range(40)}
    claimed: list[str] = []

    def claim(store: JobStore, name: str) -> None:
        while found := store.claim(name, "m", 2, {}):
            claimed.extend(job.id for job in found)

    threads = [threading.Thread(target=claim, args=(stores[n % 2], f"owner-{n}")) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(ids)


def test_what_a_killed_process_accepted_and_claimed_is_there(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from serve_app.jobs.store import JobStore\n"
        "from serve_app.jobs.tables import open_database\n"
        "from tests.serve_app.jobs.test_store import MANY, NEW, file_of\n"
        "store = JobStore(open_database(file_of(Path(sys.argv[1]))))\n"
        "for _ in range(3): store.accept(NEW, MANY)\n"
        "store.claim('dead', 'm', 1, {})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, check=False)
    assert ran.returncode == -9, ran.stderr
    store = JobStore(open_database(file_of(tmp_path)))
    found, _ = store.page("ann", None, None, 10)
    assert sorted(job.status for job in found) == ["queued", "queued", "running"]
    store.close()


def test_a_late_finisher_changes_nothing(stores: tuple[JobStore, JobStore], clock: Clock) -> None:
    first, second = stores
    id = accept(first)
    (job,) = first.claim("first", "m", 1, {})
    clock.now += 60
    (again,) = second.claim("second", "m", 1, {})
    assert (again.id, again.attempt, again.deaths) == (id, 2, 1)
    assert first.renew("first", [Seen(id, job.attempt, 1, 2)]) == {id}
    assert not first.finish(id, job.attempt, '{"of": "first"}')
    assert second.finish(id, again.attempt, '{"of": "second"}')
    assert not second.finish(id, again.attempt, '{"of": "third"}')
    done = first.get(id)
    assert done is not None and (done.status, done.result) == ("done", '{"of": "second"}')
    assert types(first, id) == ["job.queued", "job.running", "job.running", "job.done"]


def test_a_renewed_lease_stays(stores: tuple[JobStore, JobStore], clock: Clock) -> None:
    first, second = stores
    id = accept(first)
    (job,) = first.claim("first", "m", 1, {})
    for step in range(5):
        clock.now += 15
        assert first.renew("first", [Seen(id, job.attempt, step, 5)]) == set()
        assert second.claim("second", "m", 1, {}) == []


def test_a_job_that_dies_each_time_fails_by_name(stores: tuple[JobStore, JobStore], clock: Clock) -> None:
    store = stores[0]
    id = accept(store)
    for death in range(DEATHS):
        (job,) = store.claim("owner", "m", 1, {})
        assert job.deaths == death
        clock.now += 60
    assert store.claim("owner", "m", 1, {}) == []
    failed = store.get(id)
    assert failed is not None and failed.error is not None
    assert (failed.status, json.loads(failed.error)["code"]) == ("failed", "job_abandoned")


def test_a_cancelled_job_is_nobodys(stores: tuple[JobStore, JobStore]) -> None:
    first, second = stores
    id = accept(first)
    (job,) = first.claim("first", "m", 1, {})
    seen = Seen(id, job.attempt)
    assert first.still_mine([seen]) == {(id, job.attempt)}
    cancelled = second.cancel(id)
    assert cancelled is not None and cancelled.status == "cancelled"
    assert first.still_mine([seen]) == set()
    assert not first.finish(id, job.attempt, "{}")
    assert types(first, id)[-1] == "job.cancelled"


def test_callers_take_turns_and_know_their_place(stores: tuple[JobStore, JobStore]) -> None:
    store = stores[0]
    for _ in range(6):
        accept(store)
    bens = accept(store, replace(NEW, owner="ben", asked_by="ben"))
    waiting = store.get(bens)
    assert waiting is not None and store.place_of(waiting) == (2, 1.0)
    assert [job.asked_by for job in store.claim("owner", "m", 3, {})] == ["ann", "ben", "ann"]


def test_who_was_served_last_waits(stores: tuple[JobStore, JobStore]) -> None:
    store = stores[0]
    for name in ("ann", "ann", "ben"):
        accept(store, replace(NEW, owner=name, asked_by=name))
    (job,) = store.claim("owner", "m", 1, {"ann": 1})
    assert job.asked_by == "ben"


def test_another_models_jobs_are_left_alone(stores: tuple[JobStore, JobStore]) -> None:
    accept(stores[0])
    assert stores[0].claim("owner", "another", 5, {}) == []


def test_jobs_of_several_models_take_turns_by_their_age(stores: tuple[JobStore, JobStore]) -> None:
    store, _ = stores
    ids = [accept(store, replace(NEW, model=model)) for model in ("m", "n", "o", "m", "n")]
    claimed = [store.claim("one", ("m", "n"), 1, {})[0].id for _ in range(4)]
    assert claimed == [ids[0], ids[1], ids[3], ids[4]]
    assert store.claim("one", ("m", "n"), 1, {}) == []


def test_what_was_let_go_waits_for_its_time(stores: tuple[JobStore, JobStore], clock: Clock) -> None:
    store = stores[0]
    id = accept(store)
    (job,) = store.claim("owner", "m", 1, {})
    assert store.let_go(id, job.attempt, 30.0)
    assert store.claim("owner", "m", 1, {}) == []
    clock.now += 31
    (again,) = store.claim("owner", "m", 1, {})
    assert (again.id, again.deaths, again.attempt) == (id, 0, 2)


def test_no_more_jobs_than_may_wait(stores: tuple[JobStore, JobStore]) -> None:
    store = stores[0]
    few = Limits(2, 3)
    for _ in range(2):
        store.accept(NEW, few)
    with pytest.raises(TooManyJobs) as mine:
        store.accept(NEW, few)
    store.accept(replace(NEW, owner="ben"), few)
    with pytest.raises(TooManyJobs) as everybodys:
        store.accept(replace(NEW, owner="cid"), few)
    assert (mine.value.of_caller, everybodys.value.of_caller) == (True, False)


def test_a_key_is_one_job_for_a_day(stores: tuple[JobStore, JobStore], clock: Clock) -> None:
    found: list[tuple[str, bool]] = []

    def ask(store: JobStore) -> None:
        job, is_new = store.accept(NEW, MANY, "key", "body")
        found.append((job.id, is_new))

    threads = [threading.Thread(target=ask, args=(stores[n % 2],)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len({id for id, _ in found}), sum(is_new for _, is_new in found)) == (1, 1)
    with pytest.raises(KeyReused):
        stores[0].accept(NEW, MANY, "key", "another body")
    assert stores[0].accept(replace(NEW, owner="ben"), MANY, "key", "another body")[1]
    clock.now += KEY_SECONDS + 1
    assert stores[0].accept(NEW, MANY, "key", "another body")[1]


@pytest.mark.parametrize("id", ["\0", "job-\0", "\ud800", "", "job-" + "x" * 5000])
def test_a_text_that_no_database_takes_is_no_id(store: JobStore, id: str) -> None:
    assert store.get(id) is None
    with pytest.raises(KeyError):
        store.page(None, None, id, 10)


def test_what_is_old_is_forgotten(stores: tuple[JobStore, JobStore], clock: Clock) -> None:
    store = stores[0]
    done, waiting = accept(store), accept(store, replace(NEW, model="of nobody"))
    (job,) = store.claim("owner", "m", 1, {})
    store.finish(done, job.attempt, '{"data": []}')
    assert store.forget(7 * 24 * 3600) == []
    clock.now += 8 * 24 * 3600
    assert store.forget(7 * 24 * 3600) == ['{"data": []}']
    assert store.get(done) is None and types(store, done) == []
    expired = store.get(waiting)
    assert expired is not None and expired.error is not None and "job_expired" in expired.error


def test_an_end_and_its_webhook_are_one(stores: tuple[JobStore, JobStore], clock: Clock) -> None:
    first, second = stores
    id = accept(first, replace(NEW, webhook_url="https://example.org"))
    assert first.due_delivery() is None
    (job,) = first.claim("owner", "m", 1, {})
    first.finish(id, job.attempt, "{}")
    delivery = first.due_delivery()
    assert delivery is not None and json.loads(delivery.body)["data"] == {"id": id, "status": "done"}
    assert second.due_delivery() is None
    clock.now += 61  # its sender died
    again = second.due_delivery()
    assert again is not None and (again.id, again.tries) == (delivery.id, 2)
    second.delivered(again.id)
    clock.now += 3600
    assert first.due_delivery() is None


def test_what_a_job_is_drawn_from_goes_with_its_end(
    stores: tuple[JobStore, JobStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = stores
    monkeypatch.setattr("serve_app.jobs.store.SOURCE_BYTES", 10)
    with_files = replace(NEW, operation="edits", files={"image": b"12345", "mask": b"67"})
    id = accept(store, with_files)
    with pytest.raises(NoRoomForSources):
        accept(store, replace(NEW, operation="edits", files={"image": b"1234"}))
    (job,) = other.claim("one", "m", 1, {})
    assert (job.operation, other.files_of(id)) == ("edits", {"image": b"12345", "mask": b"67"})
    other.let_go(id, job.attempt)
    assert other.files_of(id) == with_files.files, "whoever draws it next needs them too"
    store.cancel(id)
    assert store.files_of(id) == {}
    accept(store, with_files)


def test_a_database_of_version_1_is_brought_up_to_date(url: str | URL) -> None:
    engine = open_database(url)
    store = JobStore(engine)
    id = accept(store)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE zimage_job_sources"))
        connection.execute(text("ALTER TABLE zimage_jobs DROP COLUMN operation"))
        connection.execute(text("UPDATE zimage_versions SET version = 1"))
    store.close()
    store = JobStore(open_database(url))
    (job,) = store.claim("one", "m", 1, {})
    assert (job.id, job.operation, store.files_of(id)) == (id, "generations", {})
    accept(store, replace(NEW, operation="edits", files={"image": b"1"}))
    store.close()


def test_a_database_of_another_version_is_not_touched(tmp_path: Path) -> None:
    engine = open_database(file_of(tmp_path))
    with engine.connect() as connection, connection.begin():
        connection.execute(text("UPDATE zimage_versions SET version = 99"))
    engine.dispose()
    with pytest.raises(StoreUnusable, match="version 99"):
        open_database(file_of(tmp_path))
