"""`GET /v1/models`: the models that requests can name, as OpenAI's clients list them."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request

from serve_app import openai_schema as schema
from serve_app.error_mapping import ModelNotReady
from serve_app.routes.answers import AnsweringRoute, service_of

router = APIRouter(tags=["models"], route_class=AnsweringRoute)

#: OpenAI tells when a model was made; of a checkpoint only the beginning of this process is known.
_STARTED = int(time.time())


@router.get("/v1/models", summary="The models, the default one first")
async def list_models(request: Request) -> schema.ModelList:
    return schema.ModelList(data=await _cards(request))


@router.get("/v1/models/{model_id:path}", summary="One model", responses={404: {}})
async def get_model(model_id: str, request: Request) -> schema.ModelCard:
    cards = await _cards(request)
    found = next((card for card in cards if model_id in (card.id, *card.aliases)), None)
    if found is not None:
        return found
    service = service_of(request)
    schema.refuse_model(model_id, await service.description_when_ready(), service.names_of_models)


async def _cards(request: Request) -> list[schema.ModelCard]:
    service = service_of(request)
    states = await service.model_states()
    if not states:
        raise ModelNotReady((await service.readiness()).reason)
    return [
        schema.to_model_card(state, service.with_live_defaults(state.description), _STARTED)
        for state in states
    ]
