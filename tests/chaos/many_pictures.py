"""Pictures in a row with faults, cancels and deadlines at random; after each, a control picture is drawn.

    python -m tests.chaos.many_pictures [--count 200] [--seed 0]

One engine of each family draws them in turns, sizes, steps and guidance mixed. A picture is wrong where the
engine raised anything but what was asked for, where a value that is not finite went into the picture, where
a fault that happened once changed it, or where the control picture afterwards is not bit for bit the first.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests.zimage_engine.sampling.faults import FAMILIES, Cell, Rig, Rigs
from zimage_engine.errors import DeadlineExceeded, GenerationCancelled, GuardExhausted
from zimage_engine.sampling.control import DrawingControl
from zimage_engine.types import GenerationRequest, GenerationResult, StepProgress

SIDES_PX = {"z-image": (32, 64, 96, 128)}
OTHER_SIDES_PX = (32, 48, 64)
BAD = (math.nan, math.inf, -math.inf, 500.0)
#: The text encoders' states may be larger than that.
FAR_TOO_LARGE = 1e8


@dataclass(frozen=True)
class Fault:
    """In `part` (a component or a part of one): from call `first` (from 0) on, `times` calls give `value`."""

    part: str
    first: int
    times: int
    value: float


@dataclass(frozen=True)
class Misfortune:
    """What befalls one picture. Steps count from 1; 0 is before anything is drawn."""

    faults: tuple[Fault, ...] = ()
    cancelled_at: int | None = None
    breaks_at: int | None = None
    deadline_seconds: float | None = None

    @property
    def kind(self) -> str:
        parts = ["fault" for _ in self.faults[:1]]
        parts += ["cancel"] if self.cancelled_at is not None else []
        parts += ["deadline"] if self.deadline_seconds is not None else []
        parts += ["callback breaks"] if self.breaks_at is not None else []
        return " and ".join(parts) or "none"

    @property
    def is_one_transient_fault(self) -> bool:
        return self.kind == "fault" and len(self.faults) == 1 and self.faults[0].times == 1


class CallbackBroke(Exception):
    """What the caller's own callback raised."""


@dataclass
class Tally:
    """How the pictures ended, by what befell them, and what was wrong in words."""

    endings: Counter[tuple[str, str]] = field(default_factory=Counter)
    trips: Counter[str] = field(default_factory=Counter)
    injected: int = 0
    unchanged: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def pictures(self) -> int:
        return sum(self.endings.values())

    def __str__(self) -> str:
        lines = ["| befallen by | ended | pictures |", "|---|---|---:|"]
        lines += [f"| {kind} | {end} | {n} |" for (kind, end), n in sorted(self.endings.items())]
        lines += [
            "",
            f"{self.pictures} pictures, {self.injected} bad values put in, recovered by {dict(self.trips)}",
            f"{self.unchanged} with one transient fault, bit for bit as without it",
            f"{len(self.wrong)} wrong",
        ]
        return "\n".join(lines)


def endure(count: int, seed: int, folder: Path) -> Tally:
    """Draw `count` pictures and after each a control picture."""
    chance, tally, rigs = random.Random(seed), Tally(), Rigs(folder)
    controls: dict[str, list[bytes]] = {}
    for number in range(count):
        rig = rigs[Cell(chance.choice(list(FAMILIES)), "denoiser", "nan", "once")]
        if rig.family not in controls:
            controls[rig.family] = control_picture(rig)
        request, misfortune = random_request(rig, chance), random_misfortune(rig, chance)
        wrong = drawn(rig, request, misfortune, tally)
        if control_picture(rig) != controls[rig.family]:
            wrong.append("the control picture afterwards is another")
        told = f"picture {number} (seed {seed}, {rig.family}, {request}, {misfortune})"
        tally.wrong += [f"{told}: {each}" for each in wrong]
    return tally


def random_request(rig: Rig, chance: random.Random) -> GenerationRequest:
    sides = SIDES_PX.get(rig.family, OTHER_SIDES_PX)
    return GenerationRequest(
        chance.choice(["a red circle", "圆形", "a black wall " * 8]),
        negative_prompt=chance.choice(["", "blue"]),
        seed=chance.randrange(1000),
        width=chance.choice(sides),
        height=chance.choice(sides),
        num_inference_steps=chance.randint(1, 8),
        guidance_scale=chance.choice([0.0, 1.0, 1.8, 7.5]),
        n=chance.choice([1, 1, 1, 2]),
        enhance=False,
    )


