"""The OpenAPI document keeps its word: requests made from it, right and wrong ones, by schemathesis.

Some hundreds in the suite. The long form, with another seed each time, makes 5,000 and more in two parts, the
second where nothing is drawn and no prompt made up:

    OPENAPI_CASES=100 python -m pytest tests/serve_app/test_openapi_document.py -k "POST"
    OPENAPI_CASES=500 python -m pytest tests/serve_app/test_openapi_document.py -k "GET or HEAD or DELETE"

Each way of each operation gets as many. Where requests ask for pictures, they ask for small and quick ones,
because what a picture costs is not what is tried here.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
from collections import Counter
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from PIL import Image
from ray import serve
from schemathesis import Case, GenerationMode
from schemathesis.transport.serialization import Binary

from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.reproduction import read_given
from serve_app.service import ImageService
from serve_app.settings import Settings
from tests.serve_app.conftest import client_of

CASES_IN_THE_SUITE = 12
CASES = int(os.environ.get("OPENAPI_CASES", CASES_IN_THE_SUITE))
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE

DRAW, REPRODUCE, JOBS = "/v1/images/generations", "/v1/images/reproduce", "/v1/images/jobs"
PARAMETERS, HISTORY = "/v1/images/parameters", "/v1/history"
SMALL = {"size": "64x64", "num_inference_steps": 1}
#: What is done of most right requests; elsewhere they ask for what is not there.
ANSWERED = (
    (DRAW, "POST"),
    ("/v1/images/edits", "POST"),
    ("/v1/images/variations", "POST"),
    (REPRODUCE, "POST"),
    (PARAMETERS, "POST"),
    (HISTORY, "GET"),
    (JOBS, "POST"),
    (JOBS, "GET"),
    ("/v1/prompts/enhance", "POST"),
    ("/v1/prompts/analyze", "POST"),
)
#: What can be asked in more than one way; the rest has no parameters, and is asked once.
WITH_INPUT = (
    (DRAW, "POST", RIGHT),
    (DRAW, "POST", WRONG),
    ("/v1/prompts/enhance", "POST", RIGHT),
    ("/v1/prompts/enhance", "POST", WRONG),
    ("/v1/prompts/analyze", "POST", RIGHT),
    ("/v1/prompts/analyze", "POST", WRONG),
    ("/v1/images/edits", "POST", RIGHT),
    ("/v1/images/edits", "POST", WRONG),
    ("/v1/images/variations", "POST", RIGHT),
    ("/v1/images/variations", "POST", WRONG),
    (REPRODUCE, "POST", RIGHT),
    (REPRODUCE, "POST", WRONG),
    (PARAMETERS, "POST", RIGHT),
    (PARAMETERS, "POST", WRONG),
    (HISTORY, "GET", RIGHT),
    (HISTORY, "GET", WRONG),
    (f"{HISTORY}/{{picture_id}}", "GET", RIGHT),
    (f"{HISTORY}/{{picture_id}}", "DELETE", RIGHT),
    (f"{HISTORY}/{{picture_id}}/picture", "GET", RIGHT),
    (f"{HISTORY}/{{picture_id}}/picture", "GET", WRONG),
    (f"{HISTORY}/{{picture_id}}/thumbnail", "GET", RIGHT),
    (JOBS, "POST", RIGHT),
    (JOBS, "POST", WRONG),
    (JOBS, "GET", RIGHT),
    (JOBS, "GET", WRONG),
    (f"{JOBS}/{{job_id}}", "GET", RIGHT),
    (f"{JOBS}/{{job_id}}", "DELETE", RIGHT),
    (f"{JOBS}/{{job_id}}/events", "GET", RIGHT),
    ("/v1/models/{model_id}", "GET", RIGHT),
    ("/v1/loras", "GET", RIGHT),
    ("/v1/files/{id}", "GET", RIGHT),
    ("/v1/files/{id}", "HEAD", RIGHT),
)
WITHOUT_INPUT = (
    ("/v1/models", "GET"),
    ("/v1/loras", "GET"),
    (HISTORY, "DELETE"),
    ("/healthz", "GET"),
    ("/readyz", "GET"),
    ("/metrics", "GET"),
)


@pytest.fixture(scope="module")
def api_app(
    worker_handle: serve.handle.DeploymentHandle,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> FastAPI:
    chosen: Settings = request.getfixturevalue("settings")
    # The name that schemathesis calls an app by.
    update = {
        "allowed_hosts": ("testserver",),
        "data_dir": tmp_path_factory.mktemp("data"),
        "offered_enhancers": ("model", "endpoint"),
    }
    chosen = chosen.model_copy(update=update)
    return build_asgi_app(ImageService(worker_handle, ServerMetrics("test"), chosen), chosen)


@pytest.fixture(scope="module")
def drawn(api_app: FastAPI) -> dict[str, bytes]:
    """A picture that was drawn here, with its receipt in it, as each kind of file."""

    async def draw(output_format: str) -> bytes:
        async with client_of(api_app) as client:
            fields = {**SMALL, "prompt": "a red circle", "output_format": output_format}
            answer = await client.post(DRAW, json=fields)
        return base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"])

    return {f"image/{each}": asyncio.run(draw(each)) for each in ("png", "jpeg", "webp")}


def half_transparent() -> bytes:
    """A PNG as large as what is drawn here: a picture, and a mask too."""
    picture = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 32, 64))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def document(api_app: FastAPI, drawn: dict[str, bytes]) -> Any:
    # Files as they are: what is made up is no picture, or one without a receipt.
    for media_type, picture in drawn.items():
        schemathesis.openapi.media_type(media_type, st.just(picture))
    return schemathesis.openapi.from_asgi("/openapi.json", api_app)


def quick(body: dict[str, Any]) -> None:
    """The same for a small picture of few steps, and of what the loaded model has.

    How many steps, which sizes and which fields together a model bears, it says itself (400).
    """
    small: dict[str, Any] = {**SMALL, "model": "default"}
    body.update({name: value for name, value in small.items() if body.get(name) is not None})
    body["num_inference_steps"] = 1
    body.pop("n", None)
    if body.get("output_format") in (None, "png"):
        body.pop("output_compression", None)
    if not body.get("stream"):
        body.pop("partial_images", None)
    elif body.get("response_format") == "url":
        body.pop("response_format")
    body.pop("loras", None)
    # Where it is asked for, the name of the host is looked up.
    body.pop("webhook", None)


def made_possible(case: Case, receipt_of: bytes) -> Case:
    """A right request with receipts and ids in it that there are, which nothing can make up."""
    if case.meta is None or case.meta.generation.mode is not RIGHT:
        return case
    case.query.pop("after", None)
    if isinstance(case.body, dict) and case.path == REPRODUCE:
        given = {
            "image": base64.b64encode(receipt_of).decode(),
            "receipt": read_given(receipt_of).receipt,
        }
        case.body = {name: given[name] for name in case.body if name in given}
    elif isinstance(case.body, dict) and case.path == PARAMETERS:
        case.body["image"] = Binary(receipt_of)
    elif isinstance(case.body, dict) and case.path.startswith("/v1/images/"):
        quick(case.body)
        files = {name: Binary(half_transparent()) for name in ("image", "mask") if name in case.body}
        case.body.update(files)
    return case


@st.composite
def asked(draw: st.DrawFn, requests: st.SearchStrategy[Case]) -> Case:
    """One of them; of forms some wrong ones hold a file where schemathesis itself cannot check it."""
    try:
        return draw(requests)
    except ValueError as error:
        if "Unsupported type: 'Binary'" not in str(error):
            raise
    reject()


@pytest.mark.parametrize(("path", "method", "mode"), WITH_INPUT, ids=str)
def test_every_answer_is_one_that_the_document_tells_of(
    document: Any, drawn: dict[str, bytes], path: str, method: str, mode: GenerationMode
) -> None:
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        derandomize=CASES == CASES_IN_THE_SUITE,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=asked(document[path][method].as_strategy(generation_mode=mode)))
    def keeps_its_word(case: Case) -> None:
        response = made_possible(case, drawn["image/png"]).call()
        statuses[response.status_code] += 1
        case.validate_response(response)

    keeps_its_word()
    assert statuses.total() >= CASES, statuses
    done = sum(number for status, number in statuses.items() if status < 300)
    assert (done > CASES / 2) is ((path, method) in ANSWERED and mode is RIGHT), statuses


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
