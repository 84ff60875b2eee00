"""Several drawings in one thread whose calls of the denoiser are made together, step by step.

Each drawing runs as a greenlet: the stock pipeline, its scheduler and its guard know nothing of the others.
Where a pipeline calls its denoiser the drawing waits; when all of them wait, calls that can share a forward
pass are made as one, and each goes on with its part. So a drawing may come while others are under way, at its
own first step, and one that ends, fails or is cancelled leaves the others as they are. A forward pass that
fails for several is done again for each of them alone. A drawing of several pictures lets each of them be
drawn at a seat of its own and waits for all. Knows no requests and no engine.
"""

from __future__ import annotations

import contextvars
import copy
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from greenlet import getcurrent, greenlet

from zimage_engine.sampling.known_dtype import dtype_known
from zimage_engine.sampling.known_signatures import signatures_known

logger = logging.getLogger(__name__)

Made = TypeVar("Made")

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
        form = plain.pop("return_dict", True)
        if len(args) != 3 or plain:
            return None
        latents, times, prompts = args
        if not isinstance(latents, list) or not all(isinstance(each, torch.Tensor) for each in latents):
            return None
        shapes = {(tuple(each.shape), each.dtype, each.device) for each in latents}
        if len(shapes) != 1:
            return None
        return (
            form,
            *shapes,
            times.dtype,
            frozenset(-(-len(prompt) // TOKENS_A_BUCKET) for prompt in prompts),
        )

    def items(self, args: tuple[Any, ...]) -> int:
        return len(args[0])

    def merged(
        self, calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        latents = [each for args, _ in calls for each in args[0]]
        prompts = [each for args, _ in calls for each in args[2]]
        return (latents, torch.cat([args[1] for args, _ in calls]), prompts), dict(calls[0][1])

    def parts(self, output: Any, calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> list[Any]:
        found, at = [], 0
        for args, _ in calls:
            found.append(_like(output, output[0][at : at + len(args[0])]))
            at += len(args[0])
        return found


class RowsMerge:
    """Tensors with a row for each picture: the latents, a time, and arguments by their names.

    A time of no or one row counts for all of the call's. `names` are the arguments that may be there beside
    the latents, tensors or mappings of such; with any other that is not None a call is made alone. Prompts of
    these denoisers are padded to one length.
    """

    def __init__(self, positional: int, *names: str) -> None:
        """So many arguments come without their names, the latents first and the time next."""
        self._positional = positional
        self._names = frozenset(names)

    def key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        given = _leaves(kwargs)
        form = given.pop(("return_dict",), True)
        if len(args) != self._positional:
            return None
        tensors = _leaves(dict(enumerate(args))) | given
        if not all(isinstance(each, torch.Tensor) for each in tensors.values()):
            return None
        if not self._names.issuperset(place[0] for place in given):
            return None
        rows = self.items(args)
        for place, each in tensors.items():
            counts_for_all = place in ((1,), ("timestep",)) and each.numel() == 1
            if not counts_for_all and (each.dim() == 0 or len(each) != rows):
                return None
        return form, *(
            (place, tuple(each.shape[1:]), each.dtype, each.device)
            for place, each in sorted(tensors.items(), key=lambda named: str(named[0]))
        )

    def items(self, args: tuple[Any, ...]) -> int:
        return len(args[0])

    def merged(
        self, calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = [self.items(args) for args, _ in calls]

        def joined(values: Sequence[Any]) -> Any:
            if isinstance(values[0], Mapping):
                return {name: joined([each[name] for each in values]) for name in values[0]}
            if not isinstance(values[0], torch.Tensor):
                return values[0]
            whole = (
                each.reshape(-1).expand(count) if each.numel() == 1 and each.dim() < 2 else each
                for each, count in zip(values, rows, strict=True)
            )
            return torch.cat(list(whole))

        args = tuple(joined([args[at] for args, _ in calls]) for at in range(len(calls[0][0])))
        return args, {name: joined([kwargs[name] for _, kwargs in calls]) for name in calls[0][1]}

    def parts(self, output: Any, calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> list[Any]:
        rows = [self.items(args) for args, _ in calls]
        return [_like(output, each) for each in torch.split(output[0], rows)]


def _like(output: Any, drawn: Any) -> Any:
    """What was drawn for one call, in the form that all of it came in: a tuple, or an output with a name."""
    return (drawn,) if isinstance(output, tuple) else type(output)(drawn)


def _leaves(given: Mapping[Any, Any]) -> dict[tuple[Any, ...], Any]:
    """What is given, by its name, or of a mapping by both names; nothing that is None."""
    found: dict[tuple[Any, ...], Any] = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            found |= {(name, *place): each for place, each in _leaves(value).items()}
        elif value is not None:
            found[(name,)] = value
    return found


#: By the name of the denoiser's class; others draw in turns, a step each, and share nothing.
MERGES: Mapping[str, Merge] = {
    "ZImageTransformer2DModel": ZImageMerge(),
    "UNet2DConditionModel": RowsMerge(2, "encoder_hidden_states", "timestep_cond", "added_cond_kwargs"),
    "PixArtTransformer2DModel": RowsMerge(
        1, "encoder_hidden_states", "encoder_attention_mask", "timestep", "added_cond_kwargs"
    ),
}


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


@dataclass(eq=False)
class _Parts:
    """What a drawing waits for that is made of several: those still to begin, and how many are under way."""

    to_begin: deque[Drawing]
    under_way: int = 0


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
        during_passes: Callable[[], AbstractContextManager[Any]] = nullcontext,
        form: Hashable = (),
    ) -> None:
        """`on_pass` hears of each forward pass how many drawings it was for. `during_passes` holds while the
        denoiser runs; verdicts are of passes in this `form` alone.
        """
        self.shared = Shared(on_pass)
        self._during_passes = during_passes
        self._form = form
        self._verdicts = verdicts
        self._denoiser = denoiser
        self._merge = merge_for(denoiser, next(denoiser.parameters()).device.type)
        self._most = max(1, most)
        self._hub: greenlet | None = None
        self._seats: dict[greenlet, Seat] = {}
        #: By the drawing that waits for its parts, and by each part the drawing that it is of.
        self._parts: dict[greenlet, _Parts] = {}
        self._whole: dict[greenlet, greenlet] = {}
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
            with dtype_known(self._denoiser), signatures_known():
                while True:
                    for newcomer in come():
                        self._begin(waiting, newcomer)
                    if not waiting:
                        return
                    for together in self._groups(waiting):
                        self._step(waiting, together)
        finally:
            for drawing in (*waiting, *self._parts):  # only an error of our own leaves any
                drawing.throw(RuntimeError("the drawings beside this one could not go on"))
            self._seats.clear()
            self._parts.clear()
            self._whole.clear()
            self._hub = None

    def seat(self, stock: Any, denoiser: str) -> Seat:
        """A place for one drawing, whose pipeline has the components of `stock`."""
        return Seat(self, stock, denoiser)

    def each(self, works: Sequence[tuple[Seat, Callable[[], Made]]]) -> list[Made]:
        """In a drawing: what each of these makes at its seat, all of them at once, at most `most`.

        They are begun in their order. The first error is raised when all have ended; what is still to begin
        then is not.
        """
        made: dict[int, Made] = {}
        errors: list[BaseException] = []

        def run(number: int, work: Callable[[], Made]) -> None:
            if errors:
                return
            try:
                made[number] = work()
            except BaseException as error:
                errors.append(error)

        assert self._hub is not None
        parts = (Drawing(seat, partial(run, number, work)) for number, (seat, work) in enumerate(works))
        self._hub.switch(_Parts(deque(parts)))
        if errors:
            raise errors[0]
        return [made[number] for number in range(len(works))]

    def _begin(
        self, waiting: dict[greenlet, _Call], newcomer: Drawing, whole: greenlet | None = None
    ) -> None:
        drawing = greenlet(newcomer.run, self._hub)
        drawing.gr_context = newcomer.context
        self._seats[drawing] = newcomer.seat
        if whole is not None:
            self._whole[drawing] = whole
        self._go_on(waiting, drawing, drawing.switch)

    def _begin_parts(self, waiting: dict[greenlet, _Call], whole: greenlet) -> None:
        """As many as may be under way; the drawing goes on when none is left."""
        parts = self._parts[whole]
        while parts.to_begin and parts.under_way < self._most:
            parts.under_way += 1
            self._begin(waiting, parts.to_begin.popleft(), whole)
        if not parts.under_way and self._parts.get(whole) is parts:
            del self._parts[whole]
            self._go_on(waiting, whole, whole.switch)

    def _go_on(
        self, waiting: dict[greenlet, _Call], drawing: greenlet, on: Callable[..., Any], *values: Any
    ) -> None:
        """Let a drawing run until it asks for the denoiser again, waits for its parts, or ends."""
        began = time.perf_counter()
        asked = on(*values)
        self._seats[drawing].seconds += time.perf_counter() - began
        if isinstance(asked, _Parts):
            self._parts[drawing] = asked
            self._begin_parts(waiting, drawing)
        elif not drawing.dead:
            waiting[drawing] = asked
        else:
            del self._seats[drawing]
            if (whole := self._whole.pop(drawing, None)) is not None:
                self._parts[whole].under_way -= 1
                self._begin_parts(waiting, whole)

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
                answer = self._answer(call.args, call.kwargs)
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
        parts = merge.parts(self._answer(args, kwargs), asked)
        if self._verdicts is None or is_known:
            self.shared.count(calls)
            return parts
        alone = [self._answer(call.args, call.kwargs) for call in calls]
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
        return (self._form, calls[0].key), tuple(self._merge.items(call.args) for call in calls)

    def _answer(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with self._during_passes():
            return self._denoiser(*args, **kwargs)

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

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        # Something holds during this drawing's passes alone, such as float32 arithmetic.
        if self._shell._forward_pre_hooks:
            self.passes += 1
            self.drawings += 1
            self._company.shared.on_pass(1)
            # And nothing else: what holds during others' passes may be what it is to do without.
            return self._module(*args, **kwargs)
        return self._company._asked(self, args, kwargs)


def _same(one: Any, other: Any) -> bool:
    """Whether two answers are made of the same bits."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and _same(tuple(one.values()), tuple(other.values()))
    return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))


def _shell(module: torch.nn.Module) -> Any:
    """The same parameters and submodules in a module of its own, without the hooks of the other."""
    shell = copy.copy(module)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called"):
        vars(shell)[name] = OrderedDict()
    for name in ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
        vars(shell)[name] = OrderedDict()
    return shell
