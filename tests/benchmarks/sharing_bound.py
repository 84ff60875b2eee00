"""How many times as many pictures a CPU could give if no core ever waited: the most that sharing can give.

    python -m tests.benchmarks.sharing_bound [--size 512] [--rounds 5]

The demo model in bfloat16, guidance 1.8. A picture alone on all threads is measured in turns with one on a
single thread; threads that never waited would need a single one's time divided by their number, however the
work of several pictures is cut up among them. Then what a picture takes a single thread where several share
a step, and where several are decoded at once: where that does not fall with their number, only waiting is
left to be saved. Run it on a machine that is otherwise idle.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch

from zimage_engine import Engine, GenerationRequest

AT_ONCE = (1, 2, 4)


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--size", type=int, default=512)
    asked.add_argument("--rounds", type=int, default=5)
    chosen = asked.parse_args()
    threads = len(os.sched_getaffinity(0))
    engine = Engine.load(None, "cpu", dtype="bfloat16", exact=True)
    request = GenerationRequest(
        "a red circle on a white background", seed=1, width=chosen.size, height=chosen.size
    )
    best: dict[str, float] = {}
    parts = _parts(engine, request)
    for _ in range(chosen.rounds):
        for count in (threads, 1):
            torch.set_num_threads(count)
            _keep(best, f"a picture, {count} threads", lambda: engine.generate(request))
        for name, (work, pictures) in parts.items():
            _keep(best, f"{name}, 1 thread", work, pictures)
    for name, seconds in best.items():
        print(f"{chosen.size}x{chosen.size}, {name}: {1000 * seconds:.1f} ms a picture")  # noqa: T201
    bound = best[f"a picture, {threads} threads"] / (best["a picture, 1 threads"] / threads)
    print(  # noqa: T201
        f"{chosen.size}x{chosen.size}: {threads} threads that never wait would give {bound:.2f} times as many"
    )


def _keep(best: dict[str, float], name: str, work: Callable[[], object], pictures: int = 1) -> None:
    began = time.perf_counter()
    work()
    seconds = (time.perf_counter() - began) / pictures
    best[name] = min(best.get(name, seconds), seconds)


def _parts(engine: Engine, request: GenerationRequest) -> dict[str, tuple[Callable[[], object], int]]:
    """Steps of so many pictures in one pass, as a real drawing makes them, and decodings of so many."""
    calls: list[tuple[tuple, dict]] = []

    def seen(_module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((args, kwargs))

    handle = engine.denoiser.register_forward_pre_hook(seen, with_kwargs=True)
    engine.generate(request)
    handle.remove()
    (latents, times, prompts), kwargs = calls[-1]
    vae = engine.pipeline.vae
    clean = torch.cat([latents[0].movedim(1, 0)])

    def step(count: int) -> Callable[[], object]:
        return torch.no_grad()(
            lambda: engine.denoiser(latents * count, times.repeat(count), prompts * count, **kwargs)
        )

    def decode(count: int) -> Callable[[], object]:
        return torch.no_grad()(lambda: vae.decode(clean.repeat(count, 1, 1, 1).to(vae.dtype)))

    steps = {f"a step of {count} pictures": (step(count), count) for count in AT_ONCE}
    return steps | {f"decoding {count} at once": (decode(count), count) for count in AT_ONCE}


if __name__ == "__main__":
    main()
