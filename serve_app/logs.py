"""Where the application's own words go: one line each, to the standard error of its process.

Ray hands that on to the terminal of `launch`, and to the pod's log in a cluster. Serve redirects
`sys.stderr` into files of its own, so the real one is used. Each line tells the request that it is about:
Serve takes its id from the header `x-request-id` or makes one, passes it from the ingress to the worker, and
sends it back in the answer's header of that name. Where requests are traced, it tells their trace too.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LOGGER_NAMES = ("serve_app", "zimage_engine")
#: One line a request; written as JSON only, where machines read along.
REQUESTS = "serve_app.requests"

LogFormat = Literal["plain", "json"]

#: What a caller may choose for an id; the rest is cut off or left out.
LONGEST_ID = 64
#: Every attribute that a record has by itself; others were given with `extra`.
_OWN_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

_trace_id: ContextVar[str] = ContextVar("trace_id", default="")


class PlainLines(logging.Formatter):
    """For a person: time, level, logger, request (and trace) in brackets where there is one, words."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(request)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        trace = trace_id_of_request()
        current = " ".join(filter(None, (request_id(), trace and f"trace {trace}")))
        record.request = f"[{current}] " if current else ""
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line itself, without the exception's, which follow set in: no caller can begin a line."""
        return as_one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {as_one_line(line)}" for line in super().formatException(ei).split("\n"))


class JsonLines(logging.Formatter):
    """For a machine: one JSON object a line, with what was given as `extra` beside the words."""

    def __init__(self, replica: str) -> None:
        super().__init__()
        self._replica = replica

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id() or None,
            "trace_id": trace_id_of_request() or None,
            "replica": self._replica,
            **{name: value for name, value in vars(record).items() if name not in _OWN_ATTRIBUTES},
        }
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        told = {name: value for name, value in fields.items() if value is not None}
        line = json.dumps(told, ensure_ascii=False, default=str)
        # JSON leaves some line ends and control characters as they are.
        return line if line.isprintable() else json.dumps(told, default=str)


def as_one_line(text: str) -> str:
    """The text with all that is no printable character, such as a line end or a colour, as its escape."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def request_id() -> str:
    """The id of the request that this code works for; "" where it works for none."""
    # Serve has no public way to ask for it, and its own formatter reads it so.
    from ray.serve.context import _get_serve_request_context

    kept = _get_serve_request_context().request_id[:LONGEST_ID]
    return "".join(character for character in kept if character.isascii() and character.isprintable())


def context_of_request(id: str) -> Context:
    """A copy of this context for code that works for that request, and for none that is at hand here.

    Its log lines tell that id, and so do those of the workers that it asks.
    """
    from ray.serve.context import _RequestContext, _serve_request_context

    context = copy_context()
    context.run(_serve_request_context.set, _RequestContext(request_id=id))
    return context


def trace_id_of_request() -> str:
    """The trace that this code works for; "" where there is none."""
    return _trace_id.get()


@contextmanager
def in_trace(trace_id: str) -> Iterator[None]:
    """What this code logs inside tells that trace; "" for none."""
    token = _trace_id.set(trace_id)
    try:
        yield
    finally:
        _trace_id.reset(token)


def log_to_terminal(form: LogFormat = "plain", replica: str = "", stream: TextIO | None = None) -> None:
    """Let the loggers of our packages write to the terminal; called once in each replica."""
    handler = logging.StreamHandler(stream or sys.__stderr__)
    handler.setFormatter(JsonLines(replica) if form == "json" else PlainLines())
    for name in LOGGER_NAMES:
        logger = logging.getLogger(name)
        if logger.handlers:
            continue
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    logging.getLogger(REQUESTS).setLevel(logging.INFO if form == "json" else logging.WARNING)
