"""A figure that was measured several times: its middle and its quartiles, never its best alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of `count` figures."""

    median: float
    lower_quartile: float
    upper_quartile: float
    count: int


def spread_of(figures: Iterable[float]) -> Spread:
    """The spread of at least one figure; of one alone all three are that one."""
    found = sorted(figures)
    if len(found) == 1:
        return Spread(found[0], found[0], found[0], 1)
    lower, middle, upper = statistics.quantiles(found, n=4, method="inclusive")
    return Spread(middle, lower, upper, len(found))


def ratios(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times longer `slow` took, pair by pair: what the machine does beside meets both of a pair."""
    return spread_of(one / other for one, other in zip(slow, fast, strict=True))
