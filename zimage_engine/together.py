"""Several requests drawn at once by one engine, each as it would be drawn alone.

Made for a server's queue: requests are taken as they come, also while others are being drawn, and share the
denoiser's forward passes where they can. Requests never wait for company. Knows no HTTP and no queue.
"""

from __future__ import annotations

import contextvars
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from zimage_engine.engine import Engine
from zimage_engine.errors import EngineError, OutOfMemory
from zimage_engine.memory.activations import activation_bytes
from zimage_engine.memory.residency import OffloadPlan, Residency
from zimage_engine.sampling.company import Company, Drawing, Seat, Shared, Verdicts
from zimage_engine.sampling.control import DrawingControl
from zimage_engine.sampling.device_failure import device_failures_named
from zimage_engine.sampling.pipeline import GuardedPipeline
from zimage_engine.sampling.plan import SamplingPlan, most_of_size, resolve
from zimage_engine.types import GenerationRequest, GenerationResult

logger = logging.getLogger(__name__)

#: Of the memory that is free beside one drawing, what the others may be predicted to take.
SHARE_OF_FREE = 0.8

Ended = Callable[[GenerationResult | BaseException], None]


@dataclass(frozen=True)
class Asked:
    """A request and who hears of its end: `ended` is called once, in the drawing thread, and raises nothing.

    `context` is what the drawing runs in, such as a request's id in the log.
    """

    request: GenerationRequest
    control: DrawingControl
    ended: Ended
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    #: Called with the engine that draws it, just before: the one that can show its latents.
    begins: Callable[[Engine], None] = lambda engine: None


class Together:
    """Draws requests of one engine at once, at most `most` in one forward pass. For the engine's thread.

    With `verdicts`, empty at first and kept as long as the engine, each picture is bit for bit the one that
    is drawn alone: the first pass of each kind is compared with passes alone and noted there, and kinds that
    come out otherwise are not shared. With None all are shared.
    """

    def __init__(
        self,
        engine: Engine,
        most: int,
        verdicts: Verdicts | None,
        on_pass: Callable[[int], None] = lambda drawings: None,
    ) -> None:
        """`on_pass` hears of each forward pass how many drawings it was for."""
        self._engine = engine
        self._most = most
        self._verdicts = verdicts
        self._on_pass = on_pass
        #: What the last run's forward passes were.
        self.shared = Shared()

    def may_join(self, first: GenerationRequest, other: GenerationRequest) -> bool:
        """Whether `other` can be drawn beside `first`: where both would gain, and can be at once.

        They are of one size, which leaves room in a pass for two, have the same LoRAs, no picture to begin
        with, and their model's calls share a forward pass.
        """
        engine = self._engine
        if self._most < 2 or not engine.description.shares_passes:
            return False
        if first.image is not None or other.image is not None:
            return False
        try:
            plans = [resolve(request, engine.description) for request in (first, other)]
            if engine._wanted_loras(first) != engine._wanted_loras(other):
                return False
        except EngineError:  # it is told when it is drawn, alone
            return False
        sizes = {(plan.width_px, plan.height_px) for plan in plans}
        return len(sizes) == 1 and most_of_size(*sizes.pop(), self._most) > 1

    def run(self, first: Asked, come: Callable[[], Sequence[Asked]]) -> None:
        """Draw `first` and those that `come` hands out until there are none; all of them may join it.

        What memory does not suffice for at once is drawn alone afterwards, and what cannot be beside others
        (the plan in force moves weights) alone from the beginning.
        """
        engine = self._engine
        alone: list[Asked] = []
        with _held(engine, first.request) as plan:
            if plan is None:
                alone.append(first)
            else:
                company = Company(
                    engine._guarded._denoiser, self._room_for(plan), self._verdicts, self._on_pass
                )
                waiting = [first]

                def newcomers() -> list[Drawing]:
                    # Who ran out of memory came first and is drawn before whoever comes later.
                    asked = [*waiting, *(() if alone else come())]
                    waiting.clear()
                    return [self._drawing(each, company, plan, alone) for each in asked]

                company.run(newcomers)
                self.shared = company.shared
        for each in alone:
            each.context.run(draw_into, engine, each)

    def most_beside(self, request: GenerationRequest) -> int:
        """How many of its size are drawn at once at most."""
        try:
            plan = resolve(request, self._engine.description)
        except EngineError:
            return 1
        return most_of_size(plan.width_px, plan.height_px, self._most)

    def _room_for(self, plan: OffloadPlan) -> int:
        """How many drawings can share a pass: by what the device has beside one, and at most `most`."""
        engine = self._engine
        most = most_of_size(plan.width_px, plan.height_px, self._most)
        free = engine._keeper._free_bytes() if engine._keeper.has_own_memory else None
        if free is None:
            return most
        config: dict[str, Any] = dict(getattr(engine.pipeline, engine._guarded._family.denoiser).config)
        each = activation_bytes(engine._guarded._family, config, plan.width_px, plan.height_px, True)
        others = int(SHARE_OF_FREE * max(0, free - plan.peak_bytes) / max(1, each))
        return min(most, 1 + others)

    def _drawing(self, asked: Asked, company: Company, plan: OffloadPlan, alone: list[Asked]) -> Drawing:
        seat = company.seat(self._engine.pipeline, self._engine._guarded._family.denoiser)
        engine = _engine_at(seat, self._engine, plan)

        def run() -> None:
            try:
                asked.begins(engine)
                result = engine.generate(asked.request, control=asked.control)
            except (torch.OutOfMemoryError, OutOfMemory):
                logger.warning("out of memory beside others; drawn alone afterwards")
                alone.append(asked)
            except BaseException as error:
                asked.ended(error)
            else:
                shared = {"sharing": round(seat.sharing, 2), "device_seconds": seat.seconds}
                asked.ended(replace(result, report=replace(result.report, **shared)))  # type: ignore[arg-type]

        return Drawing(seat, run, asked.context)


