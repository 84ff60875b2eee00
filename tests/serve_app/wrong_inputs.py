"""Requests that must be refused: one row each, with what the answer has to say.

Used twice: against the app alone, and against a running server, which must go on serving.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WrongInput:
    """A request, and its refusal: status, the field at fault, and a phrase of the message."""

    name: str
    status: int
    param: str | None
    phrase: str
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


def fields(name: str, param: str | None, phrase: str, status: int = 400, **values: Any) -> WrongInput:
    """A row whose body is a JSON object, with a good prompt unless the row has its own."""
    return WrongInput(name, status, param, phrase, json.dumps({"prompt": "a red circle"} | values).encode())


def raw(name: str, phrase: str, body: bytes, param: str | None = None, **more: Any) -> WrongInput:
    """A row whose body is sent as it stands."""
    return WrongInput(name, more.pop("status", 400), param, phrase, body, **more)


def announced(name: str, phrase: str, **headers: str) -> WrongInput:
    """A row whose headers announce something that is not read here."""
    named = {header.replace("_", "-"): value for header, value in headers.items()}
    return WrongInput(name, 415, None, phrase, b'{"prompt": "a red circle"}', named)


#: Refused by the schema alone.
OF_THE_BODY = (
    # the prompt
    raw("no prompt", "prompt is required", b"{}", "prompt"),
    fields("empty prompt", "prompt", "prompt is empty", prompt=""),
    fields("white prompt", "prompt", "nothing but white space", prompt=" \n\t\u3000"),
    fields("prompt a number", "prompt", "must be text, got 7", prompt=7),
    fields("prompt null", "prompt", "must be text, got null", prompt=None),
    fields("prompt a list", "prompt", 'must be text, got ["a"]', prompt=["a"]),
    fields("huge prompt", "prompt", "at most 32,000 characters, got 32,001", prompt="a" * 32_001),
    fields("null character", "prompt", "null character at position 3", prompt="red\0circle"),
    raw("half a surrogate pair", "surrogate", b'{"prompt": "red \\ud800 circle"}', "prompt"),
    fields("negative prompt a number", "negative_prompt", "must be text, got 3", negative_prompt=3),
    fields("huge negative prompt", "negative_prompt", "at most 32,000", negative_prompt="b" * 40_000),
    fields("null in negative prompt", "negative_prompt", "null character", negative_prompt="\0"),
    # how many
    fields("n 0", "n", "at least 1, got 0", n=0),
    fields("n 11", "n", "at most 10, got 11", n=11),
    fields("n negative", "n", "at least 1, got -1", n=-1),
    fields("n a fraction", "n", "whole number, got 1.5", n=1.5),
    fields("n text", "n", "whole number, got '2'", n="2"),
    fields("n true", "n", "whole number, got true", n=True),
    # the size
    fields("size of one number", "size", "WIDTHxHEIGHT", size="512"),
    fields("size in words", "size", "WIDTHxHEIGHT", size="large"),
    fields("size a number", "size", "must be text, got 512", size=512),
    fields("size 0", "size", "WIDTHxHEIGHT", size="0x256"),
    fields("size negative", "size", "WIDTHxHEIGHT", size="-256x256"),
    fields("size with other digits", "size", "WIDTHxHEIGHT", size="２５６x２５６"),
    fields("size empty", "size", "WIDTHxHEIGHT", size=""),
    # quality, steps, guidance, seed
    fields("quality unknown", "quality", "'low', 'medium', 'high' or 'auto'", quality="hd"),
    fields("quality a number", "quality", "must be one of", quality=1),
    fields("no steps", "num_inference_steps", "at least 1, got 0", num_inference_steps=0),
    fields("steps a fraction", "num_inference_steps", "whole number", num_inference_steps=7.5),
    fields("guidance negative", "guidance_scale", "at least 0, got -1", guidance_scale=-1),
    fields("guidance text", "guidance_scale", "must be a number, got 'high'", guidance_scale="high"),
    raw("guidance NaN", "NaN", b'{"prompt": "a", "guidance_scale": NaN}'),
    raw("guidance Infinity", "Infinity", b'{"prompt": "a", "guidance_scale": -Infinity}'),
    raw("guidance overflowing", "finite", b'{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale"),
    fields("seed negative", "seed", "at least 0, got -1", seed=-1),
    fields("enhance text", "enhance", "'model' or 'endpoint', got 'yes'", enhance="yes"),
    # the packing
    fields("url of a stream", "response_format", "with stream true", response_format="url", stream=True),
    fields("format of the response", "response_format", "b64_json", response_format="jpeg"),
    fields("gif", "output_format", "'png', 'jpeg' or 'webp'", output_format="gif"),
    fields("compression 101", "output_compression", "at most 100", output_compression=101),
    fields("compression below", "output_compression", "at least 0", output_compression=-1),
    fields("compressed png", "output_compression", "png is lossless", output_compression=50),
    # OpenAI's fields that cannot be honoured
    fields("transparent", "background", "no transparency", background="transparent"),
    fields("style", "style", "into the prompt", style="vivid"),
    fields("stream text", "stream", "true or false, got 'yes'", stream="yes"),
    fields("a stream of two", "n", "must be 1 with stream true, got 2", stream=True, n=2),
    fields("four previews", "partial_images", "at most 3, got 4", stream=True, partial_images=4),
    fields("previews below", "partial_images", "at least 0, got -1", stream=True, partial_images=-1),
    fields("previews text", "partial_images", "whole number, got '2'", stream=True, partial_images="2"),
    fields("previews of no stream", "partial_images", "needs stream true", partial_images=2),
    fields("moderation", "moderation", "'auto' or 'low'", moderation="off"),
    fields("user a number", "user", "must be text", user=1),
    # the model, and fields that are not there
    fields("model a number", "model", "must be text", model=3),
    fields("misspelt field", "stepz", "no field 'stepz'", stepz=8),
    fields("near field", "num_inference_step", "did you mean 'num_inference_steps'", num_inference_step=8),
    fields("several wrong: the unknown first", "colour", "no field 'colour'", colour="red", n=0),
    # what is no JSON object in UTF-8
    raw("empty body", "body is empty", b""),
    raw("white body", "body is empty", b"  \n"),
    raw("cut off", "not valid JSON", b'{"prompt": "a red'),
    raw("single quotes", "line 1, column 2", b"{'prompt': 'a'}"),
    raw("a list", "got an array", b'["a red circle"]'),
    raw("a string", "got a string", b'"a red circle"'),
    raw("null", "got null", b"null"),
    raw("a number", "got a number", b"7"),
    raw("twice the same field", "stands twice", b'{"prompt": "a", "prompt": "b"}', "prompt"),
    raw("nested deeply", "nested too deeply", b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    raw("thousands of digits", "digits", b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}"),
    raw("latin-1", "UTF-8; byte 12", '{"prompt": "é"}'.encode("latin-1")),
    raw("utf-16", "UTF-8", '{"prompt": "a"}'.encode("utf-16")),
    raw("gbk", "UTF-8", '{"prompt": "红色圆形"}'.encode("gbk")),
)

#: Refused for what surrounds the body.
OF_THE_TRANSPORT = (
    raw("too large", "at most 1,048,576 bytes", b'{"prompt": "' + b"a" * 1_100_000 + b'"}', status=413),
    announced("a form", "must be application/json", content_type="application/x-www-form-urlencoded"),
    announced("no content type", "got none", content_type=""),
    announced("plain text", "must be application/json", content_type="text/plain"),
    announced("another charset", "charset must be utf-8", content_type="application/json; charset=gb18030"),
    announced(
        "compressed", "send the body uncompressed", content_type="application/json", content_encoding="gzip"
    ),
)

#: Refused because of what the loaded model can draw.
OF_THE_MODEL = (
    fields("size off the grid", "size", "multiple of 32", size="100x96"),
    fields("height off the grid", "size", "multiple of 32", size="96x100"),
    fields("size enormous", "size", "must be from", size="65536x65536"),
    fields("endless steps", "num_inference_steps", "from 1 to 100", num_inference_steps=100_000),
    fields("guidance enormous", "guidance_scale", "from 0 to 20", guidance_scale=1e6),
    fields("seed enormous", "seed", "seed", seed=2**80),
    fields("seed without room for n", "seed", "counts up", seed=2**32 - 1, n=2),
    fields("other model", "model", "no model 'dall-e-3'", status=404, model="dall-e-3"),
)

WRONG_INPUTS: tuple[WrongInput, ...] = (*OF_THE_BODY, *OF_THE_TRANSPORT, *OF_THE_MODEL)
