"""What the OpenAPI document tells of jobs is so: requests made from it, right and wrong ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from ray import serve
from schemathesis import Case, GenerationMode

from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.service import ImageService
from serve_app.settings import Settings

JOBS = "/v1/images/jobs"
JOB = JOBS + "/{job_id}"
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = 30


@pytest.fixture(scope="module")
def document(
    worker_handle: serve.handle.DeploymentHandle,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    chosen: Settings = request.getfixturevalue("settings")
    # The name that schemathesis calls an app by.
    more = {"allowed_hosts": ("testserver",), "data_dir": tmp_path_factory.mktemp("data")}
    chosen = chosen.model_copy(update=more)
    app = build_asgi_app(ImageService(worker_handle, ServerMetrics("test"), chosen), chosen)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def drawable(case: Case) -> Case:
    """The same request with what the loaded model bears; what it does not bear it says itself (400)."""
    body = case.body
    if case.method == "POST" and isinstance(body, dict) and case.meta.generation.mode is RIGHT:
        body |= {"size": None, "n": None, "num_inference_steps": 1, "model": None, "webhook": None}
        body |= {"loras": None}
        if body.get("output_format") in (None, "png"):
            body["output_compression"] = None
    return case


@pytest.mark.parametrize(
    ("path", "method", "mode", "usual"),
    [
        (JOBS, "POST", RIGHT, 202),
        (JOBS, "POST", WRONG, 400),
        (JOBS, "GET", RIGHT, 200),
        (JOBS, "GET", WRONG, 400),
        (JOB, "GET", RIGHT, 404),
        (JOB, "DELETE", RIGHT, 404),
        (JOB + "/events", "GET", RIGHT, 404),
    ],
    ids=str,
)
def test_every_answer_is_one_that_the_document_tells_of(
    document: Any, path: str, method: str, mode: GenerationMode, usual: int
) -> None:
    statuses: Counter[int] = Counter()

    @hypothesis_settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[path][method].as_strategy(generation_mode=mode))
    def keeps_its_word(case: Case) -> None:
        response = drawable(case).call()
        statuses[response.status_code] += 1
        case.validate_response(response)

    keeps_its_word()
    assert statuses[usual] > CASES / 5, statuses


def test_a_job_that_is_there_is_told_as_the_document_tells(document: Any) -> None:
    accepted = document[JOBS]["POST"].Case(body={"prompt": "a", "num_inference_steps": 1})
    job = accepted.call_and_validate().json()["id"]
    for path, method in ((JOB, "GET"), (JOB, "DELETE"), (JOB, "GET"), (JOB + "/events", "GET")):
        document[path][method].Case(path_parameters={"job_id": job}).call_and_validate()
    late = document[JOB + "/events"]["GET"].Case(
        path_parameters={"job_id": job}, headers={"Last-Event-ID": "999999"}
    )
    assert late.call_and_validate().status_code == 204
