"""One measurement from beginning to end: pictures and their stages, stock diffusers, many at once, the limit.

Gives plain values as `report.schema.json` describes them; prints nothing itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from zimage_engine.bench.machine import MemoryPeak, Row, commit_of_program, load, machine_facts, versions
from zimage_engine.bench.pictures import PictureClock, PictureTimes
from zimage_engine.bench.rates import DeviceRates, measure_rates
from zimage_engine.bench.spread import ratios, spread_of
from zimage_engine.bench.stock import StockPipeline
from zimage_engine.bench.work import Work, count_work
from zimage_engine.engine import Engine
from zimage_engine.families import family_named
from zimage_engine.loading.describe import max_tokens
from zimage_engine.memory.snapshot import device_clock
from zimage_engine.refiner import refine
from zimage_engine.sampling.plan import resolve
from zimage_engine.types import GenerationRequest, GenerationResult

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "zimage-turbo bench"
FORMAT_VERSION = 1
SEED = 7
#: About the length of what people write, and things that the demo model knows.
PROMPT = "a red circle on a white background, soft evening light, fine detail, a calm and plain composition"
AT_ONCE = (1, 2, 4, 8)
#: Each of the many draws so many at the least: one that begins late would else say little.
ROUNDS = 2

#: Makes a picture's file, whole.
Pack = Callable[[GenerationResult], object]


@dataclass(frozen=True, slots=True)
class Crowd:
    """Requests that were answered, some at a time: the wall-clock seconds of all, and of each from its
    sending to its answer."""

    seconds: float
    waits: tuple[float, ...]


Made = TypeVar("Made")


class InThread(Protocol):
    """Runs what it is given in the thread in which requests are drawn, and waits for it."""

    def __call__(self, work: Callable[[], Made], /) -> Made: ...


def _here(work: Callable[[], Made], /) -> Made:
    return work()


#: Sends the requests, so many at once, and waits for all answers.
DrawAtOnce = Callable[[Sequence[GenerationRequest], int], Crowd]


@dataclass(frozen=True, slots=True)
class BenchWishes:
    """What is to be measured. None is the model's own; `sizes` are (width, height) in pixels, none: its own.

    `tiny` measures rates with matrices that are too small for it: to see that all of it runs.
    """

    sizes: tuple[tuple[int, int], ...] = ()
    steps: int | None = None
    guidance_scale: float | None = None
    repeat: int = 5
    compare_stock: bool = False
    at_once: tuple[int, ...] = AT_ONCE
    tiny: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine that has not drawn yet, what loading it took, and what a report says of its model beside its
    description: `weights` is "files" or "random", `layers` how many of the denoiser's are left, None: all."""

    engine: Engine
    load_seconds: float
    weights: str = "files"
    layers: int | None = None


def measure(
    loaded: Loaded,
    wishes: BenchWishes,
    pack: Pack,
    draw_at_once: DrawAtOnce | None,
    say: Callable[[str], None] = lambda line: None,
    in_thread: InThread = _here,
) -> Row:
    """Everything that was asked for. `say` is told what comes next, in a line.

    All that computes does so `in_thread`, the one in which `draw_at_once` draws and the engine was loaded:
    each thread that has computed keeps threads of its own for it, and on a processor the threads of two
    leave one another no core to wait on, which made pictures take twice as long.

    Raises InvalidRequest or InvalidSize for what the model does not draw.
    """
    engine = loaded.engine
    machine = machine_facts(engine.description.device)
    requests = [_request(engine, wishes, size) for size in wishes.sizes or [(None, None)]]
    stock = in_thread(partial(_stock_of, engine)) if wishes.compare_stock else None
    say("the first picture")
    first_seconds = in_thread(partial(_first_picture, engine, requests[0]))
    cases = []
    with _quiet():
        for request in requests:
            case = _Case(engine, request, wishes, pack, stock, draw_at_once, in_thread)
            cases.append(case.measured(say))
    say("what this machine computes and copies in a second")
    rates = in_thread(partial(measure_rates, engine.description.device, wishes.tiny))
    for row in cases:
        _add_limit(row, rates, engine.description.dtype)
    steady = cases[0]["stages"]["picture"]["median"]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit_of_program(),
        "versions": versions(),
        "machine": {**machine, "load_at_end": load()},
        "settings": {**asdict(wishes), "sizes": [[row["width_px"], row["height_px"]] for row in cases]},
        "model": _model_facts(loaded),
        "start": {
            "load_seconds": loaded.load_seconds,
            "first_picture_seconds": first_seconds,
            "first_over_steady": first_seconds / steady,
        },
        "rates": asdict(rates),
        "cases": cases,
        "notes": list(_notes(cases, machine, wishes)),
    }


