"""The parts of the suite: each draws under its own conditions and gives rows of what was measured.

A row is a plain dict. `outcome` is "drawn" or a sentence why there is no picture; figures that the device
does not tell are None. What time did not allow for has a row that says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.gpu.card import GIB, Card, Hog
from tests.gpu.drawing import Asked, Drawn, Painter, draw_stock
from tests.gpu.random_model import RandomModel, build
from zimage_engine.errors import DoesNotFit, OutOfMemory
from zimage_engine.loading.describe import max_tokens
from zimage_engine.memory.oom import MemoryKeeper, Stage, same_placement
from zimage_engine.memory.planner import (
    RESERVE_BYTES,
    PlanOptions,
    all_options,
    plan_offload,
    title,
)
from zimage_engine.memory.residency import OffloadPlan, Residency
from zimage_engine.memory.snapshot import take_snapshot
from zimage_engine.memory.strategies import apply

Row = dict[str, Any]

#: A mode that takes no more than this must exist.
LEAN_BYTES = round(5.2 * GIB)
OUT_OF_TIME = "not measured: the part's time was over"


@dataclass(frozen=True)
class Scale:
    """How large everything is: as published, or tiny."""

    tiny: bool
    asked: tuple[Asked, ...]
    resolutions: tuple[tuple[int, int], ...]
    pictures: int
    fragmentation_steps: int
    cards_gib: tuple[int, ...]


def scale(tiny: bool) -> Scale:
    """1024x1024 and 512x512 in 8 steps, guidance off and 1.8; the tiny model draws no more than 128x128."""
    side, steps = (128, 2) if tiny else (1024, 8)
    asked_sides = (side // 2,) if tiny else (side, side // 2)
    part = side // 8
    sides = (4, 6, 8) if not tiny else (2, 4, 6)
    squares = tuple((part * width, part * height) for width in sides for height in sides)
    extra = ((7, 5), (5, 7), (8, 5)) if not tiny else ((2, 8), (8, 2), (8, 8))
    return Scale(
        tiny=tiny,
        asked=tuple(Asked(size, size, guidance, steps) for size in asked_sides for guidance in (1.0, 1.8)),
        resolutions=(*squares, *((part * width, part * height) for width, height in extra)),
        pictures=24 if tiny else 200,
        fragmentation_steps=1 if tiny else 2,
        cards_gib=(12,) if tiny else (8, 12, 16, 24),
    )


class Bench:
    """What the parts share: a model on the host, a device, its rates, and a time to be ready by."""

    def __init__(self, device: str, tiny: bool, seconds: float, cache_folder: Path) -> None:
        self.deadline = time.monotonic() + seconds
        self.scale = scale(tiny)
        self.card = Card(device)
        self.speed = self.card.speed(tiny)
        self.cache_folder = cache_folder
        started = time.monotonic()
        self.model = build(device, tiny)
        #: What making the model took; the time for one more is kept.
        self.build_seconds = time.monotonic() - started
        self.painter = Painter(self.model, self.card)
        #: The longest that weights took to be put in place so far; the time for one more is kept.
        self.put_seconds = 0.0

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def options(self, asked: Asked) -> PlanOptions:
        return PlanOptions(speed=self.speed, steps=asked.steps)

    def warm_up(self) -> None:
        """One picture that does not count: kernels are loaded, and the context has grown to what it takes."""
        smallest = min(self.scale.asked, key=lambda asked: asked.width_px)
        plan = self.plan_for(smallest)
        with self.applied(plan):
            self.painter.draw(replace(smallest, steps=1))
        self.card.clear()
        self.card.note_context()

    def plan_for(
        self, asked: Asked, free_bytes: int | None = None, reserve_bytes: int = RESERVE_BYTES
    ) -> OffloadPlan:
        return plan_offload(
            self.model.footprint,
            *asked.size,
            guided=asked.guided,
            free_bytes=self.card.model_bytes if free_bytes is None else free_bytes,
            reserve_bytes=reserve_bytes,
            options=self.options(asked),
        )

    @contextmanager
    def applied(self, plan: OffloadPlan) -> Iterator[Callable[[], None]]:
        """The plan in force; gives what is to be called when the prompts are encoded."""
        started = time.monotonic()
        put = apply(plan, self.model.pipeline, self.model.footprint, self.card.device, self.cache_folder)
        self.put_seconds = max(self.put_seconds, time.monotonic() - started)
        try:
            yield put.after_encoding
        finally:
            put.remove()
            self.card.clear()

    def component(self, name: str) -> torch.nn.Module:
        module: torch.nn.Module = getattr(self.model.pipeline, name)
        return module


# Residencies, unlimited and on smaller cards.


@dataclass(frozen=True)
class _Case:
    asked: Asked
    plan: OffloadPlan
    is_chosen: bool


def residencies(bench: Bench, card_gib: int | None) -> Iterator[Row]:
    """Every residency on a card of `card_gib` (None: as it is), each picture beside the resident one."""
    bench.card.limit(None)
    references = _references(bench)
    bench.card.limit(None if card_gib is None else card_gib * GIB)
    cases: list[_Case] = []
    for asked in bench.scale.asked:
        fitting, unfit = _plans(bench, asked, is_lean_wanted=card_gib is None)
        cases += fitting
        yield from ({"card_gib": card_gib, **_row(bench, asked, plan, plan.because)} for plan in unfit)
    for placement in _by_placement(cases):
        yield from ({"card_gib": card_gib, **row} for row in _measured(bench, placement, references))
    bench.card.limit(None)


def _references(bench: Bench) -> dict[Asked, Drawn]:
    """What the resident model draws, kernels loaded; none where it does not fit on the card."""
    found: dict[Asked, Drawn] = {}
    resident = [
        plan
        for plan in all_options(
            bench.model.footprint, *bench.scale.asked[0].size, guided=False, free_bytes=None
        )
        if plan.residency is Residency.NONE
    ]
    try:
        with bench.applied(resident[0]):
            for asked in bench.scale.asked:
                bench.painter.draw(replace(asked, steps=1))
                found[asked] = bench.painter.draw(asked)
    except torch.OutOfMemoryError:
        pass  # those drawn so far are as good
    bench.card.clear()
    bench.card.note_context()
    if not found:
        bench.warm_up()
    return found


def _plans(bench: Bench, asked: Asked, is_lean_wanted: bool) -> tuple[list[_Case], list[OffloadPlan]]:
    """The plans of each kind that fit, and those that do not."""
    footprint, free = bench.model.footprint, bench.card.model_bytes
    plans = all_options(
        footprint, *asked.size, guided=asked.guided, free_bytes=free, options=bench.options(asked)
    )
    fitting = [plan for plan in plans if plan.because == "fits"]
    unfit = [plan for plan in plans if plan.because != "fits"]
    chosen = None
    try:
        chosen = bench.plan_for(asked)
        if is_lean_wanted:
            lean = bench.plan_for(asked, min(free, LEAN_BYTES), reserve_bytes=0)
            fitting += [] if any(same_placement(lean, plan) for plan in fitting) else [lean]
    except DoesNotFit:
        pass  # no way fits, and the rows of those that do not say by how much
    cases = [_Case(asked, plan, chosen is not None and same_placement(plan, chosen)) for plan in fitting]
    if chosen is not None and not any(case.is_chosen for case in cases):
        cases.append(_Case(asked, chosen, True))
    return cases, unfit


#: What is planned comes first, the slow ones last, so that time runs out for them.
_SLOWNESS = {residency: place for place, residency in enumerate(Residency)}


def _by_placement(cases: Iterable[_Case]) -> list[list[_Case]]:
    """Cases whose weights lie in the same places, so that they are moved there once."""
    groups: list[list[_Case]] = []
    for case in cases:
        for group in groups:
            if same_placement(group[0].plan, case.plan):
                group.append(case)
                break
        else:
            groups.append([case])
    return sorted(
        groups,
        key=lambda group: (not any(case.is_chosen for case in group), _SLOWNESS[group[0].plan.residency]),
    )


def _measured(bench: Bench, group: Sequence[_Case], references: dict[Asked, Drawn]) -> Iterator[Row]:
    """The rows of one placement's cases. An out-of-memory is a result: the plan promised it would fit."""
    done, outcome = 0, OUT_OF_TIME
    try:
        if bench.seconds_left < 2 * bench.put_seconds:
            raise TimeoutError
        with bench.applied(group[0].plan) as encoded:
            for case in group:
                row = _measured_case(bench, case, encoded, references)
                done += 1
                yield row
    except torch.OutOfMemoryError as error:
        outcome = _first_line(error)
    except TimeoutError:
        pass
    yield from (_row(bench, case.asked, case.plan, outcome, case.is_chosen) for case in group[done:])
    bench.card.clear()


