"""`/v1/images/jobs`: pictures asked for now and fetched later."""

from __future__ import annotations

from typing import Any, get_args

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serve_app import openai_schema as schema
from serve_app.error_mapping import RequestRefused
from serve_app.jobs.events import follow, parse_last_id
from serve_app.jobs.store import Status
from serve_app.routes.answers import AnsweringRoute
from serve_app.routes.as_job import (
    JOBS_PATH,
    WEBHOOK_IN_DOCS,
    ImageJob,
    ImageJobList,
    answer,
    asker_of,
    desk_of,
    job_bodies,
    job_body,
)
from serve_app.routes.images import check_json_headers

router = APIRouter(tags=["jobs"], route_class=AnsweringRoute)

MOST_A_PAGE = 100
FIRST_PAGE = 20

_NONE = {"model": schema.ErrorResponse, "description": "There is no such job, or it is another caller's."}
_UNAVAILABLE = {
    "model": schema.ErrorResponse,
    "description": "Jobs are not available, or no worker has its model.",
}
_WRONG = {"model": schema.ErrorResponse, "description": "A field cannot be used; the message says why."}


def _schema_of_body() -> dict[str, Any]:
    body = schema.ImageGenerationRequest.model_json_schema()
    body["properties"]["stream"] = {
        "enum": [False, None],
        "default": None,
        "description": "A job is not streamed; it has events of its own.",
    }
    body["properties"]["partial_images"] = {
        "enum": [0, None],
        "default": None,
        "description": "A job has no previews.",
    }
    body["properties"]["webhook"] = WEBHOOK_IN_DOCS
    return body


@router.post(
    JOBS_PATH,
    summary="Ask for pictures and fetch them later",
    status_code=202,
    response_model=None,
    responses={
        202: {"model": ImageJob, "description": "The job is kept, and is drawn whatever happens meanwhile."},
        400: _WRONG,
        422: {
            "model": schema.ErrorResponse,
            "description": "The Idempotency-Key was used with another body.",
        },
        429: {"model": schema.ErrorResponse, "description": "Too many jobs wait already."},
        503: _UNAVAILABLE,
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": _schema_of_body(),
                    "example": {"prompt": "a red circle on a white background", "seed": 1},
                }
            },
        }
    },
)
async def create(request: Request) -> Response:
    """The same as `Prefer: respond-async` with /v1/images/generations."""
    check_json_headers(request)
    return await answer(request, schema.read_json(await request.body()), always_async=True)


@router.get(
    JOBS_PATH,
    summary="One's own jobs, newest first",
    response_model=None,
    responses={
        200: {"model": ImageJobList, "description": "A page."},
        400: _WRONG,
        404: {"model": schema.ErrorResponse, "description": "There is no job `after`."},
        503: _UNAVAILABLE,
    },
    openapi_extra={
        "parameters": [
            {
                "name": "status",
                "in": "query",
                "schema": {"enum": list(get_args(Status))},
                "description": "Only these.",
            },
            {
                "name": "after",
                "in": "query",
                "schema": {"type": "string"},
                "description": "The last_id of the page before.",
            },
            {
                "name": "limit",
                "in": "query",
                "schema": {"type": "integer", "minimum": 1, "maximum": MOST_A_PAGE},
                "description": f"Jobs a page; without it {FIRST_PAGE}.",
            },
        ]
    },
)
async def page(request: Request) -> JSONResponse:
    """Results are told with each job alone."""
    status, after = request.query_params.get("status"), request.query_params.get("after")
    if status is not None and status not in get_args(Status):
        raise RequestRefused(f"status must be one of {', '.join(get_args(Status))}.", "status")
    text = request.query_params.get("limit", str(FIRST_PAGE))
    if not (text.isascii() and text.isdecimal() and len(text) <= 3 and 1 <= int(text) <= MOST_A_PAGE):
        raise RequestRefused(f"limit must be a number from 1 to {MOST_A_PAGE}.", "limit")
    found, has_more = await desk_of(request).page(asker_of(request), status, after, int(text))
    data = await job_bodies(request, found)
    last = found[-1].id if found else None
    return JSONResponse({"object": "list", "data": data, "last_id": last, "has_more": has_more})


@router.get(
    JOBS_PATH + "/{job_id}",
    summary="How a job is getting on, and its result",
    response_model=None,
    responses={
        200: {"model": ImageJob, "description": "The job; with its pictures when it is done."},
        404: _NONE,
        410: {"model": schema.ErrorResponse, "description": "It is done, and its pictures have expired."},
        503: _UNAVAILABLE,
    },
)
async def get(job_id: str, request: Request) -> JSONResponse:
    job = await desk_of(request).job(job_id, asker_of(request))
    return JSONResponse(await job_body(request, job, with_result=True))


@router.get(
    JOBS_PATH + "/{job_id}/events",
    summary="A job's events as they come",
    response_model=None,
    responses={
        200: {
            "description": "Server-sent events job.queued, job.running, job.step, job.done, job.failed and "
            "job.cancelled, each with an id; with Last-Event-ID those behind it.",
            "content": {"text/event-stream": {}},
        },
        204: {"description": "The job has ended, and Last-Event-ID was its last event."},
        400: _WRONG,
        404: _NONE,
        503: _UNAVAILABLE,
    },
)
async def events(job_id: str, request: Request) -> Response:
    desk = desk_of(request)
    after = parse_last_id(request.headers.get("last-event-id"))
    job = await desk.job(job_id, asker_of(request))
    first = await desk.events_after(job, after)
    if job.has_ended and not first:
        # A browser's EventSource comes back for ever, but not after this.
        return Response(status_code=204)
    return StreamingResponse(
        follow(desk, job, after, first),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
    )


@router.delete(
    JOBS_PATH + "/{job_id}",
    summary="Cancel a job",
    response_model=None,
    responses={
        200: {"model": ImageJob, "description": "The job, cancelled; one that had ended is as it was."},
        404: _NONE,
        503: _UNAVAILABLE,
    },
)
async def cancel(job_id: str, request: Request) -> JSONResponse:
    """One that is being drawn is stopped within a step."""
    job = await desk_of(request).cancel(job_id, asker_of(request))
    return JSONResponse(await job_body(request, job, with_result=False))
