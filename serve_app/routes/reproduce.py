"""`POST /v1/images/reproduce`: draws a picture again from its receipt, and says whether it is the same."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serve_app import openai_schema as schema
from serve_app import reproduction_schema
from serve_app.image_codec import ImageEncoding
from serve_app.jobs.operations import IMAGE, MASK, PICTURE, REPRODUCTIONS
from serve_app.picture_input import unpackers
from serve_app.reproduction_schema import PICTURES, ReproductionResponse
from serve_app.routes import as_job
from serve_app.routes.answers import AnsweringRoute, asked_by, service_of

router = APIRouter(tags=["images"], route_class=AnsweringRoute)

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
                        "webhook": as_job.WEBHOOK_OF_JOB_IN_DOCS,
                    },
                }
            },
            **{media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in PICTURES},
        },
    }
}


@router.post(
    "/v1/images/reproduce",
    summary="Draw a picture again from its receipt, and say whether it is the same",
    response_model=None,
    responses={
        200: {"model": ReproductionResponse, "description": "It was drawn again; whether it is the same."},
        202: {
            "model": as_job.ImageJob,
            "description": "With the header Prefer: respond-async, the job, as of POST /v1/images/jobs. What "
            "was sent is kept until it has ended.",
        },
        400: {"model": schema.ErrorResponse, "description": "It has no receipt that can be drawn from."},
        410: {
            "model": schema.ErrorResponse,
            "description": "It was drawn under this Idempotency-Key, and the picture has expired.",
        },
        415: {"model": schema.ErrorResponse, "description": "The body is announced as something else."},
        422: {
            "model": schema.ErrorResponse,
            "description": "The Idempotency-Key was used with another body within a day.",
        },
        429: {"model": schema.ErrorResponse, "description": "Too many requests wait already."},
        503: {"model": schema.ErrorResponse, "description": "No worker has its model at the moment."},
    },
    openapi_extra=_IN_DOCS,
)
async def reproduce(request: Request) -> Response:
    """It is drawn by the model of its receipt where that is in the list, else by the default one; where what
    draws it is another one, the differences say so.
    """
    if as_job.is_wanted(request.headers):
        return await _kept(request)
    service = service_of(request)
    with service.failures_counted():
        upload = await _upload(request)
        receipt = upload.given.receipt
        unpack = partial(reproduction_schema.reproduction_to_engine, receipt, upload.source, upload.mask)
        asked = await asyncio.get_running_loop().run_in_executor(unpackers(), unpack)
    asked = replace(asked, model=service.listed_name(reproduction_schema.made_by(receipt)))
    # A LoRA that is not there any more is left out, and the differences name it.
    asked = replace(asked, loras=await service.loras_there(asked.loras or (), asked.model))
    name = asked_by(request.scope)
    reply = await service.generate(asked, ImageEncoding("png"), asked_by=name)
    told = await asyncio.to_thread(reproduction_schema.compared, upload.given, reply.pictures[0])
    return JSONResponse(
        {**told, "b64_json": base64.b64encode(reply.pictures[0]).decode("ascii")},
        headers={"x-engine-seconds": f"{reply.report.seconds:.4f}", **service.rate_headers(name)},
    )


async def _kept(request: Request) -> JSONResponse:
    """As a job, with the files as they came until it has ended."""
    upload = await _upload(request, takes_webhook=as_job.is_async(request.headers))
    sent = {PICTURE: upload.picture, IMAGE: upload.source, MASK: upload.mask}
    files = {name: content for name, content in sent.items() if content is not None}
    payload: dict[str, Any] = {"drawn_before": upload.given.receipt}
    if upload.webhook is not None:
        payload["webhook"] = upload.webhook
    return await as_job.answer(request, payload, operation=REPRODUCTIONS, files=files)


async def _upload(request: Request, takes_webhook: bool = False) -> reproduction_schema.Upload:
    announced, body = request.headers.get("content-type", ""), await request.body()
    parse = partial(reproduction_schema.parse_reproduction, announced, body, takes_webhook)
    return await asyncio.get_running_loop().run_in_executor(unpackers(), parse)
