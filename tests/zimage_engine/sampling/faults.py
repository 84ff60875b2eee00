"""Bad values put into a real tiny pipeline by forward hooks, and what has to come of each; the fault matrix.

A cell is one fault in one pipeline. `judge` draws it and says how it ended and what was wrong, if anything.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests.zimage_engine.memory.residencies import footprint_of, plan_for
from tests.zimage_engine.tiny_models import write_tiny_pixart, write_tiny_sdxl, write_tiny_z_image
from zimage_engine.engine import Engine
from zimage_engine.errors import GuardExhausted
from zimage_engine.families import family_named
from zimage_engine.memory.residency import Residency
from zimage_engine.memory.strategies import apply
from zimage_engine.sampling.pipeline import DrawnPicture, GuardedPipeline, PromptEmbeddings
from zimage_engine.sampling.plan import SamplingPlan, resolve
from zimage_engine.types import GenerationRequest, GuardTrace, GuardTrip

STEPS = 8
GUIDANCE = 1.8
SEED = 3

FAMILIES: Mapping[str, Callable[[Path], Path]] = {
    "z-image": write_tiny_z_image,
    "pixart": write_tiny_pixart,
    "sdxl-lcm": lambda folder: write_tiny_sdxl(folder, lcm=True),
    "sdxl-euler": write_tiny_sdxl,
}
#: Z-Image's picture is then two tokens wide, which the others' are long before.
SIDES_PX = {"z-image": 64}
#: In which row of the doubled batch the prompt itself is.
CONDITIONAL_ROW = {"z-image": 0, "pixart": 1, "sdxl-euler": 1}

#: One value of the tensor becomes this. A finite blow-up is larger where larger values are sound.
VALUES = ("nan", "+inf", "-inf", "blow-up")
PLACES = ("denoiser", "embeddings", "vae")
BLOW_UPS = {"denoiser": 500.0, "embeddings": 1e8, "vae": 500.0}
HALVES = ("conditional", "unconditional", "both")
ALWAYS = 10_000
#: So often in a row. With guidance off the third try is the first in float32.
TIMES = {"once": 1, "twice": 2, "thrice": 3, "always": ALWAYS}


#: Puts the engine's weights where they lie, with a folder for what goes to the disk; returns what to call
#: when the prompts are encoded.
Offload = Callable[[Engine, Path], Callable[[], None]]


def _resident(engine: Engine, folder: Path) -> Callable[[], None]:
    return lambda: None


def _group_offloaded(offload_type: str) -> Offload:
    def offload(engine: Engine, folder: Path) -> Callable[[], None]:
        engine.pipeline.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=offload_type,
            num_blocks_per_group=1 if offload_type == "block_level" else None,
        )
        return lambda: None

    return offload


def _stored_in_float8(engine: Engine, folder: Path) -> Callable[[], None]:
    denoiser = getattr(engine.pipeline, family_named(engine.description.family).denoiser)
    denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    return lambda: None


def _planned(residency: Residency) -> Offload:
    """As the memory plan does it: text encoders leave too, and of the streamed blocks the first stays."""

    def offload(engine: Engine, folder: Path) -> Callable[[], None]:
        footprint = footprint_of(engine)
        blocks = tuple(footprint.components[footprint.denoiser].blocks)
        plan = plan_for(
            residency,
            streamed_blocks=blocks[1:] if residency is Residency.STREAM else (),
            release_text_encoder=residency in (Residency.MODEL, Residency.STREAM),
            stream_text_encoder=residency is Residency.STREAM,
        )
        return apply(plan, engine.pipeline, footprint, "cpu", folder).after_encoding

    return offload


#: diffusers' ways that run without an accelerator (its model and sequential offload need one), and ours.
OFFLOADS: Mapping[str, Offload] = {
    "none": _resident,
    "block_level": _group_offloaded("block_level"),
    "leaf_level": _group_offloaded("leaf_level"),
    "layerwise_casting": _stored_in_float8,
    **{way.value: _planned(way) for way in Residency if way is not Residency.NONE},
}


@dataclass(frozen=True)
class Cell:
    """One fault: where, what, at which call of the denoiser's step (from 0), in which half, how often."""

    family: str
    place: str
    value: str
    times: str
    step: int | None = None
    half: str = "both"
    guided: bool = True
    offload: str = "none"

    def __str__(self) -> str:
        where = [self.place] if self.step is None else [self.place, f"step{self.step}"]
        return "-".join(
            [
                self.family,
                self.offload,
                "guided" if self.guided else "unguided",
                *where,
                self.half,
                self.value,
                self.times,
            ]
        )

    @property
    def doubled(self) -> bool:
        """Whether a step has two halves: LCM takes guidance as an embedding."""
        return self.guided and self.family != "sdxl-lcm"

    @property
    def expected_rung(self) -> str | None:
        """The rung that has to help; None where none can."""
        times = TIMES[self.times]
        if times == 1:
            return "same_inputs"
        if self.place == "denoiser":
            if self.guided and (times < ALWAYS or (self.doubled and self.half == "unconditional")):
                return "lower_guidance"
            return {2: "plain_attention", 3: "float32"}.get(times)
        if self.place == "embeddings":
            return {2: "plain_attention", 3: "float32"}.get(times)
        return {2: "float32", 3: None if self.family == "z-image" else "tiled"}.get(times)


