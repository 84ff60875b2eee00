"""Stored tensors and the files that hold them, as their headers tell; knows no folder and no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One tensor as a safetensors header names it; `dtype` is the format's word, such as `BF16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file of weights. `tensors` is empty where the form has no readable header (`.bin`).

    `variant` is "" for a plain file. `damage` is a clause saying what is wrong with the file, "" if nothing.
    """

    name: str
    variant: str
    form: str
    is_shard: bool
    size_bytes: int
    tensors: tuple[TensorFacts, ...] = field(repr=False, default=())
    damage: str = ""
    path: Path = field(repr=False, default=Path())
