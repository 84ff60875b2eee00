"""A request for pictures that is kept as a job: answered with the job, or with the pictures when it is done.

The first is asked for with `Prefer: respond-async`, the second comes with an `Idempotency-Key`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, cast

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import Headers

from serve_app import openai_schema as schema
from serve_app.error_mapping import RequestRefused
from serve_app.jobs.desk import Asker, JobDesk
from serve_app.jobs.idempotency import parse_key
from serve_app.jobs.operations import REPRODUCTIONS, Files
from serve_app.jobs.store import JOB, Job
from serve_app.jobs.tables import GENERATIONS
from serve_app.keys import ADMIN
from serve_app.reproduction_schema import ReproductionResponse
from serve_app.results import ResultExpired
from serve_app.routes.answers import asked_by
from serve_app.routes.files import link_to, results_of

#: The code of a job's end whose pictures are kept no more.
_EXPIRED = "result_expired"

JOBS_PATH = "/v1/images/jobs"
KEY_HEADER = "idempotency-key"


#: The field `webhook` of a body in JSON.
WEBHOOK_IN_DOCS: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"url": {"type": "string"}, "secret": {"type": ["string", "null"]}},
            "required": ["url"],
            "additionalProperties": False,
        },
        {"type": "null"},
    ],
    "default": None,
    "description": "Where the end of the job is told by POST: url, and a secret (whsec_ and base64) to "
    "sign with, as Standard Webhooks has it.",
}
#: The same where a plain answer is possible too.
WEBHOOK_OF_JOB_IN_DOCS: dict[str, Any] = WEBHOOK_IN_DOCS | {
    "description": f"With the header Prefer: respond-async alone. {WEBHOOK_IN_DOCS['description']}"
}
#: The same in a form, where all is text.
WEBHOOK_OF_FORM_IN_DOCS: dict[str, Any] = {
    "type": "string",
    "description": "With the header Prefer: respond-async alone. Where the end of the job is told by POST, "
    'as JSON: {"url": "...", "secret": "whsec_..."}; the secret may be left out.',
}


class JobError(schema.ErrorBody):
    """Why a job failed; `status` is the one that a plain request would have been answered with."""

    status: int


class JobWebhook(BaseModel):
    """Where the end of the job is told, as the caller named it. The secret is not."""

    url: str


class ImageJob(BaseModel):
    """A job. Times are seconds since 1970; what does not apply at the moment is null."""

    id: str
    object: Literal["image.job"] = "image.job"
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    model: str
    created_at: int
    started_at: int | None
    ended_at: int | None
    position: int | None = None
    eta_seconds: float | None = None
    step: int | None = None
    of: int | None = None
    webhook: JobWebhook | None = None
    error: JobError | None = None
    result: schema.ImagesResponse | ReproductionResponse | None = None


class ImageJobList(BaseModel):
    """A page of jobs, newest first; `after` of the next one is `last_id`."""

    object: Literal["list"] = "list"
    data: list[ImageJob]
    last_id: str | None
    has_more: bool


def desk_of(request: Request) -> JobDesk:
    """The desk that the ingress put on the app."""
    return cast(JobDesk, request.app.state.jobs)


def asker_of(request: Request) -> Asker:
    """Who asks, by the key of the request; without keys all callers own their jobs together."""
    state = request.scope.get("state", {})
    return Asker(state.get("caller") or "", asked_by(request.scope), ADMIN in state.get("scopes", ()))


def is_wanted(headers: Headers) -> bool:
    """Whether a request for pictures is to be kept."""
    return KEY_HEADER in headers or is_async(headers)


def is_async(headers: Headers) -> bool:
    """Whether a job is wanted, to be asked for later."""
    preferred = (each.partition(";")[0].strip().lower() for each in headers.get("prefer", "").split(","))
    return "respond-async" in preferred


def webhook_in(text: str) -> Any:
    """The field `webhook` of a form; what is no JSON stays text, and is refused as that."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def answer(
    request: Request,
    payload: Mapping[str, Any],
    always_async: bool = False,
    operation: str = GENERATIONS,
    files: Files = MappingProxyType({}),
) -> JSONResponse:
    """202 with the job, or 200 with its pictures as soon as they are drawn.

    `files` are what it is drawn from; they are kept until the job has ended, and not longer.
    """
    desk, asker = desk_of(request), asker_of(request)
    key = parse_key(request.headers.getlist(KEY_HEADER))
    if always_async or is_async(request.headers):
        job, is_new = await desk.accept(payload, asker, key, JOB, operation, files)
        headers = {"Location": f"{JOBS_PATH}/{job.id}", **_replayed(is_new)}
        if not always_async:
            headers["Preference-Applied"] = "respond-async"
        body = await job_body(request, job, with_result=False)
        return JSONResponse(body, status_code=202, headers=headers)
    assert key is not None  # `is_wanted` of a key or of a job
    job, is_new = await desk.answered(payload, asker, key, operation, files)
    if job.status == "done" and not is_new:
        try:
            return JSONResponse(await result_of(request, job), headers=_replayed(is_new))
        except RequestRefused as refused:
            if refused.code != _EXPIRED:
                raise
            # It was drawn, and is kept no more: it is drawn anew, as for one who never came.
            await desk.forget_key(asker, key, job)
            job, is_new = await desk.answered(payload, asker, key, operation, files)
    if job.status != "done":
        error: dict[str, Any] = json.loads(job.error) if job.error else dict(_CANCELLED)
        status = error.pop("status")
        return JSONResponse({"error": error}, status_code=status, headers=_replayed(is_new))
    return JSONResponse(await result_of(request, job), headers=_replayed(is_new))


