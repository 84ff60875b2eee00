"""Reads a multipart form within limits: texts by name, and files as bytes, whatever they are called.

Knows neither the fields' meaning nor pictures.
"""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NoReturn

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from serve_app.error_mapping import RequestRefused

#: More than any route takes, so that the one too many can be named.
MAX_FILES = 20
MAX_TEXTS = 50
#: A prompt of 32,000 characters in UTF-8.
MAX_TEXT_BYTES = 128 * 1024

TEXT, FILE = "a text", "a file"


@dataclass(frozen=True, slots=True)
class Form:
    """What was sent. A file's name and announced type are its sender's affair, and not kept."""

    texts: dict[str, str]
    files: dict[str, list[bytes]] = field(repr=False)


async def read_form(request: Request) -> Form:
    """The form in the body.

    Raises RequestRefused: 415 where another kind of body is announced, 400 for one that is not whole, has
    too much in it, or a text twice.
    """
    _check_headers(request)
    try:
        async with aclosing(request.stream()) as body:
            parser = MultiPartParser(
                request.headers,
                body,
                max_files=MAX_FILES,
                max_fields=MAX_TEXTS,
                max_part_size=MAX_TEXT_BYTES,
            )
            sent = await parser.parse()
    except MultiPartException as error:
        _refuse(_sentence_on(error.message))
    except FormParserError:
        _refuse("The body is no whole multipart form; send it as HTTP clients make one, with its boundary.")
    try:
        texts: dict[str, str] = {}
        files: dict[str, list[bytes]] = {}
        for name, value in sent.multi_items():
            if isinstance(value, UploadFile):
                files.setdefault(name, []).append(await value.read())
            elif name in texts:
                _refuse(f"The field {name[:60]!r} stands twice; send it once.", name)
            else:
                texts[name] = value
        return Form(texts, files)
    finally:
        await sent.close()


def _sentence_on(told: str) -> str:
    """What the parser found, in our words: its own may change."""
    if told.startswith("Too many files"):
        return f"The form holds more than {MAX_FILES} files; send one picture, and a mask if need be."
    if told.startswith("Too many fields"):
        return f"The form holds more than {MAX_TEXTS} fields; send only those that the route knows."
    if told.startswith("Part exceeded"):
        return f"A field of the form is longer than {MAX_TEXT_BYTES // 1024} KiB; shorten it."
    return "The body is no whole multipart form; send it as HTTP clients make one, with its boundary."


def _check_headers(request: Request) -> None:
    announced = request.headers.get("content-type", "")
    media_type, options = parse_options_header(announced)
    if media_type.strip().lower() != b"multipart/form-data":
        raise RequestRefused(
            f"Content-Type must be multipart/form-data, got {announced[:100] or 'none'}; send the picture as "
            "the file 'image' of a form.",
            None,
            "unsupported_media_type",
            415,
        )
    # The parser would take any that Python has, some of which raise, or take long, for every text.
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        _refuse(f"The form announces charset {charset[:60]!r}; send its texts in utf-8.")
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise RequestRefused(
            f"Content-Encoding {coding[:100]} is not read here; send the body uncompressed.",
            None,
            "unsupported_media_type",
            415,
        )


def _refuse(message: str, name: str | None = None) -> NoReturn:
    raise RequestRefused(message, name, "invalid_multipart")
