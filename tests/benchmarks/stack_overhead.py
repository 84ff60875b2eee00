"""What the whole stack costs over the bare pipeline: a running server beside stock diffusers, pair by pair.

    python -m tests.benchmarks.stack_overhead [--size 256 512] [--pictures 30] [--threads N] [--json FILE]

The demo model. `zimage-turbo launch` is asked over one kept connection, and between its pictures stock
diffusers draws the same ones in this process: same prompts, seeds, steps, guidance and count of threads,
neither enhanced nor refined. Now one is first, now the other, and each waits until the other is done; ratios
are taken pair by pair. The picture that came as PNG is compared with the bare one in every pixel.

What the stack takes is told in three parts: what the engine takes more than the bare pipeline (less than
nothing where it is quicker), the file (the worker's packing, from the server's metrics, as a mean), and the
rest: HTTP, proxy, ingress, handles, queue, base64. What the server takes of the processors while it has
nothing to do slows the bare pipeline too, so it is told beside.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.running_server import RunningServer, running_server
from zimage_engine import Engine, GenerationRequest, cpu
from zimage_engine.bench.spread import Spread, ratios, spread_of
from zimage_engine.bench.stock import StockPipeline
from zimage_engine.families import family_named
from zimage_engine.loading.describe import max_tokens
from zimage_engine.sampling.plan import resolve

URL = "/v1/images/generations"
PROMPT = "a red circle on a white background, soft evening light, number"
WARM_UP_PAIRS = 3
#: So long OpenMP's threads may go on looking for work after the last product, on cores the other one needs.
PAUSE_SECONDS = 0.05
#: The stack may take so many times what the bare pipeline takes.
TARGET = 1.10
PROXIES = {"default": "false", "haproxy": "true"}


@dataclass(frozen=True)
class Pair:
    """One picture, drawn by both: seconds, and how far its pixels are apart (of 255)."""

    bare: float
    request: float
    engine: float
    idle_cores: float
    largest_difference: int


@dataclass(frozen=True)
class StackOverhead:
    """One size. Ratios are over the bare pipeline, the rest is in milliseconds of a picture."""

    side_px: int
    pictures: int
    stack: Spread
    engine: Spread
    bare_ms: Spread
    request_ms: Spread
    engine_more_ms: Spread
    around_engine_ms: Spread
    file_ms: float
    idle_cores: float
    largest_difference: int


class BothWays:
    """Draws the same picture by the running server and by stock diffusers in this process."""

    def __init__(self, server: RunningServer, client: httpx.Client, side_px: int) -> None:
        self._server = server
        self._client = client
        self._side_px = side_px
        self._count = 0
        engine = Engine.load(device="cpu", threads=torch.get_num_threads(), exact=True)
        self._description = engine.description
        self._stock = StockPipeline(
            engine, max_tokens(engine.pipeline, family_named(engine.description.family))
        )

    def pair(self) -> Pair:
        """The next picture, whose prompt nobody has read before."""
        self._count += 1
        asked = GenerationRequest(
            prompt=f"{PROMPT} {self._count}",
            negative_prompt="",
            width=self._side_px,
            height=self._side_px,
            seed=self._count,
            enhance=False,
            refine=False,
        )
        if self._count % 2:
            bare, image, idle_cores = self._bare(asked)
            request, engine, file = self._by_server(asked)
        else:
            request, engine, file = self._by_server(asked)
            bare, image, idle_cores = self._bare(asked)
        ours, stock = (
            np.asarray(each.convert("RGB"), dtype=np.int16) for each in (Image.open(io.BytesIO(file)), image)
        )
        return Pair(bare, request, engine, idle_cores, int(np.abs(ours - stock).max()))

    def _bare(self, asked: GenerationRequest) -> tuple[float, Image.Image, float]:
        time.sleep(PAUSE_SECONDS)
        plan = resolve(asked, self._description)
        before = _processor_seconds(self._server)
        began = time.perf_counter()
        image = self._stock.draw(plan, plan.seeds[0])
        seconds = time.perf_counter() - began
        return seconds, image, (_processor_seconds(self._server) - before) / seconds

    def _by_server(self, asked: GenerationRequest) -> tuple[float, float, bytes]:
        time.sleep(PAUSE_SECONDS)
        body = {
            "prompt": asked.prompt,
            "negative_prompt": asked.negative_prompt,
            "size": f"{asked.width}x{asked.height}",
            "seed": asked.seed,
            "enhance": asked.enhance,
            "refine": asked.refine,
        }
        began = time.perf_counter()
        answer = self._client.post(URL, json=body)
        answer.raise_for_status()
        picture = base64.b64decode(answer.json()["data"][0]["b64_json"])
        seconds = time.perf_counter() - began
        return seconds, float(answer.headers["x-engine-seconds"]), picture

    def files_packed(self) -> tuple[float, float]:
        """The seconds that packing files has taken in all, and how many there were."""
        sums = {"zimage_generation_seconds_sum": 0.0, "zimage_generation_seconds_count": 0.0}
        for family in text_string_to_metric_families(self._client.get("/metrics").raise_for_status().text):
            for sample in family.samples:
                if sample.name in sums and sample.labels.get("stage") == "encode_file":
                    sums[sample.name] += sample.value
        seconds, count = sums.values()
        return seconds, count


def measure(
    server: RunningServer, side_px: int, pictures: int, warm_up: int = WARM_UP_PAIRS
) -> StackOverhead:
    """Both ways, one after another, so many times."""
    with httpx.Client(base_url=server.base_url, timeout=600) as client:
        both = BothWays(server, client, side_px)
        for _ in range(warm_up):
            both.pair()
        seconds_before, count_before = both.files_packed()
        pairs = [both.pair() for _ in range(pictures)]
        seconds, count = both.files_packed()
    bare = [pair.bare for pair in pairs]
    return StackOverhead(
        side_px=side_px,
        pictures=pictures,
        stack=ratios([pair.request for pair in pairs], bare),
        engine=ratios([pair.engine for pair in pairs], bare),
        bare_ms=_ms(bare),
        request_ms=_ms([pair.request for pair in pairs]),
        engine_more_ms=_ms([pair.engine - pair.bare for pair in pairs]),
        around_engine_ms=_ms([pair.request - pair.engine for pair in pairs]),
        file_ms=1e3 * (seconds - seconds_before) / (count - count_before),
        idle_cores=spread_of(pair.idle_cores for pair in pairs).median,
        largest_difference=max(pair.largest_difference for pair in pairs),
    )


def lines_of(found: StackOverhead) -> list[str]:
    """What was found, for people."""
    side = found.side_px
    return [
        f"{side}x{side}, {found.pictures} pairs: bare {_told(found.bare_ms)} ms, "
        f"whole stack {_told(found.request_ms)} ms",
        f"  whole stack / bare   {_told(found.stack, 3)}   (target: at most {TARGET:.2f})",
        f"  engine / bare        {_told(found.engine, 3)}",
        f"  engine over bare     {_told(found.engine_more_ms)} ms",
        f"  around the engine    {_told(found.around_engine_ms)} ms, of which the file {found.file_ms:.1f}",
        f"  idle server          {found.idle_cores:.2f} cores while the bare pipeline draws",
        f"  largest difference   {found.largest_difference} of 255 levels in any pixel",
    ]


def _ms(seconds: Sequence[float]) -> Spread:
    return spread_of(1e3 * each for each in seconds)


def _told(spread: Spread, digits: int = 1) -> str:
    lower, upper = f"{spread.lower_quartile:.{digits}f}", f"{spread.upper_quartile:.{digits}f}"
    return f"{spread.median:.{digits}f} ({lower} to {upper})"


def _processor_seconds(server: RunningServer) -> float:
    """What the server's processes have used so far."""
    used = 0.0
    for process in server.processes():
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        used += times.user + times.system
    return used


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--size", type=int, nargs="+", default=[256, 512])
    asked.add_argument("--pictures", type=int, default=30)
    asked.add_argument("--threads", type=int, default=None, help="of both (default: every core)")
    asked.add_argument("--proxy", choices=PROXIES, help="default: as people start it")
    asked.add_argument("--json", type=Path)
    chosen = asked.parse_args()
    threads = cpu.use_cores(chosen.threads).threads
    environment = {"ZIMAGE_CPU_THREADS": str(threads), "ZIMAGE_EXACT": "true"}
    if chosen.proxy:
        environment["ZIMAGE_HAPROXY"] = PROXIES[chosen.proxy]
    rows = []
    with running_server(environment=environment) as server:
        _print(f"{threads} threads each; load {os.getloadavg()[0]:.1f}")
        for side_px in chosen.size:
            found = measure(server, side_px, chosen.pictures)
            _print("\n".join(lines_of(found)))
            rows.append(asdict(found))
    _print(f"load at the end {os.getloadavg()[0]:.1f}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(rows, indent=1))


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
