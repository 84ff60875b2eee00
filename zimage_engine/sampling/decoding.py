"""The VAE's decoding with a look at what comes out, and measures against a bad picture.

Stands in the place of `vae.decode` for one call of the pipeline; knows nothing of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from zimage_engine.sampling import float32
from zimage_engine.sampling.device_failure import raise_if_failed
from zimage_engine.sampling.known_dtype import dtype_of
from zimage_engine.sampling.recovery import Facts, Measures, Trip
from zimage_engine.sampling.tripwire import finding_in
from zimage_engine.types import GuardTrip

#: Below this many latent cells a side there is nothing to cut into pieces.
SMALLEST_SIDE = 16
_TILING = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")


class GuardedDecoder:
    """`vae.decode` for one picture. `before` is called first, and may end the drawing by raising."""

    def __init__(
        self,
        vae: Any,
        limit: float,
        rungs: Sequence[str],
        clock: Callable[[], float],
        before: Callable[[], None],
        start: Measures,
    ) -> None:
        self._vae = vae
        self._limit = limit
        self._rungs = rungs
        self._clock = clock
        self._before = before
        self._start = start
        self.started_at: float | None = None
        self.trips: tuple[GuardTrip, ...] = ()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """`vae.decode` is this decoder within; afterwards the VAE is as it was, its dtype included.

        Pipelines widen a float16 VAE for the decoding and narrow it again only if that ends well.
        """
        dtype = dtype_of(self._vae)
        self._stock = self._vae.decode
        vars(self._vae)["decode"] = self._decode
        try:
            yield
        finally:
            del vars(self._vae)["decode"]
            if dtype_of(self._vae) != dtype:
                self._vae.to(dtype)

    def _decode(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.started_at = self._clock()
        self._before()
        decoded = self._decoded(self._start, latents, args, kwargs)
        found = finding_in(decoded[0], self._limit)
        if found is None:
            return decoded
        facts = Facts(
            current=self._start,
            is_float32=self._vae.dtype is torch.float32,
            can_tile=hasattr(self._vae, "tile_latent_min_size") and max(latents.shape[-2:]) >= SMALLEST_SIDE,
        )
        trip = Trip("decode", None, found, self._rungs, self._clock)
        while found is not None:
            measures = trip.next_measures(facts, found)
            self._before()
            try:
                decoded = self._decoded(measures, latents, args, kwargs)
            except RuntimeError as error:
                raise_if_failed(error)
                found = f"an error ({type(error).__name__})"
            else:
                found = finding_in(decoded[0], self._limit)
        trip.recovered()
        self.trips = (trip.report,)
        return decoded

    def _decoded(self, measures: Measures, latents: torch.Tensor, args: Any, kwargs: Any) -> Any:
        arithmetic = float32.wide(self._vae) if measures.float32 else nullcontext()
        pieces = tiles_of(self._vae, latents) if measures.tiled else nullcontext()
        with arithmetic, pieces:
            return self._stock(latents, *args, **kwargs)


@contextmanager
def tiles_of(vae: Any, latents: torch.Tensor) -> Iterator[None]:
    """The VAE decodes `latents` (B, C, h, w) in four or so overlapping pieces within."""
    before = {name: getattr(vae, name) for name in _TILING}
    scale = before["tile_sample_min_size"] // before["tile_latent_min_size"]
    side = -(-max(latents.shape[-2:]) * 5 // 8)  # pieces overlap by a quarter
    vae.use_tiling = True
    vae.tile_latent_min_size = side
    vae.tile_sample_min_size = side * scale
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
