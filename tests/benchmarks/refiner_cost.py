"""What refining a finished picture costs on one core, from PIL to PIL.

    python -m tests.benchmarks.refiner_cost [--side 1024] [--rounds 41]

The picture is noise, every pixel busy; the work is the same for any picture. Time of the thread's own core is
told beside the time that passed: on a shared machine the latter counts what others do meanwhile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from zimage_engine.refiner import refine

#: What one picture of 1024 x 1024 may take.
TARGET_MS = 50.0


@dataclass(frozen=True)
class RefinerCost:
    """Milliseconds of each round on one thread: on its core, and as they passed."""

    core_ms: tuple[float, ...]
    passed_ms: tuple[float, ...]


def measure(side_px: int, rounds: int) -> RefinerCost:
    """Refine a square picture of noise so often, after one round that is not counted."""
    colours = np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    picture = Image.fromarray(colours)
    core_ms, passed_ms = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        refine(picture)
        for _ in range(rounds):
            started = time.thread_time()
            passed_ms.append(refine(picture).seconds * 1000)
            core_ms.append((time.thread_time() - started) * 1000)
    finally:
        torch.set_num_threads(threads)
    return RefinerCost(tuple(core_ms), tuple(passed_ms))


def main() -> None:
    """Print the median and the spread."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--side", type=int, default=1024)
    asked.add_argument("--rounds", type=int, default=41)
    chosen = asked.parse_args()
    cost = measure(chosen.side, chosen.rounds)
    sys.stdout.write(
        f"{chosen.side} x {chosen.side}, one thread, {chosen.rounds} rounds, load {os.getloadavg()[0]:.1f}; "
        f"{TARGET_MS:.0f} ms allowed at 1024\n"
    )
    for name, times_ms in (("core time", cost.core_ms), ("passed", cost.passed_ms)):
        sys.stdout.write(
            f"{name:<10} median {statistics.median(times_ms):5.1f} ms, "
            f"least {min(times_ms):5.1f}, most {max(times_ms):5.1f}\n"
        )


if __name__ == "__main__":
    main()
