"""What a picture of the demo model takes on this processor, by dtype and threads, and what would be chosen.

    python -m tests.benchmarks.cpu_speed [--pictures 10] [--threads 1,2]

256x256 in 8 steps at guidance 1.8; the combinations take turns, so that what else the machine does meets all
of them; medians in seconds. With `ONEDNN_MAX_CPU_ISA=AVX512_CORE ATEN_CPU_CAPABILITY=avx512` before it no
instructions for bfloat16 are used, with `AVX2` and `avx2` none of AVX512.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import torch

from zimage_engine import Engine, GenerationRequest
from zimage_engine.cpu import plan_threads, read_cores
from zimage_engine.cpu_dtype import measure_speeds, widths_of

REQUEST = GenerationRequest(
    prompt="a red circle on a white background",
    seed=7,
    width=256,
    height=256,
    num_inference_steps=8,
    guidance_scale=1.8,
    enhance=False,
    refine=False,
)
DTYPES = ("bfloat16", "float32")


def main() -> None:
    """Print the processor, the measured operations, then a line for each number of threads."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--pictures", type=int, default=10)
    asked.add_argument("--threads", default="1,2")
    chosen = asked.parse_args()
    cores = read_cores()
    _print(f"{cores}; {plan_threads(cores).because}")
    engines = {dtype: Engine.load(device="cpu", dtype=dtype, exact=True) for dtype in DTYPES}
    pipeline = engines["bfloat16"].pipeline
    shapes = [
        [tuple(each.shape) for each in module.parameters()] for module in (pipeline.transformer, pipeline.vae)
    ]
    speeds = measure_speeds(widths_of(*shapes))
    _print(f"kernels {torch.backends.cpu.get_cpu_capability()}; {speeds}; float32 {speeds.gain:.2f} x")
    counts = [int(count) for count in chosen.threads.split(",")]
    taken: dict[tuple[int, str], list[float]] = {(count, dtype): [] for count in counts for dtype in DTYPES}
    for number in range(chosen.pictures + 1):
        for (count, dtype), seconds in taken.items():
            torch.set_num_threads(count)
            began = time.perf_counter()
            engines[dtype].generate(REQUEST)
            if number:  # the first makes kernels and threads
                seconds.append(time.perf_counter() - began)
    for (count, dtype), seconds in taken.items():
        middle = statistics.median(seconds)
        _print(f"{count} threads  {dtype:<9}{middle:8.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})")
    _print(f"load {os.getloadavg()[0]:.1f}")


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