def _measured_case(
    bench: Bench, case: _Case, encoded: Callable[[], None], references: dict[Asked, Drawn]
) -> Row:
    """One short picture that does not count, and one that does."""
    bench.card.begin_peaks()
    short = bench.painter.draw(replace(case.asked, steps=1), encoded)
    expected_seconds = short.encode_seconds + case.asked.steps * short.denoise_seconds + short.decode_seconds
    if expected_seconds > bench.seconds_left:
        raise TimeoutError
    drawn = bench.painter.draw(case.asked, encoded)
    row = _row(bench, case.asked, case.plan, "drawn", case.is_chosen)
    return row | _figures(drawn, bench.card) | _compared(case, drawn, references)


def _compared(case: _Case, drawn: Drawn, references: dict[Asked, Drawn]) -> Row:
    """Beside the resident picture: equal to it, and how much slower. Tiles change a picture, so then None."""
    reference = references.get(case.asked)
    if reference is None:
        return {"equal_to_resident": None, "resident": None}
    tiled = case.plan.vae_tile_px is not None
    return {
        "equal_to_resident": None if tiled else drawn.digest == reference.digest,
        "resident": _times(reference),
    }


def _figures(drawn: Drawn, card: Card) -> Row:
    peaks = card.peaks()
    return {
        "peak_allocated_bytes": peaks.allocated_bytes,
        "peak_reserved_bytes": peaks.reserved_bytes,
        "digest": drawn.digest,
        "guard_trips": drawn.trips,
        **_times(drawn),
    }


