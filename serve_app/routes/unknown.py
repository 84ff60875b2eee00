"""Paths under /v1 that nothing answers, and methods that a path does not take, with OpenAI's body.

Without this the page, which takes every free path, would answer an API client with its own 404.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.routing import Match, Route

from serve_app.error_mapping import RequestRefused
from serve_app.routes import (
    edits,
    files,
    history,
    images,
    jobs,
    loras,
    models,
    parameters,
    prompts,
    reproduce,
)
from serve_app.routes.answers import AnsweringRoute

router = APIRouter(include_in_schema=False, route_class=AnsweringRoute)

_WITH_PATHS = (edits, files, history, images, jobs, loras, models, parameters, prompts, reproduce)
_EVERY_METHOD = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


@router.api_route("/v1/{path:path}", methods=_EVERY_METHOD, response_model=None)
async def unknown(request: Request) -> None:
    """Raise RequestRefused: 405 where the path is known with another method, else 404."""
    allowed = _methods_of(request)
    if allowed:
        raise RequestRefused(
            f"{request.url.path} takes {', '.join(allowed)}, got {request.method}.",
            None,
            "method_not_allowed",
            405,
            headers={"Allow": ", ".join(allowed)},
        )
    raise RequestRefused(
        f"There is no {request.method} {request.url.path[:200]} here; "
        "/docs lists what there is (pictures are drawn by POST /v1/images/generations).",
        None,
        "unknown_url",
        404,
    )


def _methods_of(request: Request) -> list[str]:
    methods: set[str] = set()
    for route in (route for each in _WITH_PATHS for route in each.router.routes):
        if isinstance(route, Route) and route.matches(request.scope)[0] == Match.PARTIAL:
            methods |= route.methods or set()
    return sorted(methods)
