"""Several requests drawn at once by one engine, and the pictures of each, all as they would be drawn alone.

Made for a server's queue: requests are taken as they come, also while others are being drawn, and share the
denoiser's forward passes where they can. Requests never wait for company. Knows no HTTP and no queue.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from zimage_engine.engine import Engine, Held
from zimage_engine.errors import EngineError, OutOfMemory
from zimage_engine.sampling.company import Company, Drawing, Seat, Shared, Verdicts
from zimage_engine.sampling.control import DrawingControl
from zimage_engine.sampling.plan import most_of_size, resolve
from zimage_engine.types import GenerationReport, GenerationRequest, GenerationResult

logger = logging.getLogger(__name__)

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

        They are of one size, which leaves room in a pass for two, name the same LoRAs, have no picture to
        begin with and no prompt that the model is to rewrite first, and their model's calls share a forward
        pass. Reads no files.
        """
        model = self._engine.description
        if self._most < 2 or not model.shares_passes:
            return False
        if first.loras != other.loras or first.exact != other.exact:
            return False
        if any(each.image is not None or _is_written_for(each) for each in (first, other)):
            return False
        try:
            plans = [resolve(request, model) for request in (first, other)]
        except EngineError:  # it is told when it is drawn, alone
            return False
        sizes = {(plan.width_px, plan.height_px) for plan in plans}
        return len(sizes) == 1 and most_of_size(*sizes.pop(), self._most) > 1

    def run(self, first: Asked, come: Callable[[], Sequence[Asked]]) -> None:
        """Draw `first` and those that `come` hands out until there are none; all of them may join it.

        What memory does not suffice for at once is drawn alone afterwards, and so is one for whom a LoRA's
        file was exchanged meanwhile; what cannot be beside others (the plan in force moves weights) alone
        from the beginning.
        """
        engine = self._engine
        alone: list[Asked] = []
        with engine.held_for(first.request) as held:
            if held is None:
                alone.append(first)
            else:
                company = Company(
                    engine.denoiser,
                    self._room_for(held),
                    self._verdicts,
                    self._on_pass,
                    partial(engine.levers.during_passes, held.levers),
                    held.levers,
                )
                waiting = [first]

                def newcomers() -> list[Drawing]:
                    # Who ran out of memory came first and is drawn before whoever comes later.
                    asked = [*waiting, *(() if alone else come())]
                    waiting.clear()
                    return [self._drawing(each, company, held, alone) for each in asked]

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

    def _room_for(self, held: Held) -> int:
        """How many drawings can share a pass: by what the device has beside one, and at most `most`."""
        most = most_of_size(held.plan.width_px, held.plan.height_px, self._most)
        others = self._engine.room_beside(held)
        return most if others is None else min(most, 1 + others)

    def _drawing(self, asked: Asked, company: Company, held: Held, alone: list[Asked]) -> Drawing:
        seats: list[Seat] = []

        def seated() -> Engine:
            seats.append(company.seat(self._engine.pipeline, self._engine.denoiser_name))
            return self._engine.at_seat(seats[-1].pipeline, held, each)

        def each(works: Sequence[Callable[[Engine], Any]]) -> list[Any]:
            """Each of several pictures has a seat of its own."""
            if len(works) == 1:
                return [works[0](engine)]
            engines = [seated() for _ in works]
            own = seats[-len(works) :]
            return company.each([(own[at], partial(work, engines[at])) for at, work in enumerate(works)])

        engine = seated()

        def run() -> None:
            try:
                if self._engine.loras_for(asked.request) != held.loras:
                    alone.append(asked)
                    return
                asked.begins(engine)
                result = engine.generate(asked.request, control=asked.control)
            except (torch.OutOfMemoryError, OutOfMemory):
                logger.warning("out of memory beside others; drawn alone afterwards")
                alone.append(asked)
            except BaseException as error:
                asked.ended(error)
            else:
                asked.ended(replace(result, report=_told(result.report, seats)))

        return Drawing(seats[0], run, asked.context)


def _told(report: GenerationReport, seats: Sequence[Seat]) -> GenerationReport:
    """The report of what was drawn at these seats, with what it shared and what of the time was its own."""
    passes = sum(seat.passes for seat in seats)
    sharing = sum(seat.drawings for seat in seats) / passes if passes else 1.0
    return replace(report, sharing=round(sharing, 2), device_seconds=sum(seat.seconds for seat in seats))


def _is_written_for(request: GenerationRequest) -> bool:
    """Whether the model's text encoder rewrites the prompt first; others would stand still meanwhile."""
    return request.enhance and request.enhancer == "model"


def draw_into(engine: Engine, asked: Asked) -> None:
    """Draw one request alone, and tell its end."""
    try:
        asked.begins(engine)
        result = engine.generate(asked.request, control=asked.control)
    except BaseException as error:
        asked.ended(error)
    else:
        asked.ended(result)
