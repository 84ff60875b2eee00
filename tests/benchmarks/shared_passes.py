"""Pictures a minute and waits of a real server whose requests share forward passes, beside one where none do.

    python -m tests.benchmarks.shared_passes [--size 256x256] [--count 48] [--at-once 8] [--rounds 2]

The demo model behind `zimage-turbo launch`, with ZIMAGE_MAX_BATCH_SIZE 1 and 8 in turns; before each count a
third as many pictures are drawn that are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time

import httpx

from tests.running_server import running_server

MOST = (1, 8)


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--size", default="256x256")
    asked.add_argument("--count", type=int, default=48)
    asked.add_argument("--at-once", type=int, default=8)
    asked.add_argument("--rounds", type=int, default=2)
    chosen = asked.parse_args()
    for _ in range(chosen.rounds):
        for most in MOST:
            _measure(most, chosen.size, chosen.count, chosen.at_once)


def _measure(most: int, size: str, count: int, at_once: int) -> None:
    with tempfile.TemporaryDirectory(prefix="zimage-shared-") as data:
        environment = {"ZIMAGE_DATA_DIR": data, "ZIMAGE_MAX_BATCH_SIZE": str(most)}
        with running_server(environment=environment) as server:
            asyncio.run(_drawn(server.base_url, size, count // 3, at_once))
            began = time.perf_counter()
            waits = asyncio.run(_drawn(server.base_url, size, count, at_once))
            seconds = time.perf_counter() - began
            metrics = httpx.get(f"{server.base_url}/metrics", timeout=60).text
    passes, pictures = (
        _sum(metrics, f"zimage_denoiser_{name}_total") for name in ("passes", "pass_pictures")
    )
    print(  # noqa: T201
        f"{size}, at most {most} in a pass: {60 * count / seconds:.0f} pictures a minute, "
        f"wait {statistics.median(waits):.2f} s (worst {max(waits):.2f}), "
        f"{pictures / max(passes, 1):.2f} pictures a pass",
        flush=True,
    )


async def _drawn(base_url: str, size: str, count: int, at_once: int) -> list[float]:
    """What each answer took; so many clients send one request after another."""
    numbers, waits = iter(range(count)), []

    async def client(http: httpx.AsyncClient) -> None:
        for number in numbers:
            body = {"prompt": f"a red circle, number {number % 4}", "seed": number, "size": size}
            began = time.perf_counter()
            (await http.post("/v1/images/generations", json=body)).raise_for_status()
            waits.append(time.perf_counter() - began)

    async with httpx.AsyncClient(base_url=base_url, timeout=300) as http:
        await asyncio.gather(*(client(http) for _ in range(at_once)))
    return waits


def _sum(metrics: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line.startswith(name))


if __name__ == "__main__":
    main()
