"""Lines of the log as a person and as a machine read them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest
from ray.serve.context import _RequestContext, _serve_request_context

from serve_app.logs import LOGGER_NAMES, REQUESTS, LogFormat, log_to_terminal

Written = Callable[[LogFormat], io.StringIO]


@pytest.fixture
def written() -> Iterator[Written]:
    """Sets the loggers up as a replica does, to write into what it returns; all is as before afterwards."""
    loggers = [logging.getLogger(name) for name in (*LOGGER_NAMES, REQUESTS)]
    before = [(each, each.handlers[:], each.level, each.propagate) for each in loggers]

    def set_up(form: LogFormat) -> io.StringIO:
        for each in loggers:
            each.handlers.clear()
        stream = io.StringIO()
        log_to_terminal(form, "worker-1", stream)
        return stream

    yield set_up
    for each, handlers, level, propagate in before:
        each.handlers[:], each.propagate = handlers, propagate
        each.setLevel(level)


@pytest.fixture
def asked() -> Iterator[Callable[[str], None]]:
    """Lets this code work for a request of that id."""
    token = _serve_request_context.set(_RequestContext())
    yield lambda request_id: _serve_request_context.set(_RequestContext(request_id=request_id)) and None
    _serve_request_context.reset(token)


def test_a_person_reads_one_line_with_the_request_in_brackets(
    written: Written, asked: Callable[[str], None]
) -> None:
    stream = written("plain")
    logging.getLogger("serve_app.service").warning("a worker died")
    asked("abc-1")
    logging.getLogger("zimage_engine.engine").warning("seed %d: it was black", 7)
    logging.getLogger(REQUESTS).info("not for a person")
    without, within = stream.getvalue().splitlines()
    assert without.endswith(" WARNING serve_app.service: a worker died")
    assert within.endswith(" WARNING zimage_engine.engine: [abc-1] seed 7: it was black")


def test_a_machine_reads_one_object_a_line(written: Written, asked: Callable[[str], None]) -> None:
    stream = written("json")
    asked("abc-1")
    logging.getLogger(REQUESTS).info("request ended", extra={"outcome": "ok", "seconds": 1.5})
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("serve_app.error_mapping").exception("it failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "logger": REQUESTS,
        "message": "request ended",
        "request_id": "abc-1",
        "replica": "worker-1",
        "outcome": "ok",
        "seconds": 1.5,
    }
    assert "ValueError: two\nlines" in second["trace"]


@pytest.mark.parametrize("form", ["plain", "json"])
def test_a_callers_id_can_neither_break_a_line_nor_fill_the_log(
    written: Written, asked: Callable[[str], None], form: LogFormat
) -> None:
    stream = written(form)
    asked("a\nERROR forged\x1b[31m" + "x" * 10_000)
    logging.getLogger("serve_app").warning("said")
    (line,) = stream.getvalue().splitlines()
    assert len(line) < 300 and "\x1b" not in line
