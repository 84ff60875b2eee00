"""Debian's Prometheus reads our OpenMetrics text, and keeps the names of requests beside the buckets."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.service import ImageService
from serve_app.settings import load_settings
from tests.monitoring.live import prometheus_over
from tests.ports import free_ports
from tests.serve_app.conftest import client_of
from tests.serve_app.test_metrics import REPORT
from tests.serve_app.test_service import ScriptedWorkers

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PLAIN = "text/plain; version=1.0.0; charset=utf-8"
EXEMPLAR = {"request_id": "a-client-chose-this", "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736"}
#: What a scraper accepts, and what it gets. The first is what Debian's Prometheus sends.
ACCEPTED = {
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1": OPENMETRICS,
    "application/openmetrics-text": OPENMETRICS,
    "text/plain;version=1.0.0;escaping=allow-utf-8": PLAIN,
    "text/plain;version=0.0.4": PLAIN,
    "application/json": PLAIN,
    "*/*": PLAIN,
    "": PLAIN,
}


@pytest.fixture
def application() -> FastAPI:
    """The server's face, over an ingress that has served one request in 4 seconds."""
    settings, metrics = load_settings(ui=False), ServerMetrics("test")
    metrics.record(REPORT, 4.0, exemplar=EXEMPLAR)
    service = ImageService(ScriptedWorkers(), metrics, settings)  # type: ignore[arg-type]
    return build_asgi_app(service, settings)


@pytest.mark.parametrize("accept", ACCEPTED, ids=lambda accept: accept[:40] or "nothing")
async def test_only_who_asks_for_openmetrics_gets_it(application: FastAPI, accept: str) -> None:
    async with client_of(application) as client:
        answer = await client.get("/metrics", headers={"accept": accept})
    assert answer.headers["content-type"] == ACCEPTED[accept]
    assert answer.text.endswith("# EOF\n") is ("trace_id" in answer.text) is (ACCEPTED[accept] == OPENMETRICS)


def test_prometheus_keeps_the_name_of_a_request(
    prometheus: None, application: FastAPI, tmp_path: Path
) -> None:
    port, prometheus_port = free_ports(2)
    asked = {"query": "zimage_request_seconds_bucket", "start": time.time() - 60, "end": time.time() + 60}
    deadline = time.monotonic() + 60
    with (
        _listening(application, port),
        prometheus_over(tmp_path / "prometheus", prometheus_port, {"ours": port}) as client,
    ):
        while not (found := client.get("/api/v1/query_exemplars", params=asked).json()["data"]):
            assert time.monotonic() < deadline, client.get("/api/v1/targets").text
            time.sleep(0.2)
        served = client.get("/api/v1/query", params={"query": 'zimage_requests_total{outcome="ok"}'}).json()
    (series,) = found
    (exemplar,) = series["exemplars"]
    assert (exemplar["labels"], float(exemplar["value"])) == (EXEMPLAR, 4.0)
    assert series["seriesLabels"]["le"] == "4.0", "as it is written for everybody"
    assert [each["value"][1] for each in served["data"]["result"]] == ["1"]


@contextmanager
def _listening(application: FastAPI, port: int) -> Iterator[None]:
    server = uvicorn.Server(uvicorn.Config(application, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(30)
