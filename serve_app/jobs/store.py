"""What a job goes through, each change one transaction.

queued -> running -> done, failed or cancelled; back to queued where whoever drew it let it go. A claim has a
lease that must be renewed, and a number of its own, the attempt: whoever lost the lease cannot change the job
any more, so that a job has one end whatever dies meanwhile. With the end come its event and the webhook that
is to be sent, in the same transaction.

Blocks: call it from threads. Knows nothing of drawing, HTTP and files.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sqlalchemy import Connection, Engine, Row, func, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from serve_app.jobs.tables import GENERATIONS, deliveries, events, jobs, keys, sources

Status = Literal["queued", "running", "done", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = ("queued", "running", "done", "failed", "cancelled")
ENDED: tuple[Status, ...] = ("done", "failed", "cancelled")
#: What a caller asked for by name; and what stands behind an Idempotency-Key, where the caller waits for it.
JOB, ANSWER = "job", "answer"

#: How often a job's drawing may take its process along before it is taken for the cause.
DEATHS = 3
#: How long an Idempotency-Key is remembered.
KEY_SECONDS = 24 * 3600.0
#: Of one claimed job; a process that renews none for so long is taken for dead.
LEASE_SECONDS = 20.0
#: Of all the files that jobs which have not ended are drawn from.
SOURCE_BYTES = 2**30
#: While a webhook is being sent nobody else sends it, unless the sender has died.
SENDING_SECONDS = 60.0

#: Whatever an id may look like. Other texts come from addresses, and databases fail of some: of NUL, and of
#: halves of characters.
_ID = re.compile(r"[!-~]{1,100}")


class KeyReused(Exception):
    """The Idempotency-Key was used with another body."""


class TooManyJobs(Exception):
    """As many jobs wait as may; `of_caller` where it is the caller's own bound."""

    def __init__(self, waiting: int, of_caller: bool) -> None:
        super().__init__(waiting, of_caller)
        self.waiting = waiting
        self.of_caller = of_caller


class NoRoomForSources(Exception):
    """The files that the jobs at hand are drawn from are as large as they may be."""


@dataclass(frozen=True)
class NewJob:
    """What is to be kept of a request: `request` is its body as JSON with the seed fixed.

    `files` are what it is drawn from, by name; they are kept until the job ends.
    """

    owner: str
    asked_by: str
    model: str
    request: str
    work: float
    kind: str = JOB
    webhook_url: str | None = None
    webhook_secret: str | None = None
    operation: str = GENERATIONS
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Job:
    """One row. `result` and `error` are JSON; `attempt` counts claims, `deaths` those whose process died."""

    number: int
    id: str
    owner: str
    asked_by: str
    kind: str
    operation: str
    model: str
    status: Status
    request: str
    work: float
    created_at: float
    started_at: float | None
    ended_at: float | None
    attempt: int
    deaths: int
    step: int
    steps: int
    result: str | None
    error: str | None
    webhook_url: str | None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED


@dataclass(frozen=True)
class JobEvent:
    """One event of a job; `number` grows with each."""

    number: int
    type: str
    data: str


@dataclass(frozen=True)
class Delivery:
    """A webhook that is to be sent now; `tries` counts this one."""

    id: str
    url: str
    secret: str | None
    body: str
    tries: int


@dataclass(frozen=True)
class Limits:
    """How many jobs may wait or be drawn: of one caller, and in all."""

    of_caller: int
    in_all: int


@dataclass(frozen=True)
class Seen:
    """How far the drawing of a claimed job is."""

    id: str
    attempt: int
    step: int = 0
    steps: int = 0


#: Seconds since 1970; SQLite is not asked, for its machine is this one.
_DATABASES_NOW = select(func.extract("epoch", func.clock_timestamp()))
_COLUMNS = [jobs.c[name] for name in Job.__dataclass_fields__]


def _job(row: Row[Any]) -> Job:
    return Job(**row._mapping)


