"""Several drawings in one thread whose calls of the denoiser are made together, step by step.

Each drawing runs as a greenlet: the stock pipeline, its scheduler and its guard know nothing of the others.
Where a pipeline calls its denoiser the drawing waits; when all of them wait, calls that can share a forward
pass are made as one, and each goes on with its part. So a drawing may come while others are under way, at its
own first step, and one that ends, fails or is cancelled leaves the others as they are. A forward pass that
fails for several is done again for each of them alone. Knows no requests and no engine.
"""

from __future__ import annotations

import contextvars
import copy
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet

logger = logging.getLogger(__name__)

#: Prompts are padded to a multiple of it, and the shortest of a batch to the longest.
TOKENS_A_BUCKET = 32


class Merge(Protocol):
    """How the calls of one kind of denoiser are made as one."""

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Calls of one key can share a forward pass and come out as they would alone; None: only alone."""

    def items(self, args: tuple[Any, ...]) -> int:
        """How many pictures a call computes; with guidance two for one."""

    def merged(
        self, calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of all, in their order."""

    def parts(self, output: Any, calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> list[Any]:
        """What each call would have been answered."""


class ZImageMerge:
    """A list of latents, a time for each, and a list of embeddings, which may all be longer.

    What is padded to the same length with the same mask comes out alike whatever stands beside it, so
    prompts of a call and those of its company have the same set of lengths in buckets.
    """

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        plain = {name: value for name, value in kwargs.items() if value is not None}
        if len(args) != 3 or plain != {"return_dict": False}:
            return None
        latents, times, prompts = args
        if not isinstance(latents, list) or not all(isinstance(each, torch.Tensor) for each in latents):
            return None
        shapes = {(tuple(each.shape), each.dtype, each.device) for each in latents}
        if len(shapes) != 1:
            return None
        return (*shapes, times.dtype, frozenset(-(-len(prompt) // TOKENS_A_BUCKET) for prompt in prompts))

    def items(self, args: tuple[Any, ...]) -> int:
        return len(args[0])

    def merged(
        self, calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        latents = [each for args, _ in calls for each in args[0]]
        prompts = [each for args, _ in calls for each in args[2]]
        return (latents, torch.cat([args[1] for args, _ in calls]), prompts), dict(calls[0][1])

    def parts(self, output: Any, calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> list[Any]:
        (drawn,) = output
        found, at = [], 0
        for args, _ in calls:
            found.append((drawn[at : at + len(args[0])],))
            at += len(args[0])
        return found


#: By the name of the denoiser's class; others draw in turns, a step each, and share nothing.
MERGES: Mapping[str, Merge] = {"ZImageTransformer2DModel": ZImageMerge()}


def merge_for(denoiser: torch.nn.Module, device: str) -> Merge | None:
    """How calls of this denoiser share a forward pass on a device; None: they do not.

    On a CPU in float32 they do not: a matrix product's last bits depend on how many rows it has, and nothing
    would be gained, for it takes as long for two as twice for one.
    """
    if torch.device(device).type == "cpu" and next(denoiser.parameters()).dtype is torch.float32:
        return None
    return MERGES.get(type(denoiser).__name__)


@dataclass(eq=False)
class _Call:
    """What a waiting drawing asks of the denoiser; `seat` keeps count of its company."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: tuple[Any, ...] | None
    seat: Seat


#: Whether passes of a kind, of calls of so many pictures each, came out bit for bit as each call alone.
Verdicts = dict[tuple[Any, tuple[int, ...]], bool]


@dataclass
class Shared:
    """What a company's forward passes were: how many, of how many drawings in all, and the largest."""

    on_pass: Callable[[int], None] = field(repr=False, default=lambda drawings: None)
    passes: int = 0
    calls: int = 0
    largest: int = 0
    done_again: int = 0

    def count(self, calls: Sequence[_Call]) -> None:
        self.passes += 1
        self.calls += len(calls)
        self.largest = max(self.largest, len(calls))
        self.on_pass(len(calls))
        for call in calls:
            call.seat.passes += 1
            call.seat.drawings += len(calls)


@dataclass(frozen=True)
class Drawing:
    """What is to be run at a seat: `run` reports its own end and lets nothing out. `context` is its own."""

    seat: Seat
    run: Callable[[], None]
    context: contextvars.Context = field(default_factory=contextvars.copy_context)


class Company:
    """Drawings around one denoiser; at most `most` of them share a forward pass.

    With `verdicts` a picture is bit for bit the one that is drawn alone: the first pass of each kind is made
    both ways, compared and noted there, and a kind that comes out otherwise is not shared.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        most: int,
        verdicts: Verdicts | None = None,
        on_pass: Callable[[int], None] = lambda drawings: None,
    ) -> None:
        """`on_pass` hears of each forward pass how many drawings it was for."""
        self.shared = Shared(on_pass)
        self._verdicts = verdicts
        self._denoiser = denoiser
        self._merge = merge_for(denoiser, next(denoiser.parameters()).device.type)
        self._most = max(1, most)
        self._hub: greenlet | None = None
        self._seats: dict[greenlet, Seat] = {}
        #: Kinds of which a shared pass has failed.
        self._failed: set[Any] = set()

    @torch.no_grad()
    def run(self, come: Callable[[], Sequence[Drawing]]) -> None:
        """Draw until none is under way and `come` has none more; it is asked again after each step.

        Without gradients all of it: the mode belongs to the thread, and what one drawing sets as it leaves
        must be what the others had.
        """
        self._hub = getcurrent()
        waiting: dict[greenlet, _Call] = {}
        try:
            while True:
                for newcomer in come():
                    drawing = greenlet(newcomer.run, self._hub)
                    drawing.gr_context = newcomer.context
                    self._seats[drawing] = newcomer.seat
                    self._go_on(waiting, drawing, drawing.switch)
                if not waiting:
                    return
                for together in self._groups(waiting):
                    self._step(waiting, together)
        finally:
            for drawing in waiting:  # only an error of our own leaves any
                drawing.throw(RuntimeError("the drawings beside this one could not go on"))
            self._seats.clear()
            self._hub = None

    def seat(self, stock: Any, denoiser: str) -> Seat:
        """A place for one drawing, whose pipeline has the components of `stock`."""
        return Seat(self, stock, denoiser)

    def _go_on(
        self, waiting: dict[greenlet, _Call], drawing: greenlet, on: Callable[..., Any], *values: Any
    ) -> None:
        """Let a drawing run until it asks for the denoiser again, or ends."""
        began = time.perf_counter()
        asked = on(*values)
        self._seats[drawing].seconds += time.perf_counter() - began
        if drawing.dead:
            del self._seats[drawing]
        else:
            waiting[drawing] = asked

    def _groups(self, waiting: Mapping[greenlet, _Call]) -> list[list[greenlet]]:
        by_key: dict[Any, list[greenlet]] = {}
        for drawing, call in waiting.items():
            by_key.setdefault(call.key or drawing, []).append(drawing)
        return [
            group[at : at + self._most]
            for group in by_key.values()
            for at in range(0, len(group), self._most)
        ]

    def _step(self, waiting: dict[greenlet, _Call], together: list[greenlet]) -> None:
        calls = [waiting.pop(drawing) for drawing in together]
        answers: list[Any] | None = None
        began = time.perf_counter()
        if len(calls) > 1 and self._merge is not None and self._kind(calls) not in self._failed:
            try:
                answers = self._made_as_one(calls, self._merge)
            except Exception:  # whose fault it is shows when each is made alone
                self.shared.done_again += 1
                self._failed.add(self._kind(calls))
                logger.warning("a shared forward pass failed; such are made alone", exc_info=True)
            seconds = (time.perf_counter() - began) / len(calls)
            for call in calls:
                call.seat.seconds += seconds
        for at, (drawing, call) in enumerate(zip(together, calls, strict=True)):
            if answers is not None:
                self._go_on(waiting, drawing, drawing.switch, answers[at])
                continue
            began = time.perf_counter()
            try:
                answer = self._denoiser(*call.args, **call.kwargs)
                self.shared.count([call])
                call.seat.seconds += time.perf_counter() - began
            except BaseException as error:
                self._go_on(waiting, drawing, drawing.throw, error)
            else:
                self._go_on(waiting, drawing, drawing.switch, answer)

    def _made_as_one(self, calls: list[_Call], merge: Merge) -> list[Any] | None:
        """The answers; None where each call is to be made alone."""
        kind = self._kind(calls)
        is_known = self._verdicts is None or kind in self._verdicts
        if self._verdicts is not None and is_known and not self._verdicts[kind]:
            return None
        asked = [(call.args, call.kwargs) for call in calls]
        args, kwargs = merge.merged(asked)
        parts = merge.parts(self._denoiser(*args, **kwargs), asked)
        if self._verdicts is None or is_known:
            self.shared.count(calls)
            return parts
        alone = [self._denoiser(*call.args, **call.kwargs) for call in calls]
        self._verdicts[kind] = all(_same(one, other) for one, other in zip(parts, alone, strict=True))
        logger.info(
            "%d drawings in one pass come out %s alone",
            len(calls),
            "as" if self._verdicts[kind] else "otherwise than, so they are made",
        )
        for call in calls:
            self.shared.count([call])
        return alone

    def _kind(self, calls: Sequence[_Call]) -> tuple[Any, tuple[int, ...]]:
        """What a pass for these calls is like; it comes out alike each time, or not."""
        assert self._merge is not None
        return calls[0].key, tuple(self._merge.items(call.args) for call in calls)

    def _asked(self, seat: Seat, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In a drawing: wait until the denoiser has answered."""
        assert self._hub is not None
        key = None if self._merge is None else self._merge.key(args, kwargs)
        return self._hub.switch(_Call(args, kwargs, key, seat))


class Seat:
    """One drawing's place: a pipeline of its own around the same weights, whose denoiser waits for company.

    The VAE is its own too, as a shell: a guard stands in for its methods.
    """

    def __init__(self, company: Company, stock: Any, denoiser: str) -> None:
        self.passes = 0
        self.drawings = 0
        #: What of the thread's time was this drawing's own: of a shared pass an equal part.
        self.seconds = 0.0
        self._company = company
        self._module: torch.nn.Module = vars(stock)[denoiser]
        self._shell = _shell(self._module)
        self._shell.forward = self._forward
        self.pipeline: Any = copy.copy(stock)
        vars(self.pipeline).update({denoiser: self._shell, "vae": _shell(vars(stock)["vae"])})

    @property
    def sharing(self) -> float:
        """How many drawings shared a pass of this one's, on the average."""
        return self.drawings / self.passes if self.passes else 1.0

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        # Something holds during this drawing's passes alone, such as float32 arithmetic.
        if self._shell._forward_pre_hooks:
            self.passes += 1
            self.drawings += 1
            self._company.shared.on_pass(1)
            return self._module(*args, **kwargs)
        return self._company._asked(self, args, kwargs)


def _same(one: Any, other: Any) -> bool:
    """Whether two answers are made of the same bits."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))


def _shell(module: torch.nn.Module) -> Any:
    """The same parameters and submodules in a module of its own, without the hooks of the other."""
    shell = copy.copy(module)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called"):
        vars(shell)[name] = OrderedDict()
    for name in ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
        vars(shell)[name] = OrderedDict()
    return shell
