"""Where a picture of the demo model spends its time on a CPU, beside its matrix work.

    python -m tests.benchmarks.cpu_profile [--size 256] [--pictures 20]

The model's own size in 8 steps at guidance 1.8, enhanced and refined, with its PNG, each for a prompt that is
new. Milliseconds a picture as cProfile has them, which slows what is called often: shares are what counts.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve_app.image_codec import ImageEncoding, encode, facts_of
from zimage_engine import Engine, GenerationRequest


@dataclass(frozen=True)
class Cost:
    """A line of the table: the functions that it is made of, by the end of their file and their name.

    `alone`: without what they call.
    """

    name: str
    functions: tuple[tuple[str, str], ...]
    alone: bool = False


#: What has no Python of its own has no file.
BUILT_IN = "~"
COSTS = (
    Cost("all", (("engine.py", "generate"), ("image_codec.py", "encode"))),
    Cost("matrix products", ((BUILT_IN, "torch._C._nn.linear"), (BUILT_IN, "torch.bmm")), True),
    Cost("convolutions", ((BUILT_IN, "torch.conv2d"),), True),
    Cost("attention", ((BUILT_IN, "scaled_dot_product_attention"),), True),
    Cost("denoiser's norms", (("models/normalization.py", "forward"),)),
    Cost(
        "search for dtypes",
        (("modeling_utils.py", "get_parameter_dtype"), ("module_walk.py", "plain_dtype")),
    ),
    Cost("signatures of attention", (("inspect.py", "signature"),)),
    Cost("second look", (("quality.py", "measure"),)),
    Cost("refine", (("refiner/picture.py", "refine"),)),
    Cost("guard's steps, without the scheduler's", (("guard.py", "judged"), ("guard.py", "stepped"))),
    Cost("guarded scheduler made", (("guard.py", "guarded_scheduler"),)),
    Cost("enhancer", (("enhancer.py", "enhance"),)),
    Cost("PNG", (("image_codec.py", "encode"),)),
    Cost("keys of encoded prompts", (("sampling/pipeline.py", "_form_of"),)),
)


def main() -> None:
    """Print the table, and the load of the machine."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--size", type=int, default=256)
    asked.add_argument("--pictures", type=int, default=20)
    chosen = asked.parse_args()
    engine = Engine.load(device="cpu", exact=True)
    draw = _drawer(engine, chosen.size)
    for _ in range(3):
        draw()
    began = time.perf_counter()
    for _ in range(chosen.pictures):
        draw()
    plain = (time.perf_counter() - began) / chosen.pictures
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(chosen.pictures):
        draw()
    profile.disable()
    entries: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    whole = 0.0
    for cost in COSTS:
        spent = 1000 * sum(_seconds(entries, cost)) / chosen.pictures
        whole = whole or spent
        _print(f"{cost.name:<40}{spent:8.2f} ms  {spent / whole:6.1%}")
    _print(f"unprofiled {1000 * plain:.1f} ms a picture; load {os.getloadavg()[0]:.1f}")


def _drawer(engine: Engine, side_px: int) -> Callable[[], object]:
    count = 0

    def draw() -> object:
        nonlocal count
        count += 1
        request = GenerationRequest(
            prompt=f"a red circle on a white background {count}", seed=count, width=side_px, height=side_px
        )
        result = engine.generate(request)
        return encode(result.images[0], ImageEncoding("png"), facts_of(result.report, 0))

    return draw


def _seconds(entries: dict[Any, Any], cost: Cost) -> list[float]:
    return [
        alone if cost.alone else with_calls
        for (file, _, name), (_, _, alone, with_calls, _) in entries.items()
        if any(
            file.endswith(end) and (name == wanted or (end == BUILT_IN and wanted in name))
            for end, wanted in cost.functions
        )
    ]


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
