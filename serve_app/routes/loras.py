"""`GET /v1/loras`: the LoRAs that requests can name."""

from __future__ import annotations

from fastapi import APIRouter, Request

from serve_app import openai_schema as schema
from serve_app.error_mapping import ModelNotReady
from serve_app.routes.answers import AnsweringRoute, service_of

router = APIRouter(tags=["models"], route_class=AnsweringRoute)


@router.get(
    "/v1/loras",
    summary="The LoRAs that requests can name, and those that the model does not take",
    responses={
        404: {"model": schema.ErrorResponse, "description": "There is no model of this name here."},
        503: {"model": schema.ErrorResponse, "description": "No worker has its model at the moment."},
    },
)
async def list_loras(request: Request, model: str | None = None) -> schema.LoraList:
    """Of the default model, or of one that is named and loaded."""
    service = service_of(request)
    description = await (service.description() if model is None else service.description_for(model))
    if description is None:
        raise ModelNotReady((await service.readiness()).reason)
    offers = await service.loras_offered(model)
    if offers is None:
        raise ModelNotReady(
            "No worker has this model loaded at the moment, so that it is not known which LoRAs fit it; try "
            "again when one has."
        )
    return schema.LoraList(data=[schema.to_lora_card(offer, description.family) for offer in offers])
