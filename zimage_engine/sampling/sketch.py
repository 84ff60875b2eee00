"""What a drawing looks like after each step, at next to no cost: a small linear map of its clean latents.

The map, from the channels of one cell to its mean colour, is fitted once per VAE to what that VAE itself
makes of a few pictures, beside the drawing and on a copy. Until it is there, and for a VAE of which it tells
too little, a small decoding takes its place. Looks only, as `preview` does.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from zimage_engine.sampling.preview import clean_latents, preview, small, unscaled

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

#: Longest side of a sketch, in cells of the latents where it is mapped and in pixels either way.
LARGEST_SIDE = 256
#: Longest side of the latents that are decoded where they cannot be mapped: 256 pixels with the usual VAE.
LARGEST_DECODED_SIDE = 32
#: At most so much of a drawing's time goes into decoded sketches; those that would take more are left out.
DECODING_SHARE = 0.25
#: Of the colours' variance in pictures that the fit has not seen. Below it shapes are told, colours are not.
LEAST_R_SQUARED = 0.8
#: Pictures that are fitted to, those of them that the fit is tried on first, and their side in cells.
PICTURES, HELD_OUT, SIDE_CELLS = 16, 4, 16


@dataclass(frozen=True, eq=False, slots=True)
class LinearLook:
    """The colour of a cell, from -1 to 1, is `weight` (C, 3) times its C channels, and `bias` (3).

    `r_squared` is the share of the variance of the decoded colours that it explains in pictures that it was
    not fitted to; below LEAST_R_SQUARED it is not to be used.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    r_squared: float

    @property
    def is_good(self) -> bool:
        return self.r_squared >= LEAST_R_SQUARED


#: By the digest of the VAE, of which models often share one.
_LOOKS: dict[str, LinearLook] = {}


class ProgramEnds(Exception):
    """A fit is given up: Python waits for its threads, and nobody wants the map any more."""


class Sketcher:
    """Sketches of one pipeline's drawings. The first one that is asked for begins the fit, in a thread."""

    def __init__(self) -> None:
        self._look: LinearLook | None = None
        self._fitting: threading.Thread | None = None
        self._rests_until = float("-inf")

    def sketch(self, pipeline: Any, latents: torch.Tensor) -> Image | None:
        """The picture that the drawing under way in `pipeline` points to, at most LARGEST_SIDE pixels a side.

        `latents` are those that its last step has ended with. None where nothing can be shown. Never raises.
        """
        if self._fitting is None:
            self._begin(pipeline.vae)
        try:
            if self._look is not None and self._look.is_good:
                return mapped(self._look, pipeline, latents)
        except Exception:  # the picture itself goes on
            logger.warning("a sketch could not be made and is left out", exc_info=True)
            return None
        return self._decoded(pipeline, latents)

    def wait(self, seconds: float) -> LinearLook | None:
        """The map of the VAE once it is fitted, however good; None where that takes longer, or cannot be."""
        if self._fitting is not None:
            self._fitting.join(seconds)
        return self._look

    def _decoded(self, pipeline: Any, latents: torch.Tensor) -> Image | None:
        began = time.monotonic()
        if began < self._rests_until:
            return None
        image = preview(pipeline, latents, LARGEST_DECODED_SIDE)
        ended = time.monotonic()
        self._rests_until = ended + (ended - began) * (1 / DECODING_SHARE - 1)
        if image is not None:
            image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        return image

    def _begin(self, vae: Any) -> None:
        try:
            copied = _copy(vae)
        except Exception:  # weights that are elsewhere at the moment, or of a kind that cannot be copied
            logger.info("no linear map is fitted: the VAE cannot be copied", exc_info=True)
            copied = None
        self._fitting = threading.Thread(target=self._fit, args=(copied,), name="sketch-fit")
        self._fitting.start()

    def _fit(self, vae: Any | None) -> None:
        if vae is None:
            return
        try:
            digest = _digest(vae)
            if digest not in _LOOKS:
                _LOOKS[digest] = fitted(vae)
            self._look = _LOOKS[digest]
        except ProgramEnds:
            return
        except Exception:  # decoded sketches go on
            logger.warning("no linear map could be fitted to the VAE", exc_info=True)


