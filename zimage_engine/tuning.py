"""Measures which levers make a model quicker on a device, and remembers it; knows no HTTP, prints nothing.

    tuning = tune(engine, [(1024, 1024)], TuneWishes())

Each lever is tried beside the best found so far, picture by picture in turns, and against the plain path in
how far its pictures are from that one's. What is found acts in this engine at once and in every later one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from zimage_engine.bench.spread import Spread, ratios, spread_of
from zimage_engine.engine import Engine, remembered_choices
from zimage_engine.errors import GuardExhausted, LeverFailed
from zimage_engine.memory.residency import Residency
from zimage_engine.memory.snapshot import device_clock
from zimage_engine.sampling.plan import resolve
from zimage_engine.speed.levers import LEVERS, Lever, compiles, size_bucket, with_lever
from zimage_engine.speed.remembered import key_of_choice
from zimage_engine.types import GenerationRequest, GenerationResult

#: Things that every model can draw, of several lengths: compiled code has to serve them all.
PROMPTS = (
    "a red circle on a white background",
    "a blue square on a black background, soft evening light, fine detail, a calm and plain composition",
    "a green triangle",
)
#: Mean difference of a picture from the plain path's, of 255 levels. Drawing a bfloat16 model's steps in
#: float32 instead moves the demo model's pictures by 0.23 (tests/benchmarks/REPORT.md); what people see in
#: two pictures side by side begins at several times as much.
TOLERANCE = 1.0
#: What is quicker by less is as likely to be the machine's mood.
WORTH = 1.02


@dataclass(frozen=True, slots=True)
class TuneWishes:
    """`repeat` pictures each way and lever; `tolerance` is the most that a picture's mean may differ from the
    plain path's, of 255 levels; `steps` and `guidance_scale` None: the model's own."""

    repeat: int = 5
    tolerance: float = TOLERANCE
    steps: int | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True, slots=True)
class LeverTrial:
    """What one lever came to at one size, and in a clause why it was taken or not.

    Seconds are of denoising and decoding a picture; `without` is the best before it. `speedup` is their ratio
    pair by pair; differences are from the plain path, of 255 levels: the largest mean of a picture, the
    largest of a value. All four are None where it was not tried. `prepare_seconds` is what making it ready
    took, compiling included, 0 where nothing was to be made.
    """

    lever: str
    taken: bool
    because: str
    without: Spread | None = None
    seconds: Spread | None = None
    speedup: Spread | None = None
    mean_difference: float | None = None
    largest_difference: int | None = None
    prepare_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SizeTuning:
    """What acts from now on at the sizes of `bucket`, and how each lever came out.

    `speedup` and the differences are of all of them together against the plain path; None where none acts.
    """

    width: int
    height: int
    bucket: int
    levers: tuple[str, ...]
    trials: tuple[LeverTrial, ...]
    speedup: Spread | None = None
    mean_difference: float | None = None
    largest_difference: int | None = None


@dataclass(frozen=True, slots=True)
class Tuning:
    """All of a run. `facts` is what it holds for; `remembered` False: it could not be written down."""

    facts: dict[str, Any]
    wishes: TuneWishes
    sizes: tuple[SizeTuning, ...]
    remembered: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes."""
        return asdict(self)


def tune(
    engine: Engine,
    sizes: Sequence[tuple[int, int]] = (),
    wishes: TuneWishes | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Tuning:
    """Try every lever at each of `sizes` ((width, height) in pixels; none: the model's own).

    `say` is told what comes next, in a line. Raises InvalidRequest or InvalidSize for what the model does not
    draw, and whatever drawing by the plain path raises.
    """
    wishes = wishes or TuneWishes()
    model = engine.description
    wanted = [
        resolve(_request(wishes, size, 0), model)
        for size in sizes or [(model.native_width, model.native_height)]
    ]
    facts, remembered = engine.lever_facts, remembered_choices()
    key = key_of_choice(facts)
    found: list[SizeTuning] = []
    is_kept = True
    for plan in wanted:
        one = _SizeTrial(engine, (plan.width_px, plan.height_px), wishes, key, say).tuned()
        found.append(one)
        measured = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **asdict(one)}
        is_kept &= remembered.remember(key, facts, one.bucket, one.levers, measured)
    engine.accelerate(remembered.recall(key) if is_kept else {one.bucket: one.levers for one in found})
    return Tuning(facts, wishes, tuple(found), is_kept)


def _request(wishes: TuneWishes, size: tuple[int, int], number: int) -> GenerationRequest:
    return GenerationRequest(
        prompt=PROMPTS[number % len(PROMPTS)],
        negative_prompt="",
        width=size[0],
        height=size[1],
        num_inference_steps=wishes.steps,
        guidance_scale=wishes.guidance_scale,
        seed=number,
        enhance=False,
        refine=False,
    )


