"""`POST /v1/images/generations`, as OpenAI's clients call it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serve_app import openai_schema as schema
from serve_app.error_mapping import RequestRefused
from serve_app.routes import as_job
from serve_app.routes.answers import AnsweringRoute, asked_by, service_of
from serve_app.routes.files import keep_pictures
from serve_app.streaming import events_in_docs, picture_stream
from zimage_engine.types import GenerationRequest

router = APIRouter(tags=["images"], route_class=AnsweringRoute)

_BODY_IN_DOCS = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": schema.ImageGenerationRequest.model_json_schema(),
                "example": {"prompt": "a red circle on a white background, a small yellow star at the top"},
            }
        },
    }
}


def _headers(**described: str) -> dict[str, dict[str, object]]:
    return {
        name.replace("_", "-"): {"description": text, "schema": {"type": "string"}}
        for name, text in described.items()
    }


#: Of OpenAI's headers about a caller's requests there are none where the caller has no limit.
_RATE_IN_DOCS = _headers(
    x_ratelimit_limit_requests="Requests a minute that the caller may send, where there is a limit.",
    x_ratelimit_remaining_requests="How many of them are left.",
    x_ratelimit_reset_requests="When all are back, such as 6m0s.",
)
_ID_IN_DOCS = _headers(x_request_id="The id that the request came with, else one made for it; logs tell it.")
_DRAWN_IN_DOCS = _headers(
    x_engine_seconds="Seconds that drawing took; not of a stream.",
    x_queue_wait="Seconds that the request waited for its turn; not of a stream.",
)
_LATER_IN_DOCS = _headers(
    retry_after="Seconds after which to send it again.",
    x_queue_position="The place that there would have been, where the queue is full.",
    x_queue_seconds="The wait that there would have been, as estimated from the last pictures.",
)


@router.post(
    "/v1/images/generations",
    summary="Draw pictures from a prompt",
    response_model=None,
    responses={
        200: {
            "model": schema.ImagesResponse,
            "description": "The pictures; with stream true, server-sent events with the picture in the last.",
            "content": {"text/event-stream": events_in_docs()},
            "headers": _ID_IN_DOCS | _DRAWN_IN_DOCS | _RATE_IN_DOCS,
        },
        202: {
            "model": as_job.ImageJob,
            "description": "With the header Prefer: respond-async, the job, as of POST /v1/images/jobs.",
        },
        400: {"model": schema.ErrorResponse, "description": "A field cannot be used; the message says why."},
        410: {
            "model": schema.ErrorResponse,
            "description": "It was drawn under this Idempotency-Key, and the pictures have expired.",
        },
        422: {
            "model": schema.ErrorResponse,
            "description": "The Idempotency-Key was used with another body within a day.",
        },
        429: {
            "model": schema.ErrorResponse,
            "description": "Too many requests wait already, or the caller has had what one caller may; "
            "Retry-After says when to come again.",
            "headers": _ID_IN_DOCS | _LATER_IN_DOCS | _RATE_IN_DOCS,
        },
        503: {"model": schema.ErrorResponse, "description": "No worker has its model at the moment."},
    },
    openapi_extra=_BODY_IN_DOCS,
)
async def generate(request: Request) -> Response:
    """The body is read here and not by FastAPI, whose messages are not made for callers."""
    service = service_of(request)
    if as_job.is_wanted(request.headers):
        check_json_headers(request)
        return await as_job.answer(request, schema.read_json(await request.body()))
    with service.failures_counted():
        check_json_headers(request)
        wire = schema.parse(schema.read_json(await request.body()))
        encoding = schema.to_encoding(wire)
        await service.description_for(wire.model)
        asked = schema.to_engine(wire, service.live.default_enhance)
    if wire.stream:
        return picture_stream(service, wire, asked, encoding, asked_by(request.scope))
    return await drawn(request, wire, asked)


async def drawn(
    request: Request, wire: schema.ImageGenerationRequest, asked: GenerationRequest
) -> JSONResponse:
    """Draw what is asked and answer as `wire` wants it: the pictures themselves, or where they are kept."""
    service, name, encoding = service_of(request), asked_by(request.scope), schema.to_encoding(wire)
    reply = await service.generate(asked, encoding, asked_by=name)
    wants_url = wire.response_format == "url"
    links = await keep_pictures(request, reply.pictures, encoding.format) if wants_url else None
    return JSONResponse(
        schema.to_response(
            wire,
            encoding,
            reply.pictures,
            reply.report,
            links,
            count_tokens=service.token_counter(reply.report.model),
        ),
        headers={
            "x-engine-seconds": f"{reply.report.seconds:.4f}",
            "x-queue-wait": f"{reply.queue_seconds:.3f}",
            **service.rate_headers(name),
        },
    )


def check_json_headers(request: Request) -> None:
    """Raise RequestRefused (415) where the body is announced as something other than plain JSON in UTF-8."""
    announced = request.headers.get("content-type", "")
    media_type, *parameters = (part.strip().lower() for part in announced.split(";"))
    if media_type != "application/json":
        raise _unsupported(
            f"Content-Type must be application/json, got {announced[:100] or 'none'}; send JSON."
        )
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "charset" and value.strip('"') not in ("utf-8", "utf8"):
            raise _unsupported(f"The charset must be utf-8, got {value[:100]}; send the body as UTF-8.")
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise _unsupported(f"Content-Encoding {coding[:100]} is not read here; send the body uncompressed.")


def _unsupported(message: str) -> RequestRefused:
    return RequestRefused(message, None, "unsupported_media_type", 415)
