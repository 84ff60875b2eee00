"""How far pictures are from those of bfloat16 weights where matrices are kept in one byte a value.

    python -m tests.benchmarks.quantisation [--seeds 1]

The demo model draws eight prompts in 8 steps at its own size, enhancement and refiner off, from fixed seeds.
The distance is the mean of |difference| over all values of a picture (0 to 255). Weights in bfloat16 computed
with in float32 stand beside it: what rounding alone does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from zimage_engine import Engine
from zimage_engine.memory.residency import MemoryWishes
from zimage_engine.memory.streaming import tensors_of
from zimage_engine.sampling.float32 import during_forward, wide
from zimage_engine.types import GenerationRequest

PROMPTS = (
    "a red circle on a white background",
    "a white star on a black background",
    "绿色三角形在紫色圆形的左边，黄色背景",
    "a blue square on a green background",
    "a red house and trees in front of mountains by day, the sun",
    "夜晚的大海，月亮和白色的小船",
    "a yellow house, red flowers, a meadow, sunset",
    "a big purple heart on a yellow background",
)
STEPS = 8
WISHES: Mapping[str, MemoryWishes] = {
    "--float8": MemoryWishes(float8=True),
    "--quantize int8": MemoryWishes(quantize="int8"),
    "--quantize fp8": MemoryWishes(quantize="fp8"),
}

Pixels = NDArray[np.float32]


def pictures(engine: Engine, seeds: int) -> list[Pixels]:
    """Every prompt with every seed, in the same order each time."""
    return [
        np.asarray(
            engine.generate(
                GenerationRequest(
                    prompt=prompt, seed=seed, num_inference_steps=STEPS, enhance=False, refine=False
                )
            ).images[0],
            np.float32,
        )
        for prompt in PROMPTS
        for seed in range(seeds)
    ]


def distances(one: list[Pixels], other: list[Pixels]) -> list[float]:
    return [float(np.abs(a - b).mean()) for a, b in zip(one, other, strict=True)]


def main(seeds: int) -> None:
    plain = Engine.load(device="cpu")
    wanted = pictures(plain, seeds)
    denoiser = plain.pipeline.transformer
    rows = [("bfloat16", denoiser, [0.0] * len(wanted))]
    remove = during_forward(denoiser, wide)
    rows.append(("float32 arithmetic", denoiser, distances(pictures(plain, seeds), wanted)))
    remove()
    for name, wishes in WISHES.items():
        engine = Engine.load(device="cpu", memory=wishes)
        rows.append((name, engine.pipeline.transformer, distances(pictures(engine, seeds), wanted)))
    sys.stdout.write(f"{'denoiser':<20}{'MB':>8}{'mean':>8}{'median':>8}{'largest':>9}\n")
    for name, module, found in rows:
        size = sum(tensor.nbytes for tensor in tensors_of((module,))) / 1e6
        sys.stdout.write(
            f"{name:<20}{size:>8.2f}{statistics.mean(found):>8.3f}{statistics.median(found):>8.3f}"
            f"{max(found):>9.3f}\n"
        )
    sys.stdout.write(f"{len(wanted)} pictures a row, torch {torch.__version__}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="pictures a prompt")
    main(parser.parse_args().seeds)
