"""Where the page draws the cells of its grids: one picture a request, each kept in the history.

A grid is a page's own affair: it asks for one cell behind the other, so that between two of them everybody
else in the queue has their turn, and a page that goes away leaves at most one cell behind, which is stopped.
"""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve_app import openai_schema as schema
from serve_app.image_codec import ImageEncoding
from serve_app.routes.answers import AnsweringRoute, asked_by
from serve_app.routes.history import HISTORY_PATH, owner_of
from serve_app.routes.images import check_json_headers
from serve_app.worker_reply import WorkerReply
from zimage_engine.types import GenerationRequest

if TYPE_CHECKING:
    from serve_app.history.history import History
    from serve_app.service import ImageService

CELL_PATH = "/page/cell"
#: What a cell's request may ask for otherwise, and what it is: one PNG, in one answer.
ONE_PICTURE = {"n": 1, "output_format": "png", "response_format": "b64_json", "stream": False}


def routes(service: ImageService, history: History | None) -> APIRouter:
    """`POST /page/cell`: the body of POST /v1/images/generations, for one picture that is then kept.

    The answer is the picture's id in the history; where it is not kept, the picture itself.
    """
    router = APIRouter(include_in_schema=False, route_class=AnsweringRoute)

    @router.post(CELL_PATH, response_model=None)
    async def cell(request: Request) -> Response:
        with service.failures_counted():
            check_json_headers(request)
            payload = {**schema.read_json(await request.body()), **ONE_PICTURE}
            wire = schema.parse(payload)
            await service.description_for(wire.model)
            asked = schema.to_engine(wire, service.live.default_enhance)
        reply = await _drawn_while_wanted(request, service, asked)
        if reply is None:
            return Response(status_code=204)  # nobody hears it
        png, report = reply.pictures[0], reply.report
        parameters = _as_asked(payload) | {"seed": report.pictures[0].seed}
        id = None if history is None else await history.keep(png, parameters, owner_of(request.scope))
        answer: dict[str, Any] = {
            "id": id,
            "parameters": parameters,
            "width": report.width,
            "height": report.height,
            "revised_prompt": report.prompt,
            "seconds": report.seconds,
        }
        if id is None:
            answer["b64_json"] = base64.b64encode(png).decode()
        else:
            answer |= {
                "url": f"{HISTORY_PATH}/{id}/picture",
                "thumbnail_url": f"{HISTORY_PATH}/{id}/thumbnail",
            }
        return JSONResponse(answer, headers={"Cache-Control": "no-store"})

    return router


async def _drawn_while_wanted(
    request: Request, service: ImageService, asked: GenerationRequest
) -> WorkerReply | None:
    """The picture; None where the page has gone away before it was done, and the drawing is stopped."""
    drawing = asyncio.ensure_future(
        service.generate(asked, ImageEncoding("png"), asked_by=asked_by(request.scope))
    )
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([drawing, leaving], return_when=asyncio.FIRST_COMPLETED)
        return await drawing if drawing.done() else None
    finally:
        leaving.cancel()
        drawing.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _as_asked(payload: dict[str, Any]) -> dict[str, Any]:
    """What draws the picture once more; what is said of files and answers does not belong to it."""
    return {name: value for name, value in payload.items() if name not in ONE_PICTURE and value is not None}
