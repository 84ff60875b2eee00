"""What a row of a layout is: which clean names it takes and what becomes of them; knows no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from zimage_engine.checkpoint.parts import Recipe
from zimage_engine.checkpoint.repair import Repair
from zimage_engine.errors import CheckpointDamaged

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Tensors whose clean name matches `pattern` as a whole become those that `into` names.

    Several names: the first dimension is cut in equal parts, in their order. `dims`: the model holds the
    tensor with so many dimensions; those missing are added in front, those too many must be 1 and are at the
    end. `repair` is None where the stock loader does the same.
    """

    pattern: str
    into: tuple[str, ...]
    repair: Repair | None = None
    transpose: bool = False
    dims: int | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """Tensors that the model has no place for. `stock_ignores`: the stock loader leaves them out itself."""

    pattern: str
    because: str
    stock_ignores: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """One arrangement of one model's tensors. `recognises` reads clean names and shapes.

    `places` gives, for layouts that number their blocks otherwise, block prefixes and what they are called
    in the rows. `stock_prefixes` may stand in front of every name for the stock loader. `stock_renames` are
    patterns of stored names and what the stock loader itself makes of them.
    """

    name: str
    class_name: str
    recognises: Callable[[Shapes], bool]
    because: str
    rows: tuple[Rewrite, ...]
    drops: tuple[Drop, ...] = ()
    component: str = ""
    places: Callable[[Shapes], Mapping[str, str]] | None = None
    stock_prefixes: tuple[str, ...] = ("",)
    renumbering: Repair | None = None
    stock_renames: tuple[tuple[str, str], ...] = ()


def same(pattern: str) -> Rewrite:
    """A row for names that are already the model's own."""
    return Rewrite(f"({pattern})", (r"\1",))


def has(*names: str) -> Callable[[Shapes], bool]:
    """All of these clean names are there."""
    return lambda shapes: all(name in shapes for name in names)


def lacks(*fronts: str) -> Callable[[Shapes], bool]:
    """No clean name begins with one of these."""
    return lambda shapes: not any(name.startswith(fronts) for name in shapes)


def both(*conditions: Callable[[Shapes], bool]) -> Callable[[Shapes], bool]:
    return lambda shapes: all(condition(shapes) for condition in conditions)


def recipes(row: Rewrite, names: Iterable[str], source: str, shape: Shape, scale: str | None) -> list[Recipe]:
    """The recipes of one stored tensor. Raises CheckpointDamaged, naming it, where its shape does not fit."""
    into = tuple(names)
    if len(into) > 1 and (not shape or shape[0] % len(into)):
        raise CheckpointDamaged(
            f"the tensor {source!r} holds {len(into)} matrices one below the other, so its first dimension "
            f"must be a multiple of {len(into)}, got the shape {list(shape)}; fetch the file again"
        )
    if row.transpose and len(shape) != 2:
        raise CheckpointDamaged(
            f"the tensor {source!r} must have two dimensions, got the shape {list(shape)}"
        )
    height = shape[0] // len(into) if len(into) > 1 else 0
    own = (height, *shape[1:]) if height else shape[::-1] if row.transpose else shape
    own = _with_dims(own, row.dims, source)
    return [
        Recipe(name, own, source, (at * height, (at + 1) * height) if height else None, row.transpose, scale)
        for at, name in enumerate(into)
    ]


def _with_dims(shape: Shape, dims: int | None, source: str) -> Shape:
    if dims is None or len(shape) == dims:
        return shape
    fitted = (1,) * (dims - len(shape)) + shape if len(shape) < dims else shape[:dims]
    if math.prod(fitted) != math.prod(shape):
        raise CheckpointDamaged(
            f"the tensor {source!r} must have {dims} dimensions, got the shape {list(shape)}; "
            "fetch the file again"
        )
    return fitted
