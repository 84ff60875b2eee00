"""`POST /v1/images/reproduce`: draws a picture again from its receipt, and says whether it is the same."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from serve_app import openai_schema as schema
from serve_app.error_mapping import RequestRefused
from serve_app.image_codec import ImageEncoding
from serve_app.picture_input import source_picture, unpackers
from serve_app.receipt import loras_of
from serve_app.reproduction import Given, compare, read_given
from serve_app.routes.answers import AnsweringRoute, asked_by, service_of
from serve_app.routes.as_job import refuse_key
from zimage_engine.errors import InvalidRequest
from zimage_engine.types import GenerationRequest

router = APIRouter(tags=["images"], route_class=AnsweringRoute)

_PICTURES = ("image/png", "image/jpeg", "image/webp")
_IN_DOCS = {
    "requestBody": {
        "required": True,
        "description": "A picture that was drawn here, as its file or in base64, or its receipt alone.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "oneOf": [{"required": ["image"]}, {"required": ["receipt"]}],
                    "properties": {
                        "image": {"type": "string", "description": "The picture's file in base64."},
                        "receipt": {
                            "type": "object",
                            "description": "Its receipt, as an answer with receipt true tells it.",
                        },
                        "source": {
                            "type": "string",
                            "description": "Of an edit, the picture that it was drawn from, in base64.",
                        },
                        "mask": {"type": "string", "description": "Of an edit, its mask, in base64."},
                    },
                }
            },
            **{media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in _PICTURES},
        },
    }
}


class ReceiptDifference(BaseModel):
    """A part of how the picture was made that is not the same now."""

    name: str
    then: Any
    now: Any


class ReproductionResponse(BaseModel):
    """What came of drawing it again; `identical` is null where there were no pixels to compare with."""

    identical: bool | None
    changed_pixels: int | None
    message: str
    differences: list[ReceiptDifference]
    b64_json: str
    receipt: dict[str, Any]


@router.post(
    "/v1/images/reproduce",
    summary="Draw a picture again from its receipt, and say whether it is the same",
    response_model=None,
    responses={
        200: {"model": ReproductionResponse, "description": "It was drawn again; whether it is the same."},
        400: {"model": schema.ErrorResponse, "description": "It has no receipt that can be drawn from."},
        429: {"model": schema.ErrorResponse, "description": "Too many requests wait already."},
        503: {"model": schema.ErrorResponse, "description": "No worker has its model at the moment."},
    },
    openapi_extra=_IN_DOCS,
)
async def reproduce(request: Request) -> Response:
    """It is drawn by the model of its receipt where that is in the list, else by the default one; where what
    draws it is another one, the differences say so.
    """
    refuse_key(request.headers)
    service = service_of(request)
    with service.failures_counted():
        announced, body = request.headers.get("content-type", ""), await request.body()
        given, asked = await asyncio.get_running_loop().run_in_executor(
            unpackers(), _given_in, announced, body
        )
    made_by = given.receipt.get("model")
    if isinstance(made_by, dict):
        asked = replace(asked, model=service.listed_name(made_by.get("id")))
    # A LoRA that is not there any more is left out, and the differences name it.
    asked = replace(asked, loras=await service.loras_there(loras_of(given.receipt), asked.model))
    name = asked_by(request.scope)
    reply = await service.generate(asked, ImageEncoding("png"), asked_by=name)
    came_of_it = await asyncio.to_thread(compare, given, reply.pictures[0])
    return JSONResponse(
        {
            "identical": came_of_it.identical,
            "changed_pixels": came_of_it.changed_pixels,
            "message": came_of_it.sentence,
            "differences": [
                {"name": each.name, "then": each.then, "now": each.now} for each in came_of_it.differences
            ],
            "b64_json": base64.b64encode(reply.pictures[0]).decode("ascii"),
            "receipt": read_given(reply.pictures[0]).receipt,
        },
        headers={"x-engine-seconds": f"{reply.report.seconds:.4f}", **service.rate_headers(name)},
    )


def _given_in(announced: str, body: bytes) -> tuple[Given, GenerationRequest]:
    """What is to be drawn again, and what draws it. Takes time: not for an event loop."""
    media_type = announced.partition(";")[0].strip().lower()
    if media_type in _PICTURES:
        given = read_given(body)
        return given, given.request()
    if media_type != "application/json":
        raise RequestRefused(
            f"Content-Type must be {', '.join(_PICTURES)} or application/json, got {announced[:60] or '-'}.",
            None,
            "unsupported_media_type",
            415,
        )
    fields = schema.read_json(body)
    given = _picture_in(fields)
    source = None
    if "source" in fields:
        edit = given.receipt.get("edit")
        own_mask = isinstance(edit, dict) and bool(edit.get("masked"))
        mask = _file_in(fields, "mask") if "mask" in fields else None
        source = source_picture(_file_in(fields, "source"), mask, own_mask=own_mask)
    return given, given.request(source)


def _picture_in(fields: Mapping[str, Any]) -> Given:
    if ("image" in fields) == ("receipt" in fields) or fields.keys() - {"image", "receipt", "source", "mask"}:
        raise RequestRefused(
            "The body must have one of the fields image and receipt, of an edit also source and a mask, "
            "and no other.",
            "image",
        )
    if "image" in fields:
        return read_given(_file_in(fields, "image"))
    if not isinstance(fields["receipt"], dict):
        raise InvalidRequest("receipt must be an object, as an answer with receipt true tells it", "receipt")
    return Given(fields["receipt"])


def _file_in(fields: Mapping[str, Any], name: str) -> bytes:
    try:
        return base64.b64decode(fields[name], validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise InvalidRequest(f"{name} must be a picture's file in base64", name) from error
