"""Requests with LoRAs on, off and mixed, one after another, against pictures of fresh processes.

    python -m tests.chaos.loras [--count 100] [--seed 1]

The demo model, and LoRAs that are made for it here. What each set of them draws from each seed is computed
first, in a process of its own for each set, which is loaded with these LoRAs and draws nothing else. Then
one engine draws sets and seeds by lot. A request is wrong where its picture is another one, or its report
tells of other LoRAs, and lost where it ends without a picture.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zimage_engine import Engine, GenerationRequest, LoraWeight
from zimage_engine.engine import DEMO_MODEL_PATH
from zimage_engine.errors import EngineError
from zimage_engine.types import LoraChoice

SEEDS = range(4)
NAMES = ("ink", "light", "style", "touch")
#: What the engine is started with, and draws with where a request says nothing.
STARTED = (("light", 0.6),)
#: None: the request says nothing of LoRAs.
SETS: tuple[tuple[tuple[str, float], ...] | None, ...] = (
    None,
    (),
    (("style", 0.8),),
    (("style", -0.3),),
    (("touch", 1.0),),
    (("style", 0.8), ("touch", 0.5)),
    (("ink", 0.7), ("light", 0.2), ("touch", -0.4)),
)


@dataclass
class Outcome:
    """What came of a run; `wrong` and `lost` say of which requests."""

    drawn: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.drawn.items()))
        return (
            f"{sum(self.drawn.values())} drawn ({kinds}), {len(self.wrong)} wrong, {len(self.lost)} lost; "
            "expected pictures from a fresh process for each set"
        )


def request_for(seed: int) -> GenerationRequest:
    """One that the demo model draws in a moment."""
    return GenerationRequest(
        "a red circle and a blue star",
        seed=seed,
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=1.0,
        enhance=False,
    )


def digest(engine: Engine, request: GenerationRequest) -> tuple[str, tuple[tuple[str, float], ...]]:
    """The picture's digest, and the LoRAs that the report tells of."""
    result = engine.generate(request)
    told = tuple((use.name.removesuffix(".safetensors"), use.weight) for use in result.report.loras)
    return hashlib.sha256(result.images[0].convert("RGB").tobytes()).hexdigest(), told


def of_a_fresh_process(folder: Path, loras: tuple[tuple[str, float], ...]) -> dict[int, str]:
    """What each seed draws in a process that has only these LoRAs."""
    command = [sys.executable, "-m", "tests.chaos.loras", "--fresh", json.dumps([str(folder), loras])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {int(seed): drawn for seed, drawn in json.loads(done.stdout.splitlines()[-1]).items()}


def draw_fresh(folder: str, loras: list[tuple[str, float]]) -> None:
    """The other end of `of_a_fresh_process`."""
    on = [LoraWeight(Path(folder) / f"{name}.safetensors", weight) for name, weight in loras]
    engine = Engine.load(DEMO_MODEL_PATH, "cpu", loras=on, threads=1)
    sys.stdout.write(json.dumps({seed: digest(engine, request_for(seed))[0] for seed in SEEDS}) + "\n")


def run(engine: Engine, expected: dict[Any, dict[int, str]], count: int, dice: random.Random) -> Outcome:
    """Draw `count` requests, each of a set and a seed by lot."""
    outcome = Outcome()
    for number in range(count):
        wanted, seed = dice.choice(SETS), dice.choice(SEEDS)
        named = None if wanted is None else tuple(LoraChoice(*each) for each in wanted)
        which = f"request {number}, {wanted}, seed {seed}"
        try:
            drawn, told = digest(engine, replace(request_for(seed), loras=named))
        except EngineError as error:
            outcome.lost.append(f"{which}: {error}")
            continue
        acting = STARTED if wanted is None else wanted
        outcome.drawn["off" if not acting else "on" if len(acting) == 1 else "mixed"] += 1
        if drawn != expected[acting][seed] or told != acting:
            outcome.wrong.append(f"{which}: drawn with {told}, picture {drawn[:12]}")
    return outcome


def main() -> int:
    from tests.zimage_engine.tiny_models.lora import write_lora

    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--count", type=int, default=100)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--fresh", type=json.loads, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.fresh:
        draw_fresh(*chosen.fresh)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, name in enumerate(NAMES):
            write_lora(DEMO_MODEL_PATH, folder / f"{name}.safetensors", seed=number, strength=0.1)
        sets = {STARTED if wanted is None else wanted for wanted in SETS}
        expected: dict[Any, dict[int, str]] = {each: of_a_fresh_process(folder, each) for each in sets}
        pictures = {drawn for by_seed in expected.values() for drawn in by_seed.values()}
        if len(pictures) != len(sets) * len(SEEDS):
            sys.stdout.write("some sets draw the same pictures, so that nothing could be told apart\n")
            return 1
        on = [LoraWeight(folder / f"{name}.safetensors", weight) for name, weight in STARTED]
        engine = Engine.load(DEMO_MODEL_PATH, "cpu", loras=on, lora_folder=folder, threads=1)
        outcome = run(engine, expected, chosen.count, random.Random(chosen.seed))
    for line in (*outcome.wrong, *outcome.lost):
        sys.stdout.write(line + "\n")
    sys.stdout.write(f"{outcome}\n")
    return 1 if outcome.wrong or outcome.lost else 0


if __name__ == "__main__":
    sys.exit(main())
