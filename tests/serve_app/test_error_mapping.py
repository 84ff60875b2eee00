"""Every failure has a row, found by its class order, and a message for the person who asked."""

from __future__ import annotations

import pickle

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

import zimage_engine.errors as engine_errors
from serve_app.error_mapping import (
    ROWS,
    ModelNotReady,
    RequestKillsWorkers,
    RequestRefused,
    WorkerLost,
    answer_for,
    outcome_of,
    row_for,
    unwrap,
)
from serve_app.queueing import QueueFull
from zimage_engine.errors import (
    CheckpointDamaged,
    DeviceFailed,
    DeviceUnavailable,
    EngineError,
    GenerationCancelled,
    InvalidRequest,
    InvalidSize,
    OutOfMemory,
)


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (InvalidRequest("n is odd", "n"), 400, "invalid_value", "n"),
        (InvalidSize("width is odd", "width"), 400, "invalid_value", "size"),
        (InvalidSize("height is odd", "height"), 400, "invalid_value", "size"),
        (InvalidRequest("it is odd"), 400, "invalid_value", None),
        (ModelNotReady("loading"), 503, "model_not_ready", None),
        (WorkerLost("gone"), 503, "worker_lost", None),
        (RequestKillsWorkers("twice"), 422, "request_kills_workers", None),
        (DeviceFailed("cuda:0 failed"), 503, "device_failed", None),
        (ActorDiedError(), 503, "worker_lost", None),
        (ActorUnavailableError("away", None), 503, "worker_lost", None),
        (QueueFull("The queue is full.", {"Retry-After": "3"}), 429, "queue_full", None),
        (GenerationCancelled("stopped"), 503, "cancelled", None),
        (OutOfMemory("used up", "decode", (512, 512)), 503, "out_of_memory", None),
        (DeviceUnavailable("no such device"), 503, "device_unavailable", None),
        (CheckpointDamaged("/srv/model is damaged"), 500, "engine_error", None),
        (ValueError("bug"), 500, "internal_error", None),
        (RequestRefused("no such model", "model", "model_not_found", 404), 404, "model_not_found", "model"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_failures_are_answered(error: Exception, status: int, code: str, param: str | None) -> None:
    answer = answer_for(error)
    assert (answer.status, answer.code, answer.param) == (status, code, param)
    assert outcome_of(error) == code
    assert set(answer.body()["error"]) == {"message", "type", "param", "code"}
    assert answer.message
    if status == 500:
        assert str(error) not in answer.message
    if status in (429, 503) and not isinstance(error, DeviceUnavailable):
        assert int(answer.headers["Retry-After"]) > 0


def test_every_error_of_the_engine_has_a_row() -> None:
    classes = [
        value
        for value in vars(engine_errors).values()
        if isinstance(value, type) and issubclass(value, EngineError)
    ]
    assert len(classes) > 5
    for cls in classes:
        assert row_for(cls("a sentence")) is not ROWS[Exception], cls


@pytest.mark.parametrize("error", [InvalidSize("width is odd", "width"), RequestRefused("no", "n", "c", 404)])
def test_errors_keep_their_fields_between_processes(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_the_shell_of_ray_is_taken_off_however_thick() -> None:
    inner = InvalidRequest("n is odd", "n")
    error = RayTaskError("outer", "trace", RayTaskError("inner", "trace", inner)).as_instanceof_cause()
    assert unwrap(error) is inner
    assert answer_for(error).status == 400
