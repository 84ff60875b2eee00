"""`POST /v1/images/parameters`: what draws a picture again, read out of its file."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from serve_app import openai_schema as schema
from serve_app.error_mapping import RequestRefused
from serve_app.multipart import read_form
from serve_app.picture_input import unpackers
from serve_app.picture_parameters import GRID_PX, Ignored, PictureParameters, Source, parameters_in
from serve_app.routes.answers import AnsweringRoute, service_of
from serve_app.service import ImageService
from zimage_engine.types import LoraChoice, ModelDescription

router = APIRouter(tags=["images"], route_class=AnsweringRoute)

_PICTURES = ("image/png", "image/jpeg", "image/webp")
_FORM = "multipart/form-data"
_IN_DOCS = {
    "requestBody": {
        "required": True,
        "description": "The picture's file, in a form or as it is.",
        "content": {
            _FORM: {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["image"],
                    "properties": {
                        "image": {
                            "type": "string",
                            "format": "binary",
                            "description": "A PNG, JPEG or WebP that was drawn here, by AUTOMATIC1111, Forge "
                            "or ComfyUI.",
                        }
                    },
                }
            },
            **{media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in _PICTURES},
        },
    }
}


class IgnoredParameter(BaseModel):
    """What the file tells and is not used, or not as it stands."""

    field: str
    value: str
    reason: str


class PictureParametersResponse(BaseModel):
    """`parameters` are fields of POST /v1/images/generations, and draw a picture of this program again."""

    parameters: dict[str, Any]
    source: Source
    ignored: list[IgnoredParameter]


@router.post(
    "/v1/images/parameters",
    summary="Read out of a picture's file what draws it again",
    response_model=None,
    responses={
        200: {"model": PictureParametersResponse, "description": "The parameters, and what was left out."},
        400: {"model": schema.ErrorResponse, "description": "It is no picture, or has no parameters in it."},
    },
    openapi_extra=_IN_DOCS,
)
async def read(request: Request) -> JSONResponse:
    """Of a picture that was drawn here the prompt is the one that was drawn, with what the server had added,
    and `enhance` is false: they draw the identical picture. What this server does not have, of models and
    LoRAs, is left out and named.
    """
    content = await _file_in(request)
    service = service_of(request)
    model = await service.description()
    grid_px = GRID_PX if model is None else model.size_multiple
    found = await asyncio.get_running_loop().run_in_executor(unpackers(), parameters_in, content, grid_px)
    found = await _with_what_is_there(service, found, model)
    return JSONResponse(
        {
            "parameters": found.parameters,
            "source": found.source,
            "ignored": [asdict(each) for each in found.ignored],
        }
    )


async def _file_in(request: Request) -> bytes:
    announced = request.headers.get("content-type", "")
    media_type = announced.partition(";")[0].strip().lower()
    if media_type in _PICTURES:
        return await request.body()
    if media_type != _FORM:
        raise RequestRefused(
            f"Content-Type must be {_FORM}, {', '.join(_PICTURES[:-1])} or {_PICTURES[-1]}, got "
            f"{announced[:60] or '-'}; send the picture's file.",
            None,
            "unsupported_media_type",
            415,
        )
    form = await read_form(request)
    if form.texts or form.files.keys() != {"image"} or len(form.files["image"]) != 1:
        raise RequestRefused("The form must have one file, image, and nothing else.", "image")
    return form.files["image"][0]


async def _with_what_is_there(
    service: ImageService, found: PictureParameters, default: ModelDescription | None
) -> PictureParameters:
    """Without the model and the LoRAs that no request could name here."""
    parameters, ignored = dict(found.parameters), list(found.ignored)
    named = parameters.pop("model", None)
    if (listed := service.listed_name(named)) is not None:
        parameters["model"] = listed
    elif named is not None and default is not None and named != default.id:
        ignored.append(Ignored("model", named, "there is no model of this name here; the default one draws"))
    if loras := parameters.get("loras"):
        wanted = tuple(LoraChoice(each["name"], each["weight"]) for each in loras)
        there = {each.name for each in await service.loras_there(wanted, listed)}
        parameters["loras"] = [each for each in loras if each["name"] in there]
        ignored += [_no_lora(each) for each in loras if each["name"] not in there]
    return PictureParameters(parameters, found.source, tuple(ignored))


def _no_lora(lora: Mapping[str, Any]) -> Ignored:
    return Ignored("loras", lora["name"], "there is no LoRA of this name here")
