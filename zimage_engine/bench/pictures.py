"""Times single pictures from outside, ours and stock ones in the same way: by when the denoiser and the
decoder are entered."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from zimage_engine.families import ModelFamily

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class PictureTimes:
    """Seconds of one picture. `encode` runs until the denoiser is first entered, `decode` from the decoder's
    entry to the finished picture; `steps` are from one entry of the denoiser to the next, the last to the
    decoder."""

    picture: float
    encode: float
    denoise: float
    decode: float
    steps: tuple[float, ...]

    @property
    def step(self) -> float:
        """The middle of all steps but the first, which waits for what is not yet there."""
        return statistics.median(self.steps[1:] or self.steps)


@dataclass
class _Entries:
    denoiser: list[float] = field(default_factory=list)
    decoder: list[float] = field(default_factory=list)


class PictureClock:
    """Stands at the entries of one pipeline's denoiser and decoder while it is in place."""

    def __init__(self, pipeline: Any, family: ModelFamily, clock: Clock) -> None:
        self._modules = (getattr(pipeline, family.denoiser), pipeline.vae.decoder)
        self._clock = clock

    def timed(self, draw: Callable[[], Any]) -> tuple[Any, PictureTimes]:
        """What `draw` answers, and what it took. `draw` draws one picture."""
        with self._noting() as entries:
            began = self._clock()
            answer = draw()
            ended = self._clock()
        first, decoding = entries.denoiser[0], entries.decoder[0]
        moments = [*entries.denoiser, decoding]
        return answer, PictureTimes(
            picture=ended - began,
            encode=first - began,
            denoise=decoding - first,
            decode=ended - decoding,
            steps=tuple(later - earlier for earlier, later in itertools.pairwise(moments)),
        )

    @contextmanager
    def _noting(self) -> Iterator[_Entries]:
        entries = _Entries()
        handles = [
            module.register_forward_pre_hook(_noter(moments, self._clock))
            for module, moments in zip(self._modules, (entries.denoiser, entries.decoder), strict=True)
        ]
        try:
            yield entries
        finally:
            for handle in handles:
                handle.remove()


def _noter(moments: list[float], clock: Clock) -> Callable[[torch.nn.Module, Any], None]:
    def note(_module: torch.nn.Module, _arguments: Any) -> None:
        moments.append(clock())

    return note
