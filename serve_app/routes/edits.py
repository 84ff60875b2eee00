"""`POST /v1/images/edits` and `POST /v1/images/variations`, as OpenAI's clients call them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serve_app import edit_schema, picture_input
from serve_app import openai_schema as schema
from serve_app.jobs.operations import EDITS, IMAGE, MASK, VARIATIONS
from serve_app.multipart import Form, read_form
from serve_app.routes import as_job
from serve_app.routes.answers import AnsweringRoute, asked_by, service_of
from serve_app.routes.images import drawn
from serve_app.streaming import EDIT, events_in_docs, picture_stream
from zimage_engine.types import SourcePicture

router = APIRouter(tags=["images"], route_class=AnsweringRoute)

_IMAGE = (
    "The picture: PNG, JPEG or WebP, told by its content; held as its EXIF says, and its colours brought to "
    "sRGB as its ICC profile says."
)
_FILES_OF_EDIT = {
    "image": f"{_IMAGE} Without a mask, what is transparent in it is drawn anew, or all of it.",
    "mask": "PNG or WebP of the same size: what is transparent in it is drawn anew, the rest stays as it is.",
}
_FILES_OF_VARIATION = {"image": f"{_IMAGE} Transparency is put on white."}
_TEXTS_OF_EDIT = tuple(name for name in edit_schema.ImageEditRequest.model_fields if name != "style")


class EditedResponse(schema.ImagesResponse):
    """OpenAI's response to an edit or a variation."""

    data: list[schema.EditedPicture]  # type: ignore[assignment]


def _answers(what: str) -> dict[int | str, dict[str, Any]]:
    refused = {"model": schema.ErrorResponse}
    return {
        200: {"model": EditedResponse, "description": what},
        202: {
            "model": as_job.ImageJob,
            "description": "With the header Prefer: respond-async, the job, as of POST /v1/images/jobs. What "
            "it is drawn from is kept until it has ended.",
        },
        400: {
            **refused,
            "description": "A field or a picture cannot be used, or the model draws from prompts alone; the "
            "message says why.",
        },
        410: {
            **refused,
            "description": "It was drawn under this Idempotency-Key, and the pictures have expired.",
        },
        413: {**refused, "description": "The form with its files is too large."},
        415: {**refused, "description": "The body is announced as something other than multipart/form-data."},
        422: {**refused, "description": "The Idempotency-Key was used with another body within a day."},
        429: {
            **refused,
            "description": "Too many requests wait already, or the caller has had what one caller may; "
            "Retry-After says when to come again.",
        },
        503: {**refused, "description": "No worker has its model at the moment."},
    }


def _answers_of_edit() -> dict[int | str, dict[str, Any]]:
    answers = _answers(
        "The pictures. Outside of a mask every pixel is that of the picture in the size that is drawn. With "
        "stream true, server-sent events with the picture in the last."
    )
    return answers | {200: {**answers[200], "content": {"text/event-stream": events_in_docs(EDIT)}}}


def _body(described: dict[str, Any]) -> dict[str, Any]:
    described["properties"]["webhook"] = as_job.WEBHOOK_OF_FORM_IN_DOCS
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": described}}}}


@router.post(
    "/v1/images/edits",
    summary="Draw a picture, or what a mask marks of it, anew from a prompt",
    response_model=None,
    responses=_answers_of_edit(),
    openapi_extra=_body(edit_schema.form_in_docs(_TEXTS_OF_EDIT, _FILES_OF_EDIT)),
)
async def edit(request: Request) -> Response:
    """The form is read here and not by FastAPI, whose messages are not made for callers."""
    if as_job.is_wanted(request.headers):
        return await _kept(request, EDITS, edit_schema.parse_edit)
    service = service_of(request)
    with service.failures_counted():
        upload = edit_schema.parse_edit(await read_form(request))
        await service.description_for(upload.wire.model)
        source = await _unpacked(upload, own_mask=True)
        asked = edit_schema.edit_to_engine(upload.wire, source, service.live.default_enhance)
    if upload.wire.stream:
        encoding, name = schema.to_encoding(upload.wire), asked_by(request.scope)
        return picture_stream(service, upload.wire, asked, encoding, name, EDIT)
    return await drawn(request, upload.wire, asked)


@router.post(
    "/v1/images/variations",
    summary="Draw pictures like one that is sent",
    response_model=None,
    responses=_answers("The pictures."),
    openapi_extra=_body(edit_schema.form_in_docs(edit_schema.VARIATION_FIELDS, _FILES_OF_VARIATION)),
)
async def vary(request: Request) -> Response:
    """As an edit without a prompt and without a mask."""
    if as_job.is_wanted(request.headers):
        return await _kept(request, VARIATIONS, edit_schema.parse_variation)
    service = service_of(request)
    with service.failures_counted():
        upload = edit_schema.parse_variation(await read_form(request))
        description = await service.description_for(upload.wire.model)
        source = await _unpacked(upload, own_mask=False)
        asked = edit_schema.variation_to_engine(upload.wire, source, description)
    return await drawn(request, upload.wire, asked)


async def _kept(
    request: Request, operation: str, parse: Callable[[Form], edit_schema.Upload]
) -> JSONResponse:
    """As a job, with the files as they came until it has ended."""
    form = await read_form(request)
    webhook = form.texts.pop("webhook", None) if as_job.is_async(request.headers) else None
    upload = parse(form)
    files = {IMAGE: upload.image} | ({} if upload.mask is None else {MASK: upload.mask})
    payload = upload.wire.model_dump(exclude_unset=True)
    if webhook is not None:
        payload["webhook"] = as_job.webhook_in(webhook)
    return await as_job.answer(request, payload, operation=operation, files=files)


async def _unpacked(upload: edit_schema.Upload, own_mask: bool) -> SourcePicture:
    unpack: Callable[[], SourcePicture] = partial(
        picture_input.source_picture, upload.image, upload.mask, own_mask=own_mask
    )
    return await asyncio.get_running_loop().run_in_executor(picture_input.unpackers(), unpack)
