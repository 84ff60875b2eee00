"""Draws from a picture: the stock image-to-image and inpaint pipelines around the components that are loaded.

What those pipelines would make of the picture themselves is made here, once, so that a drawing that is taken
up again after a fault starts from the same: its latents are the VAE's mean, which need no noise, and the
noise is what the seed draws first. Knows no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps

from zimage_engine.families import ModelFamily
from zimage_engine.sampling import float32
from zimage_engine.sampling.decoding import SMALLEST_SIDE, tiles_of
from zimage_engine.sampling.device_failure import raise_if_failed
from zimage_engine.sampling.guard import Checkpoint
from zimage_engine.sampling.plan import SamplingPlan
from zimage_engine.sampling.recovery import Facts, Measures, Trip
from zimage_engine.sampling.tripwire import finding_in
from zimage_engine.types import GuardTrip, SourcePicture

#: Before they are scaled, latents deviate by 1 to 8, by the model; a hundred times that is a fault.
LATENT_LIMIT = 1000.0
#: How wide the edge is over which the new part fades into the old one, within the mask: one latent's width.
EDGE_RADIUS_PX = 4


@dataclass
class PreparedSource:
    """One request's picture in the size that is drawn, with what the VAE made of it.

    `mask` is white where it is drawn anew; None: everywhere.
    """

    picture: Image.Image
    mask: Image.Image | None
    #: By whether it was encoded in float32; with each what the guard met, until a picture's report tells it.
    _latents: dict[bool, tuple[torch.Tensor, tuple[GuardTrip, ...]]] = field(default_factory=dict)

    def tell_once(self) -> None:
        """A picture is drawn whose report tells what the guard met; those that follow need not."""
        self._latents = {key: (latents, ()) for key, (latents, _) in self._latents.items()}

    def cells(self, side_px: int) -> Image.Image | None:
        """The mask for a pipeline: white in every square of `side_px`, one latent's, that it touches at all.

        Pipelines take one pixel of each square for all of it, and what is less than half white for black: of
        a thin stroke or a faint one nothing would be drawn.
        """
        if self.mask is None:
            return None
        marked = np.asarray(self.mask) > 0
        height, width = marked.shape
        marked = np.pad(marked, ((0, -height % side_px), (0, -width % side_px)))
        squares = marked.reshape(marked.shape[0] // side_px, side_px, -1, side_px).any(axis=(1, 3))
        grown = squares.repeat(side_px, axis=0).repeat(side_px, axis=1)[:height, :width]
        return Image.fromarray(np.where(grown, 255, 0).astype(np.uint8))

    def pasted(self, drawn: Image.Image) -> Image.Image:
        """`drawn`, with the source's own pixels where the mask leaves them, exactly; as it is without a mask.

        The VAE changes every pixel a little, also those that nobody wanted changed. The new part fades in
        inside of the mask, so that no pixel outside of it is touched.
        """
        if self.mask is None:
            return drawn
        soft = ImageChops.darker(self.mask.filter(ImageFilter.GaussianBlur(EDGE_RADIUS_PX / 2)), self.mask)
        return Image.composite(drawn.convert("RGB"), self.picture, soft)


def prepared(source: SourcePicture, width_px: int, height_px: int) -> PreparedSource:
    """The source covering that size: scaled, what hangs over cut off on both sides alike."""
    size, wanted = (source.width, source.height), (width_px, height_px)
    picture = Image.frombytes("RGB", size, source.rgb)
    mask = None if source.mask is None else Image.frombytes("L", size, source.mask)
    lanczos, linear = Image.Resampling.LANCZOS, Image.Resampling.BILINEAR
    return PreparedSource(
        ImageOps.fit(picture, wanted, lanczos), None if mask is None else ImageOps.fit(mask, wanted, linear)
    )


class SourceRow(Protocol):
    """How one kind of pipeline takes a picture."""

    def strength(self, steps_run: int, steps: int) -> float:
        """What makes the pipeline draw the last `steps_run` of `steps`; it rounds in its own way."""

    def arguments(
        self, pipeline: Any, source: PreparedSource, latents: torch.Tensor, width_px: int, height_px: int
    ) -> dict[str, Any]:
        """The picture, and the mask if there is one, as keyword arguments of the pipeline."""


class ZImageSource:
    """Pictures as they are; the pipeline encodes them, and is answered with the latents that are there."""

    def strength(self, steps_run: int, steps: int) -> float:
        return 1.0 if steps_run == steps else (steps_run - 0.5) / steps  # rounds up

    def arguments(
        self, pipeline: Any, source: PreparedSource, latents: torch.Tensor, width_px: int, height_px: int
    ) -> dict[str, Any]:
        whole = {"image": source.picture, "width": width_px, "height": height_px}
        if source.mask is None:
            return whole
        # What is left of the picture under the mask is for models that take it as channels; none here does.
        return {
            **whole,
            "mask_image": source.cells(pipeline.vae_scale_factor),
            "masked_image_latents": latents,
        }


class SDXLSource:
    """Scaled latents in the picture's place: the pipeline would store the VAE as float32 to make them."""

    def strength(self, steps_run: int, steps: int) -> float:
        return 1.0 if steps_run == steps else (steps_run + 0.5) / steps  # rounds down

    def arguments(
        self, pipeline: Any, source: PreparedSource, latents: torch.Tensor, width_px: int, height_px: int
    ) -> dict[str, Any]:
        scaled = {"image": _scaled(pipeline.vae.config, latents)}
        if source.mask is None:
            return scaled
        cells = source.cells(pipeline.vae_scale_factor)
        return {**scaled, "mask_image": cells, "width": width_px, "height": height_px}