def _request(engine: Engine, wishes: BenchWishes, size: tuple[int | None, int | None]) -> GenerationRequest:
    """Every value decided; neither enhanced nor refined, so that stock diffusers can draw the same."""
    asked = GenerationRequest(
        prompt=PROMPT,
        negative_prompt="",
        width=size[0],
        height=size[1],
        num_inference_steps=wishes.steps,
        guidance_scale=wishes.guidance_scale,
        seed=SEED,
        enhance=False,
        refine=False,
    )
    plan = resolve(asked, engine.description)
    return replace(
        asked,
        width=plan.width_px,
        height=plan.height_px,
        num_inference_steps=plan.steps,
        guidance_scale=plan.guidance_scale,
    )


def _stock_of(engine: Engine) -> StockPipeline:
    return StockPipeline(engine, max_tokens(engine.pipeline, family_named(engine.description.family)))


def _first_picture(engine: Engine, request: GenerationRequest) -> float:
    clock = device_clock(engine.description.device)
    began = clock()
    engine.generate(request)
    return clock() - began


@contextmanager
def _quiet() -> Iterator[None]:
    """Nobody looks at these pictures: warnings about their looks would only stand between the lines."""
    logger = logging.getLogger("zimage_engine")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Case:
    """One size: what is measured for it, in the order of the report."""

    def __init__(
        self,
        engine: Engine,
        request: GenerationRequest,
        wishes: BenchWishes,
        pack: Pack,
        stock: StockPipeline | None,
        draw_at_once: DrawAtOnce | None,
        in_thread: InThread,
    ) -> None:
        self._engine = engine
        self._request = request
        self._wishes = wishes
        self._pack = pack
        self._stock = stock
        self._draw_at_once = draw_at_once
        self._in_thread = in_thread
        self._family = family_named(engine.description.family)
        self._clock = device_clock(engine.description.device)
        self._ours = PictureClock(engine.pipeline, self._family, self._clock)
        self._theirs = None if stock is None else PictureClock(stock.pipeline, self._family, self._clock)
        self._prompts = 0
        self._trips = 0

    def measured(self, say: Callable[[str], None]) -> Row:
        request, size = self._request, f"{self._request.width}x{self._request.height}"
        guided = (request.guidance_scale or 1.0) > 1.0
        peak = MemoryPeak(self._engine.description.device)
        say(f"{size}: warming up, and counting the work")
        self._draw_ours(self._another())
        work = self._work()
        drawn: list[_Drawn] = []
        theirs: list[PictureTimes] = []
        unguided: list[PictureTimes] = []
        exact: list[PictureTimes] = []
        levers = self._engine.levers.for_picture(request.width or 0, request.height or 0)
        compared: list[Row] = []
        memory = peak.facts()  # before stock diffusers takes any
        if self._stock is not None:
            self._draw_theirs(self._another())
        self._answered()  # the worker draws in a thread of its own, new to it all
        answers: list[float] = []
        for number in range(self._wishes.repeat):
            say(f"{size}: picture {number + 1} of {self._wishes.repeat}")
            asked = self._another()
            ours, stock = self._pair(asked, is_ours_first=number % 2 == 0)
            drawn.append(ours)
            answers += self._answered()
            if stock is not None:
                theirs.append(stock[1])
                compared.append(_difference(ours.result.images[0], stock[0]))
            if guided:
                unguided.append(self._draw_ours(replace(asked, guidance_scale=1.0)).times)
            if levers:
                exact.append(self._draw_ours(replace(asked, exact=True)).times)
        times = [each.times for each in drawn]
        return {
            "width_px": request.width,
            "height_px": request.height,
            "steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "stages": {
                **_stages(times, drawn),
                **({"answer": asdict(spread_of(answers))} if answers else {}),
            },
            "ratios": {
                **_speedups(theirs, times),
                **_answer_ratio(answers, theirs),
                **({"guidance_cost": _ratio(times, unguided, "denoise")} if guided else {}),
                **({"acceleration": _ratio(exact, times, "picture")} if levers else {}),
            },
            "stock": None if not theirs else {"stages": _stages(theirs), "pictures": _worst(compared)},
            "work": asdict(work),
            "memory": memory,
            "guard_trips": self._trips,
            "accelerated_by": list(drawn[0].result.report.accelerated_by),
            "at_once": self._crowds(size, say),
        }

    def _another(self) -> GenerationRequest:
        """The same picture for another prompt, so that nothing of it was encoded before; the negative prompt
        stays, as it does for most people."""
        self._prompts += 1
        return replace(self._request, prompt=f"{PROMPT}, number {self._prompts} of {self._request.width}")

    def _draw_ours(self, request: GenerationRequest) -> _Drawn:
        return self._in_thread(partial(self._drawn_by_us, request))

    def _drawn_by_us(self, request: GenerationRequest) -> _Drawn:
        result, times = self._ours.timed(lambda: self._engine.generate(request))
        self._trips += sum(len(picture.guard.trips) for picture in result.report.pictures)
        began = self._clock()
        self._pack(result)
        packed = self._clock()
        refine(result.images[0])
        return _Drawn(result, times, packed - began, self._clock() - packed)

    def _draw_theirs(self, request: GenerationRequest) -> tuple[Image, PictureTimes]:
        assert self._stock is not None and self._theirs is not None
        plan = resolve(request, self._engine.description)
        return self._in_thread(partial(self._theirs.timed, partial(self._stock.draw, plan, SEED)))

    def _pair(
        self, request: GenerationRequest, is_ours_first: bool
    ) -> tuple[_Drawn, tuple[Image, PictureTimes] | None]:
        """Both right after one another, now this one first, now that one."""
        if self._stock is None:
            return self._draw_ours(request), None
        if is_ours_first:
            ours = self._draw_ours(request)
            return ours, self._draw_theirs(request)
        theirs = self._draw_theirs(request)
        return self._draw_ours(request), theirs

    def _answered(self) -> tuple[float, ...]:
        """How long the worker takes for one picture with its PNG, as it is asked for alone."""
        return () if self._draw_at_once is None else self._draw_at_once([self._another()], 1).waits

    def _work(self) -> Work:
        """Of one step, taken for each of them: all have the same shapes."""
        # Exact, because what runs within compiled code is not seen from outside.
        request = replace(self._another(), num_inference_steps=1, exact=True)
        draw = partial(self._engine.generate, request)
        one = self._in_thread(partial(count_work, self._engine.pipeline, self._family, draw))
        steps = self._request.num_inference_steps or 1
        return replace(
            one, denoise_flops=steps * one.denoise_flops, denoiser_calls=steps * one.denoiser_calls
        )

    def _crowds(self, size: str, say: Callable[[str], None]) -> list[Row]:
        if self._draw_at_once is None:
            return []
        rows: list[Row] = []
        for at_once in self._wishes.at_once:
            say(f"{size}: {at_once} at once")
            count = max(self._wishes.repeat, ROUNDS * at_once)
            crowd = self._draw_at_once([self._another() for _ in range(count)], at_once)
            a_minute = 60 * count / crowd.seconds
            rows.append(
                {
                    "at_once": at_once,
                    "pictures": count,
                    "seconds": crowd.seconds,
                    "pictures_a_minute": a_minute,
                    "answer_seconds": asdict(spread_of(crowd.waits)),
                    "gain": a_minute / (rows[0]["pictures_a_minute"] if rows else a_minute),
                }
            )
        return rows


