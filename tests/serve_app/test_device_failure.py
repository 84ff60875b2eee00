"""A worker whose device fails draws no more and is replaced; what it held is drawn by another."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from serve_app.image_codec import ImageEncoding
from serve_app.settings import Settings
from serve_app.worker import ImageWorker
from serve_app.worker_reply import DrawingBegan, WorkerUnfit
from tests.ports import free_ports
from tests.running_server import ROOT, START_SECONDS, STOP_SECONDS
from tests.serve_app.conftest import loaded_worker
from tests.serve_app.failing_device_server import FATAL
from zimage_engine.errors import DeviceFailed
from zimage_engine.types import GenerationRequest

REQUEST = GenerationRequest(
    "a red circle", width=64, height=64, num_inference_steps=3, guidance_scale=1.0, seed=1, enhance=False
)
PNG = ImageEncoding("png")
#: Sooner than any worker starts.
AT_ONCE_SECONDS = 4.0


async def failing_worker(settings: Settings) -> ImageWorker:
    worker = await loaded_worker(settings)

    def fails(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    worker._pool.engines[0].pipeline.transformer.register_forward_pre_hook(fails)
    return worker


async def test_after_a_failure_nothing_is_drawn_and_what_waits_goes_elsewhere(settings: Settings) -> None:
    worker = await failing_worker(settings)
    await worker.check_health()
    one, two = await asyncio.gather(
        worker.generate(REQUEST, PNG), worker.generate(REQUEST, PNG), return_exceptions=True
    )
    assert isinstance(one, DeviceFailed), one
    assert isinstance(two, WorkerUnfit), two
    for asked in (worker.check_health, worker.describe, worker.device_status, worker.metrics_text):
        with pytest.raises(WorkerUnfit, match="illegal memory access"):
            await asked()
    items = []
    with pytest.raises(WorkerUnfit):
        async for item in worker.generate_streaming(REQUEST, PNG):
            items.append(item)
    assert items == [], "whoever is refused so was not begun with"


async def test_a_stream_tells_that_it_had_begun_before_it_fails(settings: Settings) -> None:
    worker, items = await failing_worker(settings), []
    with pytest.raises(DeviceFailed):
        async for item in worker.generate_streaming(REQUEST, PNG):
            items.append(item)
    assert items == [DrawingBegan("local")]


async def test_a_failure_that_nobody_waits_for_any_more_is_noticed_too(settings: Settings) -> None:
    worker = await loaded_worker(settings)
    steps: list[int] = []

    def slow_then_fails(*_: Any) -> None:
        steps.append(1)
        time.sleep(0.3)
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    worker._pool.engines[0].pipeline.transformer.register_forward_pre_hook(slow_then_fails)
    drawing = asyncio.ensure_future(worker.generate(replace(REQUEST, n=2), PNG))
    while not steps:
        await asyncio.sleep(0.01)
    drawing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await drawing
    with pytest.raises(WorkerUnfit):
        await worker.check_health()


@pytest.fixture(scope="module")
def client(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server of workers that fail."""
    folder = tmp_path_factory.mktemp("failing")
    (port,) = free_ports(1)
    program = [sys.executable, "-m", "tests.serve_app.failing_device_server", str(tiny_model), str(port)]
    output = folder / "output"
    with (
        output.open("w") as written,
        subprocess.Popen(
            [*program, str(folder / "failed")], cwd=ROOT, stdout=written, stderr=subprocess.STDOUT
        ) as server,
    ):
        try:
            deadline = time.monotonic() + START_SECONDS
            while "is ready" not in output.read_text():
                assert server.poll() is None and time.monotonic() < deadline, output.read_text()
                time.sleep(0.2)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=200) as client:
                yield client
        finally:
            server.terminate()
            server.wait(STOP_SECONDS)


def asked_for(client: httpx.Client, prompt: str, seed: int) -> httpx.Response:
    fields = {"prompt": prompt, "seed": seed, "num_inference_steps": 3, "size": "64x64"}
    return client.post("/v1/images/generations", json=fields)


def counted(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


@pytest.mark.server
def test_a_failed_device_is_replaced_and_costs_no_picture(
    client: httpx.Client, record_property: Callable[[str, object], None]
) -> None:
    def draw(seed: int) -> str:
        answer = asked_for(client, "a red circle", seed)
        return str(answer.raise_for_status().json()["data"][0]["b64_json"])

    began = time.monotonic()
    with ThreadPoolExecutor(3) as callers:
        through_the_failure = list(callers.map(draw, (1, 2, 3)))
    record_property("seconds_to_the_answers", round(time.monotonic() - began, 1))
    assert through_the_failure == [draw(seed) for seed in (1, 2, 3)]
    assert counted(client, "zimage_device_failures_total") == 1


@pytest.mark.server
def test_a_request_that_kills_two_workers_is_named_and_never_drawn_again(client: httpx.Client) -> None:
    retries = counted(client, "zimage_worker_retries_total")
    killer = asked_for(client, FATAL, 1)
    assert killer.status_code == 422, killer.text
    assert killer.json()["error"]["code"] == "request_kills_workers"
    assert killer.headers["x-request-id"] in killer.json()["error"]["message"]
    assert asked_for(client, "a red circle", 4).status_code == 200

    died_so_far = counted(client, "zimage_worker_retries_total")
    assert died_so_far > retries
    again = asked_for(client, FATAL, 2)
    assert (again.status_code, again.json()["error"]["code"]) == (422, "request_kills_workers")
    assert killer.headers["x-request-id"] in again.json()["error"]["message"]
    assert again.elapsed.total_seconds() < AT_ONCE_SECONDS
    assert asked_for(client, "a red circle", 5).elapsed.total_seconds() < AT_ONCE_SECONDS
    assert counted(client, "zimage_worker_retries_total") == died_so_far