class JobStore:
    """The jobs of one database; any number of processes may have one on the same."""

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float] | None = None,
        webhook_of_all: tuple[str, str | None] | None = None,
    ) -> None:
        """Without a `clock` time is the database's, which is one for all machines that share it.

        `webhook_of_all`, an address and its secret, is told of the end of each job that names none itself.
        """
        self._engine = engine
        self._webhook_of_all = webhook_of_all
        self._clock = time.time if clock is None and engine.dialect.name == "sqlite" else clock

    def close(self) -> None:
        self._engine.dispose()

    def _now(self, connection: Connection) -> float:
        if self._clock is not None:
            return self._clock()
        return float(connection.execute(_DATABASES_NOW).scalar_one())

    def _lost(self, connection: Connection) -> Any:
        """Jobs whose owner has not renewed the lease."""
        return (jobs.c.status == "running") & (jobs.c.lease_until < self._now(connection))

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._engine.connect() as connection, connection.begin():
            yield connection

    # --- callers -----------------------------------------------------------------------------------------

    def accept(
        self,
        new: NewJob,
        limits: Limits,
        key: str | None = None,
        fingerprint: str = "",
        refusal: Exception | None = None,
    ) -> tuple[Job, bool]:
        """The job, on disk when this returns, and whether it is a new one: with a `key` it may be there.

        Raises KeyReused, TooManyJobs and NoRoomForSources, and `refusal` where it would be a new one.
        """
        while True:
            try:
                with self._writing() as connection:
                    known = None if key is None else self._under_key(connection, new, key, fingerprint)
                    if known is not None:
                        return known, False
                    if refusal is not None:
                        raise refusal
                    self._check_limits(connection, new.owner, limits)
                    self._check_room(connection, new)
                    return self._insert(connection, new, key, fingerprint), True
            except IntegrityError:
                # Another process took the same key in this moment: its job is the one.
                if key is None:
                    raise

    def _under_key(self, connection: Connection, new: NewJob, key: str, fingerprint: str) -> Job | None:
        here = (keys.c.owner == new.owner) & (keys.c.key == key)
        found = connection.execute(select(keys).where(here)).one_or_none()
        if found is None:
            return None
        if found.created_at > self._now(connection) - KEY_SECONDS:
            if found.fingerprint != fingerprint:
                raise KeyReused
            job = self._get(connection, found.job)
            if job is not None and not self._is_no_answer(connection, new, job):
                if new.kind == JOB and job.kind == ANSWER:
                    # Who asks for a job now gets one that can be asked for.
                    connection.execute(jobs.update().where(jobs.c.id == job.id).values(kind=JOB))
                    job = replace(job, kind=JOB)
                return job
        connection.execute(keys.delete().where(here))
        return None

    def _is_no_answer(self, connection: Connection, new: NewJob, job: Job) -> bool:
        if job.kind != ANSWER:
            return False
        if job.model != new.model:
            # Another is the default model now: nobody may be there to draw it as it was asked for.
            self._end(connection, job.id, jobs.c.status == "queued", "cancelled")
            return True
        # Of a failure nothing was drawn: who asks again may have more luck.
        return job.status in ("failed", "cancelled")

    def drop_key(self, owner: str, key: str, job: str) -> None:
        """The key is as if it had never been used, where it stands for that job."""
        here = (keys.c.owner == owner) & (keys.c.key == key) & (keys.c.job == job)
        with self._writing() as connection:
            connection.execute(keys.delete().where(here))

    def _check_limits(self, connection: Connection, owner: str, limits: Limits) -> None:
        waiting = select(func.count()).select_from(jobs).where(jobs.c.status.in_(("queued", "running")))
        of_caller = connection.execute(waiting.where(jobs.c.owner == owner)).scalar_one()
        if of_caller >= limits.of_caller:
            raise TooManyJobs(of_caller, True)
        in_all = connection.execute(waiting).scalar_one()
        if in_all >= limits.in_all:
            raise TooManyJobs(in_all, False)

    def _check_room(self, connection: Connection, new: NewJob) -> None:
        if new.files:
            kept = connection.execute(select(func.coalesce(func.sum(sources.c.size_bytes), 0))).scalar_one()
            if kept + sum(map(len, new.files.values())) > SOURCE_BYTES:
                raise NoRoomForSources

    def _insert(self, connection: Connection, new: NewJob, key: str | None, fingerprint: str) -> Job:
        now = self._now(connection)
        id = f"job-{secrets.token_urlsafe(24)}"
        row = {name: getattr(new, name) for name in NewJob.__dataclass_fields__ if name != "files"}
        connection.execute(jobs.insert().values(id=id, status="queued", created_at=now, **row))
        for name, content in new.files.items():
            file = {"job": id, "name": name, "size_bytes": len(content), "content": content}
            connection.execute(sources.insert().values(**file))
        self._tell(connection, id, "job.queued", {})
        if key is not None:
            mine = {"owner": new.owner, "key": key, "fingerprint": fingerprint, "job": id}
            connection.execute(keys.insert().values(created_at=now, **mine))
        job = self._get(connection, id)
        assert job is not None
        return job

    def get(self, id: str) -> Job | None:
        if _ID.fullmatch(id) is None:
            return None
        with self._reading() as connection:
            return self._get(connection, id)

    def _get(self, connection: Connection, id: str) -> Job | None:
        row = connection.execute(select(*_COLUMNS).where(jobs.c.id == id)).one_or_none()
        return None if row is None else _job(row)

    def files_of(self, id: str) -> dict[str, bytes]:
        """What a job that has not ended is drawn from, by name."""
        asked = select(sources.c.name, sources.c.content).where(sources.c.job == id)
        with self._reading() as connection:
            return {row.name: bytes(row.content) for row in connection.execute(asked)}

    def page(
        self, owner: str | None, status: str | None, after: str | None, limit: int
    ) -> tuple[list[Job], bool]:
        """The newest jobs first, those behind the job `after`, and whether there are more.

        `owner` None: everybody's. Raises KeyError where there is no job `after`.
        """
        asked = select(*_COLUMNS).where(jobs.c.kind == JOB)
        if owner is not None:
            asked = asked.where(jobs.c.owner == owner)
        if status is not None:
            asked = asked.where(jobs.c.status == status)
        with self._reading() as connection:
            if after is not None:
                last = self._get(connection, after) if _ID.fullmatch(after) else None
                if last is None or owner not in (None, last.owner):
                    raise KeyError(after)
                asked = asked.where(jobs.c.number < last.number)
            rows = connection.execute(asked.order_by(jobs.c.number.desc()).limit(limit + 1)).all()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def place_of(self, job: Job) -> tuple[int, float]:
        """Where a queued job stands, 1 for the next, and the work before it, where callers take turns."""
        return self.places_of([job])[job.id]

    def places_of(self, found: Sequence[Job]) -> dict[str, tuple[int, float]]:
        """The same of several, by id, with one look at the queue for all."""
        queued = jobs.c.status == "queued"
        with self._reading() as connection:
            counts = {
                row.asked_by: (row.number, row.work)
                for row in connection.execute(
                    select(jobs.c.asked_by, func.count().label("number"), func.sum(jobs.c.work).label("work"))
                    .where(queued)
                    .group_by(jobs.c.asked_by)
                )
            }
            own_line: Any = {"partition_by": jobs.c.asked_by, "order_by": jobs.c.number}
            lines = (
                select(
                    jobs.c.id,
                    func.count().over(**own_line).label("number"),
                    func.sum(jobs.c.work).over(**own_line).label("work"),
                )
                .where(queued & jobs.c.asked_by.in_({job.asked_by for job in found}))
                .subquery()
            )
            up_to = {
                row.id: (row.number, row.work)
                for row in connection.execute(select(lines).where(lines.c.id.in_([job.id for job in found])))
            }
            running = connection.execute(
                select(func.coalesce(func.sum(jobs.c.work), 0.0)).where(jobs.c.status == "running")
            ).scalar_one()
        places: dict[str, tuple[int, float]] = {}
        for job in found:
            # One that is not queued any more is the next.
            own, work = up_to.get(job.id, (1, job.work))
            position, before = own, work - job.work
            for caller, (number, its_work) in counts.items():
                if caller != job.asked_by:
                    turns = min(number, own)
                    position += turns
                    before += its_work * turns / number
            places[job.id] = (position, before + running)
        return places

    def among(self, ids: Collection[str], statuses: Collection[Status]) -> set[str]:
        """Those of `ids` that have one of these statuses."""
        asked = select(jobs.c.id).where(jobs.c.id.in_(list(ids)) & jobs.c.status.in_(list(statuses)))
        with self._reading() as connection:
            return set(connection.execute(asked).scalars())

    def events_after(self, id: str, number: int) -> list[JobEvent]:
        asked = select(events.c.number, events.c.type, events.c.data)
        asked = asked.where((events.c.job == id) & (events.c.number > number)).order_by(events.c.number)
        with self._reading() as connection:
            return [JobEvent(*row) for row in connection.execute(asked)]

    def cancel(self, id: str) -> Job | None:
        """The job, cancelled unless it had ended; None where there is none. It is nobody's from then on."""
        with self._writing() as connection:
            waiting = jobs.c.status.in_(("queued", "running"))
            self._end(connection, id, waiting, "cancelled")
            return self._get(connection, id)

    def cancel_waiting(self, id: str) -> bool:
        """Cancel what stands behind a key and nobody draws yet; False where somebody does, or it is a job."""
        with self._writing() as connection:
            waits = (jobs.c.status == "queued") & (jobs.c.kind == ANSWER)
            return self._end(connection, id, waits, "cancelled")

    # --- whoever draws -----------------------------------------------------------------------------------

    def claim(
        self,
        owner: str,
        models: str | Sequence[str],
        limit: int,
        turn_of: Mapping[str, int],
        lease: float = LEASE_SECONDS,
        besides: Collection[str] = (),
        not_of: Collection[str] = (),
    ) -> list[Job]:
        """Up to `limit` jobs of these models that are `owner`'s from now on, while the lease is renewed.

        First those whose owner died; then of each caller the oldest, from those first who have fewest at
        hand and whose turn (`turn_of`, greater is later, missing is first) was longest ago. Of the jobs
        `besides`, which the owner has, none is taken for lost, and of the callers `not_of` none at all.
        """
        known: Any = jobs.c.model.in_([models] if isinstance(models, str) else list(models))
        known &= jobs.c.asked_by.not_in(list(not_of))
        others = known & jobs.c.id.not_in(list(besides))
        claimed: list[Job] = []
        while len(claimed) < limit:
            try:
                with self._writing() as connection:
                    job = self._claim_lost(connection, owner, others, lease) or self._claim_queued(
                        connection, owner, known, turn_of, [each.asked_by for each in claimed], lease
                    )
            except SQLAlchemyError:
                if not claimed:
                    raise
                # Those before are the owner's, and nobody else would draw them.
                break
            if job is None:
                break
            claimed.append(job)
        return claimed

    def _claim_lost(self, connection: Connection, owner: str, known: Any, lease: float) -> Job | None:
        lost = self._lost(connection) & known
        asked = select(jobs.c.id, jobs.c.attempt, jobs.c.deaths).where(lost).order_by(jobs.c.number).limit(8)
        for row in connection.execute(asked).all():
            still_lost = lost & (jobs.c.attempt == row.attempt)
            if row.deaths + 1 >= DEATHS:
                self._end(connection, row.id, still_lost, "failed", error=abandoned(), deaths=row.deaths + 1)
            elif self._take(connection, row.id, still_lost, owner, lease, deaths=row.deaths + 1):
                return self._get(connection, row.id)
        return None

    def _claim_queued(
        self,
        connection: Connection,
        owner: str,
        known: Any,
        turn_of: Mapping[str, int],
        just_now: Sequence[str],
        lease: float,
    ) -> Job | None:
        now = self._now(connection)
        queued = (jobs.c.status == "queued") & (jobs.c.not_before <= now) & known
        heads = connection.execute(
            select(jobs.c.asked_by, func.min(jobs.c.number).label("number"))
            .where(queued)
            .group_by(jobs.c.asked_by)
        ).all()
        if not heads:
            return None
        at_hand: dict[str, int] = {
            row[0]: row[1]
            for row in connection.execute(
                select(jobs.c.asked_by, func.count())
                .where(jobs.c.status == "running")
                .group_by(jobs.c.asked_by)
            )
        }

        def turn(head: Any) -> tuple[int, int, int, int]:
            name = head.asked_by
            return at_hand.get(name, 0), just_now.count(name), turn_of.get(name, 0), head.number

        for head in sorted(heads, key=turn):
            row = connection.execute(select(jobs.c.id).where(jobs.c.number == head.number)).one()
            if self._take(connection, row.id, queued, owner, lease):
                return self._get(connection, row.id)
        return None

    def _take(
        self, connection: Connection, id: str, while_: Any, owner: str, lease: float, **more: Any
    ) -> bool:
        now = self._now(connection)
        taken = connection.execute(
            jobs.update()
            .where((jobs.c.id == id) & while_)
            .values(
                status="running",
                attempt=jobs.c.attempt + 1,
                lease_owner=owner,
                lease_until=now + lease,
                started_at=func.coalesce(jobs.c.started_at, now),
                step=0,
                **more,
            )
        )
        if not taken.rowcount:
            return False
        attempt = connection.execute(select(jobs.c.attempt).where(jobs.c.id == id)).scalar_one()
        self._tell(connection, id, "job.running", {"attempt": attempt})
        return True

    def renew(self, owner: str, seen: Sequence[Seen], lease: float = LEASE_SECONDS) -> set[str]:
        """Renew the leases, note the steps, and tell which of the jobs are not the owner's any more."""
        gone: set[str] = set()
        with self._writing() as connection:
            for each in sorted(seen, key=lambda each: each.id):
                mine = self._mine(each.id, each.attempt) & (jobs.c.lease_owner == owner)
                before = connection.execute(select(jobs.c.step).where(mine)).one_or_none()
                values = {"step": each.step, "steps": each.steps} if each.steps else {}
                renewed = connection.execute(
                    jobs.update().where(mine).values(lease_until=self._now(connection) + lease, **values)
                )
                if before is None or not renewed.rowcount:
                    gone.add(each.id)
                elif each.steps and each.step != before.step:
                    self._tell(connection, each.id, "job.step", {"step": each.step, "of": each.steps})
        return gone

    def still_mine(self, seen: Sequence[Seen]) -> set[tuple[str, int]]:
        """The ids and attempts of those that are; a look only."""
        asked = select(jobs.c.id, jobs.c.attempt).where(
            jobs.c.id.in_([each.id for each in seen]) & (jobs.c.status == "running")
        )
        with self._reading() as connection:
            held = {(row.id, row.attempt) for row in connection.execute(asked)}
        return {(each.id, each.attempt) for each in seen} & held

    def finish(self, id: str, attempt: int, result: str) -> bool:
        """The job is done, with its result in the same moment; False where it is another's or has ended."""
        with self._writing() as connection:
            return self._end(connection, id, self._mine(id, attempt), "done", result=result)

    def fail(self, id: str, attempt: int, error: Mapping[str, Any]) -> bool:
        with self._writing() as connection:
            return self._end(connection, id, self._mine(id, attempt), "failed", error=error)

    def let_go(
        self, id: str, attempt: int, seconds: float = 0.0, died: bool = False, told: bool = True
    ) -> bool:
        """Back into the queue, for whoever claims it after `seconds`; the last of its deaths ends it.

        Not `told`: nothing had begun, and its events are as if it had not been claimed.
        """
        with self._writing() as connection:
            mine = self._mine(id, attempt)
            deaths = connection.execute(select(jobs.c.deaths).where(mine)).scalar_one_or_none()
            if deaths is None:
                return False
            deaths += died
            if deaths >= DEATHS:
                return self._end(connection, id, mine, "failed", error=abandoned(), deaths=deaths)
            connection.execute(
                jobs.update()
                .where(mine)
                .values(
                    status="queued",
                    lease_owner=None,
                    lease_until=None,
                    not_before=self._now(connection) + seconds,
                    deaths=deaths,
                    step=0,
                )
            )
            if told:
                self._tell(connection, id, "job.queued", {})
            else:
                began = select(func.max(events.c.number)).where(
                    (events.c.job == id) & (events.c.type == "job.running")
                )
                number = connection.execute(began).scalar_one()
                connection.execute(events.delete().where(events.c.number == number))
            return True

    def _mine(self, id: str, attempt: int) -> Any:
        return (jobs.c.id == id) & (jobs.c.attempt == attempt) & (jobs.c.status == "running")

    def _end(
        self,
        connection: Connection,
        id: str,
        while_: Any,
        status: Status,
        *,
        result: str | None = None,
        error: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> bool:
        now = self._now(connection)
        ended = connection.execute(
            jobs.update()
            .where((jobs.c.id == id) & while_)
            .values(
                status=status,
                ended_at=now,
                lease_owner=None,
                lease_until=None,
                result=result,
                error=None if error is None else json.dumps(error),
                **more,
            )
        )
        if not ended.rowcount:
            return False
        connection.execute(sources.delete().where(sources.c.job == id))
        self._tell(connection, id, f"job.{status}", {} if error is None else {"error": error})
        row = connection.execute(
            select(jobs.c.kind, jobs.c.webhook_url, jobs.c.webhook_secret).where(jobs.c.id == id)
        ).one()
        webhook = self._webhook_of_all if row.kind == JOB else None
        if row.webhook_url is not None:
            webhook = (row.webhook_url, row.webhook_secret)
        if webhook is not None:
            told = {"id": id, "status": status} | ({} if error is None else {"error": error})
            connection.execute(
                deliveries.insert().values(
                    id=f"msg-{secrets.token_urlsafe(24)}",
                    job=id,
                    url=webhook[0],
                    secret=webhook[1],
                    body=json.dumps({"type": f"job.{status}", "timestamp": _iso(now), "data": told}),
                    next_at=now,
                )
            )
        return True

    def _tell(self, connection: Connection, id: str, type: str, data: Mapping[str, Any]) -> None:
        told = json.dumps({"id": id, "at": round(self._now(connection), 3), **data})
        connection.execute(events.insert().values(job=id, type=type, data=told))

    # --- webhooks ----------------------------------------------------------------------------------------

    def due_delivery(self) -> Delivery | None:
        """A webhook whose time has come, and which nobody else sends from now on."""
        with self._writing() as connection:
            now = self._now(connection)
            due = deliveries.c.next_at <= now
            for row in connection.execute(
                select(deliveries).where(due).order_by(deliveries.c.next_at).limit(8)
            ).all():
                taken = connection.execute(
                    deliveries.update()
                    .where((deliveries.c.id == row.id) & due)
                    .values(next_at=now + SENDING_SECONDS, tries=deliveries.c.tries + 1)
                )
                if taken.rowcount:
                    return Delivery(row.id, row.url, row.secret, row.body, row.tries + 1)
        return None

    def delivered(self, id: str) -> None:
        with self._writing() as connection:
            connection.execute(
                deliveries.update()
                .where(deliveries.c.id == id)
                .values(next_at=None, delivered_at=self._now(connection), said="")
            )

    def not_delivered(self, id: str, said: str, again_in: float | None) -> None:
        """Once more after `again_in` seconds; None: never."""
        with self._writing() as connection:
            next_at = None if again_in is None else self._now(connection) + again_in
            connection.execute(
                deliveries.update().where(deliveries.c.id == id).values(next_at=next_at, said=said)
            )

    # --- counts ------------------------------------------------------------------------------------------

    def census(self) -> tuple[dict[str, int], float]:
        """How many jobs there are by status, and for how many seconds the oldest queued one has waited.

        Those behind an Idempotency-Key count too: they are drawn as the others are.
        """
        with self._reading() as connection:
            counted = select(jobs.c.status, func.count()).group_by(jobs.c.status)
            by_status = {row[0]: row[1] for row in connection.execute(counted)}
            oldest = connection.execute(
                select(func.min(jobs.c.created_at)).where(jobs.c.status == "queued")
            ).scalar_one()
            now = self._now(connection)
        return by_status, 0.0 if oldest is None else max(0.0, now - oldest)

    # --- time --------------------------------------------------------------------------------------------

    def forget(self, keep_seconds: float) -> list[str]:
        """Drop what is older: jobs that have ended, and keys; a job that nobody drew for so long fails.

        Returns the results of the jobs that were dropped, as `finish` was given them.
        """
        with self._writing() as connection:
            now = self._now(connection)
            connection.execute(keys.delete().where(keys.c.created_at < now - KEY_SECONDS))
            waits = (jobs.c.status == "queued") | self._lost(connection)
            stale = waits & (jobs.c.created_at < now - keep_seconds)
            for (id,) in connection.execute(select(jobs.c.id).where(stale).limit(100)).all():
                self._end(connection, id, stale, "failed", error=never_drawn())
            old = jobs.c.status.in_(ENDED) & (jobs.c.ended_at < now - max(keep_seconds, KEY_SECONDS))
            rows = connection.execute(select(jobs.c.id, jobs.c.result).where(old).limit(500)).all()
            connection.execute(jobs.delete().where(jobs.c.id.in_([row.id for row in rows])))
        return [row.result for row in rows if row.result is not None]


def abandoned() -> dict[str, Any]:
    """The failure of a job that took its process along each time."""
    return {
        "message": f"This was drawn {DEATHS} times, and each time the process that drew it died. If it is a "
        "large picture, ask for a smaller one.",
        "type": "server_error",
        "param": None,
        "code": "job_abandoned",
        "status": 503,
    }


def never_drawn() -> dict[str, Any]:
    """The failure of a job that waited longer than jobs are kept."""
    return {
        "message": "This waited for longer than jobs are kept, and nobody could draw it: no server with its "
        "model ran. Send it again.",
        "type": "server_error",
        "param": None,
        "code": "job_expired",
        "status": 503,
    }


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
