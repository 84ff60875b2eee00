"""`POST /v1/images/edits` and `POST /v1/images/variations`, as OpenAI's clients call them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serve_app import edit_schema, picture_input
from serve_app import openai_schema as schema
from serve_app.error_mapping import RequestRefused
from serve_app.multipart import read_form
from serve_app.routes import as_job
from serve_app.routes.answers import AnsweringRoute, asked_by, service_of
from serve_app.routes.files import keep_pictures
from zimage_engine.types import GenerationRequest, SourcePicture

router = APIRouter(tags=["images"], route_class=AnsweringRoute)

#: Pictures that are unpacked at the same moment: each may take some hundred megabytes.
UNPACKED_AT_ONCE = 2

_IMAGE = "The picture: PNG, JPEG or WebP, told by its content; held as its EXIF says."
_FILES_OF_EDIT = {
    "image": f"{_IMAGE} Without a mask, what is transparent in it is drawn anew, or all of it.",
    "mask": "PNG or WebP of the same size: what is transparent in it is drawn anew, the rest stays as it is.",
}
_FILES_OF_VARIATION = {"image": f"{_IMAGE} Transparency is put on white."}
#: Every field is told but streams, which are of generations alone.
_TEXTS_OF_EDIT = tuple(
    name
    for name in edit_schema.ImageEditRequest.model_fields
    if name not in ("stream", "partial_images", "style")
)


class EditedResponse(schema.ImagesResponse):
    """OpenAI's response to an edit or a variation."""

    data: list[schema.EditedPicture]  # type: ignore[assignment]


def _answers(what: str) -> dict[int | str, dict[str, Any]]:
    refused = {"model": schema.ErrorResponse}
    return {
        200: {"model": EditedResponse, "description": what},
        400: {
            **refused,
            "description": "A field or a picture cannot be used, or the model draws from prompts alone; the "
            "message says why.",
        },
        413: {**refused, "description": "The form with its files is too large."},
        415: {**refused, "description": "The body is announced as something other than multipart/form-data."},
        429: {
            **refused,
            "description": "Too many requests wait already, or the caller has had what one caller may; "
            "Retry-After says when to come again.",
        },
        503: {**refused, "description": "No worker has its model at the moment."},
        507: {**refused, "description": "There is no room to keep a picture for its url."},
    }


def _body(described: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": described}}}}


@router.post(
    "/v1/images/edits",
    summary="Draw a picture, or what a mask marks of it, anew from a prompt",
    response_model=None,
    responses=_answers("The pictures. Outside of a mask every pixel is that of the picture sent."),
    openapi_extra=_body(edit_schema.form_in_docs(_TEXTS_OF_EDIT, _FILES_OF_EDIT)),
)
async def edit(request: Request) -> Response:
    """The form is read here and not by FastAPI, whose messages are not made for callers."""
    as_job.refuse_key(request.headers)
    service = service_of(request)
    with service.failures_counted():
        upload = edit_schema.parse_edit(await read_form(request))
        if upload.wire.stream:
            raise RequestRefused(
                "stream true is offered for generations alone; leave it out for an answer with the pictures.",
                "stream",
                "unsupported_value",
            )
        schema.check_model(upload.wire, await service.description_when_ready())
        source = await _unpacked(upload, own_mask=True)
        asked = edit_schema.edit_to_engine(upload.wire, source, service.live.default_enhance)
    return await _drawn(request, upload.wire, asked)


@router.post(
    "/v1/images/variations",
    summary="Draw pictures like one that is sent",
    response_model=None,
    responses=_answers("The pictures."),
    openapi_extra=_body(edit_schema.form_in_docs(edit_schema.VARIATION_FIELDS, _FILES_OF_VARIATION)),
)
async def vary(request: Request) -> Response:
    """As an edit without a prompt and without a mask."""
    as_job.refuse_key(request.headers)
    service = service_of(request)
    with service.failures_counted():
        upload = edit_schema.parse_variation(await read_form(request))
        description = await service.description_when_ready()
        schema.check_model(upload.wire, description)
        source = await _unpacked(upload, own_mask=False)
        asked = edit_schema.variation_to_engine(upload.wire, source, description)
    return await _drawn(request, upload.wire, asked)


async def _drawn(
    request: Request, wire: edit_schema.ImageEditRequest, asked: GenerationRequest
) -> JSONResponse:
    service, name, encoding = service_of(request), asked_by(request.scope), schema.to_encoding(wire)
    reply = await service.generate(asked, encoding, asked_by=name)
    wants_url = wire.response_format == "url"
    links = await keep_pictures(request, reply.pictures, encoding.format) if wants_url else None
    return JSONResponse(
        schema.to_response(
            wire, encoding, reply.pictures, reply.report, links, count_tokens=service.count_tokens
        ),
        headers={
            "x-engine-seconds": f"{reply.report.seconds:.4f}",
            "x-queue-wait": f"{reply.queue_seconds:.3f}",
            **service.rate_headers(name),
        },
    )


async def _unpacked(upload: edit_schema.Upload, own_mask: bool) -> SourcePicture:
    unpack: Callable[[], SourcePicture] = partial(
        picture_input.source_picture, upload.image, upload.mask, own_mask=own_mask
    )
    return await asyncio.get_running_loop().run_in_executor(_unpackers(), unpack)


@functools.cache
def _unpackers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(UNPACKED_AT_ONCE, thread_name_prefix="unpack")
