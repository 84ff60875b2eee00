"""A real server knows whom it draws for: each request's id, in, out and in the log, and the address."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.keys import DRAW, READ, Allowance, add_key
from serve_app.logs import REQUESTS
from serve_app.ui import build_page
from tests.running_server import running_server
from tests.serve_app.ui.painting_service import PaintingService
from tests.serve_app.ui.test_page import CONTROLS, STEPS
from tests.zimage_engine.sampling.overflowing_models import BFLOAT16, write_overflowing

URL = "/v1/images/generations"
ENGINE = "zimage_engine.engine"
QUICK = {"prompt": "an orangutan", "num_inference_steps": 3, "size": "64x64", "seed": 1}
FORGED = {"x-forwarded-for": "198.51.100.1", "x-zimage-proxy": "0" * 64}
#: What each path answers, asked with an id of its own.
PATHS: dict[str, tuple[str, str, dict[str, Any] | None, int]] = {
    "id-plain": ("POST", URL, QUICK, 200),
    "id-stream": ("POST", URL, QUICK | {"stream": True, "partial_images": 1}, 200),
    "id-wrong": ("POST", URL, QUICK | {"size": "1x1x1"}, 400),
    "id-nothing": ("GET", "/nothing", None, 404),
    "id-method": ("PUT", URL, QUICK, 405),
    "id-page": ("GET", "/", None, 200),
    "id-models": ("GET", "/v1/models", None, 200),
    "id-health": ("GET", "/readyz", None, 200),
}


@pytest.mark.server
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")
def test_ids_go_in_and_out_and_into_the_log_and_two_addresses_are_two_callers(tmp_path: Path) -> None:
    # Its worker has something to say of each picture.
    model = write_overflowing(BFLOAT16, tmp_path / "overflowing")
    key = add_key(tmp_path / "keys", "ann", [DRAW, READ], Allowance(requests_a_minute=600))
    environment = {"ZIMAGE_LOG_FORMAT": "json", "ZIMAGE_API_KEYS_FILE": str(tmp_path / "keys")}
    bearer = {"authorization": f"Bearer {key}"}
    with running_server("--model", str(model), "--device", "cpu", environment=environment) as server:
        with httpx.Client(base_url=server.base_url, headers=bearer, timeout=300) as client:
            for id, (method, path, body, status) in PATHS.items():
                answer = client.request(method, path, json=body, headers={"x-request-id": id})
                assert (answer.status_code, answer.headers.get("x-request-id")) == (status, id), path
                limit = answer.headers.get("x-ratelimit-limit-requests")
                assert limit == ("600" if (path, status) == (URL, 200) else None), "as the key's line says"
            made = {client.get("/readyz").headers["x-request-id"] for _ in range(2)}
            assert len(made) == 2, "who sends none gets one"
            for wrong in (b"\xff\xfe", b"x" * 4000, b"two words"):
                answer = client.get("/v1/models", headers=[(b"x-request-id", wrong)])
                assert answer.status_code == 200 and answer.headers["x-request-id"].isascii(), wrong
                assert len(answer.headers["x-request-id"]) < 100
            _draw_on_the_page(client, "id-drawn-on-the-page")
        for address in ("127.0.0.1", "127.0.0.2"):
            transport = httpx.HTTPTransport(local_address=address)
            with httpx.Client(transport=transport, base_url=server.base_url, timeout=300) as client:
                answer = client.post(URL, json={}, headers=FORGED | {"x-request-id": f"id-of-{address}"})
                assert answer.status_code == 401
        assert server.stop() == 0
    lines = [json.loads(line[line.index("{") :]) for line in server.output if '"request_id": "id-' in line]
    for id, (_, path, _, status) in PATHS.items():
        loggers = {line["logger"] for line in lines if line["request_id"] == id}
        if path == URL:
            assert "serve_app.audit" in loggers, (id, loggers)
            assert (REQUESTS in loggers) is (status < 405), (id, loggers)
            assert (ENGINE in loggers) is (status == 200), (id, loggers)
    drawn = {line["logger"] for line in lines if line["request_id"] == "id-drawn-on-the-page"}
    assert {REQUESTS, ENGINE} <= drawn
    audited = {line["request_id"]: line["address"] for line in lines if line["logger"] == "serve_app.audit"}
    assert audited["id-of-127.0.0.1"] == "127.0.0.1"
    assert audited["id-of-127.0.0.2"] == "127.0.0.2"


def _draw_on_the_page(client: httpx.Client, id: str) -> None:
    page = build_page(PaintingService())  # type: ignore[arg-type]
    (draws,) = [number for number, function in page.fns.items() if function.name == "on_draw"]
    data = [1 if control == STEPS else value for control, value in enumerate(CONTROLS)]
    asked = {"fn_index": draws, "session_hash": "one", "data": data}
    joined = client.post("/gradio_api/queue/join", json=asked, headers={"x-request-id": id})
    assert (joined.status_code, joined.headers["x-request-id"]) == (200, id)
    events = client.get("/gradio_api/queue/data", params={"session_hash": "one"}).text
    assert '"process_completed"' in events, events
