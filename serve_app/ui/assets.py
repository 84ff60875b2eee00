"""The page's own scripts and styles: read once, named by their content, put into the page's head.

Every file of the folder `static` is in the page: `first.js` before anything else runs, each other script as a
module. Knows nothing of what the files do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.ui.texts import SCRIPT_TEXTS

FOLDER = Path(__file__).with_name("static")
#: Below it stand the files, under a name that changes with their content.
PREFIX = "/page"
#: Runs before Gradio's bundle, so that what it does is settled before the first picture of the page.
FIRST = "first.js"
MEDIA_TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
#: A year: what is under this address never changes.
_IMMUTABLE = "public, max-age=31536000, immutable"

_HEAD = b"<head>"


@dataclass(frozen=True)
class Assets:
    """The files by name, and the digest of them all: scripts import one another by relative address."""

    digest: str
    files: Mapping[str, bytes]

    def address(self, name: str) -> str:
        return f"{PREFIX}/{self.digest}/{name}"

    def head(self) -> str:
        """What belongs at the beginning of the page's head: words, styles, scripts."""
        # "<" as an escape: no sentence can end the element that it stands in.
        words = json.dumps(
            {key: {"en": text.en, "zh": text.zh} for key, text in SCRIPT_TEXTS.items()}, ensure_ascii=False
        ).replace("<", "\\u003c")
        lines = [f'<script type="application/json" id="page-texts">{words}</script>']
        if FIRST in self.files:
            lines.append(f'<script src="{escape(self.address(FIRST))}"></script>')
        for name in self.files:
            address = escape(self.address(name))
            if name.endswith(".css"):
                lines.append(f'<link rel="stylesheet" href="{address}">')
            elif name != FIRST:
                lines.append(f'<script type="module" src="{address}"></script>')
        return "\n".join(lines)


def read_assets(folder: Path) -> Assets:
    """Every script and style of the folder."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in MEDIA_TYPES)
    files = {path.name: path.read_bytes() for path in paths}
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return Assets(digest.hexdigest()[:16], files)


@cache
def assets() -> Assets:
    """The files that came with the program."""
    return read_assets(FOLDER)


def head() -> str:
    """What belongs at the beginning of the page's head."""
    return assets().head()


router = APIRouter(include_in_schema=False)


@router.api_route(PREFIX + "/{digest}/{name}", methods=["GET", "HEAD"])
async def file(digest: str, name: str, request: Request) -> Response:
    """A file of the page. Under the digest of another version, as a page has it that was open during an
    update, it is the one of now, and is not to be kept."""
    content = assets().files.get(name)
    if content is None:
        return PlainTextResponse("There is no such file of the page.", status_code=404)
    is_now = digest == assets().digest
    return Response(
        content,
        media_type=MEDIA_TYPES[Path(name).suffix],
        headers={
            "Cache-Control": _IMMUTABLE if is_now else "no-cache",
            "X-Content-Type-Options": "nosniff",
        },
    )


class PageHead:
    """Puts `head()` first into the head of the page's document.

    Gradio adds a head of ours too, but with its own scripts, when they have run: too late to tell them the
    language, and a flash of the wrong colours.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        parts: list[bytes] = []

        async def send_with_head(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message.get("headers", ())))
                is_document = headers.get("content-type", "").startswith("text/html")
                if not is_document or "content-encoding" in headers:
                    await send(message)
                    return
                start = message
                return
            if start is None:
                await send(message)
                return
            parts.append(message.get("body", b""))
            if message.get("more_body", False):
                return
            body = b"".join(parts).replace(_HEAD, _HEAD + b"\n" + head().encode(), 1)
            headers = MutableHeaders(raw=[pair for pair in start["headers"] if pair[0] != b"content-length"])
            if scope["method"] == "GET":
                headers["content-length"] = str(len(body))
            # The page names its files by their content: an old page would name those of before.
            headers["cache-control"] = "no-cache"
            await send({**start, "headers": headers.raw})
            await send({"type": "http.response.body", "body": body})

        await self._app(scope, receive, send_with_head)