def draw_into(engine: Engine, asked: Asked) -> None:
    """Draw one request alone, and tell its end."""
    try:
        asked.begins(engine)
        result = engine.generate(asked.request, control=asked.control)
    except BaseException as error:
        asked.ended(error)
    else:
        asked.ended(result)


@contextmanager
def _held(engine: Engine, request: GenerationRequest) -> Iterator[OffloadPlan | None]:
    """The memory plan for the request's size is in force within; None where it moves weights, or is none."""
    keeper = engine._keeper
    try:
        with device_failures_named(engine.description.device):
            plan: SamplingPlan = resolve(request, engine.description)
            wanted = engine._wanted_loras(request)
            engine._put_on(wanted)
            engine._let_idle_loras_go(wanted, plan)
            # As with guidance: who joins may have it.
            in_force = keeper.before(plan.width_px, plan.height_px, True)
    except EngineError:
        yield None
        return
    try:
        is_whole = in_force.residency is Residency.NONE and not in_force.release_text_encoder
        yield in_force if is_whole else None
    finally:
        keeper.after()


class _HeldMemory:
    """A keeper's face for one drawing among others: nothing is moved while they are under way."""

    def __init__(self, keeper: Any, plan: OffloadPlan) -> None:
        self.plan = plan
        self.has_own_memory: bool = keeper.has_own_memory

    def before(self, width_px: int, height_px: int, guided: bool) -> OffloadPlan:
        return self.plan

    def encoded(self) -> None:
        """The text encoders stay for whoever comes next."""

    def after(self) -> None:
        """Memory is tidied up when all have gone."""

    def on_oom(self, stage: str, error: BaseException | None = None) -> str:
        raise OutOfMemory("the device's memory does not suffice for this picture beside others")


def _engine_at(seat: Seat, engine: Engine, plan: OffloadPlan) -> Engine:
    """The engine for one drawing: a guard of its own around the seat's pipeline, and memory that is held."""
    own = copy.copy(engine)
    own._guarded = GuardedPipeline(seat.pipeline, engine._guarded._family, engine._clock, engine._embeddings)
    own._keeper = _HeldMemory(engine._keeper, plan)  # type: ignore[assignment]
    own._put_on = lambda wanted: None  # type: ignore[method-assign]
    own._let_idle_loras_go = lambda wanted, plan: None  # type: ignore[method-assign]
    return own
