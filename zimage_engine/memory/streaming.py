"""Weights that lie on the host and come to the device for their turn; knows no pipeline and no plan.

A copy to the device runs on a stream of its own, ahead of the block that needs it, into one of two places
that are made once: nothing is allocated during a step, so nothing is fragmented, and what is taken from the
device is known beforehand. Host copies are never written, so going back is forgetting. On the CPU the copies
are as real, made in the caller's thread: what is tested there is what runs on a card.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

#: One is being computed with while the other is filled.
PLACES = 2
#: Where a tensor starts: as CUDA's allocator does it, because kernels are chosen by alignment too.
ALIGNMENT_BYTES = 512


def tensors_of(modules: Iterable[torch.nn.Module]) -> list[torch.Tensor]:
    """Parameters and buffers of `modules`, each once though it be tied.

    Of a quantised weight what it consists of (values, scales): its own `data` holds none of them.
    """
    found: dict[int, torch.Tensor] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            for part in _parts(tensor):
                found.setdefault(id(part), part)
    return list(found.values())


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that hold what `tensor` is; itself where it is one."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(tensor, name))


def move(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Put each of `tensors` on `device`, in place, so that whoever holds it sees it there."""
    for tensor in tensors:
        if tensor.device != device:
            tensor.data = tensor.data.to(device)


class HostWeights:
    """Tensors packed into one stretch of host memory, which one copy brings to a device.

    Their `data` is a view of it. With `pin_for`, a card, the stretch is page-locked, where the system lets
    us; a copy from it then runs beside the computing. It is locked in place: PyTorch's own pinned allocations
    round up to a power of two, which is half as much again for a block of 362 MB. With `file` the stretch is
    that file, which is made; the system keeps of it in memory what it has room for.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], pin_for: torch.device | None = None, file: Path | None = None
    ) -> None:
        self.tensors = tuple(tensors)
        self._homes = tuple(tensor.device for tensor in self.tensors)
        self._offsets: list[int] = []
        self.bytes = 0
        for tensor in self.tensors:
            self._offsets.append(self.bytes)
            taken = tensor.numel() * tensor.element_size()
            self.bytes += -(-taken // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._in_file = file is not None and self.bytes > 0
        self.flat = (
            torch.from_file(str(file), shared=True, size=self.bytes, dtype=torch.uint8)
            if self._in_file
            else torch.empty(self.bytes, dtype=torch.uint8)
        )
        self._resting = self.views_in(self.flat)
        for tensor, view in zip(self.tensors, self._resting, strict=True):
            view.copy_(tensor.data)
            tensor.data = view
        #: The card that the stretch is locked for; None where it is not locked.
        self._card = pin_for if not self._in_file and self.bytes > 0 and _lock(self.flat, pin_for) else None

    @property
    def is_pinned(self) -> bool:
        """Whether the stretch is page-locked."""
        return self._card is not None

    def views_in(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The tensors as they lie in `flat`, with their own shapes and strides."""
        views = []
        for tensor, offset in zip(self.tensors, self._offsets, strict=True):
            stretch = flat[offset : offset + tensor.numel() * tensor.element_size()]
            view = stretch.view(tensor.dtype)
            strides = (
                tensor.stride() if _is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
            )
            views.append(view.as_strided(tensor.shape, strides))
        return views

    def use(self, views: Sequence[torch.Tensor]) -> None:
        """Let the tensors be `views`, which were filled from here."""
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view

    def rest(self) -> None:
        """Let the tensors be on the host again."""
        self.use(self._resting)

    def remove(self) -> None:
        """Give each tensor back to the device where it was found; the host's memory is unlocked."""
        self.rest()
        if self._card is not None:
            _unlock(self.flat, self._card)
            self._card = None
        for tensor, device in zip(self.tensors, self._homes, strict=True):
            if self._in_file:
                tensor.data = tensor.data.clone()
            move((tensor,), device)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one stretch without gaps or overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


class _MetLater:
    """Weights that a module got after the others were packed (a LoRA's): moved to the device, and stay."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moved: list[tuple[weakref.ref[torch.Tensor], torch.device]] = []

    def bring(self, module: torch.nn.Module, known: Container[int]) -> None:
        for tensor in tensors_of((module,)):
            if id(tensor) not in known and tensor.device != self._device:
                self._moved.append((weakref.ref(tensor), tensor.device))
                move((tensor,), self._device)

    def remove(self) -> None:
        for reference, device in self._moved:
            if (tensor := reference()) is not None:
                move((tensor,), device)
        self._moved = []


class _Place:
    """Room on the device for one block, and what has been put there."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.flat = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        self.in_use = False
        self.views: dict[int, list[torch.Tensor]] = {}
        is_cuda = device.type == "cuda"
        self.filled = torch.cuda.Event() if is_cuda else None
        self.read = torch.cuda.Event() if is_cuda else None


