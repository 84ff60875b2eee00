"""What a drawing looks like so far: a small picture of the clean latents that a step points to.

Looks only: nothing that the drawing uses is written to, and no random number is drawn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from zimage_engine.sampling import float32
from zimage_engine.sampling.tripwire import finding_in

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

#: Longest side of the latents that are decoded, 512 pixels with the usual VAE: a quarter of the time and of
#: the memory that 1024 pixels take.
LARGEST_SIDE = 64


def preview_steps(steps: int, previews: int) -> frozenset[int]:
    """The steps (from 1) of `steps` after which `previews` pictures are shown, evenly spread.

    Never the last, whose picture is the finished one, so a drawing of few steps has fewer.
    """
    spread = (math.ceil(steps * number / (previews + 1)) for number in range(1, previews + 1))
    return frozenset(step for step in spread if 1 <= step < steps)


def preview(pipeline: Any, latents: torch.Tensor, largest_side: int | None = None) -> Image | None:
    """The picture that the drawing under way in `pipeline` points to.

    At most `largest_side` cells a side are decoded; None: LARGEST_SIDE.

    `latents` are those that its last step has ended with. None where nothing can be shown: the VAE waits on
    the host for its turn, memory does not suffice, or what comes out is not finite. Never raises.
    """
    try:
        return _shown(pipeline, latents, LARGEST_SIDE if largest_side is None else largest_side)
    except Exception:  # the picture itself goes on
        logger.warning("a preview could not be made and is left out", exc_info=True)
        return None


def _shown(pipeline: Any, latents: torch.Tensor, largest_side: int) -> Image | None:
    from PIL import Image

    vae = pipeline.vae
    weights = next(vae.parameters())
    if weights.device != latents.device:
        return None
    with torch.no_grad():
        cells = small(clean_latents(pipeline.scheduler, latents), largest_side)
        decodable = unscaled(cells.to(vae.dtype), vae.config)
        # Past the instance: while a picture is drawn, its `decode` belongs to the guard. Float16 VAEs are
        # known to overflow, and pipelines widen them too.
        with float32.wide(vae) if vae.dtype is torch.float16 else nullcontext():
            (decoded,) = type(vae).decode(vae, decodable, return_dict=False)[0]
        if finding_in(decoded, math.inf) is not None:
            return None
        pixels = (decoded.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy(), "RGB")


def clean_latents(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    """The latents without noise that the last step of a guarded `scheduler` points to.

    Those as they are where its kind of step does not tell.
    """
    told = _CLEAN.get(type(scheduler).__name__)
    return latents if told is None else told(scheduler, latents)


def _along_the_line(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    """Euler's steps are straight in sigma, and the clean picture lies on the same line, at zero."""
    started = scheduler.watch.last_good
    if getattr(scheduler.config, "stochastic_sampling", False):
        return latents
    index = _index(scheduler, started.step)
    before, now = (float(scheduler.sigmas[each]) for each in (index, index + 1))
    return latents + (latents - started.latents) * (now / (before - now))


def _without_noise(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    """Of a step that adds fresh noise: what it started from, less the noise that was predicted in it."""
    started, noise = scheduler.watch.last_good, scheduler.watch.used
    if scheduler.config.prediction_type != "epsilon" or noise.shape != started.latents.shape:
        return latents
    if isinstance(sigmas := getattr(scheduler, "sigmas", None), torch.Tensor):
        clean: torch.Tensor = started.latents - noise * float(sigmas[_index(scheduler, started.step)])
        return clean
    kept = float(scheduler.alphas_cumprod[scheduler.timesteps[_index(scheduler, started.step)]])
    return (started.latents - noise * (1 - kept) ** 0.5) / kept**0.5


def _index(scheduler: Any, step: int) -> int:
    """Where a drawing's step, from 0, is in the schedule: one from a picture leaves the first of it out."""
    return int(scheduler.watch.left_out * scheduler.order + step)


def _as_predicted(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    """DPM-Solver++ keeps its predictions of the clean latents."""
    predicted = scheduler.model_outputs[-1]
    return predicted if scheduler.config.algorithm_type == "dpmsolver++" else latents


_CLEAN: Mapping[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "FlowMatchEulerDiscreteScheduler": _along_the_line,
    "EulerDiscreteScheduler": _along_the_line,
    "EulerAncestralDiscreteScheduler": _without_noise,
    "LCMScheduler": _without_noise,
    "DPMSolverMultistepScheduler": _as_predicted,
}


def small(latents: torch.Tensor, largest_side: int) -> torch.Tensor:
    """The latents at no more than so many cells a side, each the mean of those in its place."""
    height, width = latents.shape[-2:]
    factor = max(height, width) / largest_side
    if factor <= 1:
        return latents
    sides = (max(1, round(height / factor)), max(1, round(width / factor)))
    return functional.interpolate(latents, size=sides, mode="area")


def unscaled(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """As the VAE wants them: the inverse of what its config says that encoding does."""
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or deviation is None:
        return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    deviations, means = (latents.new_tensor(each).view(1, -1, 1, 1) for each in (deviation, mean))
    return latents * deviations / config.scaling_factor + means