def random_misfortune(rig: Rig, chance: random.Random) -> Misfortune:
    one, two = random_fault(rig, chance), random_fault(rig, chance)
    step = chance.randint(0, 8)
    return chance.choice(
        [
            Misfortune(),
            Misfortune((one,)),
            Misfortune((one,)),
            Misfortune((one, two)),
            Misfortune(cancelled_at=step),
            Misfortune((one,), cancelled_at=step),
            Misfortune(deadline_seconds=chance.choice([0.0, 0.02, 0.05, 0.1])),
            Misfortune((one,), deadline_seconds=chance.choice([0.02, 0.05, 0.1])),
            Misfortune(breaks_at=max(1, step)),
            Misfortune((one, two), breaks_at=max(1, step)),
        ]
    )


def random_fault(rig: Rig, chance: random.Random) -> Fault:
    part = chance.choice(
        [rig.row.denoiser, rig.row.denoiser, rig.row.denoiser, "vae.decoder", "text_encoder"]
    )
    first = chance.randint(0, 7) if part == rig.row.denoiser else 0
    value = chance.choice(BAD)
    large = FAR_TOO_LARGE if part == "text_encoder" else value
    times = chance.choice([1, 1, 2, 3, 6, 1000])
    return Fault(part, first, times, value if not math.isfinite(value) else large)


def drawn(rig: Rig, request: GenerationRequest, misfortune: Misfortune, tally: Tally) -> list[str]:
    """Draw under misfortune, count how it ended, and say what was wrong."""
    undisturbed = pixels(rig.engine.generate(request)) if misfortune.is_one_transient_fault else None
    injected: list[float] = []
    control = DrawingControl(misfortune.deadline_seconds)
    if misfortune.cancelled_at == 0:
        control.cancel()
    allowed: list[type[Exception]] = [GuardExhausted] if misfortune.faults else []
    allowed += [GenerationCancelled] if misfortune.cancelled_at is not None else []
    allowed += [DeadlineExceeded] if misfortune.deadline_seconds is not None else []
    allowed += [CallbackBroke] if misfortune.breaks_at is not None else []
    wrong: list[str] = []
    with ExitStack() as stack:
        decoded = stack.enter_context(rig.decoded())
        for fault in misfortune.faults:
            stack.enter_context(lying_in_wait(rig, fault, injected))
        try:
            result = rig.engine.generate(request, on_step(misfortune, control), control)
        except Exception as error:
            ended = type(error).__name__
            if type(error) not in allowed:
                wrong.append(f"raised {ended}: {error}")
        else:
            ended = "drawn"
            # A picture that merely looks wrong, as noise does, is drawn again: that is no bad value.
            trips = [
                trip
                for each in result.report.pictures
                for trip in each.guard.trips
                if trip.stage != "picture"
            ]
            tally.trips.update(str(trip.recovered_by) for trip in trips)
            if injected and not trips:
                wrong.append("bad values were put in, and nothing was found")
            if undisturbed is not None and injected:
                tally.unchanged += 1
                if pixels(result) != undisturbed:
                    wrong.append("a fault that happened once changed the picture")
        if not all(bool(torch.isfinite(each).all()) for each in decoded):
            wrong.append("a value that is not finite went into a picture")
    tally.endings[misfortune.kind, ended] += 1
    tally.injected += len(injected)
    return wrong


def on_step(misfortune: Misfortune, control: DrawingControl) -> Callable[[StepProgress], None]:
    def told(progress: StepProgress) -> None:
        if progress.step == misfortune.cancelled_at:
            canceller = threading.Thread(target=control.cancel)
            canceller.start()
            canceller.join()
        if progress.step == misfortune.breaks_at:
            raise CallbackBroke

    return told


@contextmanager
def lying_in_wait(rig: Rig, fault: Fault, injected: list[float]) -> Iterator[None]:
    calls = itertools.count()

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        if not fault.first <= next(calls) < fault.first + fault.times:
            return output
        injected.append(fault.value)
        return tree_map(spoilt, output)

    def spoilt(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        copy = leaf.clone(memory_format=torch.contiguous_format)
        copy.view(-1)[0] = fault.value
        return copy

    part = rig.pipeline
    for name in fault.part.split("."):
        part = getattr(part, name)
    handle = part.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def control_picture(rig: Rig) -> list[bytes]:
    side = SIDES_PX.get(rig.family, OTHER_SIDES_PX)[1]
    request = GenerationRequest(
        "a control", seed=5, width=side, height=side, num_inference_steps=3, guidance_scale=1.8, enhance=False
    )
    return pixels(rig.engine.generate(request))


def pixels(result: GenerationResult) -> list[bytes]:
    return [image.tobytes() for image in result.images]


def main() -> None:
    """Print how they ended; ends with 1 if anything was wrong."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--count", type=int, default=200)
    asked.add_argument("--seed", type=int, default=0)
    chosen = asked.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tally = endure(chosen.count, chosen.seed, Path(folder))
    for each in tally.wrong:
        sys.stdout.write(f"WRONG {each}\n")
    sys.stdout.write(f"{tally}\n{time.perf_counter() - started:.0f} s\n")
    sys.exit(1 if tally.wrong else 0)


if __name__ == "__main__":
    main()