_CANCELLED: dict[str, Any] = {
    "message": "The picture was stopped before it was done; send the request again.",
    "type": "server_error",
    "param": None,
    "code": "cancelled",
    "status": 503,
}


def _replayed(is_new: bool) -> dict[str, str]:
    return {} if is_new else {"Idempotent-Replayed": "true"}


async def job_bodies(request: Request, found: Sequence[Job]) -> list[dict[str, Any]]:
    """The body of each job, without its result."""
    places = await desk_of(request).places_of(found)
    return [_body_of(job, places.get(job.id)) for job in found]


async def job_body(request: Request, job: Job, with_result: bool) -> dict[str, Any]:
    """The body of `ImageJob`. Raises RequestRefused (410) where its result is wanted and has expired."""
    (body,) = await job_bodies(request, [job])
    if job.status == "done" and with_result:
        body["result"] = await result_of(request, job)
    return body


def _body_of(job: Job, place: tuple[int, float | None] | None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": job.id,
        "object": "image.job",
        "status": job.status,
        "model": job.model,
        "created_at": int(job.created_at),
        "started_at": None if job.started_at is None else int(job.started_at),
        "ended_at": None if job.ended_at is None else int(job.ended_at),
        "position": None,
        "eta_seconds": None,
        "step": None,
        "of": None,
        "webhook": None if job.webhook_url is None else {"url": job.webhook_url},
        "error": None if job.error is None else json.loads(job.error),
        "result": None,
    }
    if place is not None:
        position, seconds = place
        body |= {"position": position, "eta_seconds": None if seconds is None else round(seconds, 1)}
    if job.status == "running" and job.steps:
        body |= {"step": job.step, "of": job.steps}
    return body


async def result_of(request: Request, job: Job) -> dict[str, Any]:
    """What a plain request would be answered with, the pictures as they were asked for.

    Raises RequestRefused (410).
    """
    assert job.result is not None
    result: dict[str, Any] = json.loads(job.result)
    as_links = json.loads(job.request).get("response_format") == "url"
    for picture in result["data"]:
        id = picture["url"]
        try:
            file = await results_of(request).get(id)
        except ResultExpired:
            file = None
        if file is None:
            raise RequestRefused(
                "This job is done, and its pictures have expired: results are kept for a time and within a "
                "size. Draw it again, from the same seed if it is to be the same picture.",
                None,
                _EXPIRED,
                410,
            )
        if as_links:
            picture["url"] = link_to(request, id)
        else:
            del picture["url"], picture["expires_at"]
            picture["b64_json"] = base64.b64encode(file.data).decode("ascii")
    if job.operation == REPRODUCTIONS:
        return {**result["reproduction"], "b64_json": result["data"][0]["b64_json"]}
    return result
