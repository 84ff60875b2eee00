"""`/docs`: the API described on one page that asks no other host for anything.

FastAPI's own page loads its scripts from a network that a machine without internet does not reach.
What stands here is read from the same OpenAPI document, `/openapi.json`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
h2 { margin-top: 2.5rem; } h2 code { font-size: 1.1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; }
tr + tr { border-top: 1px solid #8884; }
pre { padding: .75rem 1rem; overflow-x: auto; background: #8881; border-radius: .5rem; }
"""

_EXAMPLE = """
curl {url}v1/images/generations \\
  -H 'Content-Type: application/json' \\
  -d '{{"prompt": "a red circle on a white background", "seed": 1}}'

from openai import OpenAI

client = OpenAI(base_url="{url}v1", api_key="none")  # or the server's key, where it has one
picture = client.images.generate(prompt="a red circle on a white background").data[0].b64_json
"""


@router.get("/docs", response_class=HTMLResponse)
async def docs(request: Request) -> HTMLResponse:
    return HTMLResponse(page(request.app.openapi(), str(request.base_url)))


#: What the gates before every route may answer.
_OF_THE_GATES = {
    "401": "The server asks for a key, and there was none or a wrong one.",
    "403": "The key may not do this, or the request came from another site's page.",
    "421": "The server does not go by the name that it was called by.",
}
#: And to a request with a body.
_OF_THE_BODY = {
    "404": "There is no model of this name here.",
    "408": "The body took too long to arrive.",
    "413": "The body is too large.",
    "415": "The body is announced as something other than JSON in UTF-8.",
}


def describe_gates(app: FastAPI, open_paths: Collection[str], needs_key: bool) -> None:
    """Let the app's document tell also what stands before its routes: keys, and what all may answer."""
    of_the_routes = app.openapi

    def whole() -> dict[str, Any]:
        if app.openapi_schema is None:
            _tell_of_gates(of_the_routes(), open_paths, needs_key)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = whole  # type: ignore[method-assign]


def _tell_of_gates(document: dict[str, Any], open_paths: Collection[str], needs_key: bool) -> None:
    refusal = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            answers = operation["responses"]
            # Every path is a text, so FastAPI's own refusal of one cannot come.
            if "HTTPValidationError" in str(answers.get("422")):
                del answers["422"]
            for status, description in {
                **({} if path in open_paths else _OF_THE_GATES),
                **(_OF_THE_BODY if "requestBody" in operation else {}),
            }.items():
                answers.setdefault(status, {"description": description, "content": refusal})
            operation["responses"] = dict(sorted(answers.items()))
            if path not in open_paths:
                operation["security"] = [{"key": []}] if needs_key else [{}, {"key": []}]


def page(openapi: Mapping[str, Any], url: str) -> str:
    """The OpenAPI document as HTML; `url` is where the server is reached, with a slash behind."""
    info = openapi["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    operations = "\n".join(
        part
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
        for part in _operation(path, method, operation)
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1><p>{escape(info['description'])} "
        '<a href="openapi.json">openapi.json</a> has the same for programs.</p>'
        f"<pre>{escape(_EXAMPLE.format(url=url).strip())}</pre>{operations}</body></html>"
    )


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}.</p>"
    body = operation.get("requestBody")
    if body:
        schema = next(iter(body["content"].values()))["schema"]
        yield _table(_field(name, field, schema) for name, field in schema["properties"].items())
    yield _table((status, answer["description"]) for status, answer in operation["responses"].items())


def _field(name: str, field: Mapping[str, Any], schema: Mapping[str, Any]) -> tuple[str, str]:
    needed = " Required." if name in schema.get("required", ()) else ""
    return name, field["description"] + needed


def _table(rows: Iterator[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th><code>{escape(name)}</code></th><td>{escape(text)}</td>" for name, text in rows)
    return f"<table>{cells}</table>"
