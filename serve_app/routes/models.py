"""`GET /v1/models`: the one model that is loaded, as OpenAI's clients list it."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request

from serve_app import openai_schema as schema
from serve_app.error_mapping import ModelNotReady
from serve_app.routes.answers import AnsweringRoute, service_of
from zimage_engine.types import ModelDescription

router = APIRouter(tags=["models"], route_class=AnsweringRoute)

#: OpenAI tells when a model was made; of a loaded checkpoint only the loading is known.
_STARTED = int(time.time())


@router.get("/v1/models", summary="The loaded model, in a list")
async def list_models(request: Request) -> schema.ModelList:
    return schema.ModelList(data=[schema.to_model_card(await _description(request), _STARTED)])


@router.get("/v1/models/{model_id:path}", summary="The loaded model", responses={404: {}})
async def get_model(model_id: str, request: Request) -> schema.ModelCard:
    description = await _description(request)
    if not schema.is_loaded_model(model_id, description):
        schema.refuse_model(model_id, description)
    return schema.to_model_card(description, _STARTED)


async def _description(request: Request) -> ModelDescription:
    service = service_of(request)
    description = await service.description()
    if description is None:
        raise ModelNotReady((await service.readiness()).reason)
    return description