def _times(drawn: Drawn) -> Row:
    fields = ("seconds", "encode_seconds", "denoise_seconds", "decode_seconds", "step_seconds")
    return {name: getattr(drawn, name) for name in fields}


def _row(bench: Bench, asked: Asked, plan: OffloadPlan, outcome: str, is_chosen: bool = False) -> Row:
    """What was planned; the measured figures are added where there are any."""
    denoiser = bench.model.footprint.components[bench.model.footprint.denoiser]
    is_by_layer = plan.residency in (Residency.SEQUENTIAL, Residency.DISK)
    streamed = denoiser.bytes if is_by_layer else sum(denoiser.blocks[path] for path in plan.streamed_blocks)
    texts = [bench.model.footprint.components[name].bytes for name in bench.model.footprint.text_encoders]
    return {
        **asdict(asked),
        "way": title(plan),
        "residency": plan.residency.value,
        "is_chosen": is_chosen,
        "outcome": outcome,
        "predicted_peak_bytes": plan.peak_bytes,
        "predicted_relative_speed": plan.relative_speed,
        "streamed_bytes_a_step": streamed,
        "fetched_bytes_at_encoding": sum(texts) if plan.release_text_encoder else 0,
        "model_may_take_bytes": bench.card.model_bytes if bench.card.is_cuda else None,
    }


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"


# Stock diffusers on the same device.

#: Each makes a pipeline on the host ready to draw on `device`.
PEERS: dict[str, Callable[[Any, str], Any]] = {
    "stock resident": lambda pipeline, device: pipeline.to(device),
    "enable_model_cpu_offload": lambda pipeline, device: pipeline.enable_model_cpu_offload(device=device),
    "enable_group_offload block_level, stream": lambda pipeline, device: pipeline.enable_group_offload(
        onload_device=torch.device(device),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.startswith("cuda"),
        record_stream=device.startswith("cuda"),
    ),
    "enable_group_offload leaf_level, stream": lambda pipeline, device: pipeline.enable_group_offload(
        onload_device=torch.device(device),
        offload_type="leaf_level",
        use_stream=device.startswith("cuda"),
        record_stream=device.startswith("cuda"),
    ),
    "enable_sequential_cpu_offload": lambda pipeline, device: pipeline.enable_sequential_cpu_offload(
        device=device
    ),
}


