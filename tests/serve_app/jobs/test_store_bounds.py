"""What the store makes of jobs that nobody draws, of keys of another model, and of many places at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import event

from serve_app.jobs.store import ANSWER, JobStore
from serve_app.jobs.tables import open_database
from tests.serve_app.jobs.conftest import file_of
from tests.serve_app.jobs.test_store import MANY, NEW, POSTGRESQL, Clock, url

__all__ = ["url"]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(tmp_path: Path, clock: Clock) -> Iterator[JobStore]:
    store = JobStore(open_database(file_of(tmp_path)), clock)
    yield store
    store.close()


def test_a_lost_job_of_a_model_that_is_gone_does_not_stay_for_ever(timed: JobStore, clock: Clock) -> None:
    lost = timed.accept(NEW, MANY)[0].id
    drawn = timed.accept(replace(NEW, model="another"), MANY)[0].id
    assert timed.claim("dead", "m", 1, {}) and timed.claim("alive", "another", 1, {}, 10_000.0)
    clock.now += 5_000.0
    timed.forget(3_600.0)
    told = [timed.get(id) for id in (lost, drawn)]
    assert [job.status for job in told if job is not None] == ["failed", "running"]


def test_what_was_drawn_by_another_model_is_no_answer_any_more(timed: JobStore) -> None:
    plain = replace(NEW, kind=ANSWER)
    first, _ = timed.accept(plain, MANY, "key", "same")
    assert timed.accept(plain, MANY, "key", "same") == (first, False)
    second, is_new = timed.accept(replace(plain, model="another"), MANY, "key", "same")
    assert is_new and second.model == "another"
    former = timed.get(first.id)
    assert former is not None and former.status == "cancelled", "nobody may be there to draw it"


def test_a_refusal_is_for_a_new_job_alone(timed: JobStore) -> None:
    job, _ = timed.accept(NEW, MANY, "key", "same")
    assert timed.accept(NEW, MANY, "key", "same", ValueError("full")) == (job, False)
    with pytest.raises(ValueError, match="full"):
        timed.accept(NEW, MANY, "another", "same", ValueError("full"))
    assert timed.census()[0] == {"queued": 1}


def test_the_places_of_a_page_cost_as_many_looks_as_one(timed: JobStore) -> None:
    jobs = [timed.accept(replace(NEW, asked_by=who, work=2.0), MANY)[0] for who in "aabab"]
    asked: list[str] = []
    event.listen(
        timed._engine, "before_cursor_execute", lambda *arguments: asked.append(arguments[2]), named=False
    )
    places = timed.places_of(jobs)
    looks = len(asked)
    timed.place_of(jobs[0])
    assert len(asked) - looks == looks
    # Callers take turns, and before each place there may be as many of the other's, of a work of 2 each.
    assert [places[job.id] for job in jobs] == [(2, 2.0), (4, 6.0), (2, 2.0), (5, 8.0), (4, 6.0)]


@pytest.mark.skipif(POSTGRESQL is None, reason="SQLite is asked by one machine, and has its time")
def test_time_is_the_databases(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JobStore(open_database(url))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 5_000.0)
    job, _ = store.accept(NEW, MANY)
    assert abs(job.created_at - now) < 1_000.0
    (claimed,) = store.claim("one", "m", 1, {})
    assert store.claim("two", "m", 1, {}) == []
    assert store.let_go(claimed.id, claimed.attempt, told=False)
    assert [each.type for each in store.events_after(job.id, 0)] == ["job.queued"]
    assert store.places_of([job]) == {job.id: (1, 0.0)}
    store.close()
