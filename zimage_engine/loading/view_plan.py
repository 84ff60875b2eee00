"""What a repaired view will hold, decided and not yet written; knows no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from zimage_engine.checkpoint.parts import Recipe
from zimage_engine.checkpoint.tensors import WeightFile


@dataclass(frozen=True, slots=True)
class LinkedFile:
    """`target` (relative, with forward slashes) will link to the healthy file `source`."""

    target: str
    source: Path


@dataclass(frozen=True, slots=True)
class WrittenText:
    """`target` will hold `text`: a configuration that was mended."""

    target: str
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class WrittenWeights:
    """`target`, a safetensors file, will hold what `recipes` make of `sources`, in `dtype` ("bfloat16").

    `dtype` is for floating tensors; integers and booleans keep theirs. A source's tensors are read from the
    file at its `path`.
    """

    target: str
    recipes: tuple[Recipe, ...] = field(repr=False)
    sources: tuple[WeightFile, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class ViewPlan:
    """A folder to be made. `title` is a few words for `zimage-turbo cache ls`: what it was made from."""

    title: str
    origin: Path
    linked: tuple[LinkedFile, ...]
    texts: tuple[WrittenText, ...]
    weights: tuple[WrittenWeights, ...]
