"""`/v1/history`: what was drawn on the page, each caller's own, newest first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, cast, get_args

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from serve_app import openai_schema as schema
from serve_app.error_mapping import RequestRefused
from serve_app.history.conversion import as_file
from serve_app.history.history import History, is_id
from serve_app.history.index import KeptPicture
from serve_app.image_codec import FileFormat, read_receipt
from serve_app.routes.answers import AnsweringRoute
from serve_app.signing import Signing, is_signed

router = APIRouter(tags=["history"], route_class=AnsweringRoute)

HISTORY_PATH = "/v1/history"
_PICTURE_PATH = HISTORY_PATH + "/{picture_id}"

MOST_A_PAGE = 200
FIRST_PAGE = 48
MOST_WORDS = 10
MOST_CHARACTERS = 200

MEDIA_TYPES: dict[FileFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
#: Smaller than the API's own default, for pictures that people hand on.
DEFAULT_QUALITY = 90
_FOR_EVER_SECONDS = 365 * 24 * 3600
#: As kept files: no browser makes anything of them but the type that they are given out as.
_INERT = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Referrer-Policy": "no-referrer",
}


class HistoryPicture(BaseModel):
    """A picture that was drawn on the page: `parameters` draw it again by POST /v1/images/generations."""

    id: str
    object: Literal["history.picture"] = "history.picture"
    created: int
    width: int
    height: int
    parameters: dict[str, Any]
    #: The prompt that was drawn: with what the server added, where it was to.
    revised_prompt: str
    url: str
    thumbnail_url: str


class HistoryList(BaseModel):
    """A page, newest first; `before` of the next one is the id of the last picture."""

    object: Literal["list"] = "list"
    data: list[HistoryPicture]
    has_more: bool


def history_of(request: Request) -> History:
    """The history that the ingress put on the app. Raises RequestRefused (404) where it is off."""
    history = cast("History | None", request.app.state.history)
    if history is None:
        raise RequestRefused(
            "This server keeps no history: it was started with --no-history.", None, "history_off", 404
        )
    return history


def owner_of(scope: Mapping[str, Any]) -> str:
    """Whose history a request is about: the name of its key; without keys all callers have one together."""
    return cast(str, scope.get("state", {}).get("caller") or "")


_OFF = {
    "model": schema.ErrorResponse,
    "description": "There is no such picture, it is another caller's, or the server keeps no history.",
}
_WRONG = {"model": schema.ErrorResponse, "description": "A field cannot be used; the message says why."}
_UNAVAILABLE = {"model": schema.ErrorResponse, "description": "The history does not answer at the moment."}
_ANSWERS: dict[int | str, dict[str, Any]] = {404: _OFF, 503: _UNAVAILABLE}
_NOT_MODIFIED = {"description": "The caller has it already (If-None-Match)."}


@router.get(
    HISTORY_PATH,
    summary="What one has drawn on the page, newest first",
    response_model=None,
    responses={200: {"model": HistoryList, "description": "A page."}, 400: _WRONG, **_ANSWERS},
    openapi_extra={
        "parameters": [
            {
                "name": "limit",
                "in": "query",
                "schema": {"type": "integer", "minimum": 1, "maximum": MOST_A_PAGE},
                "description": f"Pictures a page; without it {FIRST_PAGE}.",
            },
            {
                "name": "before",
                "in": "query",
                "schema": {"type": "string", "pattern": "^[0-9a-f]{14}-[A-Za-z0-9_-]{24}$"},
                "description": "The id of the last picture of the page before, be it removed since.",
            },
            {
                "name": "q",
                "in": "query",
                "schema": {"type": "string", "maxLength": MOST_CHARACTERS},
                "description": "Words that each stand in the prompt, as it was asked for or drawn.",
            },
        ]
    },
)
async def page(request: Request) -> JSONResponse:
    asked = request.query_params
    text = asked.get("limit", str(FIRST_PAGE))
    if not (text.isascii() and text.isdecimal() and len(text) <= 3 and 1 <= int(text) <= MOST_A_PAGE):
        raise RequestRefused(f"limit must be a number from 1 to {MOST_A_PAGE}.", "limit")
    before = asked.get("before")
    if before is not None and not is_id(before):
        raise RequestRefused("before must be the id of a picture of the history, as it was told.", "before")
    if len(query := asked.get("q", "")) > MOST_CHARACTERS:
        raise RequestRefused(
            f"q may have at most {MOST_CHARACTERS} characters, got {len(query)}; a few words do.", "q"
        )
    words = query.split()[:MOST_WORDS]
    found, has_more = await history_of(request).page(owner_of(request.scope), int(text), before, words)
    return JSONResponse(
        {"object": "list", "data": [_told(each) for each in found], "has_more": has_more},
        headers={"Cache-Control": "no-store"},
    )


@router.get(
    _PICTURE_PATH,
    summary="How a picture of the history was drawn",
    response_model=None,
    responses={200: {"model": HistoryPicture, "description": "The picture's parameters."}, **_ANSWERS},
)
async def get(picture_id: str, request: Request) -> JSONResponse:
    kept = await _kept(request, picture_id)
    return JSONResponse(_told(kept), headers={"Cache-Control": "no-store"})


@router.get(
    _PICTURE_PATH + "/picture",
    summary="A picture of the history, as the file that one wants",
    response_class=Response,
    responses={
        200: {
            "description": "As png the very file that was drawn; as webp or jpeg one made of it, which tells "
            "the same of how it was drawn.",
            "content": {media_type: {} for media_type in MEDIA_TYPES.values()},
        },
        304: _NOT_MODIFIED,
        400: _WRONG,
        **_ANSWERS,
    },
    openapi_extra={
        "parameters": [
            {
                "name": "format",
                "in": "query",
                "schema": {"enum": list(MEDIA_TYPES)},
                "description": "png, webp or jpeg; without it png.",
            },
            {
                "name": "quality",
                "in": "query",
                "schema": {"type": "integer", "minimum": 0, "maximum": 100},
                "description": f"Of webp and jpeg, 0 to 100; without it {DEFAULT_QUALITY}. png is lossless.",
            },
            {
                "name": "download",
                "in": "query",
                "schema": {"enum": [0, 1]},
                "description": "1: browsers save it, under a name with its time and seed.",
            },
        ]
    },
)
async def picture(picture_id: str, request: Request) -> Response:
    asked = request.query_params
    wanted = asked.get("format", "png")
    if wanted not in get_args(FileFormat):
        raise RequestRefused(f"format must be one of {', '.join(MEDIA_TYPES)}.", "format")
    file_format = cast(FileFormat, wanted)
    text = asked.get("quality", str(DEFAULT_QUALITY))
    if not (text.isascii() and text.isdecimal() and len(text) <= 3 and int(text) <= 100):
        raise RequestRefused("quality must be a number from 0 to 100.", "quality")
    if (download := asked.get("download", "0")) not in ("0", "1"):
        raise RequestRefused("download must be 0 or 1.", "download")
    kept = await _kept(request, picture_id)
    name = _file_name(kept, file_format)
    disposition = "attachment" if download == "1" else "inline"
    headers = _headers(f"{picture_id}.{file_format}{'' if file_format == 'png' else int(text)}")
    headers["Content-Disposition"] = f'{disposition}; filename="{name}"'
    png = await history_of(request).picture(owner_of(request.scope), picture_id)
    if png is None:
        _refuse_unknown()
    if _has_it(request, headers):
        return Response(status_code=304, headers=headers)
    content = png
    if file_format != "png":
        signing = cast("Signing | None", request.app.state.signing)
        content = await asyncio.to_thread(_converted, png, file_format, int(text), signing)
    return Response(content, media_type=MEDIA_TYPES[file_format], headers=headers)


def _converted(png: bytes, file_format: FileFormat, quality: int, signing: Signing | None) -> bytes:
    """Signed where the picture is. Raises SigningFailed."""
    file = as_file(png, file_format, quality)
    return signing.signed(file, read_receipt(file)) if signing is not None and is_signed(png) else file


@router.get(
    _PICTURE_PATH + "/thumbnail",
    summary="A picture of the history, small",
    response_class=Response,
    responses={
        200: {"description": "A WebP of at most 256 pixels a side.", "content": {"image/webp": {}}},
        304: _NOT_MODIFIED,
        **_ANSWERS,
    },
)
async def thumbnail(picture_id: str, request: Request) -> Response:
    content = await history_of(request).thumbnail(owner_of(request.scope), picture_id)
    if content is None:
        _refuse_unknown()
    headers = _headers(f"{picture_id}.thumbnail")
    if _has_it(request, headers):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type="image/webp", headers=headers)


@router.delete(
    _PICTURE_PATH,
    summary="Remove a picture from the history",
    status_code=204,
    response_class=Response,
    responses={204: {"description": "It is gone for good."}, **_ANSWERS},
)
async def remove(picture_id: str, request: Request) -> Response:
    if not await history_of(request).remove(owner_of(request.scope), picture_id):
        _refuse_unknown()
    return Response(status_code=204)


@router.delete(
    HISTORY_PATH,
    summary="Remove all of one's own pictures from the history",
    status_code=204,
    response_class=Response,
    responses={204: {"description": "All are gone for good; there may have been none."}, **_ANSWERS},
)
async def remove_all(request: Request) -> Response:
    await history_of(request).remove_all(owner_of(request.scope))
    return Response(status_code=204)


async def _kept(request: Request, id: str) -> KeptPicture:
    kept = await history_of(request).get(owner_of(request.scope), id)
    if kept is None:
        _refuse_unknown()
    return kept


def _refuse_unknown() -> NoReturn:
    raise RequestRefused(
        "There is no picture of this id in your history; it may have been removed, or be another's.",
        None,
        "history_picture_not_found",
        404,
    )


def _told(kept: KeptPicture) -> dict[str, Any]:
    url = f"{HISTORY_PATH}/{kept.id}"
    return {
        "id": kept.id,
        "object": "history.picture",
        "created": kept.created,
        "width": kept.width,
        "height": kept.height,
        # A half of a character, which JSON can name and no answer can hold, is not worth a lost page.
        "parameters": _sendable(kept.parameters),
        "revised_prompt": kept.revised_prompt,
        "url": f"{url}/picture",
        "thumbnail_url": f"{url}/thumbnail",
    }


def _sendable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {_sendable(key): _sendable(each) for key, each in value.items()}
    return [_sendable(each) for each in value] if isinstance(value, list) else value


def _headers(etag: str) -> dict[str, str]:
    """What is at such an address never changes; what is removed is another matter, and its owner's own."""
    return {
        **_INERT,
        "Cache-Control": f"private, max-age={_FOR_EVER_SECONDS}, immutable",
        "ETag": f'"{etag}"',
        # Who comes with another key must not see what the browser still has of the one before.
        "Vary": "Authorization",
    }


def _has_it(request: Request, headers: Mapping[str, str]) -> bool:
    sent = request.headers.get("if-none-match", "")
    return headers["ETag"] in (tag.strip().removeprefix("W/") for tag in sent.split(","))


def _file_name(kept: KeptPicture, file_format: str) -> str:
    when = time.strftime("%Y%m%d-%H%M%S", time.gmtime(kept.created))
    seed = kept.parameters.get("seed")
    return f"zimage-{when}{f'-{seed}' if isinstance(seed, int) else ''}.{file_format}"
