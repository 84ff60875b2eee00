"""`POST /v1/images/generations`, as OpenAI's clients call it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serve_app import openai_schema as schema
from serve_app.error_mapping import RequestRefused
from serve_app.routes.answers import AnsweringRoute, asked_by, service_of
from serve_app.streaming import events_in_docs, picture_stream

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


@router.post(
    "/v1/images/generations",
    summary="Draw pictures from a prompt",
    response_model=None,
    responses={
        200: {
            "model": schema.ImagesResponse,
            "description": "The pictures; with stream true, server-sent events with the picture in the last.",
            "content": {"text/event-stream": events_in_docs()},
        },
        400: {"model": schema.ErrorResponse, "description": "A field cannot be used; the message says why."},
        429: {
            "model": schema.ErrorResponse,
            "description": "Too many requests wait already, or the caller has had what one caller may; "
            "Retry-After says when to come again.",
        },
        503: {"model": schema.ErrorResponse, "description": "No worker has its model at the moment."},
    },
    openapi_extra=_BODY_IN_DOCS,
)
async def generate(request: Request) -> Response:
    """The body is read here and not by FastAPI, whose messages are not made for callers."""
    service = service_of(request)
    with service.failures_counted():
        _check_headers(request)
        wire = schema.parse(schema.read_json(await request.body()))
        encoding = schema.to_encoding(wire)
        schema.check_model(wire, await service.description_when_ready())
        asked = schema.to_engine(wire)
    name = asked_by(request.scope)
    if wire.stream:
        return picture_stream(service, wire, asked, encoding, name)
    reply = await service.generate(asked, encoding, asked_by=name)
    return JSONResponse(
        schema.to_response(wire, encoding, reply.pictures, reply.report),
        headers={"x-engine-seconds": f"{reply.report.seconds:.4f}", **service.rate_headers(name)},
    )


def _check_headers(request: Request) -> None:
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
