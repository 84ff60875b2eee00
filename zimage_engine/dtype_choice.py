"""Decides between bfloat16 and float32 for one checkpoint on one processor, before anything is loaded."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from zimage_engine import cpu_dtype
from zimage_engine.cpu_dtype import AUTO, DtypeChoice
from zimage_engine.loading.adapter import ModelLoaderAdapter
from zimage_engine.loading.view import default_cache_folder
from zimage_engine.memory.snapshot import take_snapshot

logger = logging.getLogger(__name__)


def choice_of_dtype(
    asked: str | None, device: str, source: Callable[[], ModelLoaderAdapter]
) -> DtypeChoice | None:
    """What "auto" stands for here; None where something else was asked for.

    A processor without instructions for bfloat16 may take many times as long in it: there it is "auto" unless
    another was asked for.
    """
    is_slow_in_bfloat16 = asked is None and device == "cpu" and not cpu_dtype.has_bfloat16_instructions()
    if asked != AUTO and not is_slow_in_bfloat16:
        return None
    if device != "cpu":
        return DtypeChoice("bfloat16", f"auto measures processors only, and this is {device}")
    mending = source().mending
    shapes = {model.name: model.shapes.values() for model in mending.models}
    widths = cpu_dtype.widths_of(shapes[mending.family.denoiser], shapes["vae"])
    speeds = cpu_dtype.measured_speeds(widths, default_cache_folder().parent / "processors")
    weights = sum(math.prod(shape) for of_a_model in shapes.values() for shape in of_a_model)
    choice = cpu_dtype.choose_dtype(speeds, 4 * weights, take_snapshot(device).host_available_bytes)
    logger.info("cpu: %s, because %s", choice.dtype, choice.because)
    return choice