def peers(bench: Bench, card_gib: int | None) -> Iterator[Row]:
    """What stock diffusers offers, each on a pipeline of its own with the same weights, and ours too."""
    references = _references(bench)
    bench.card.limit(None if card_gib is None else card_gib * GIB)
    yield from ({"card_gib": card_gib, **row} for row in _ours(bench, references))
    prompt = bench.painter.plan(bench.scale.asked[0]).prompt
    del bench.painter, bench.model  # room on the host for the next
    for name, prepare in PEERS.items():
        # accelerate's hooks and diffusers' move weights where they want them; nothing of it may go on.
        yield from ({"card_gib": card_gib, **row} for row in _peer(bench, name, prepare, prompt, references))
    bench.card.limit(None)


def _ours(bench: Bench, references: dict[Asked, Drawn]) -> Iterator[Row]:
    for asked in bench.scale.asked:
        try:
            chosen = bench.plan_for(asked)
        except DoesNotFit as error:
            yield {**asdict(asked), "peer": "ours, as planned", "outcome": str(error)}
            continue
        for row in _measured(bench, [_Case(asked, chosen, True)], references):
            yield {"peer": "ours, as planned", **row}


def _peer(
    bench: Bench,
    name: str,
    prepare: Callable[[Any, str], Any],
    prompt: str,
    references: dict[Asked, Drawn],
) -> Iterator[Row]:
    """A peer's rows. What it cannot do is a result, with the reason."""
    wanted = bench.scale.asked
    done, outcome = 0, OUT_OF_TIME
    bench.card.clear()
    try:
        if bench.seconds_left > 2 * bench.build_seconds:
            model = build(bench.card.device, bench.scale.tiny)
            prepare(model.pipeline, bench.card.device)
            for asked in wanted:
                row = _peer_case(bench, model, name, prompt, asked, references)
                done += 1
                yield row
    except TimeoutError:
        pass
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        outcome = _first_line(error)
    yield from ({**asdict(asked), "peer": name, "outcome": outcome} for asked in wanted[done:])


def _peer_case(
    bench: Bench,
    model: RandomModel,
    name: str,
    prompt: str,
    asked: Asked,
    references: dict[Asked, Drawn],
) -> Row:
    tokens = max_tokens(model.pipeline, model.family)
    bench.card.begin_peaks()
    short = draw_stock(model, replace(asked, steps=1), prompt, tokens, bench.card)
    if short.seconds * asked.steps > bench.seconds_left:
        raise TimeoutError
    drawn = draw_stock(model, asked, prompt, tokens, bench.card)
    reference = references.get(asked)
    return {
        **asdict(asked),
        "peer": name,
        "outcome": "drawn",
        **_figures(drawn, bench.card),
        "equal_to_resident": None if reference is None else reference.digest == drawn.digest,
        "resident": None if reference is None else _times(reference),
    }


# Many pictures of many sizes.


class CardPlanner:
    """Plans for the card as it is limited: the driver tells the whole card's free memory, not the limit's."""

    def __init__(self, bench: Bench, steps: int) -> None:
        self._bench = bench
        self._options = PlanOptions(speed=bench.speed, steps=steps)

    def _free(self, free_bytes: int | None) -> int:
        known = [self._bench.card.model_bytes, *([] if free_bytes is None else [free_bytes])]
        return min(known)

    def options(
        self, width_px: int, height_px: int, guided: bool, free_bytes: int | None
    ) -> Sequence[OffloadPlan]:
        """Those that fit, the fastest first, the planner's choice in front, then the others, leanest last."""
        footprint, free = self._bench.model.footprint, self._free(free_bytes)
        chosen = plan_offload(
            footprint, width_px, height_px, guided=guided, free_bytes=free, options=self._options
        )
        others = [
            plan
            for plan in all_options(
                footprint, width_px, height_px, guided=guided, free_bytes=free, options=self._options
            )
            if plan.because == "fits" and not same_placement(plan, chosen)
        ]
        return (chosen, *sorted(others, key=lambda plan: -plan.relative_speed))

    def largest_size(
        self, width_px: int, height_px: int, guided: bool, free_bytes: int
    ) -> tuple[int, int] | None:
        """The largest picture of this shape that fits in `free_bytes`."""
        try:
            plan_offload(
                self._bench.model.footprint,
                width_px,
                height_px,
                guided=guided,
                free_bytes=free_bytes,
                reserve_bytes=0,
                options=self._options,
            )
        except DoesNotFit as refused:
            return refused.largest_size
        return (width_px, height_px)


