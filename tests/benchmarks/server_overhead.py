"""What the server adds to a picture: request time less the engine's own time, per proxy and model.

    python -m tests.benchmarks.server_overhead [--proxy haproxy default] [--model tiny demo] [--requests 40]

Each server is started by `zimage-turbo launch`, warmed up, and asked by one client over one kept
connection. The engine's time is the one that the same request reports (`x-engine-seconds`), so what
remains is HTTP, proxy, ingress, enhancer, handle, worker, packing the PNG and base64. On a busy machine
the figures mean little: the load is printed beside them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.running_server import running_server
from tests.zimage_engine.tiny_models import write_tiny_z_image

URL = "/v1/images/generations"
WARM_UP_REQUESTS = 5

#: Milliseconds that the server may add to a picture of the tiny model.
TARGETS_MS = {"default": 25.0, "haproxy": 8.0}
PROXIES = {"default": "false", "haproxy": "true"}
#: The tiny model draws 64x64 noise in milliseconds, so that the rest can be seen; the demo model is what
#: people start with.
PLANS: dict[str, dict[str, object]] = {
    "tiny": {"num_inference_steps": 1, "guidance_scale": 1},
    "demo": {"quality": "low"},
}

#: A second thread has nothing to do for the tiny model but to wait, at the cost of the server's processes.
ENVIRONMENTS: dict[str, dict[str, str]] = {"tiny": {"ZIMAGE_CPU_THREADS": "1"}, "demo": {}}


@dataclass(frozen=True)
class Measured:
    """Medians over the requests of one server, in milliseconds; `tail_ms` is the 90th percentile."""

    request_ms: float
    engine_ms: float
    overhead_ms: float
    tail_ms: float
    health_ms: float


def measure(client: httpx.Client, plan: dict[str, object], requests: int) -> Measured:
    """Ask for pictures one after another and look at what each took."""
    for _ in range(WARM_UP_REQUESTS):
        _timed(client, plan)
    pairs = [_timed(client, plan) for _ in range(requests)]
    overheads = [total - engine for total, engine in pairs]
    return Measured(
        request_ms=statistics.median(total for total, _ in pairs),
        engine_ms=statistics.median(engine for _, engine in pairs),
        overhead_ms=statistics.median(overheads),
        tail_ms=statistics.quantiles(overheads, n=10)[-1],
        health_ms=statistics.median(_health(client) for _ in range(requests)),
    )


def _timed(client: httpx.Client, plan: dict[str, object]) -> tuple[float, float]:
    began = time.perf_counter()
    answer = client.post(URL, json={"prompt": "a red circle on a white background", "seed": 1} | plan)
    total_ms = (time.perf_counter() - began) * 1e3
    answer.raise_for_status()
    return total_ms, float(answer.headers["x-engine-seconds"]) * 1e3


def _health(client: httpx.Client) -> float:
    began = time.perf_counter()
    client.get("/healthz").raise_for_status()
    return (time.perf_counter() - began) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the server adds to a picture.")
    parser.add_argument("--proxy", nargs="+", choices=PROXIES, default=list(PROXIES))
    parser.add_argument("--model", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--requests", type=int, default=40)
    chosen = parser.parse_args()
    _print("proxy    model  request   engine  overhead       p90   healthz  (ms)  target  ready(s)  load")
    with tempfile.TemporaryDirectory() as folder:
        tiny = write_tiny_z_image(Path(folder) / "tiny-z-image")
        for proxy in chosen.proxy:
            for model in chosen.model:
                options = ["--model", str(tiny)] if model == "tiny" else []
                environment = {"ZIMAGE_HAPROXY": PROXIES[proxy]} | ENVIRONMENTS[model]
                with (
                    running_server(*options, environment=environment) as server,
                    httpx.Client(base_url=server.base_url, timeout=600) as client,
                ):
                    found = measure(client, PLANS[model], chosen.requests)
                    load = os.getloadavg()[0]
                    _print(
                        f"{proxy:8} {model:5} {found.request_ms:8.1f} {found.engine_ms:8.1f} "
                        f"{found.overhead_ms:9.1f} {found.tail_ms:9.1f} {found.health_ms:9.1f}"
                        f"        {TARGETS_MS[proxy]:6.0f} {server.seconds_to_ready:9.1f} {load:5.1f}"
                    )


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
