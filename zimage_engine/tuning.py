"""Measures which levers make a model quicker on a device, and remembers it; knows no HTTP, prints nothing.

    tuning = tune(engine, [(1024, 1024)], TuneWishes())

Each lever is tried beside the best found so far, picture by picture in turns, and against the plain path in
how far its pictures are from that one's. What is found acts in this engine at once and in every later one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from zimage_engine.bench.spread import Spread, ratios, spread_of
from zimage_engine.engine import Engine
from zimage_engine.errors import GuardExhausted, LeverFailed
from zimage_engine.memory.residency import Residency
from zimage_engine.memory.snapshot import device_clock
from zimage_engine.sampling.plan import resolve
from zimage_engine.speed.levers import LEVERS, Choices, Lever, agreeing, compiles, size_bucket, with_lever
from zimage_engine.speed.remembered import key_of_choice, remembered_choices
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
#: Pairs for each lever, and the share of them that has to be quicker: 8 of 9, which by chance alone happens
#: once in fifty times.
REPEAT, SHARE_QUICKER = 9, 0.85


@dataclass(frozen=True, slots=True)
class TuneWishes:
    """`repeat` pictures each way and lever; `tolerance` is the most that a picture's mean may differ from the
    plain path's, of 255 levels; `steps` and `guidance_scale` None: the model's own."""

    repeat: int = REPEAT
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
        with _each_drawn_once(engine):
            found.append(_SizeTrial(engine, (plan.width_px, plan.height_px), wishes, key, say).tuned())
    kept = agreeing({one.bucket: one.levers for one in found})
    found = [one if one.levers == kept[one.bucket] else _without_code(one, kept) for one in found]
    for one in found:
        measured = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **asdict(one)}
        is_kept &= remembered.remember(key, facts, one.bucket, one.levers, measured)
    engine.accelerate(remembered.recall(key) if is_kept else kept)
    return Tuning(facts, wishes, tuple(found), is_kept)


@contextmanager
def _each_drawn_once(engine: Engine) -> Iterator[None]:
    """Without second looks: what looks wrong would be drawn in float32 by both, and so compared."""
    draws_again, engine.draws_again = engine.draws_again, False
    try:
        yield
    finally:
        engine.draws_again = draws_again


def _without_code(one: SizeTuning, kept: Choices) -> SizeTuning:
    """A size whose compiled code would be another than the largest one's: what was measured whole is not."""
    return replace(one, levers=kept[one.bucket], speedup=None, mean_difference=None, largest_difference=None)


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
        #: The plain path's pictures, and whether the guard met something in them.
        self._plain: dict[int, tuple[np.ndarray[Any, Any], bool]] = {}

    def tuned(self) -> SizeTuning:
        name = f"{self._size[0]}x{self._size[1]}"
        self._engine.accelerate({})
        self._say(f"{name}: pictures by the plain path")
        self._draw((), 0)
        for number in range(self._wishes.repeat):
            self._plain[number] = _seen(self._draw((), number))
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
        if best:
            whole = self._compared((), best)
            if _judged(whole, self._wishes.tolerance) is None:
                gain = ratios(whole.without, whole.seconds)
                return SizeTuning(
                    *self._size, self._bucket, best, tuple(trials), gain, whole.mean, whole.largest
                )
        # All of them together have to hold what each did.
        return SizeTuning(*self._size, self._bucket, (), tuple(trials))

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
            # Code of two kinds cannot lie side by side: then both are held against the plain path.
            is_other_code = compiles(best) not in (None, compiles(candidate))
            before = self._compared((), best) if is_other_code else None
            self._engine.accelerate({self._bucket: candidate})
            self._draw(candidate, 0)
            prepare_seconds = self._clock() - began
            compared = self._compared(() if is_other_code else best, candidate)
        except (LeverFailed, GuardExhausted) as failed:
            self._engine.accelerate({self._bucket: best})
            return LeverTrial(lever.name, False, f"it failed here: {failed}")
        because = _judged(compared, self._wishes.tolerance, before)
        if because is not None and compiles(candidate) != compiles(best):
            self._engine.accelerate({self._bucket: best})
        return LeverTrial(
            lever.name,
            because is None,
            because or lever.because,
            spread_of(compared.without),
            spread_of(compared.seconds),
            ratios(compared.without, compared.seconds),
            compared.mean,
            compared.largest,
            prepare_seconds,
        )

    def _compared(self, one: tuple[str, ...], other: tuple[str, ...]) -> _Compared:
        """Both by turns, and the other's pictures beside the plain ones."""
        seconds: dict[bool, list[float]] = {False: [], True: []}
        means, largest, tripped = [], 0, False
        for number in range(self._wishes.repeat):
            for is_other in (False, True) if number % 2 else (True, False):
                result = self._draw(other if is_other else one, number)
                picture = result.report.pictures[0]
                seconds[is_other].append(picture.denoise_seconds + picture.decode_seconds)
                if is_other:
                    (pixels, trips), (stock, stock_trips) = _seen(result), self._plain[number]
                    apart = np.abs(pixels - stock)
                    means.append(float(apart.mean()))
                    largest = max(largest, int(apart.max()))
                    tripped |= trips and not stock_trips
        return _Compared(tuple(seconds[False]), tuple(seconds[True]), max(means), largest, tripped)

    def _draw(self, names: tuple[str, ...], number: int) -> GenerationResult:
        """Raises LeverFailed where something else acted than what is to be measured."""
        self._engine.levers.choose({self._bucket: names} if names else {})
        asked = replace(_request(self._wishes, self._size, number), exact=not names)
        result = self._engine.generate(asked)
        if result.report.accelerated_by != names:
            told = ", ".join(set(names) - set(result.report.accelerated_by))
            raise LeverFailed(f"{told} did not act on a picture of this size")
        return result


@dataclass(frozen=True, slots=True)
class _Compared:
    """Seconds of pairs; how far the other's pictures are from the plain ones, and whether its guard met what
    the plain path's did not."""

    without: tuple[float, ...]
    seconds: tuple[float, ...]
    mean: float
    largest: int
    tripped: bool


def _judged(compared: _Compared, tolerance: float, before: _Compared | None = None) -> str | None:
    """Why it is not taken; None where it is. With `before` that one was measured against the same path."""
    if compared.tripped:
        return "the guard met a bad value with it"
    if compared.mean > tolerance:
        return (
            f"a picture differs by {compared.mean:.2f} of 255 levels on the average, and {tolerance:g} is "
            "allowed"
        )
    wanted = 1.0 if before is None else ratios(before.without, before.seconds).median
    pairs = [slow / fast for slow, fast in zip(compared.without, compared.seconds, strict=True)]
    quicker = sum(pair > wanted for pair in pairs)
    if spread_of(pairs).median < wanted * WORTH or quicker < SHARE_QUICKER * len(pairs):
        return "it is not clearly quicker here"
    return None


def _seen(result: GenerationResult) -> tuple[np.ndarray[Any, Any], bool]:
    pixels = np.asarray(result.images[0].convert("RGB"), dtype=np.int16)
    return pixels, bool(result.report.pictures[0].guard.trips)