@dataclass(frozen=True, slots=True)
class _Drawn:
    result: GenerationResult
    times: PictureTimes
    pack_seconds: float
    refine_seconds: float


_TIMED = ("picture", "encode", "step", "denoise", "decode")


def _stages(times: Sequence[PictureTimes], drawn: Sequence[_Drawn] = ()) -> Row:
    """Seconds; `steps` has each of them. `refine` and `pack` (the PNG) are not in `picture`."""
    found: Row = {name: asdict(spread_of(getattr(each, name) for each in times)) for name in _TIMED}
    found["steps"] = [asdict(spread_of(step)) for step in zip(*(each.steps for each in times), strict=False)]
    if drawn:
        found["refine"] = asdict(spread_of(each.refine_seconds for each in drawn))
        found["pack"] = asdict(spread_of(each.pack_seconds for each in drawn))
    return found


def _ratio(slow: Iterable[PictureTimes], fast: Iterable[PictureTimes], name: str) -> Row:
    return asdict(ratios([getattr(each, name) for each in slow], [getattr(each, name) for each in fast]))


def _speedups(theirs: Sequence[PictureTimes], ours: Sequence[PictureTimes]) -> Row:
    return {f"{name}_speedup": _ratio(theirs, ours, name) for name in _TIMED} if theirs else {}


