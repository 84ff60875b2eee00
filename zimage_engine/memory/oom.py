"""Keeps a pipeline within its device's memory: the plan in force, and the way out of an out-of-memory.

    keeper.before(width_px, height_px, guided)      # a plan is in force
    ... encode ...; keeper.encoded(); ... draw ...
    except torch.OutOfMemoryError as error:
        keeper.on_oom("denoise", error)             # returns: draw again; raises OutOfMemory: no way is left
    keeper.after()                                  # memory is tidied up

Which rung comes next and whether a faster plan is worth it are pure; `MemoryKeeper` does them.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from zimage_engine.errors import DoesNotFit, OutOfMemory
from zimage_engine.memory.defrag import Decision, DefragReport, Thresholds, decide, defragment, release_cache
from zimage_engine.memory.residency import Footprint, OffloadPlan
from zimage_engine.memory.snapshot import MemorySnapshot, take_snapshot
from zimage_engine.memory.strategies import AppliedOffload, apply

Stage = Literal["encode", "denoise", "decode"]
Rung = Literal["freed", "leaner", "tiled", "refused"]

#: A faster plan is taken after so many requests in a row that it would have fitted: moving the weights takes
#: longer than most pictures.
CALM_REQUESTS = 3
#: After an out-of-memory its plan is not tried again for so many requests, then twice as many, and so on.
FIRST_PATIENCE = 8
LONGEST_PATIENCE = 1024
#: So much more has to be free before it counts as more.
GROWN_BYTES = 256 * 2**20
#: A plan that is faster by less is not worth the move.
WORTHWHILE_SPEED = 1.05
#: The leanest plan did not fit: what fits is taken to need so much less.
SAFE_SHARE = 0.9
#: Sides of the VAE's pieces, the next smaller after each out-of-memory.
TILES_PX = (512, 256, 128)


class Planner(Protocol):
    """What the keeper asks of whoever plans."""

    def options(
        self, width_px: int, height_px: int, guided: bool, free_bytes: int | None
    ) -> Sequence[OffloadPlan]:
        """Every plan under which this picture fits, the fastest first; DoesNotFit if none.

        `free_bytes`: what the model may take, its own weights included; None for the CPU.
        """
        ...

    def largest_size(
        self, width_px: int, height_px: int, guided: bool, free_bytes: int
    ) -> tuple[int, int] | None:
        """The largest picture of this shape that fits in `free_bytes`."""
        ...

    def beside(self, taken_bytes: int) -> Planner:
        """The same where so much is taken by what it does not know."""
        ...


@dataclass(frozen=True, slots=True)
class Distrust:
    """Plans that are predicted to take `peak_bytes` or more ran out of memory.

    They are left alone for `requests` more, or until the device has clearly more free than `free_bytes`.
    """

    peak_bytes: int
    free_bytes: int | None
    requests: int

    def holds(self, free_bytes: int | None) -> bool:
        known = free_bytes is not None and self.free_bytes is not None
        grown = known and free_bytes >= self.free_bytes + GROWN_BYTES  # type: ignore[operator]
        return self.requests > 0 and not grown


@dataclass(frozen=True, slots=True)
class NextRung:
    """What to do after an out-of-memory; `plan` is the one to go on with."""

    rung: Rung
    plan: OffloadPlan | None


def next_rung(
    stage: Stage, taken: Sequence[Rung], current: OffloadPlan, options: Sequence[OffloadPlan]
) -> NextRung:
    """Free first; then the fastest plan that takes less; then smaller pieces, if the VAE is at work."""
    if "freed" not in taken:
        return NextRung("freed", current)
    leaner = [plan for plan in options if plan.peak_bytes < current.peak_bytes]
    if leaner:
        return NextRung("leaner", max(leaner, key=lambda plan: (plan.relative_speed, plan.peak_bytes)))
    tiles = [side for side in TILES_PX if current.vae_tile_px is None or side < current.vae_tile_px]
    if stage == "decode" and tiles:
        return NextRung("tiled", replace(current, vae_tile_px=tiles[0]))
    return NextRung("refused", None)


def same_placement(one: OffloadPlan, other: OffloadPlan) -> bool:
    """Whether both put everything in the same place, whatever they predict."""
    return _placement(one) == _placement(other)


def _placement(plan: OffloadPlan) -> tuple[Any, ...]:
    return (
        plan.residency,
        plan.streamed_blocks,
        plan.release_text_encoder,
        plan.stream_text_encoder,
        plan.vae_tile_px,
        plan.float8_storage,
        plan.quantize,
    )


def is_enough(current: OffloadPlan, wanted: OffloadPlan) -> bool:
    """Whether `current` keeps at least as much off the device as `wanted`, in the same way."""
    return (
        current.residency is wanted.residency
        and current.float8_storage == wanted.float8_storage
        and current.quantize == wanted.quantize
        and current.vae_tile_px == wanted.vae_tile_px
        and current.release_text_encoder >= wanted.release_text_encoder
        and current.stream_text_encoder >= wanted.stream_text_encoder
        and set(current.streamed_blocks) >= set(wanted.streamed_blocks)
    )


def choose(
    current: OffloadPlan | None,
    options: Sequence[OffloadPlan],
    distrust: Distrust | None,
    calm_requests: int,
) -> OffloadPlan:
    """The plan for the next picture: the first that is trusted, or the current one while that will do.

    What no longer fits is left at once; what would only be faster waits for a row of `CALM_REQUESTS`. The
    prediction that comes with it is for this picture.
    """
    trusted = [plan for plan in options if distrust is None or plan.peak_bytes < distrust.peak_bytes]
    best = trusted[0] if trusted else min(options, key=lambda plan: plan.peak_bytes)
    if current is None:
        return best
    equal = next((plan for plan in trusted if is_enough(current, plan)), None)
    if equal is None:
        return best
    worthwhile = best.relative_speed >= WORTHWHILE_SPEED * current.relative_speed
    if worthwhile and calm_requests >= CALM_REQUESTS:
        return best
    return replace(
        current,
        peak_bytes=equal.peak_bytes,
        width_px=equal.width_px,
        height_px=equal.height_px,
        guided=equal.guided,
    )


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What metrics tell. `ooms` counts by (stage, rung taken), `defrags` by kind."""

    plan: OffloadPlan | None
    snapshot: MemorySnapshot
    is_pinned: bool | None
    defrags: Mapping[str, int]
    defrag_seconds: float
    last_defrag: DefragReport | None
    ooms: Mapping[tuple[Stage, Rung], int]


