"""Tells whether a tensor holds what it may: one reduction and one look at its answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

NAN = "nan"
INF = "inf"
OUT_OF_RANGE = "out of range"


def largest(tensor: torch.Tensor) -> float:
    """The largest magnitude in `tensor`: NaN where one is a NaN, infinity where one is infinite.

    One fused reduction, which hands NaN on, and one wait for the device. (On a CPU a norm to the order of
    infinity took sixteen times as long for 16x128x128 values.)
    """
    least, greatest = torch.stack(torch.aminmax(tensor)).tolist()
    return max(abs(least), abs(greatest))


def finding(magnitude: float, limit: float) -> str | None:
    """What is wrong with a tensor of this magnitude, in a word; None where nothing is."""
    if math.isnan(magnitude):
        return NAN
    if math.isinf(magnitude):
        return INF
    return OUT_OF_RANGE if magnitude > limit else None


def finding_in(value: Any, limit: float) -> str | None:
    """The first finding in the floating tensors within `value`, however they are nested; None: all sound."""
    return next((found for each in _tensors(value) if (found := finding(largest(each), limit))), None)


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield value
        return
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for each in inner:
        yield from _tensors(each)