class BlockStream:
    """Brings `blocks` (in the order in which they are called) to `device` one ahead of their turn.

    The last is followed by the first, so the next step finds it. A block called out of order is fetched when
    it is called. What a block has beside the weights that were here at first (a LoRA put on later) is moved
    to the device when it is first met, and stays.
    """

    def __init__(
        self, blocks: Sequence[torch.nn.Module], device: torch.device, folder: Path | None = None
    ) -> None:
        self._blocks = tuple(blocks)
        self._device = device
        self._weights = [
            HostWeights(
                tensors_of((block,)),
                pin_for=_card(device),
                file=None if folder is None else folder / f"{index}.weights",
            )
            for index, block in enumerate(self._blocks)
        ]
        self._known = {id(tensor) for weights in self._weights for tensor in weights.tensors}
        self._met_later = _MetLater(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: list[_Place] = []
        self._running: tuple[int, _Place] | None = None
        self._handles = [handle for index in range(len(self._blocks)) for handle in self._hooks(index)]

    @property
    def is_any(self) -> bool:
        """Whether there are blocks at all."""
        return bool(self._blocks)

    @property
    def is_pinned(self) -> bool:
        """Whether every copy runs beside the computing."""
        return all(weights.is_pinned for weights in self._weights)

    def _hooks(self, index: int) -> Iterator[Any]:
        block = self._blocks[index]
        yield block.register_forward_pre_hook(lambda *_: self._begin(index), prepend=True)
        # always_call: a block whose forward raises goes back like any other.
        yield block.register_forward_hook(lambda *_: self._end(), always_call=True)

    def make_places(self) -> None:
        """Take the memory on the device; without it, it is taken when the first block is called."""
        if self._places or not self._blocks:
            return
        size = max(weights.bytes for weights in self._weights)
        self._places = [_Place(size, self._device) for _ in range(min(PLACES, len(self._blocks)))]
        for place in self._places:
            if place.read is not None:  # what had this memory before may still be computed with
                place.read.record(torch.cuda.current_stream(self._device))

    def give_up_places(self) -> None:
        """Free the memory on the device; the next call takes it anew."""
        self._put_back()
        if self._stream is not None:
            self._stream.synchronize()
            for place in self._places:  # allocated on the computing stream, filled on ours
                place.flat.record_stream(self._stream)
        self._places = []

    def _begin(self, index: int) -> None:
        # A mode that changes arithmetic (the guard's float32) has no business with copies.
        with _disable_current_modes():
            self._put_back()
            self.make_places()
            self._met_later.bring(self._blocks[index], self._known)
            place = self._holding(index) or self._fill(self._idle()[0], index)
            if place.filled is not None:
                torch.cuda.current_stream(self._device).wait_event(place.filled)
            if index not in place.views:
                place.views[index] = self._weights[index].views_in(place.flat)
            self._weights[index].use(place.views[index])
            place.in_use = True
            self._running = (index, place)
            self._fetch_ahead(index)

    def _end(self) -> None:
        with _disable_current_modes():
            running = self._running
            self._put_back()
            if running is not None:
                self._fetch_ahead(running[0])

    def _put_back(self) -> None:
        if self._running is None:
            return
        index, place = self._running
        self._running = None
        self._weights[index].rest()
        place.in_use = False
        if place.read is not None:
            place.read.record(torch.cuda.current_stream(self._device))

    def _fetch_ahead(self, index: int) -> None:
        """Fill every idle place with the blocks that come next, unless they are on the device already."""
        idle = self._idle()
        wanted = [(index + ahead) % len(self._blocks) for ahead in range(1, len(idle) + 1)]
        spare = [place for place in idle if place.holds not in wanted]
        missing = [each for each in wanted if self._holding(each) is None]
        for place, each in zip(spare, missing, strict=False):
            self._fill(place, each)

    def _idle(self) -> list[_Place]:
        return [place for place in self._places if not place.in_use]

    def _holding(self, index: int) -> _Place | None:
        return next((place for place in self._places if place.holds == index), None)

    def _fill(self, place: _Place, index: int) -> _Place:
        weights = self._weights[index]
        place.holds = None
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            if self._stream is not None and place.read is not None and place.filled is not None:
                self._stream.wait_event(place.read)
                place.flat[: weights.bytes].copy_(weights.flat, non_blocking=True)
                place.filled.record(self._stream)
            else:
                place.flat[: weights.bytes].copy_(weights.flat)
        place.holds = index
        return place

    def remove(self) -> None:
        """As if it had never been: no hooks, the weights on the device where they were found."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.give_up_places()
        for weights in self._weights:
            weights.remove()
        self._met_later.remove()


class StreamedModule:
    """A module some of whose blocks are streamed and whose rest is on the device.

    `visiting`: the rest has a copy on the host and is on the device from the first call of the module (or
    of one of `entrances`, for modules that are not called by `forward`) until `leave`. `before_entering` is
    called at each of these calls that finds the module away. With `folder` what is streamed lies there.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        streamed: Sequence[torch.nn.Module],
        device: torch.device,
        visiting: bool = False,
        entrances: Sequence[torch.nn.Module] = (),
        before_entering: Callable[[], None] = lambda: None,
        folder: Path | None = None,
    ) -> None:
        self._module = module
        self._device = device
        self._before_entering = before_entering
        self._met_later = _MetLater(device)
        self._stream = BlockStream(streamed, device, folder)
        apart = {id(tensor) for tensor in tensors_of(streamed)}
        rest = [tensor for tensor in tensors_of((module,)) if id(tensor) not in apart]
        self._known = apart | {id(tensor) for tensor in rest}
        self._visiting = HostWeights(rest, _card(device)) if visiting else None
        self._homes = [] if visiting else [(tensor, tensor.device) for tensor in rest]
        self.is_here = False
        # What neither comes nor goes nor makes others go needs no hook: a look at every weight costs a
        # large model a millisecond a step.
        callers = (entrances or (module,)) if visiting or streamed or entrances else ()
        self._handles = [
            each.register_forward_pre_hook(lambda *_: self.enter(), prepend=True) for each in callers
        ]
        try:
            if not visiting:
                move(rest, device)
        except BaseException:
            self.remove()
            raise

    @property
    def is_copied(self) -> bool:
        """Whether anything of it comes from the host while it works."""
        return self._visiting is not None or self._stream.is_any

    @property
    def is_pinned(self) -> bool:
        """Whether all that comes from the host comes from locked memory."""
        return self._stream.is_pinned and (self._visiting is None or self._visiting.is_pinned)

    def enter(self) -> None:
        """Be on the device, with what has come to the module since."""
        if not self.is_here:
            self._before_entering()
        with _disable_current_modes():
            if not self.is_here and self._visiting is not None:
                self._copy(self._visiting)
            self._met_later.bring(self._module, self._known)
        self.is_here = True

    def _copy(self, weights: HostWeights) -> None:
        # Pipelines widen a float16 VAE before it is called: it comes in the dtype that they expect.
        expected = [tensor.dtype for tensor in weights.tensors]
        weights.rest()
        flat = torch.empty(weights.bytes, dtype=torch.uint8, device=self._device)
        flat.copy_(weights.flat, non_blocking=True)
        views = weights.views_in(flat)
        weights.use([view.to(dtype) for view, dtype in zip(views, expected, strict=True)])

    def leave(self) -> None:
        """Free what is needed on the device for the time of a call only; the next call takes it anew."""
        self._stream.give_up_places()
        if self._visiting is not None:
            self._visiting.rest()
        self.is_here = False

    def remove(self) -> None:
        """As if it had never been."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.leave()
        if self._visiting is not None:
            self._visiting.remove()
        self._stream.remove()
        self._met_later.remove()
        for tensor, device in self._homes:
            move((tensor,), device)


@contextmanager
def removed_on_error(parts: Sequence[Any]) -> Iterator[None]:
    """What fails within leaves none of `parts` (a list that may grow meanwhile) behind."""
    try:
        yield
    except BaseException:
        for part in reversed(parts):
            part.remove()
        raise


def _card(device: torch.device) -> torch.device | None:
    """`device` where memory can be locked for it."""
    return device if device.type == "cuda" else None


def _lock(flat: torch.Tensor, card: torch.device | None) -> bool:
    """Lock `flat`'s pages; False where the system does not let us, which costs speed alone."""
    if card is None:
        return False
    with torch.cuda.device(card):  # else CUDA would start on the first card, and take memory there
        if int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.numel(), 0)) == 0:
            return True
        with suppress(RuntimeError):
            # CUDA keeps the refusal as its last error and would show it to whoever comes next.
            torch.zeros(1, device=card).add_(1)
    return False


def _unlock(flat: torch.Tensor, card: torch.device) -> None:
    with torch.cuda.device(card):
        torch.cuda.synchronize(card)
        torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())
