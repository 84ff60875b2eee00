"""The page behind two ingresses: what one of them begins, the other knows nothing of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve_app import haproxy
from tests.running_server import RunningServer, running_server

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(haproxy.binary() is None, reason="no HAProxy for this platform"),
]

#: Every address of 127.0.0.0/8 is this machine's, so each page has one of its own.
PAGES = tuple(f"127.0.0.{number}" for number in range(2, 14))
CALLS_A_PAGE = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    from tests.zimage_engine.tiny_models import write_tiny_z_image

    model = write_tiny_z_image(tmp_path_factory.mktemp("models") / "tiny-z-image")
    options = ("--model", str(model), "--device", "cpu", "--threads", "1")
    with running_server(*options, environment={"ZIMAGE_NUM_INGRESSES": "2"}) as running:
        yield running


#: The controls, in the order in which the page sends them.
VALUES = ["a dot", "", False, False, "64x64", 1, 1.0, "7", "{}", "en"]


def call(client: httpx.Client, session: str, fn_index: int, values: list[Any]) -> str:
    """One call as Gradio's page makes it: put into the queue, then the events to its end; their text."""
    asked = {"data": values, "fn_index": fn_index, "session_hash": session}
    joined = client.post("/gradio_api/queue/join", json=asked)
    assert joined.status_code == 200, joined.text
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as events:
        told = [json.loads(line.removeprefix("data: ")) for line in events.iter_lines() if line]
    (done,) = [event for event in told if event["msg"] == "process_completed"]
    assert done["success"], done
    return json.dumps(told, ensure_ascii=False)


def test_pages_of_many_addresses_reach_two_ingresses_and_no_call_fails(server: RunningServer) -> None:
    with httpx.Client(base_url=server.base_url, timeout=120) as client:
        dependencies = client.get("/config").json()["dependencies"]
    (draw,) = [each["id"] for each in dependencies if each["backend_fn"]]
    calls = 0
    for address in PAGES:
        transport = httpx.HTTPTransport(
            local_address=address, limits=httpx.Limits(max_keepalive_connections=0)
        )
        with httpx.Client(base_url=server.base_url, transport=transport, timeout=120) as page:
            for _ in range(CALLS_A_PAGE):
                told = call(page, f"page-{address}", draw, VALUES)
                assert "64 \u00d7 64" in told
                assert page.get("/page/status").json()["model"]["id"] == "tiny-z-image"
                calls += 1
            drawn = page.post("/v1/images/generations", json={"prompt": "a red circle", "size": "64x64"})
            assert drawn.status_code == 200, drawn.text
    assert calls == 36
    metrics = httpx.get(f"{server.base_url}/metrics", timeout=60).text
    counts = re.findall(r'^zimage_requests_total\{.*outcome="ok".*\} (\S+)$', metrics, re.MULTILINE)
    assert len(counts) == 2 and all(float(count) > 0 for count in counts), counts


def test_an_open_page_holds_no_request_so_an_ingress_can_end(server: RunningServer) -> None:
    """Gradio's pages hold one for ever where there is a session's state to be forgotten with it."""
    assert httpx.get(f"{server.base_url}/config", timeout=60).json()["connect_heartbeat"] is False
