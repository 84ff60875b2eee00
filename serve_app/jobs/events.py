"""A job's events as they come, and again from any of them: server-sent events, the store's numbers as ids.

Every event of a job is kept with it, so that a reader who lost the connection, or comes late, misses none and
sees none twice: `Last-Event-ID` says which was the last.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

from serve_app.error_mapping import RequestRefused
from serve_app.jobs.desk import JobDesk
from serve_app.jobs.store import ENDED, Job, JobEvent

#: Between two signs of life on a stream that has nothing to tell.
BEAT_SECONDS = 10.0
_LAST = frozenset(f"job.{status}" for status in ENDED)


def parse_last_id(value: str | None) -> int:
    """The header `Last-Event-ID`; 0 where there is none. Raises RequestRefused."""
    if not value:
        return 0
    if not (value.isascii() and value.isdecimal() and len(value) <= 18):
        raise RequestRefused(
            "Last-Event-ID must be the id of an event of this job, a whole number.", "Last-Event-ID"
        )
    return int(value)


def as_bytes(event: JobEvent) -> bytes:
    """One server-sent event, whose data names its type too."""
    data = json.dumps({"type": event.type, **json.loads(event.data)})
    return f"id: {event.number}\nevent: {event.type}\ndata: {data}\n\n".encode()


async def follow(desk: JobDesk, job: Job, after: int, first: list[JobEvent]) -> AsyncIterator[bytes]:
    """`first`, and what comes behind it, until the job's end; a comment where nothing comes."""
    told_at, waiting = time.monotonic(), first
    while True:
        for event in waiting:
            yield as_bytes(event)
            told_at, after = time.monotonic(), event.number
            if event.type in _LAST:
                return
        if time.monotonic() - told_at > BEAT_SECONDS:
            yield b": waiting\n\n"
            told_at = time.monotonic()
        await desk.changed()
        waiting = await desk.events_after(job, after)