@dataclass(frozen=True)
class Verdict:
    """How a cell ended ("recovered" or "exhausted") and in words what was wrong with it."""

    cell: Cell
    outcome: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Drawn:
    """A picture's bytes, its last latents, what became it, and the guard's trace of encoding and drawing."""

    picture: bytes
    latents: torch.Tensor
    decoded: torch.Tensor
    trace: GuardTrace

    def same_as(self, other: Drawn) -> bool:
        return (
            self.picture == other.picture
            and torch.equal(self.latents, other.latents)
            and torch.equal(self.decoded, other.decoded)
        )

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.latents).all() and torch.isfinite(self.decoded).all())


class Rig:
    """A tiny pipeline, guarded, under one way of offloading; knows its undisturbed pictures."""

    def __init__(self, folder: Path, family: str, offload: str = "none") -> None:
        engine = Engine.load(folder, device="cpu")
        self.engine = engine
        self.family = family
        self.row = family_named(engine.description.family)
        self.pipeline = engine.pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.denoiser: torch.nn.Module = getattr(self.pipeline, self.row.denoiser)
        self._after_encoding = OFFLOADS[offload](engine, folder.parent / f"{folder.name}-on-disk")
        self.guarded = GuardedPipeline(self.pipeline, self.row, time.perf_counter)
        self.description = engine.description
        self._embeddings: dict[bool, PromptEmbeddings] = {}
        self._undisturbed: dict[bool, Drawn] = {}

    def plan(self, guided: bool, steps: int = STEPS, side_px: int | None = None) -> SamplingPlan:
        side_px = side_px or SIDES_PX.get(self.family, 32)
        return resolve(
            GenerationRequest(
                "a red circle",
                negative_prompt="blue",
                seed=SEED,
                guidance_scale=GUIDANCE if guided else 1.0,
                num_inference_steps=steps,
                width=side_px,
                height=side_px,
                enhance=False,
            ),
            self.description,
        )

    def encoded(self, guided: bool) -> PromptEmbeddings:
        """Encoded without a fault, and only once."""
        if guided not in self._embeddings:
            self._embeddings[guided] = self._encode(self.plan(guided))
        return self._embeddings[guided]

    def _encode(self, plan: SamplingPlan) -> PromptEmbeddings:
        embeddings = self.guarded.encode(plan, 64)
        self._after_encoding()
        return embeddings

    def draw(
        self, guided: bool, steps: int = STEPS, encode: bool = False, check: Callable[[], None] = lambda: None
    ) -> Drawn:
        """`encode`: the prompts anew, where a fault may wait."""
        plan = self.plan(guided, steps)
        embeddings = self._encode(plan) if encode else self.encoded(guided)
        latents: list[torch.Tensor] = []
        with self.decoded() as decoded:
            drawn: DrawnPicture = self.guarded.draw(
                plan, embeddings, SEED, check, lambda _step, value: latents.append(value.clone())
            )
        trace = GuardTrace(
            (*embeddings.trips, *drawn.trace.trips),
            drawn.trace.clipped_values,
            drawn.trace.final_guidance_scale,
        )
        return Drawn(drawn.image.tobytes(), latents[-1], decoded[-1], trace)

    @contextmanager
    def decoded(self) -> Iterator[list[torch.Tensor]]:
        """The tensors that the pipeline makes pictures of within: the last link where a bad value shows."""
        processor = self.pipeline.image_processor
        stock, seen = processor.postprocess, []

        def postprocess(image: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(image.clone())
            return stock(image, *args, **kwargs)

        vars(processor)["postprocess"] = postprocess
        try:
            yield seen
        finally:
            del vars(processor)["postprocess"]

    def undisturbed(self, guided: bool) -> Drawn:
        if guided not in self._undisturbed:
            self._undisturbed[guided] = self.draw(guided)
        return self._undisturbed[guided]

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """What the denoiser is told at each step of the undisturbed picture."""
        told: list[float] = []
        handle = self.denoiser.register_forward_hook(
            lambda _module, args, kwargs, _output: told.append(_timestep(args, kwargs)), with_kwargs=True
        )
        with _removing([handle]):
            self.draw(guided=False)
        assert len(set(told)) == STEPS, "steps must be told apart by their timesteps"
        return tuple(told)

    @cached_property
    def control(self) -> Drawn:
        """Drawn before any fault; encodes anew, so that text encoders are looked at too."""
        return self.draw(guided=True, steps=2, encode=True)

    @contextmanager
    def fault(self, cell: Cell) -> Iterator[list[str]]:
        """`cell`'s fault lies in wait within; yields a list that grows by an entry with each injection."""
        done: list[str] = []
        install = {"denoiser": self._in_denoiser, "embeddings": self._in_embeddings, "vae": self._in_vae}
        with _removing(install[cell.place](cell, done)):
            yield done

    def _in_denoiser(self, cell: Cell, done: list[str]) -> list[Any]:
        assert cell.step is not None
        at = self.timesteps[cell.step]

        def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            if _timestep(args, kwargs) != at or len(done) >= TIMES[cell.times]:
                return output
            first = output[0]
            rows = list(first) if isinstance(first, list) else list(first.unbind(0))
            bad = self._rows(cell.half, len(rows))
            if not bad:  # guidance was lowered to off: there is no such half any more
                return output
            done.append(cell.value)
            rows = [spoilt(row, cell) if index in bad else row for index, row in enumerate(rows)]
            spoilt_first = rows if isinstance(first, list) else torch.stack(rows)
            return (spoilt_first, *output[1:])

        return [self.denoiser.register_forward_hook(hook, with_kwargs=True)]

    def _rows(self, half: str, count: int) -> set[int]:
        if count == 1:
            return set() if half == "unconditional" else {0}
        conditional = CONDITIONAL_ROW[self.family]
        return {"conditional": {conditional}, "unconditional": {1 - conditional}, "both": {0, 1}}[half]

    def _in_embeddings(self, cell: Cell, done: list[str]) -> list[Any]:
        """In each text encoder: it reads the prompt first, then the negative one where there is one."""
        wanted = {"conditional": {0}, "unconditional": {1}, "both": {0, 1}}[cell.half]
        a_round = 2 if cell.doubled else 1

        def of(text_encoder: torch.nn.Module) -> Any:
            calls = itertools.count()

            def hook(_module: Any, _args: Any, output: Any) -> Any:
                tries, position = divmod(next(calls), a_round)
                if position not in wanted or tries >= TIMES[cell.times]:
                    return output
                done.append(cell.value)
                return tree_map(lambda leaf: spoilt(leaf, cell), output)

            return text_encoder.register_forward_hook(hook)

        return [of(getattr(self.pipeline, name)) for _, name in self.row.text_encoders]

    def _in_vae(self, cell: Cell, done: list[str]) -> list[Any]:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            if len(done) >= TIMES[cell.times]:
                return output
            done.append(cell.value)
            return spoilt(output, cell)

        return [self.pipeline.vae.decoder.register_forward_hook(hook)]


def _timestep(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Z-Image and SDXL give it as the second argument, PixArt by name; one for each row or one for all."""
    told = kwargs["timestep"] if "timestep" in kwargs else args[1]
    return float(torch.as_tensor(told).flatten()[0])


@contextmanager
def _removing(handles: Iterable[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def spoilt(leaf: Any, cell: Cell) -> Any:
    """`leaf` with one bad value in it, if it is a floating tensor."""
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return leaf
    bad = {"nan": math.nan, "+inf": math.inf, "-inf": -math.inf, "blow-up": BLOW_UPS[cell.place]}
    spoilt_leaf = leaf.clone(memory_format=torch.contiguous_format)
    spoilt_leaf.view(-1)[0] = bad[cell.value]
    return spoilt_leaf


def judge(rig: Rig, cell: Cell) -> Verdict:
    """Draw with the fault, then the control picture; whatever differs from what it has to be is told."""
    control, undisturbed, timesteps = rig.control, rig.undisturbed(cell.guided), rig.timesteps
    assert timesteps and undisturbed.is_finite
    wrong: list[str] = []
    with rig.fault(cell) as injected:
        try:
            drawn = rig.draw(cell.guided, encode=cell.place == "embeddings")
        except GuardExhausted as exhausted:
            outcome = "exhausted"
            wrong += _wrongly_exhausted(cell, exhausted)
        except Exception as other:
            outcome = "raised"
            wrong.append(f"{type(other).__name__}: {other}")
        else:
            outcome = "recovered"
            wrong += _wrongly_recovered(cell, drawn, undisturbed)
    if not injected:
        wrong.append("the fault never happened")
    if not rig.draw(guided=True, steps=2, encode=True).same_as(control):
        wrong.append("the control picture afterwards is another")
    return Verdict(cell, outcome, tuple(wrong))


_STAGES = {"denoiser": "denoise", "embeddings": "encode", "vae": "decode"}
_FINDINGS = {"nan": "nan", "+inf": "inf", "-inf": "inf", "blow-up": "out of range"}


def _wrongly_exhausted(cell: Cell, exhausted: GuardExhausted) -> Iterator[str]:
    (trip,) = exhausted.trips
    if cell.expected_rung is not None:
        yield f"exhausted, but {cell.expected_rung} had to help: {trip}"
    if trip.recovered_by is not None:
        yield f"exhausted, and yet recovered by {trip.recovered_by}"
    yield from _wrongly_told(cell, trip)


def _wrongly_recovered(cell: Cell, drawn: Drawn, undisturbed: Drawn) -> Iterator[str]:
    trips = drawn.trace.trips
    if len(trips) != 1:
        yield f"one trip had to be told, there are {trips}"
        return
    (trip,) = trips
    if trip.recovered_by != cell.expected_rung:
        yield f"recovered by {trip.recovered_by}, not by {cell.expected_rung}"
    yield from _wrongly_told(cell, trip)
    if not drawn.is_finite:
        yield "a value that is not finite went into the picture"
    if cell.times == "once" and not drawn.same_as(undisturbed):
        yield "a fault that happened once changed the picture"
    lowered = cell.expected_rung == "lower_guidance"
    ended = drawn.trace.final_guidance_scale
    if lowered != (ended is not None and ended < (GUIDANCE if cell.guided else 1.0)):
        yield f"guidance ended at {ended}"


def _wrongly_told(cell: Cell, trip: GuardTrip) -> Iterator[str]:
    where = (_STAGES[cell.place], None if cell.step is None else cell.step + 1)
    if (trip.stage, trip.step) != where:
        yield f"told at {(trip.stage, trip.step)}, happened at {where}"
    if trip.finding not in _possible_findings(cell):
        yield f"found {trip.finding}, put in {cell.value}"


def _possible_findings(cell: Cell) -> set[str]:
    """Infinity less infinity is a NaN, where guidance takes the difference of two halves."""
    found = {_FINDINGS[cell.value]}
    return found | {"nan"} if "inf" in cell.value and cell.doubled else found


def halves_of(family: str, guided: bool) -> tuple[str, ...]:
    return HALVES if guided and family != "sdxl-lcm" else ("conditional",)


def denoiser_cells(
    family: str, guided: bool, steps: Iterable[int], offload: str = "none", values: Iterable[str] = VALUES
) -> Iterator[Cell]:
    """Every value, half and number of times at each of `steps`."""
    times = (*tuple(TIMES)[:2], "always") if guided else tuple(TIMES)
    for value, step, half, often in itertools.product(values, steps, halves_of(family, guided), times):
        yield Cell(family, "denoiser", value, often, step, half, guided, offload)


def other_cells(
    family: str, guided: bool, offload: str = "none", values: Iterable[str] = VALUES
) -> Iterator[Cell]:
    """In the prompt embeddings, in each half, and in the VAE."""
    for value, times in itertools.product(values, TIMES):
        for half in halves_of(family, guided):
            yield Cell(family, "embeddings", value, times, None, half, guided, offload)
        yield Cell(family, "vae", value, times, None, "both", guided, offload)


def spread(cells: Iterable[Cell]) -> list[Cell]:
    """Of cells that differ only by their step one, each time another step, so that every step comes up."""
    turns = itertools.count()
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.value, cell.half, cell.times, cell.guided), []).append(cell)
    return [group[next(turns) * 3 % len(group)] for group in groups.values()]


def full_matrix() -> list[Cell]:
    """Every cell that there is."""
    return [
        cell
        for family, offload, guided in itertools.product(FAMILIES, OFFLOADS, (True, False))
        for cell in (
            *denoiser_cells(family, guided, range(STEPS), offload),
            *other_cells(family, guided, offload),
        )
    ]


def suite_matrix() -> list[Cell]:
    """All of Z-Image's faults in the denoiser with guidance; of each other dimension every value once."""
    cells = [
        *denoiser_cells("z-image", True, range(STEPS)),
        *spread(denoiser_cells("z-image", False, range(STEPS))),
    ]
    for family, guided in (("pixart", True), ("pixart", False), ("sdxl-lcm", True), ("sdxl-euler", True)):
        cells += spread(denoiser_cells(family, guided, range(STEPS)))
    for family in ("z-image", "pixart", "sdxl-lcm"):
        cells += other_cells(family, guided=True)
    for family, offload in itertools.product(("z-image", "pixart", "sdxl-lcm"), tuple(OFFLOADS)[1:]):
        cells += denoiser_cells(family, False, (5,), offload, values=("nan",))
        guided = denoiser_cells(family, True, (2,), offload, values=("+inf",))
        cells += [cell for cell in guided if cell.half in ("both", "conditional")]
        cells += other_cells(family, False, offload, values=("nan",))
    return cells


class Rigs:
    """Makes each pipeline once: `rigs[cell]` is the one that `cell` is about."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folders: dict[str, Path] = {}
        self._rigs: dict[tuple[str, str], Rig] = {}

    def folder(self, family: str) -> Path:
        if family not in self._folders:
            self._folders[family] = FAMILIES[family](self._folder / family)
        return self._folders[family]

    def __getitem__(self, cell: Cell) -> Rig:
        key = (cell.family, cell.offload)
        if key not in self._rigs:
            self._rigs[key] = Rig(self.folder(cell.family), *key)
        return self._rigs[key]