def fragmentation(bench: Bench, with_measures: bool, card_gib: int) -> Iterator[Row]:
    """Pictures alternating between the resolutions: after each, what is reserved and how much in pieces.

    With our measures a keeper plans and tidies up between pictures, and the process was started with
    expandable segments. Without, one plan that fits the largest size stays, and nobody looks.
    """
    bench.warm_up()
    bench.card.limit(card_gib * GIB)
    steps, sizes = bench.scale.fragmentation_steps, bench.scale.resolutions
    # Not in order of size, and from another one each round.
    order = [
        sizes[(number * 5 + number // len(sizes)) % len(sizes)] for number in range(bench.scale.pictures)
    ]
    draw = _kept(bench, steps) if with_measures else _left_alone(bench, steps)
    bench.card.begin_peaks()
    with draw as picture:
        for number, (width, height) in enumerate(order):
            row = {"card_gib": card_gib, "number": number, "with_measures": with_measures}
            if bench.seconds_left < 0:
                yield {**row, "outcome": OUT_OF_TIME}
                break
            try:
                told = picture(Asked(width, height, 1.0, steps))
            except (torch.OutOfMemoryError, OutOfMemory) as error:
                told = {"outcome": _first_line(error)}
            yield {
                **row,
                "width_px": width,
                "height_px": height,
                "outcome": "drawn",
                **told,
                **_pool(bench.card, number % len(sizes) == len(sizes) - 1),
            }
    bench.card.limit(None)


def _pool(card: Card, is_end_of_round: bool) -> Row:
    """The allocator's state. The true ratio needs a walk over all blocks, so it comes once a round."""
    snapshot = take_snapshot(card.device)
    return {
        "allocated_bytes": snapshot.allocated_bytes,
        "reserved_bytes": snapshot.reserved_bytes,
        "fragmentation_ratio": snapshot.fragmentation_ratio,
        "true_fragmentation_ratio": card.true_fragmentation_ratio() if is_end_of_round else None,
        "is_end_of_round": is_end_of_round,
        "allocation_retries": snapshot.allocation_retries,
        "ooms": snapshot.ooms,
    }


@contextmanager
def _kept(bench: Bench, steps: int) -> Iterator[Callable[[Asked], Row]]:
    keeper = MemoryKeeper(
        bench.model.pipeline,
        bench.model.footprint,
        CardPlanner(bench, steps),
        bench.card.device,
        bench.cache_folder,
    )

    def picture(asked: Asked) -> Row:
        return keeper_draws(bench, keeper, asked)

    try:
        yield picture
    finally:
        keeper.close()
        bench.card.clear()


@contextmanager
def _left_alone(bench: Bench, steps: int) -> Iterator[Callable[[Asked], Row]]:
    largest = max(bench.scale.resolutions, key=lambda size: size[0] * size[1])
    plan = bench.plan_for(Asked(*largest, 1.0, steps))
    with bench.applied(plan) as encoded:

        def picture(asked: Asked) -> Row:
            drawn = bench.painter.draw(asked, encoded)
            return {"seconds": drawn.seconds, "way": title(plan), "defrags": {}, "defrag_seconds": 0.0}

        yield picture


def keeper_draws(bench: Bench, keeper: MemoryKeeper, asked: Asked) -> Row:
    """One picture under a keeper, each stage tried again as often as it finds a way. Raises OutOfMemory."""
    began = bench.painter.now()
    plan = bench.painter.plan(asked)
    painter = bench.painter
    before = dict(keeper.report.ooms)
    try:
        keeper.before(*asked.size, asked.guided)
        embeddings = _retried(keeper, lambda: painter.encode(plan), lambda: "encode")
        keeper.encoded()
        painter.steps_done = 0
        drawn = _retried(
            keeper,
            lambda: painter.draw_encoded(plan, embeddings, began),
            lambda: "decode" if painter.steps_done == asked.steps else "denoise",
        )
    finally:
        keeper.after()
    report = keeper.report
    rungs = {
        f"{stage}: {rung}": count - before.get((stage, rung), 0)
        for (stage, rung), count in report.ooms.items()
        if count > before.get((stage, rung), 0)
    }
    return {
        "seconds": painter.now() - began,
        "digest": drawn.digest,
        "way": None if report.plan is None else title(report.plan),
        "tiled": report.plan is not None and report.plan.vae_tile_px is not None,
        "rungs": rungs,
        "defrags": dict(report.defrags),
        "defrag_seconds": report.defrag_seconds,
    }


def _retried(keeper: MemoryKeeper, act: Callable[[], Any], stage: Callable[[], Stage]) -> Any:
    while True:
        try:
            return act()
        except torch.OutOfMemoryError as raised:
            error = raised
        keeper.on_oom(stage(), error)


# Out of memory.


@dataclass(frozen=True)
class _Accident:
    """How memory goes missing, and what should come of it.

    A `greedy` hog takes what is free at every try, so nothing can help. `raises`: how often an out-of-memory
    is raised where there is no card.
    """

    left_bytes: int
    greedy: bool
    raises: int
    expected: str


_ACCIDENTS = (_Accident(64 * 2**20, False, 2, "drawn"), _Accident(2**20, True, 1000, "refused"))
#: Entered in the middle of the stage.
_PLACES: dict[Stage, tuple[str, str]] = {
    "encode": ("text_encoder", "layers.1"),
    "denoise": ("transformer", "layers.1.attention"),
    "decode": ("vae", "decoder"),
}


def oom(bench: Bench, stage: Stage, card_gib: int) -> Iterator[Row]:
    """A hog takes the memory in the middle of `stage`: what the ladder did, and the pictures after it.

    The hog stays for the request that it fell on and the next one, then lets go; the planner does not know.
    """
    bench.card.limit(None)
    bench.warm_up()
    bench.card.limit(card_gib * GIB)
    asked = bench.scale.asked[0]
    with _kept(bench, asked.steps) as picture:
        reference = picture(asked)
    for accident in _ACCIDENTS:
        # A refusal has tried every residency first.
        moves = len(Residency) + 2 if accident.greedy else 3
        is_over = bench.seconds_left < moves * bench.put_seconds
        told = {"accident": OUT_OF_TIME} if is_over else _accident(bench, stage, accident, asked, reference)
        row = {"card_gib": card_gib, "is_real": bench.card.is_cuda, "stage": stage}
        yield {**row, **asdict(accident), **told}
    bench.card.limit(None)


def _accident(bench: Bench, stage: Stage, accident: _Accident, asked: Asked, reference: Row) -> Row:
    component, path = _PLACES[stage]
    hog = Hog(bench.card, accident.left_bytes, accident.greedy, accident.raises)
    row: Row = {"way_before": reference["way"]}
    with _kept(bench, asked.steps) as picture:
        with hog.at(bench.component(component).get_submodule(path)):
            row |= _outcome(picture, asked, reference, "accident")
        row["hog_bytes"] = hog.held_bytes if bench.card.is_cuda else None
        row |= _outcome(picture, asked, reference, "beside_the_hog")
        hog.let_go()
        row |= _outcome(picture, asked, reference, "after")
    return row


def _outcome(picture: Callable[[Asked], Row], asked: Asked, reference: Row, name: str) -> Row:
    """What became of one picture, under `name`; equal is None where tiles made another picture of it."""
    try:
        told = picture(asked)
    except (OutOfMemory, DoesNotFit) as refused:
        size = refused.largest_size
        return {
            name: "refused",
            f"{name}_message": str(refused),
            f"{name}_largest_size": None if size is None else list(size),
        }
    equal = told["digest"] == reference["digest"]
    return {
        name: "drawn",
        f"{name}_rungs": told["rungs"],
        f"{name}_way": told["way"],
        f"{name}_seconds": told["seconds"],
        f"{name}_equal": None if told["tiled"] != reference["tiled"] else equal,
    }
