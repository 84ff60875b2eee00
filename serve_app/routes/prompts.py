"""`POST /v1/prompts/enhance` and `/v1/prompts/analyze`: help with a prompt, without drawing anything.

They wait for no worker: the enhancer needs no more than the model's description, the analyzer not even that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from serve_app import openai_schema as schema
from serve_app import prompt_schema as prompts
from serve_app.error_mapping import ModelNotReady
from serve_app.routes.answers import AnsweringRoute, asked_by, service_of
from serve_app.routes.images import check_json_headers
from serve_app.service import ImageService
from serve_app.streaming import ErrorEvent, EventStream, Tell, event, stream_in_docs
from zimage_engine.types import ModelDescription

router = APIRouter(tags=["prompts"], route_class=AnsweringRoute)


def _body(wire_class: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    content = {"schema": wire_class.model_json_schema(), "example": example}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


#: Whoever types is not kept waiting for a worker that may not be there yet.
SOON_SECONDS = 0.05
_asking: set[asyncio.Task[ModelDescription | None]] = set()


async def _description_soon(service: ImageService) -> ModelDescription | None:
    """What the workers loaded, where that is known at once; what comes later is there for the next one."""
    task = asyncio.create_task(service.description())
    _asking.add(task)
    task.add_done_callback(_asking.discard)
    done, _ = await asyncio.wait({task}, timeout=SOON_SECONDS)
    return task.result() if done else None


_REFUSED: dict[str, Any] = {
    "model": schema.ErrorResponse,
    "description": "A field cannot be used; the message says why.",
}


_DELTA, _COMPLETED = "prompt_enhancement.delta", "prompt_enhancement.completed"
_EXAMPLE_DELTA = {"type": _DELTA, "delta": " in warm evening light"}
_STREAM = stream_in_docs(
    (
        (prompts.EnhanceDeltaEvent, _EXAMPLE_DELTA),
        (prompts.EnhanceCompletedEvent, None),
        (ErrorEvent, None),
    ),
    (event(_EXAMPLE_DELTA),),
)


@router.post(
    "/v1/prompts/enhance",
    response_model=None,
    summary="What would be drawn from a prompt, and why each phrase is added or left out",
    responses={
        200: {
            "model": prompts.EnhanceResponse,
            "description": "Prompts and why; with stream true, server-sent events with that in the last.",
            "content": {"text/event-stream": _STREAM},
        },
        400: _REFUSED,
        429: {
            "model": schema.ErrorResponse,
            "description": "For the enhancer `model`: too many requests wait already, or the caller has had "
            "what one caller may.",
        },
        503: {
            "model": schema.ErrorResponse,
            "description": "No worker has told of its model yet.",
        },
    },
    openapi_extra=_body(
        prompts.EnhanceRequest,
        {"prompt": "a minimalist poster of a fox, flat colors", "negative_prompt": "text"},
    ),
)
async def enhance(request: Request) -> prompts.EnhanceResponse | Response:
    """As a picture's request would be enhanced at this moment; that tells it as `revised_prompt`.

    Rules answer at once. A language model takes seconds, and the one that is the text encoder its turn among
    the pictures.
    """
    service = service_of(request)
    check_json_headers(request)
    wire = prompts.parse_enhance(schema.read_json(await request.body()))
    description = await service.description()
    if description is None:
        raise ModelNotReady((await service.readiness()).reason)
    by_default = service.live.default_enhance
    enhancer = service.enhancer_for(wire.enhance if isinstance(wire.enhance, str) else None)
    line = asked_by(request.scope)

    async def made(on_text: Callable[[str], None] | None = None) -> prompts.EnhanceResponse:
        limit = description.token_limit
        if enhancer == "rules" or not prompts.is_wanted(wire, by_default):
            # Off the event loop: the longest prompts take as long as a step of a small picture.
            return await asyncio.to_thread(prompts.enhanced, wire, by_default, service.tokens, limit)
        both = prompts.prompts_of(wire)
        written = await service.enhanced(*both, enhancer, description, line, on_text)
        return await asyncio.to_thread(prompts.to_response, written, True, service.tokens, limit)

    if not wire.stream:
        return await made()

    async def written(tell: Tell) -> bytes:
        answer = await made(lambda text: tell(event({"type": _DELTA, "delta": text})))
        return event({"type": _COMPLETED, **answer.model_dump()})

    return EventStream(written, lambda: service.rate_headers(line))


@router.post(
    "/v1/prompts/analyze",
    summary="What each word of a prompt speaks of",
    responses={400: _REFUSED},
    openapi_extra=_body(prompts.AnalyzeRequest, {"prompt": "夜景，霓虹灯下的少女，“春风”招牌，浅景深"}),
)
async def analyze(request: Request) -> prompts.AnalyzeResponse:
    """Made to be asked while somebody types; an empty prompt has an empty answer."""
    service = service_of(request)
    check_json_headers(request)
    wire = prompts.parse_analyze(schema.read_json(await request.body()))
    description = await _description_soon(service)
    token_limit = None if description is None else description.token_limit
    return await asyncio.to_thread(prompts.analysed, wire, service.tokens, token_limit)