def mapped(look: LinearLook, pipeline: Any, latents: torch.Tensor) -> Image | None:
    """The clean latents as colours, one pixel a cell; None where they are not finite."""
    from PIL import Image

    with torch.no_grad():
        cells = small(clean_latents(pipeline.scheduler, latents), LARGEST_SIDE)[0].float()
        cells = unscaled(cells[None], pipeline.vae.config)[0].cpu()
        if not torch.isfinite(cells).all():
            return None
        colours = torch.einsum("chw,cd->hwd", cells, look.weight) + look.bias
        pixels = (colours / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy(), "RGB")


def fitted(vae: Any) -> LinearLook:
    """The map that least squares find for `vae`, which is used and not changed.

    Its accuracy is that of a fit without HELD_OUT of the pictures, on these. Raises ProgramEnds.
    """
    latents, colours = [], []
    with torch.no_grad():
        cell_px = _cell_px(vae)
        for picture in _pictures(PICTURES, SIDE_CELLS * cell_px):
            if not threading.main_thread().is_alive():
                raise ProgramEnds
            encoded = vae.encode(picture[None])
            place = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
            decoded = vae.decode(place, return_dict=False)[0]
            mean_colours = functional.adaptive_avg_pool2d(decoded, place.shape[-2:])
            latents.append(place[0].flatten(1).T.double())
            colours.append(mean_colours[0].flatten(1).T.double())
    tried = _least_squares(torch.cat(latents[:-HELD_OUT]), torch.cat(colours[:-HELD_OUT]))
    r_squared = _r_squared(tried, torch.cat(latents[-HELD_OUT:]), torch.cat(colours[-HELD_OUT:]))
    *weight, bias = _least_squares(torch.cat(latents), torch.cat(colours)).float()
    look = LinearLook(torch.stack(weight), bias, r_squared)
    logger.info(
        "a linear map tells %.0f%% of what the VAE shows: sketches are %s",
        100 * r_squared,
        "mapped" if look.is_good else "decoded",
    )
    return look


def _least_squares(latents: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """(C + 1, 3), the bias last. A trace of ridge holds what the pictures leave open."""
    known = functional.pad(latents, (0, 1), value=1.0)
    ridge = 1e-6 * len(known) * torch.eye(known.shape[1], dtype=known.dtype)
    return torch.linalg.solve(known.T @ known + ridge, known.T @ colours)


def _r_squared(solved: torch.Tensor, latents: torch.Tensor, colours: torch.Tensor) -> float:
    missed = functional.pad(latents, (0, 1), value=1.0) @ solved - colours
    return float(1 - missed.square().sum() / (colours - colours.mean(0)).square().sum())


def _pictures(count: int, side_px: int) -> torch.Tensor:
    """(count, 3, side, side) from -1 to 1: figures of all colours before even and shaded grounds.

    Figures, because the mean colours of a VAE's cells depend on what is around them, and noise has no around.
    """
    chance = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=chance)

    down, across = torch.meshgrid(*(torch.linspace(0, 1, side_px),) * 2, indexing="ij")
    pictures = []
    for number in range(count):
        one, other = some(3, 1, 1), some(3, 1, 1)
        share = (across * some(1) + down * some(1)).clamp(0, 1) * (number % 2)
        picture = one * (1 - share) + other * share
        for figure in range(1 + number % 6):
            colour = some(3, 1, 1)
            middle_x, middle_y, width, height = (float(each) for each in some(4))
            off_x = (across - middle_x) / (0.08 + 0.3 * width)
            off_y = (down - middle_y) / (0.08 + 0.3 * height)
            is_round = figure % 2 == 1
            inside = off_x**2 + off_y**2 < 1 if is_round else torch.maximum(off_x.abs(), off_y.abs()) < 1
            picture = torch.where(inside, colour, picture)
        pictures.append(picture)
    return torch.stack(pictures) * 2 - 1


def _cell_px(vae: Any) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def _copy(vae: Any) -> Any:
    """The same VAE on the host in float32, without what guards and moves the original's weights.

    Made without the random numbers that weights begin with.
    """
    with torch.device("meta"):
        copied = type(vae).from_config(dict(vae.config))
    weights = {
        name: each.detach().to("cpu", torch.float32, copy=True) for name, each in vae.state_dict().items()
    }
    copied.load_state_dict(weights, assign=True)
    return copied.eval().requires_grad_(False)


def _digest(vae: Any) -> str:
    told = hashlib.sha256(type(vae).__name__.encode())
    for name, weights in sorted(vae.state_dict().items()):
        told.update(f"{name} {tuple(weights.shape)}".encode())
        told.update(memoryview(weights.contiguous().numpy()).cast("B"))
    return told.hexdigest()
