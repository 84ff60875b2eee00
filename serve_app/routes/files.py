"""`GET /v1/files/{id}`: a finished picture by the address that `response_format: url` told.

As with OpenAI, the address itself is the permission: its id has 144 random bits and expires, and no key
is asked for, so that a browser's `<img>` or a downloader that knows no key can fetch it. Nothing lists ids.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from fastapi import APIRouter, Request, Response

from serve_app import openai_schema as schema
from serve_app.error_mapping import RequestRefused
from serve_app.results import (
    MEDIA_TYPES,
    ResultExpired,
    ResultNotKept,
    ResultStore,
    expires_at,
)
from serve_app.routes.answers import AnsweringRoute, service_of

#: Fetched without a key.
OPEN_BELOW = "/v1/files/"
FILE_PATH = OPEN_BELOW + "{id}"

router = APIRouter(tags=["files"], route_class=AnsweringRoute)

_MEDIA_TYPE_OF_FORMAT = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

#: Whatever the bytes are, no browser makes anything of them but the type that they are given out as.
_INERT = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, slots=True)
class FileLink:
    """Where a file can be fetched, and until when in seconds since 1970."""

    url: str
    expires_at: int


def results_of(request: Request) -> ResultStore:
    """The store that the ingress put on the app."""
    return cast(ResultStore, request.app.state.results)


async def keep_pictures(
    request: Request, pictures: Sequence[bytes], file_format: str
) -> list[FileLink | None]:
    """Keep finished pictures, and where each can be fetched; None for one that could not be kept.

    It is not refused then: what was drawn is answered, and nobody draws it twice for want of a place.
    """
    store, media_type = results_of(request), _MEDIA_TYPE_OF_FORMAT[file_format]

    async def keep(picture: bytes) -> FileLink | None:
        try:
            id = await store.put(picture, media_type)
        except ResultNotKept:
            service_of(request).count_result_not_kept()
            return None
        return FileLink(link_to(request, id), expires_at(id))

    return list(await asyncio.gather(*(keep(picture) for picture in pictures)))


def link_to(request: Request, id: str) -> str:
    """The absolute address of a file, by the name under which this request reached the server.

    Where a proxy that the settings trust says that the caller used https, so does the address.
    """
    return f"{request.base_url}{OPEN_BELOW[1:]}{id}"


@router.get(
    FILE_PATH,
    summary="A finished picture that was asked for as url",
    response_class=Response,
    responses={
        200: {
            "description": "The picture, as the type that it was drawn in.",
            "content": {media_type: {} for media_type in MEDIA_TYPES.values()},
        },
        304: {"description": "The caller has it already (If-None-Match)."},
        404: {"model": schema.ErrorResponse, "description": "There never was a file of this id."},
        410: {"model": schema.ErrorResponse, "description": "It was there, and has expired."},
        503: {"model": schema.ErrorResponse, "description": "The place of files does not answer now."},
    },
)
async def get_file(id: str, request: Request) -> Response:
    """Every file is unchangeable, so its id is its ETag."""
    try:
        file = await results_of(request).get(id)
    except ResultExpired as error:
        raise RequestRefused(
            "This file has expired: results are kept for a time and within a size. Draw it again, from the "
            "same seed if it is to be the same picture.",
            None,
            "file_expired",
            410,
        ) from error
    if file is None:
        raise RequestRefused(
            "There is no file of this id; ask for the whole url as it was told.", None, "file_not_found", 404
        )
    etag = f'"{id}"'
    headers = {
        **_INERT,
        "Cache-Control": f"private, max-age={max(0, file.expires_at - int(time.time()))}, immutable",
        "Content-Disposition": f'inline; filename="picture.{id.rpartition(".")[2]}"',
        "ETag": etag,
    }
    if etag in (tag.strip() for tag in request.headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers=headers)
    return Response(file.data, media_type=file.media_type, headers=headers)


@router.head(
    FILE_PATH,
    summary="Whether a finished picture is still there",
    response_class=Response,
    responses={
        200: {"description": "It is there."},
        304: {"description": "The caller has it already (If-None-Match)."},
        404: {"description": "There never was a file of this id."},
        410: {"description": "It was there, and has expired."},
        503: {"description": "The place of files does not answer now."},
    },
)
async def head_file(id: str, request: Request) -> Response:
    """The same without the picture, which the server itself leaves out of what answers HEAD."""
    return await get_file(id, request)