class MemoryKeeper:
    """Holds one pipeline's plan from request to request. For one thread at a time.

    Where the device is not the CPU the pipeline comes on the host: what a removed plan gives back goes there.
    """

    def __init__(
        self,
        pipeline: Any,
        footprint: Footprint,
        planner: Planner,
        device: str,
        cache_folder: Path | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._footprint = footprint
        self._planner = self._planner_alone = planner
        self._beside_bytes = 0
        self._device = device
        self._cache_folder = cache_folder
        self._thresholds = thresholds
        self._applied: AppliedOffload | None = None
        self._options: Sequence[OffloadPlan] = ()
        self._request: tuple[int, int, bool] = (0, 0, False)
        self._taken: list[Rung] = []
        self._distrust: Distrust | None = None
        self._patience = FIRST_PATIENCE
        self._calm = 0
        self._emptied = False
        self._last_defrag: DefragReport | None = None
        self._defrags: Counter[str] = Counter()
        self._defrag_seconds = 0.0
        self._ooms: Counter[tuple[Stage, Rung]] = Counter()
        #: Called before a plan's weights go elsewhere, with all of them where they were.
        self.before_moving: Callable[[], None] = lambda: None

    @property
    def plan(self) -> OffloadPlan | None:
        """The plan in force; None before the first request."""
        return None if self._applied is None else self._applied.plan

    @property
    def has_own_memory(self) -> bool:
        """Whether the device's memory is another than the host's."""
        return torch.device(self._device).type == "cuda"

    @property
    def report(self) -> MemoryReport:
        """What happened so far, and what the device holds now."""
        return MemoryReport(
            plan=self.plan,
            snapshot=take_snapshot(self._device),
            is_pinned=None if self._applied is None else self._applied.is_pinned,
            defrags=dict(self._defrags),
            defrag_seconds=self._defrag_seconds,
            last_defrag=self._last_defrag,
            ooms=dict(self._ooms),
        )

    def plan_beside(self, taken_bytes: int) -> None:
        """From the next picture on, so much of the device is taken by what the footprint does not tell of."""
        if taken_bytes != self._beside_bytes:
            self._beside_bytes, self._planner = taken_bytes, self._planner_alone.beside(taken_bytes)

    def is_as_fast_beside(self, width_px: int, height_px: int, guided: bool, fewer_bytes: int) -> bool:
        """Whether this picture would be drawn no faster with no more than `fewer_bytes` taken."""
        free_bytes = self.free_bytes()

        def speed(planner: Planner) -> float:
            try:
                return planner.options(width_px, height_px, guided, free_bytes)[0].relative_speed
            except DoesNotFit:
                return 0.0

        return speed(self._planner) >= speed(self._planner_alone.beside(fewer_bytes))

    def before(self, width_px: int, height_px: int, guided: bool) -> OffloadPlan:
        """Put a plan in force under which this picture fits. Raises DoesNotFit where none is predicted to,
        OutOfMemory where not even the weights find room."""
        self._request = (width_px, height_px, guided)
        self._taken = []
        free_bytes = self.free_bytes()
        self._options = self._planner.options(width_px, height_px, guided, free_bytes)
        if self._distrust is not None and not self._distrust.holds(free_bytes):
            self._distrust = None
        chosen = choose(self.plan, self._options, self._distrust, self._calm)
        faster = self.plan is not None and self._options[0].relative_speed > self.plan.relative_speed
        self._calm = self._calm + 1 if faster else 0
        if self.plan is None or not same_placement(self.plan, chosen):
            self._calm = 0
            self._go_over_to(chosen, "encode")
        elif self._applied is not None:
            self._applied.plan = chosen
        assert self.plan is not None
        return self.plan

    def encoded(self) -> None:
        """The prompts are encoded: the text encoders leave the device, where the plan says so."""
        if self._applied is not None:
            self._applied.after_encoding()

    def on_oom(self, stage: Stage, error: BaseException | None = None) -> Rung:
        """Make room; the stage can then be tried again. Raises OutOfMemory where no way is left.

        Call it after the `except` block has ended, or hand over the `error`: its frames hold tensors.
        """
        _let_go_of_frames(error)
        assert self._applied is not None
        current = self._applied.plan
        decision = next_rung(stage, self._taken, current, self._options)
        self._taken.append(decision.rung)
        self._ooms[stage, decision.rung] += 1
        release_cache(self._device)
        if decision.rung != "freed":
            self._lose_trust(current)
        if decision.plan is None:
            raise self._refusal(stage, current)
        if decision.rung != "freed":
            self._go_over_to(decision.plan, stage)
        return decision.rung

    def after(self) -> None:
        """A request has ended, however it did: look whether memory should be tidied up, and do it."""
        if self._distrust is not None:
            self._distrust = replace(self._distrust, requests=self._distrust.requests - 1)
        if self._distrust is None and self._calm == 0:  # nothing faster is waiting to be tried again
            self._patience = FIRST_PATIENCE
        decision = decide(take_snapshot(self._device), self._thresholds, self._emptied)
        self._emptied = decision.kind == "empty_cache"
        if decision.kind == "none":
            return
        with suppress(OutOfMemory):  # no plan is in force then, and the next request looks for one
            self._tidy_up(decision)

    def _tidy_up(self, decision: Decision) -> None:
        self._last_defrag = defragment(
            decision,
            self._device,
            lambda: take_snapshot(self._device).reserved_bytes,
            self._weights_away,
            self._weights_back,
        )
        self._defrags[decision.kind] += 1
        self._defrag_seconds += self._last_defrag.seconds

    @contextmanager
    def weights_change(self) -> Iterator[None]:
        """Weights come, go or are written within (LoRAs): no plan is in force, the same one is afterwards."""
        self._weights_away()
        try:
            yield
        finally:
            self._weights_back()

    def close(self) -> None:
        """Take the plan off: as if there had never been one."""
        if self._applied is not None:
            self._applied.remove()
            self._applied = None

    def _weights_away(self) -> None:
        if self._applied is not None:
            self._applied.remove()

    def _weights_back(self) -> None:
        if self._applied is not None:
            plan, self._applied = self._applied.plan, None
            self._go_over_to(plan, "encode")

    def _go_over_to(self, plan: OffloadPlan, stage: Stage) -> None:
        """Put `plan` in force, or a leaner one if the weights themselves find no room."""
        self.before_moving()
        while True:
            self.close()
            release_cache(self._device)
            try:
                self._applied = apply(plan, self._pipeline, self._footprint, self._device, self._cache_folder)
                return
            except torch.OutOfMemoryError as error:
                _let_go_of_frames(error)
            leaner = next_rung("encode", ("freed",), plan, self._options)
            self._ooms[stage, leaner.rung] += 1
            self._lose_trust(plan)
            if leaner.plan is None:
                raise self._refusal(stage, plan)
            plan = leaner.plan

    def _refusal(self, stage: Stage, current: OffloadPlan) -> OutOfMemory:
        width_px, height_px, guided = self._request
        size = self._planner.largest_size(width_px, height_px, guided, round(SAFE_SHARE * current.peak_bytes))
        advice = (
            f"ask for {size[0]}x{size[1]} or smaller"
            if size
            else "free memory on the device, or use a smaller model"
        )
        return OutOfMemory(
            f"{self._device} ran out of memory ({stage}) at {width_px}x{height_px}, and nothing was "
            f"left to move off it; {advice}, or try again when other programs have freed memory",
            stage,
            size,
        )

    def free_bytes(self) -> int | None:
        """What the model may take: what is free, and what this process holds already."""
        snapshot = take_snapshot(self._device)
        if snapshot.free_bytes is None:
            return None
        return snapshot.free_bytes + (snapshot.reserved_bytes or 0)

    def _lose_trust(self, plan: OffloadPlan) -> None:
        self._distrust = Distrust(plan.peak_bytes, self.free_bytes(), self._patience)
        self._patience = min(2 * self._patience, LONGEST_PATIENCE)


def _let_go_of_frames(error: BaseException | None) -> None:
    """Drop the local variables of the frames that an error ended; those still running keep theirs."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