def _answer_ratio(answers: Sequence[float], theirs: Sequence[PictureTimes]) -> Row:
    if not answers or not theirs:
        return {}
    return {"worker_over_stock": asdict(ratios(answers, [each.picture for each in theirs]))}


def _difference(ours: Image, theirs: Image) -> Row:
    one, other = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (ours, theirs))
    apart = np.abs(one - other)
    return {"largest_difference": int(apart.max()), "mean_difference": float(apart.mean())}


def _worst(compared: Sequence[Row]) -> Row:
    """Of 255 levels, in all pictures that were drawn twice."""
    return {
        "compared": len(compared),
        "largest_difference": max(each["largest_difference"] for each in compared),
        "mean_difference": max(each["mean_difference"] for each in compared),
    }


def _add_limit(case: Row, rates: DeviceRates, dtype: str) -> None:
    """How the denoiser's time compares with its arithmetic at the rate of matrix products."""
    measured = {rate.dtype for rate in rates.matmul}
    if dtype not in measured:  # float16
        case["limit"] = None
        return
    seconds = case["work"]["denoise_flops"] / rates.flops_per_second(dtype)
    denoise = case["stages"]["denoise"]
    over = {name: denoise[name] / seconds for name in ("median", "lower_quartile", "upper_quartile")}
    case["limit"] = {"dtype": dtype, "denoise_seconds": seconds, "share_reached": seconds / denoise["median"]}
    case["ratios"]["denoise_over_limit"] = {**over, "count": denoise["count"]}


def _model_facts(loaded: Loaded) -> Row:
    engine, family = loaded.engine, family_named(loaded.engine.description.family)
    parts = {"denoiser": family.denoiser, "vae": "vae", **{name: name for _, name in family.text_encoders}}
    plan = engine.memory_report().plan
    return {
        "id": engine.description.id,
        "family": family.name,
        "dtype": engine.description.dtype,
        "weights": loaded.weights,
        "layers": loaded.layers,
        "parameters": {
            title: sum(each.numel() for each in getattr(engine.pipeline, name).parameters())
            for title, name in parts.items()
        },
        "memory_plan": None if plan is None else plan.residency.value,
    }


def _notes(cases: Sequence[Row], machine: Mapping[str, Any], wishes: BenchWishes) -> Iterator[str]:
    """What a reader must know to judge the figures."""
    if wishes.tiny:
        yield "a tiny run: everything is exercised, and no figure means anything"
    if (busy := machine["load_at_start"]) is not None and busy > 0.5:
        yield f"the machine was busy when it began (load {busy}): ratios hold better than seconds"
    for case in cases:
        if case["guard_trips"]:
            yield (
                f"{case['width_px']}x{case['height_px']}: the guard met {case['guard_trips']} bad values and "
                "drew parts again; these times are not a sound model's"
            )
    if any(case["limit"] is None for case in cases):
        yield "no limit is told: rates are measured in bfloat16 and float32 alone"
