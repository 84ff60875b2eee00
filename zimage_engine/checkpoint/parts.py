"""What a set of stored tensors is made into: the models found in it, tensor by tensor; knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from zimage_engine.checkpoint.repair import AppliedRepair


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one tensor of a model is made from one stored tensor.

    `name` and `shape` are those of the model's own state dict; `source` is the name in the file. Applied in
    this order: multiply by the tensor named `scale`, take `rows` (start, stop) of the first dimension,
    swap the two dimensions where `transpose`, view as `shape`.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    rows: tuple[int, int] | None = None
    transpose: bool = False
    scale: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One model found among stored tensors.

    `class_name` is the diffusers or transformers class, `layout` what its tensors' arrangement is called,
    `component` the pipeline's name for it where the file tells ("" where only the family knows).
    `is_stock`: the stock `from_pretrained` reads the stored names as they are, so nothing need be written.
    `dropped` are stored names left out on purpose, each with the reason.
    """

    class_name: str
    layout: str
    component: str
    is_stock: bool
    recipes: tuple[Recipe, ...] = field(repr=False)
    repairs: tuple[AppliedRepair, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict, repr=False)
