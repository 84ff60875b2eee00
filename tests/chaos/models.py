"""Draws requests for several models at random, and says whether each picture was that of its model.

    python -m tests.chaos.models --count 200 --most 2
    python -m tests.chaos.models --count 200 --most 2 --ray [--workers 2]

Tiny models of three families behind the real app, in this process: no Ray, no port. Each picture is compared
with that of a fresh engine of its model, and what is in memory with what may be. With --ray the same is asked
of `zimage-turbo launch` and its workers, each of which may have as many models; what they have in memory is
then what their metrics tell.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import random
import sys
import tempfile
from base64 import b64decode
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from serve_app.image_codec import read_receipt

SEEDS = 5
AT_ONCE = 4
#: After so many requests nothing is under way for a moment, and what is in memory is counted.
COUNTED_EVERY = 20


@dataclass
class Outcome:
    """What came of a run; `wrong` are the requests whose picture was another model's, or nobody's."""

    drawn: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    most_ready: int = 0
    most_parameter_bytes: int = 0
    #: Models that one worker had at a time, and how many came and went, by its metrics; 0: not asked.
    most_in_a_worker: int = 0
    loads: int = 0

    def __str__(self) -> str:
        drawn = ", ".join(f"{name} {count}" for name, count in sorted(self.drawn.items()))
        if self.most_in_a_worker:
            return (
                f"{sum(self.drawn.values())} drawn ({drawn}), {len(self.wrong)} wrong; at most "
                f"{self.most_in_a_worker} models in a worker at a time, {self.loads} loads"
            )
        return (
            f"{sum(self.drawn.values())} drawn ({drawn}), {len(self.wrong)} wrong; at most {self.most_ready} "
            f"models ready at a time, their weights at most {self.most_parameter_bytes / 1e6:.2f} MB"
        )


def body_for(model: str | None, seed: int) -> dict[str, Any]:
    """A request that a tiny model draws in an instant."""
    return {
        "prompt": f"a blue star number {seed}",
        "model": model,
        "size": "64x64",
        "num_inference_steps": 2,
        "guidance_scale": 1,
        "seed": seed,
        "enhance": False,
    }


def pixels_of_fresh_engines(paths: dict[str, Path]) -> dict[tuple[str, int], bytes]:
    """What a new engine of each model draws for each seed."""
    from serve_app.openai_schema import parse, to_engine
    from zimage_engine import Engine

    expected = {}
    for name, path in paths.items():
        engine = Engine.load(path, "cpu", threads=1)
        for seed in range(SEEDS):
            (image,) = engine.generate(to_engine(parse(body_for(name, seed)))).images
            expected[name, seed] = image.convert("RGB").tobytes()
    return expected


def parameter_bytes() -> int:
    """All weights that live in this process."""
    gc.collect()
    # Not isinstance, which torch makes slow for the million objects that are none.
    found = [each for each in gc.get_objects() if type(each) is torch.nn.Parameter]
    return sum(each.numel() * each.element_size() for each in found)


async def in_this_process(client: httpx.AsyncClient, outcome: Outcome) -> None:
    """Note all weights that live here."""
    outcome.most_parameter_bytes = max(outcome.most_parameter_bytes, parameter_bytes())


async def by_metrics(client: httpx.AsyncClient, outcome: Outcome) -> None:
    """Note what each worker says that it has in memory, and has loaded so far."""
    text = (await client.get("/metrics")).text
    samples = [
        sample for family in text_string_to_metric_families(text) for sample in family.samples if sample.value
    ]
    there = [int(sample.value) for sample in samples if sample.name == "zimage_models_in_memory"]
    outcome.most_in_a_worker = max(outcome.most_in_a_worker, *there, 0)
    outcome.loads = sum(int(sample.value) for sample in samples if sample.name == "zimage_model_loads_total")


async def run(
    client: httpx.AsyncClient,
    expected: dict[tuple[str, int], bytes],
    count: int,
    dice: random.Random,
    count_memory: Callable[[httpx.AsyncClient, Outcome], Awaitable[None]] = in_this_process,
) -> Outcome:
    """Send `count` requests, some at once, each for a model and a seed by lot."""
    outcome = Outcome()
    cases = list(expected)
    for begin in range(0, count, COUNTED_EVERY):
        chosen = dice.choices(cases, k=min(COUNTED_EVERY, count - begin))
        gate = asyncio.Semaphore(AT_ONCE)
        await asyncio.gather(*(_one(client, gate, case, expected[case], outcome) for case in chosen))
        await count_memory(client, outcome)
    return outcome


async def _one(
    client: httpx.AsyncClient,
    gate: asyncio.Semaphore,
    case: tuple[str, int],
    expected: bytes,
    outcome: Outcome,
) -> None:
    model, seed = case
    async with gate:
        answer = await client.post("/v1/images/generations", json=body_for(model, seed))
        cards = (await client.get("/v1/models")).json()["data"]
    outcome.most_ready = max(outcome.most_ready, sum(card["state"] == "ready" for card in cards))
    if answer.status_code != 200:
        outcome.wrong.append(f"{model}, seed {seed}: {answer.status_code} {answer.text[:300]}")
        return
    told = answer.json()
    content = b64decode(told["data"][0]["b64_json"])
    receipt = read_receipt(content)
    with Image.open(io.BytesIO(content)) as image:
        pixels = image.convert("RGB").tobytes()
    outcome.drawn[model] += 1
    in_receipt = None if receipt is None else receipt["model"]["id"]
    if pixels != expected or told["model"] != model or in_receipt != model:
        outcome.wrong.append(f"{model}, seed {seed}: drawn by {told['model']}, another picture")


def write_models(folder: Path) -> dict[str, Path]:
    """Three tiny models, each of another family; the first is the default one."""
    from tests.zimage_engine.tiny_models import write_tiny_pixart, write_tiny_sdxl, write_tiny_z_image

    return {
        "tiny-z-image": write_tiny_z_image(folder / "tiny-z-image"),
        "sketch": write_tiny_sdxl(folder / "tiny-sdxl"),
        "paint": write_tiny_pixart(folder / "tiny-pixart"),
    }


async def _main(count: int, most: int, seed: int) -> Outcome:
    from ray import serve

    from serve_app.ingress import build_asgi_app
    from serve_app.metrics import ServerMetrics
    from serve_app.service import ImageService
    from serve_app.settings import load_settings
    from serve_app.worker import ImageWorker
    from tests.serve_app.conftest import client_of

    with tempfile.TemporaryDirectory() as folder:
        paths = write_models(Path(folder))
        expected = pixels_of_fresh_engines(paths)
        default, *others = paths
        settings = load_settings(
            model=str(paths[default]),
            models={name: str(paths[name]) for name in others},
            max_loaded_models=most,
            device="cpu",
            cpu_threads=1,
            ui=False,
            data_dir=str(Path(folder) / "data"),
        )
        before_bytes = parameter_bytes()
        bound = serve.deployment(ImageWorker, name="ImageWorker").bind(settings)
        handle = await asyncio.to_thread(serve.run, bound, _local_testing_mode=True)
        app = build_asgi_app(ImageService(handle, ServerMetrics("chaos"), settings), settings)
        async with client_of(app) as client:
            outcome = await run(client, expected, count, random.Random(seed))
    outcome.most_parameter_bytes -= before_bytes
    return outcome


async def _of_a_launched_server(count: int, most: int, seed: int, workers: int) -> Outcome:
    from tests.running_server import running_server

    with tempfile.TemporaryDirectory() as folder:
        paths = write_models(Path(folder))
        expected = pixels_of_fresh_engines(paths)
        default, *others = paths
        also = [option for name in others for option in ("--also", f"{name}={paths[name]}")]
        environment = {
            "ZIMAGE_MAX_LOADED_MODELS": str(most),
            "ZIMAGE_NUM_REPLICAS": str(workers),
            "ZIMAGE_CPU_THREADS": "1",
            "ZIMAGE_DATA_DIR": str(Path(folder) / "data"),
        }
        options = ("--model", str(paths[default]), *also, "--device", "cpu", "--no-ui")
        with running_server(*options, environment=environment) as server:
            async with httpx.AsyncClient(base_url=server.base_url, timeout=300) as client:
                return await run(client, expected, count, random.Random(seed), by_metrics)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--most", type=int, default=2, help="models in memory at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ray", action="store_true", help="ask a launched server")
    parser.add_argument("--workers", type=int, default=1, help="workers of the launched server")
    given = parser.parse_args()
    asked = (
        _of_a_launched_server(given.count, given.most, given.seed, given.workers)
        if given.ray
        else _main(given.count, given.most, given.seed)
    )
    outcome = asyncio.run(asked)
    for line in outcome.wrong:
        sys.stdout.write(line + "\n")
    sys.stdout.write(f"{outcome}\n")
    # A model that is ready in any worker counts as ready: with several, each has its own.
    too_many = max(outcome.most_in_a_worker, 0 if given.ray else outcome.most_ready) > given.most
    return 1 if outcome.wrong or too_many or outcome.drawn.total() != given.count else 0


if __name__ == "__main__":
    sys.exit(main())
