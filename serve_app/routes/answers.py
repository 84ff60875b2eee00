"""What every route does alike: answer failures with OpenAI's error body, and find the service."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, cast

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from serve_app.error_mapping import ErrorAnswer, answer_for
from serve_app.service import ImageService


def service_of(request: Request) -> ImageService:
    """The service that the ingress put on the app."""
    return cast(ImageService, request.app.state.service)


def asked_by(scope: Mapping[str, Any]) -> str:
    """Who has one line in the queue: the name of the key, else the address that the connection comes from."""
    address: str = (scope.get("client") or ("unknown",))[0]
    return cast(str, scope.get("state", {}).get("caller") or address)


def refusal(answer: ErrorAnswer) -> JSONResponse:
    """An error as OpenAI's body."""
    return JSONResponse(answer.body(), status_code=answer.status, headers=dict(answer.headers))


class AnsweringRoute(APIRoute):
    """A route whose failures are all answered by the table.

    An exception handler of the app for `Exception` would do it too, but Starlette raises the
    exception once more behind it, and it would be logged twice.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:
                return refusal(answer_for(error))

        return answer
