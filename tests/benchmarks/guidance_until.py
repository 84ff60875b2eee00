"""How far pictures of the demo model move, and how many stay right, when guidance ends before they are done.

    python -m tests.benchmarks.guidance_until [--pictures 24] [--until 0.5 0.3 0.2 0.1 0]

256x256 in 8 steps at guidance 1.8, prompts that training never drew, half of one thing and half of two, half
of them Chinese. Levels are of 255, from the picture with guidance in every step. `guided` are the steps that
have it, `work` the denoiser's work beside that of all steps guided; the last line has no guidance at all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from PIL.Image import Image

from zimage_engine import Engine, GenerationRequest
from zimage_engine.demo.evaluate import QUESTIONS, evaluate, held_out_prompts

GUIDANCE, STEPS, SIDE_PX = 1.8, 8, 256


def main() -> None:
    """Print a line for each end of guidance."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--pictures", type=int, default=24)
    asked.add_argument("--until", type=float, nargs="+", default=[0.5, 0.3, 0.2, 0.1, 0.0])
    chosen = asked.parse_args()
    engine = Engine.load(device="cpu", exact=True)
    prompts = held_out_prompts(chosen.pictures // 2, chosen.pictures - chosen.pictures // 2)
    whole: list[Image] = []
    _print("until  guided  work   mean  worst picture   right")
    for until, guidance in [(1.0, GUIDANCE), *((each, GUIDANCE) for each in chosen.until), (1.0, 1.0)]:
        drawn: list[Image] = []

        def generate(
            texts: Sequence[str],
            w: float,
            seeds: Sequence[int],
            until: float = until,
            to: list[Image] = drawn,
        ) -> Sequence[Image]:
            images = [_drawn(engine, text, w, seed, until) for text, seed in zip(texts, seeds, strict=True)]
            to.extend(images)
            return images

        table = evaluate(generate, prompts, guidances=(guidance,))
        whole = whole or drawn
        apart = [_apart(one, other) for one, other in zip(whole, drawn, strict=True)]
        rates = [table.rate(each, guidance) for each in QUESTIONS if each.name.endswith("_content")]
        guided = _guided_steps(engine, until) if guidance > 1 else 0
        name = f"{until:5.2f}" if guidance > 1 else "  off"
        work = (STEPS + guided) / (2 * STEPS)
        _print(
            f"{name}  {guided:>6}  {work:4.0%}  {np.mean(apart):5.2f}  {max(apart):13.2f}"
            f"  {sum(rate.right for rate in rates):>3} of {sum(rate.of for rate in rates)}"
        )


def _drawn(engine: Engine, prompt: str, guidance: float, seed: int, until: float) -> Image:
    request = GenerationRequest(
        prompt=prompt,
        seed=seed,
        width=SIDE_PX,
        height=SIDE_PX,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        guidance_until=until,
        enhance=False,
        refine=False,
    )
    return engine.generate(request).images[0]


def _apart(one: Image, other: Image) -> float:
    """The mean difference in levels."""
    return float(np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)).mean())


def _guided_steps(engine: Engine, until: float) -> int:
    """The steps that begin no further on than that."""
    batches: list[int] = []
    hook = engine.pipeline.transformer.register_forward_pre_hook(
        lambda _module, arguments: batches.append(len(arguments[0]))
    )
    try:
        _drawn(engine, "a red circle", GUIDANCE, 1, until)
    finally:
        hook.remove()
    return sum(batch == 2 for batch in batches)


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