def _scaled(config: Any, latents: torch.Tensor) -> torch.Tensor:
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or deviation is None:
        return latents * config.scaling_factor
    of_channels = [latents.new_tensor(each).view(1, -1, 1, 1) for each in (mean, deviation)]
    return (latents - of_channels[0]) * config.scaling_factor / of_channels[1]


SOURCES: Mapping[str, SourceRow] = {
    "ZImageImg2ImgPipeline": ZImageSource(),
    "ZImageInpaintPipeline": ZImageSource(),
    "StableDiffusionXLImg2ImgPipeline": SDXLSource(),
    "StableDiffusionXLInpaintPipeline": SDXLSource(),
}


class EditingPipeline:
    """A family's stock pipeline that draws from a picture, around the components of its text-to-image one."""

    def __init__(self, stock: Any, family: ModelFamily, masked: bool) -> None:
        """`stock` keeps its components; this holds no weights of its own."""
        assert family.editing is not None
        name = family.editing.inpaint if masked else family.editing.image_to_image
        self.pipeline = _around(stock, name)
        self._row = SOURCES[name]

    def arguments(self, plan: SamplingPlan, source: PreparedSource, latents: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of the pipeline in the place of the size alone."""
        return {
            **self._row.arguments(self.pipeline, source, latents, plan.width_px, plan.height_px),
            "strength": self._row.strength(plan.drawn_steps, plan.steps),
        }

    @contextmanager
    def drawing(
        self,
        plan: SamplingPlan,
        latents: torch.Tensor,
        start: Checkpoint | None,
        generator: torch.Generator,
        seed: int,
    ) -> Iterator[None]:
        """Within, the pipeline's encoding is answered with `latents`, and it begins at `start`.

        The noise that it prepares is the seed's first, also for a start further on: a mask's surroundings
        are mixed with it at every step.
        """
        members, vae_members = vars(self.pipeline), vars(self.pipeline.vae)
        stock_prepare, stock_timesteps = self.pipeline.prepare_latents, self.pipeline.get_timesteps
        generator.manual_seed(seed)

        def prepare(*args: Any, **kwargs: Any) -> Any:
            made = stock_prepare(*args, **kwargs)
            if start is None:
                return made
            generator.set_state(start.generator_state)
            return (start.latents, *made[1:]) if isinstance(made, tuple) else start.latents

        # Where fewer are left to do, the pipeline would take these for all that there are.
        members["get_timesteps"] = lambda _, *args, **kwargs: stock_timesteps(plan.steps, *args, **kwargs)
        members["prepare_latents"] = prepare
        vae_members["encode"] = lambda *_, **__: SimpleNamespace(latents=latents)
        try:
            yield
        finally:
            del members["get_timesteps"], members["prepare_latents"], vae_members["encode"]


def _around(stock: Any, name: str) -> Any:
    """The pipeline class of that name around the components of `stock`, computing where `stock` does."""
    import diffusers

    made_of = getattr(diffusers, name)
    options = {"add_watermarker": False} if hasattr(stock, "watermark") else {}
    for option in ("force_zeros_for_empty_prompt", "requires_aesthetics_score"):
        if option in stock.config:
            options[option] = stock.config[option]
    pipeline = made_of(**stock.components, **options)
    vars(pipeline)["_stock"] = stock
    pipeline.__class__ = _leaning(made_of)
    if hasattr(stock, "watermark"):
        pipeline.watermark = stock.watermark
    pipeline._progress_bar_config = dict(getattr(stock, "_progress_bar_config", {}))
    return pipeline


@cache
def _leaning(made_of: type) -> type:
    """That class, of pipelines that compute and free memory as their `_stock` does; one for all edits."""
    members = {
        "__module__": made_of.__module__,
        "__qualname__": made_of.__qualname__,
        "_execution_device": property(lambda self: self._stock._execution_device),
        "maybe_free_model_hooks": lambda self: self._stock.maybe_free_model_hooks(),
    }
    return type(made_of.__name__, (made_of,), members)


def encoded(
    stock: Any,
    family: ModelFamily,
    source: PreparedSource,
    clock: Callable[[], float],
    in_float32: bool = False,
) -> tuple[torch.Tensor, tuple[GuardTrip, ...]]:
    """The source's latents (1, C, H/8, W/8), not yet scaled, and what the guard met when they were made.

    They are made once for all pictures of a request, and what was met is answered until it is told. Raises
    GuardExhausted where a bad value comes back.
    """
    if in_float32 in source._latents:
        return source._latents[in_float32]
    vae = stock.vae
    pixels = _pixels(source.picture).to(stock._execution_device, vae.dtype)
    latents, trips = _guarded(vae, pixels, family.decode_rungs, clock, Measures(float32=in_float32))
    source._latents[in_float32] = latents, trips
    return latents, trips


def _pixels(picture: Image.Image) -> torch.Tensor:
    """(1, 3, H, W), -1 to 1."""
    colours = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    return colours.unsqueeze(0).to(torch.float32) / 127.5 - 1.0


def _guarded(
    vae: Any, pixels: torch.Tensor, rungs: Sequence[str], clock: Callable[[], float], start: Measures
) -> tuple[torch.Tensor, tuple[GuardTrip, ...]]:
    latents = _encoded(vae, pixels, start)
    found = finding_in(latents, LATENT_LIMIT)
    if found is None:
        return latents, ()
    facts = Facts(
        current=start,
        is_float32=vae.dtype is torch.float32,
        can_tile=hasattr(vae, "tile_latent_min_size") and max(latents.shape[-2:]) >= SMALLEST_SIDE,
    )
    trip = Trip("source", None, found, rungs, clock)
    while found is not None:
        measures = trip.next_measures(facts, found)
        try:
            latents = _encoded(vae, pixels, measures, latents)
        except RuntimeError as error:
            raise_if_failed(error)
            found = f"an error ({type(error).__name__})"
        else:
            found = finding_in(latents, LATENT_LIMIT)
    trip.recovered()
    return latents, (trip.report,)


@torch.no_grad()
def _encoded(
    vae: Any, pixels: torch.Tensor, measures: Measures, like: torch.Tensor | None = None
) -> torch.Tensor:
    # Published VAEs that need it overflow in float16; stock pipelines store them as float32 for this.
    must_be_wide = vae.dtype is torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    with ExitStack() as stack:
        if measures.float32 or must_be_wide:
            stack.enter_context(float32.wide(vae))
        if measures.tiled and like is not None:
            stack.enter_context(tiles_of(vae, like))
        latents: torch.Tensor = vae.encode(pixels).latent_dist.mode()
    return latents
