"""Draws variations of pictures with the demo model and counts, for each strength, those that show the same.

    python -m tests.benchmarks.edit_strength --strengths 0.3 0.4 --pictures 6

The pictures are of one thing on a ground, as the demo model was trained on. Two variations are drawn of each,
without a prompt, and the demo model's own detector says what is on them.
"""

from __future__ import annotations

import argparse
import sys
from random import Random

from PIL import Image

from zimage_engine import Engine, GenerationRequest
from zimage_engine.demo.detector import judge
from zimage_engine.demo.pictures import draw, random_single
from zimage_engine.types import SourcePicture

EACH = 2


def same(engine: Engine, strength: float, pictures: int) -> int:
    """How many of `pictures` times EACH variations show what their picture shows."""
    rng, right = Random(1), 0
    for index in range(pictures):
        spec = random_single(rng)
        source = draw(spec, rng).convert("RGB")
        for varied in _variations(engine, source, strength, seed=100 + index * EACH):
            right += judge(spec, varied).all_ok
    return right


def _variations(engine: Engine, source: Image.Image, strength: float, seed: int) -> list[Image.Image]:
    asked = GenerationRequest(
        prompt="",
        seed=seed,
        n=EACH,
        guidance_scale=1.0,
        enhance=False,
        strength=strength,
        image=SourcePicture(source.width, source.height, source.tobytes()),
    )
    return engine.generate(asked).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3, 0.4, 0.5])
    parser.add_argument("--pictures", type=int, default=6)
    options = parser.parse_args()
    engine = Engine.load(device="cpu", exact=True)
    for strength in options.strengths:
        right = same(engine, strength, options.pictures)
        sys.stdout.write(f"{strength:g}: {right} of {options.pictures * EACH}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