class _SizeTrial:
    """One size: the plain pictures first, then lever by lever beside the best so far."""

    def __init__(
        self,
        engine: Engine,
        size: tuple[int, int],
        wishes: TuneWishes,
        key: str,
        say: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._size = size
        self._wishes = wishes
        self._key = key
        self._say = say
        self._bucket = size_bucket(*size)
        self._remembered = remembered_choices()
        self._clock = device_clock(engine.description.device)
        self._plain: dict[int, np.ndarray[Any, Any]] = {}

    def tuned(self) -> SizeTuning:
        name = f"{self._size[0]}x{self._size[1]}"
        self._engine.accelerate({})
        self._say(f"{name}: pictures by the plain path")
        self._draw((), 0)
        for number in range(self._wishes.repeat):
            self._plain[number] = _pixels(self._draw((), number))
        best: tuple[str, ...] = ()
        trials = []
        for lever in LEVERS:
            refusal = self._refusal(lever)
            if refusal is not None:
                trials.append(LeverTrial(lever.name, False, refusal))
                continue
            self._say(f"{name}: {lever.title}")
            with self._remembered.trying(self._key, lever.name):
                trial = self._trial(lever, best)
            trials.append(trial)
            best = with_lever(best, lever.name) if trial.taken else best
        speedup, mean, largest = self._whole(best)
        return SizeTuning(*self._size, self._bucket, best, tuple(trials), speedup, mean, largest)

    def _refusal(self, lever: Lever) -> str | None:
        placed = self._engine.memory_report().plan
        if placed is not None and placed.residency is not Residency.NONE:
            return "weights move while a picture is drawn, and nothing acts then"
        if lever.name in self._remembered.barred(self._key):
            return "trying it ended the process before; `zimage-turbo tune --forget` forgets that"
        return lever.refusal(self._engine.levers.facts)

    def _trial(self, lever: Lever, best: tuple[str, ...]) -> LeverTrial:
        candidate = with_lever(best, lever.name)
        began = self._clock()
        try:
            self._engine.accelerate({self._bucket: candidate})
            self._draw(candidate, 0)
            prepare_seconds = self._clock() - began
            without, seconds, mean, largest, tripped = self._compared(best, candidate)
        except (LeverFailed, GuardExhausted) as failed:
            self._engine.accelerate({self._bucket: best})
            return LeverTrial(lever.name, False, f"it failed here: {failed}")
        gain = ratios(without, seconds)
        because = _judged(gain, mean, tripped, self._wishes.tolerance)
        if because is not None and compiles(candidate) != compiles(best):
            self._engine.accelerate({self._bucket: best})
        return LeverTrial(
            lever.name,
            because is None,
            because or lever.because,
            spread_of(without),
            spread_of(seconds),
            gain,
            mean,
            largest,
            prepare_seconds,
        )

    def _compared(
        self, one: tuple[str, ...], other: tuple[str, ...]
    ) -> tuple[list[float], list[float], float, int, bool]:
        """Seconds of both by turns; how far the other's pictures are from the plain ones, and whether its
        guard met anything."""
        seconds: dict[bool, list[float]] = {False: [], True: []}
        means, largest, tripped = [], 0, False
        for number in range(self._wishes.repeat):
            for is_other in (False, True) if number % 2 else (True, False):
                result = self._draw(other if is_other else one, number)
                picture = result.report.pictures[0]
                seconds[is_other].append(picture.denoise_seconds + picture.decode_seconds)
                if is_other:
                    apart = np.abs(_pixels(result) - self._plain[number])
                    means.append(float(apart.mean()))
                    largest = max(largest, int(apart.max()))
                    tripped |= bool(picture.guard.trips)
        return seconds[False], seconds[True], max(means), largest, tripped

    def _whole(self, best: tuple[str, ...]) -> tuple[Spread | None, float | None, int | None]:
        if not best:
            return None, None, None
        without, seconds, mean, largest, _ = self._compared((), best)
        return ratios(without, seconds), mean, largest

    def _draw(self, names: tuple[str, ...], number: int) -> GenerationResult:
        self._engine.levers.choose({self._bucket: names} if names else {})
        asked = replace(_request(self._wishes, self._size, number), exact=not names)
        return self._engine.generate(asked)


def _judged(gain: Spread, mean: float, tripped: bool, tolerance: float) -> str | None:
    """Why it is not taken; None where it is. A gain counts where three of four pairs had it."""
    if tripped:
        return "the guard met a bad value with it"
    if mean > tolerance:
        return f"a picture differs by {mean:.2f} of 255 levels on the average, and {tolerance:g} is allowed"
    if gain.median < WORTH or gain.lower_quartile < 1:
        return "it is not clearly quicker here"
    return None


def _pixels(result: GenerationResult) -> np.ndarray[Any, Any]:
    return np.asarray(result.images[0].convert("RGB"), dtype=np.int16)
