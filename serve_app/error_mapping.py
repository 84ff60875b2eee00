"""What a failure looks like to the caller: one table from exception class to HTTP answer.

The row of the nearest class in the exception's own class order is used. The body is OpenAI's
`{"error": {"message", "type", "param", "code"}}`. This module knows no routes and no FastAPI.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError
from starlette.requests import ClientDisconnect

from serve_app.model_list import ModelLoadFailed
from serve_app.queueing import CallerLimited, QueueFull
from serve_app.results import ResultUnreachable
from serve_app.signing import SigningFailed
from zimage_engine.errors import (
    DeadlineExceeded,
    DeviceFailed,
    DeviceUnavailable,
    DoesNotFit,
    EngineError,
    GenerationCancelled,
    GuardExhausted,
    InvalidRequest,
    OutOfMemory,
    ScheduleInvalid,
)

logger = logging.getLogger(__name__)

INVALID = "invalid_request_error"
SERVER = "server_error"

#: Names of the engine's parameters where the wire calls them otherwise.
WIRE_NAME = {"width": "size", "height": "size"}


class RequestRefused(Exception):
    """The edge refuses a request before anything is drawn; the fields are the answer's."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str = "invalid_value",
        status: int = 400,
        type: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, param, code, status, type, headers)
        self.message = message
        self.param = param
        self.code = code
        self.status = status
        self.type = type
        self.headers = dict(headers or {})

    def __str__(self) -> str:
        return self.message


class ModelNotReady(Exception):
    """No worker has its model yet; the message says what is being waited for."""


class WorkerLost(Exception):
    """The workers that were to draw it were lost, whoever is to blame, or none came back."""


class RequestKillsWorkers(Exception):
    """Two workers died while they drew this request: it is not handed to a third.

    Of 400 to 499, so that no client sends it again by itself, as OpenAI's does after 408, 409, 429 and 500
    up.
    """


@dataclass(frozen=True)
class ErrorRow:
    """How failures of one class are answered; `message` None means the exception's own sentence.

    `headers` of the exception itself go out too.

    A failure that is the server's own (500) names an incident of its log instead, unless its sentence is
    `for_the_caller`.
    """

    status: int
    type: str
    code: str
    message: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    for_the_caller: bool = False


@dataclass(frozen=True)
class ErrorAnswer:
    """One answer, ready to be sent."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


ROWS: dict[type[BaseException], ErrorRow] = {
    InvalidRequest: ErrorRow(400, INVALID, "invalid_value"),
    ModelNotReady: ErrorRow(503, SERVER, "model_not_ready", headers={"Retry-After": "5"}),
    ModelLoadFailed: ErrorRow(503, SERVER, "model_load_failed"),
    WorkerLost: ErrorRow(503, SERVER, "worker_lost", headers={"Retry-After": "15"}),
    RequestKillsWorkers: ErrorRow(422, INVALID, "request_kills_workers"),
    RayActorError: ErrorRow(
        503,
        SERVER,
        "worker_lost",
        "The worker that drew this picture stopped; a new one is being started. Send the request again.",
        {"Retry-After": "15"},
    ),
    DeploymentUnavailableError: ErrorRow(
        503,
        SERVER,
        "model_not_ready",
        "No worker could be started; the server's log says why. Try again later.",
        {"Retry-After": "30"},
    ),
    QueueFull: ErrorRow(429, "rate_limit_error", "queue_full"),
    CallerLimited: ErrorRow(429, "rate_limit_error", "rate_limit_exceeded"),
    ClientDisconnect: ErrorRow(
        499, INVALID, "client_closed_request", "The connection was closed before the body had arrived."
    ),
    GenerationCancelled: ErrorRow(
        503,
        SERVER,
        "cancelled",
        "The picture was stopped before it was done; send the request again.",
        {"Retry-After": "5"},
    ),
    RequestCancelledError: ErrorRow(
        503,
        SERVER,
        "cancelled",
        "The picture was stopped before it was done; send the request again.",
        {"Retry-After": "5"},
    ),
    DoesNotFit: ErrorRow(400, INVALID, "does_not_fit"),
    DeadlineExceeded: ErrorRow(504, SERVER, "deadline_exceeded"),
    GuardExhausted: ErrorRow(500, SERVER, "guard_exhausted", for_the_caller=True),
    ScheduleInvalid: ErrorRow(500, SERVER, "schedule_invalid", for_the_caller=True),
    OutOfMemory: ErrorRow(503, SERVER, "out_of_memory", headers={"Retry-After": "15"}),
    DeviceUnavailable: ErrorRow(503, SERVER, "device_unavailable"),
    DeviceFailed: ErrorRow(
        503,
        SERVER,
        "device_failed",
        "The devices of several workers failed while they drew this picture; those workers are being "
        "replaced. Send the request again later.",
        {"Retry-After": "30"},
    ),
    ResultUnreachable: ErrorRow(
        503,
        SERVER,
        "files_unavailable",
        "The place where finished pictures are kept does not answer at the moment; ask again.",
        {"Retry-After": "10"},
    ),
    SigningFailed: ErrorRow(500, SERVER, "signing_failed", for_the_caller=True),
    EngineError: ErrorRow(500, SERVER, "engine_error"),
    Exception: ErrorRow(500, SERVER, "internal_error"),
}


def unwrap(error: BaseException) -> BaseException:
    """What the worker raised, without the shell that Ray puts around it."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def row_for(error: BaseException) -> ErrorRow:
    """The row of the nearest class in the error's class order."""
    for cls in type(error).__mro__:
        if cls in ROWS:
            return ROWS[cls]
    return ROWS[Exception]


def answer_for(error: BaseException) -> ErrorAnswer:
    """What the caller is told. A failure that is the server's own is logged here, once, with its trace."""
    error = unwrap(error)
    if isinstance(error, RequestRefused):
        return ErrorAnswer(error.status, error.type, error.code, error.message, error.param, error.headers)
    row = row_for(error)
    message = row.message or str(error)
    if row.status == 500:
        incident = secrets.token_hex(4)
        logger.error("request failed (incident %s)", incident, exc_info=error)
        reason = (
            "The server could not draw this request, and the fault is its own; "
            f"its log has the reason under incident {incident}."
        )
        message = f"{message} (incident {incident})" if row.for_the_caller else reason
    parameter: str = getattr(error, "parameter", None) or ""
    wire_name = WIRE_NAME.get(parameter, parameter) or None
    headers = {**row.headers, **getattr(error, "headers", {})}
    return ErrorAnswer(row.status, row.type, row.code, message, wire_name, headers)


def is_the_servers(error: BaseException) -> bool:
    """Whether the failure's answer has a status of 500 or more: the request itself could be served."""
    error = unwrap(error)
    return (error.status if isinstance(error, RequestRefused) else row_for(error).status) >= 500


def outcome_of(error: BaseException) -> str:
    """The outcome under which metrics count this failure: the code of its answer."""
    error = unwrap(error)
    return error.code if isinstance(error, RequestRefused) else row_for(error).code
