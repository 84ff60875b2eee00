"""The OpenAPI document keeps its word: requests made from it, right and wrong ones, by schemathesis.

Some hundreds in the suite. The long form, 5,000 and more with another seed each time:

    OPENAPI_CASES=1700 python -m pytest tests/serve_app/test_openapi_document.py

Each way of each operation gets as many. Where requests ask for pictures, they ask for small and quick ones,
because what a picture costs is not what is tried here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from ray import serve
from schemathesis import Case, GenerationMode

from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.service import ImageService
from serve_app.settings import Settings
from tests.serve_app.conftest import client_of

CASES_IN_THE_SUITE = 30
CASES = int(os.environ.get("OPENAPI_CASES", CASES_IN_THE_SUITE))
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE

DRAW = ("/v1/images/generations", "POST")
#: What is done of most right requests; elsewhere they ask for what is not there.
ANSWERED = (DRAW[0], "/v1/prompts/enhance", "/v1/prompts/analyze")
#: What can be asked in more than one way; the rest has no parameters, and is asked once.
WITH_INPUT = (
    (*DRAW, RIGHT),
    (*DRAW, WRONG),
    ("/v1/prompts/enhance", "POST", RIGHT),
    ("/v1/prompts/enhance", "POST", WRONG),
    ("/v1/prompts/analyze", "POST", RIGHT),
    ("/v1/prompts/analyze", "POST", WRONG),
    ("/v1/models/{model_id}", "GET", RIGHT),
    ("/v1/files/{id}", "GET", RIGHT),
)
WITHOUT_INPUT = (("/v1/models", "GET"), ("/healthz", "GET"), ("/readyz", "GET"), ("/metrics", "GET"))


@pytest.fixture(scope="module")
def api_app(worker_handle: serve.handle.DeploymentHandle, request: pytest.FixtureRequest) -> FastAPI:
    chosen: Settings = request.getfixturevalue("settings")
    # The name that schemathesis calls an app by.
    chosen = chosen.model_copy(update={"allowed_hosts": ("testserver",)})
    return build_asgi_app(ImageService(worker_handle, ServerMetrics("test"), chosen), chosen)


@pytest.fixture(scope="module")
def document(api_app: FastAPI) -> Iterator[Any]:
    yield schemathesis.openapi.from_asgi("/openapi.json", api_app)


def quick(case: Case) -> Case:
    """The same request for a small picture of few steps, and with a grid that the loaded model has.

    How many steps, which sizes and which fields together a model bears, it says itself (400).
    """
    body = case.body
    if case.path != DRAW[0] or not isinstance(body, dict) or case.meta is None:
        return case
    if case.meta.generation.mode is RIGHT:
        body["size"] = "64x64" if body.get("size") else None
        body["num_inference_steps"], body["n"] = 1, None
        body["model"] = "default" if body.get("model") else None
        if body.get("output_format") in (None, "png"):
            body["output_compression"] = None
        if not body.get("stream"):
            body["partial_images"] = None
        elif body.get("response_format") == "url":
            body["response_format"] = None
    return case


@pytest.mark.parametrize(("path", "method", "mode"), WITH_INPUT, ids=str)
def test_every_answer_is_one_that_the_document_tells_of(
    document: Any, path: str, method: str, mode: GenerationMode
) -> None:
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        derandomize=CASES == CASES_IN_THE_SUITE,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def keeps_its_word(case: Case) -> None:
        case = quick(case)
        response = case.call()
        statuses[response.status_code] += 1
        case.validate_response(response)

    keeps_its_word()
    assert statuses.total() >= CASES, statuses
    assert (statuses[200] > CASES / 2) is (path in ANSWERED and mode is RIGHT), statuses


@pytest.mark.parametrize(("path", "method"), WITHOUT_INPUT)
def test_what_takes_no_input_answers_as_the_document_tells(document: Any, path: str, method: str) -> None:
    document[path][method].Case().call_and_validate()


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "FOO"]
)
async def test_a_method_that_the_document_does_not_tell_is_answered_with_405(
    api_app: FastAPI, method: str
) -> None:
    async with client_of(api_app) as client:
        for path, methods in api_app.openapi()["paths"].items():
            if method.lower() not in methods:
                answer = await client.request(method, path.replace("{model_id}", "default"))
                assert answer.status_code == 405, (method, path)
                assert set(answer.headers["allow"].lower().split(", ")) <= {*methods, "head"}, (method, path)
