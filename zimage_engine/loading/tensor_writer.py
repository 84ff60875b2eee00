"""Writes a safetensors file tensor by tensor, each made from a stored one; knows nothing of models.

The format: 8 bytes little-endian header length, the header as JSON padded with spaces so that the data
begins at a multiple of 8, then each tensor's bytes without a gap, wide elements before narrow ones, so
that every tensor is aligned to its element.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from zimage_engine.checkpoint.parts import Recipe
from zimage_engine.checkpoint.tensors import TensorFacts
from zimage_engine.errors import CheckpointDamaged

#: What is not in this table is floating in some way (fp8 and quantised words too) and becomes `dtype`.
KEPT_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
}
FLOATING_WORDS: Mapping[str, str] = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}

#: A tensor is cast and written in pieces of about this size: an embedding alone is 1.5 GB in float32.
_PIECE_BYTES = 32_000_000
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where one result goes: `begin` and `end` count from the end of the header."""

    recipe: Recipe
    word: str
    dtype: torch.dtype
    begin: int
    end: int


def write_safetensors(
    target: Path,
    recipes: Iterable[Recipe],
    read: Callable[[str], torch.Tensor],
    facts: Iterable[TensorFacts],
    dtype: str,
) -> None:
    """Write what `recipes` make of stored tensors to `target`, and see it safe on the disk.

    `read` gives the stored tensor of a name, `facts` are the stored tensors as their files announce them.
    Floating results have `dtype` ("bfloat16"), integers and booleans the one that they are stored with.
    Scaling happens in float32. No more than one stored tensor, the one that scales it and a piece of the
    result are in memory. Raises CheckpointDamaged where a stored tensor is missing or has the wrong shape.
    """
    slots = _slots(recipes, {fact.name: fact.dtype for fact in facts}, dtype)
    header = {
        slot.recipe.name: {
            "dtype": slot.word,
            "shape": list(slot.recipe.shape),
            "data_offsets": [slot.begin, slot.end],
        }
        for slot in slots
    }
    # Loaders of the transformers library refuse a file that does not say whose layout it has.
    packed = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % _ALIGNMENT)
    with target.open("xb") as file:
        file.write(len(packed).to_bytes(8, "little"))
        file.write(packed)
        for source, made_from_it in _by_source(slots):
            stored = read(source)
            for slot in made_from_it:
                _write_tensor(file, slot, stored, read)
            del stored  # before the next is read, or two would be in memory
        file.flush()
        os.fsync(file.fileno())


def written_bytes(recipes: Iterable[Recipe], facts: Iterable[TensorFacts], dtype: str) -> int:
    """How many bytes of tensors `write_safetensors` would write, the header not counted."""
    slots = _slots(recipes, {fact.name: fact.dtype for fact in facts}, dtype)
    return slots[-1].end if slots else 0


def _slots(recipes: Iterable[Recipe], stored_words: Mapping[str, str], dtype: str) -> list[_Slot]:
    if dtype not in FLOATING_WORDS:
        raise ValueError(f"dtype must be one of {', '.join(FLOATING_WORDS)}, got {dtype!r}")
    typed: list[tuple[Recipe, str, torch.dtype]] = []
    for recipe in recipes:
        for needed in (recipe.source, recipe.scale):
            if needed is not None and needed not in stored_words:
                raise CheckpointDamaged(
                    f"{recipe.name} is made from the stored tensor {needed}, which is not there;"
                    " fetch the file again"
                )
        word = stored_words[recipe.source]
        # Scaled integers are weights in disguise: the product is floating.
        if word in KEPT_DTYPES and recipe.scale is None:
            typed.append((recipe, word, KEPT_DTYPES[word]))
        else:
            typed.append((recipe, FLOATING_WORDS[dtype], getattr(torch, dtype)))
    # Those of one source side by side, so that it is read once.
    first_seen: dict[str, int] = {}
    for recipe, _, _ in typed:
        first_seen.setdefault(recipe.source, len(first_seen))
    typed.sort(key=lambda row: (-row[2].itemsize, first_seen[row[0].source]))

    slots: list[_Slot] = []
    begin = 0
    for recipe, word, torch_dtype in typed:
        end = begin + math.prod(recipe.shape) * torch_dtype.itemsize
        slots.append(_Slot(recipe, word, torch_dtype, begin, end))
        begin = end
    return slots


def _by_source(slots: Sequence[_Slot]) -> Iterator[tuple[str, list[_Slot]]]:
    group: list[_Slot] = []
    for slot in slots:
        if group and group[0].recipe.source != slot.recipe.source:
            yield group[0].recipe.source, group
            group = []
        group.append(slot)
    if group:
        yield group[0].recipe.source, group


def _write_tensor(
    file: BinaryIO, slot: _Slot, stored: torch.Tensor, read: Callable[[str], torch.Tensor]
) -> None:
    recipe = slot.recipe
    value = stored.detach()
    scale = _fitting_scale(recipe, value, read(recipe.scale)) if recipe.scale is not None else None
    if recipe.rows is not None:
        start, stop = recipe.rows
        if value.dim() == 0 or not 0 <= start <= stop <= value.shape[0]:
            raise _wrong_shape(recipe, stored)
        value = value[start:stop]
        scale = scale[start:stop] if scale is not None else None
    if recipe.transpose:
        if value.dim() != 2:
            raise _wrong_shape(recipe, stored)
        value = value.t()
        scale = scale.t() if scale is not None else None
    # A view may add or drop sides of 1 (a 1x1 convolution as a matrix, a pad token as a row). Any other
    # would take the numbers in an order that nobody meant.
    if _long_sides(value.shape) != _long_sides(recipe.shape):
        raise _wrong_shape(recipe, stored)
    if value.dim() == 0:
        value, scale = value.reshape(1), scale.reshape(1) if scale is not None else None
    row_bytes = 4 * math.prod(value.shape[1:])  # at most float32 on the way
    rows_at_once = max(1, _PIECE_BYTES // max(1, row_bytes))
    for first in range(0, value.shape[0], rows_at_once):
        piece = value[first : first + rows_at_once]
        if scale is not None:
            piece = piece.to(torch.float32) * scale[first : first + rows_at_once].to(torch.float32)
        piece = piece.to(device="cpu", dtype=slot.dtype).contiguous()
        file.write(piece.reshape(-1).view(torch.uint8).numpy().data)


def _fitting_scale(recipe: Recipe, value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`scale` seen in the shape of `value`: one number for all, one for each row, or what broadcasts."""
    shape = tuple(scale.shape)
    if scale.numel() == 1:
        return scale.reshape(()).expand(value.shape)
    if value.dim() and shape in ((value.shape[0],), (value.shape[0], *[1] * (value.dim() - 1))):
        return scale.reshape(-1, *[1] * (value.dim() - 1)).expand(value.shape)
    if scale.dim() == value.dim() and all(
        side in (1, whole) for side, whole in zip(shape, value.shape, strict=True)
    ):
        return scale.expand(value.shape)
    raise CheckpointDamaged(
        f"the stored tensor {recipe.scale} must scale {recipe.source} of shape {list(value.shape)} as a whole"
        f" or by rows, got the shape {list(shape)}; use a file without scaled weights"
    )


def _long_sides(shape: Iterable[int]) -> list[int]:
    return [side for side in shape if side != 1]


def _wrong_shape(recipe: Recipe, stored: torch.Tensor) -> CheckpointDamaged:
    way = " and ".join(
        clause
        for clause, taken in (
            (f"rows {recipe.rows[0]} to {recipe.rows[1]}" if recipe.rows else "", recipe.rows is not None),
            ("transposed", recipe.transpose),
        )
        if taken
    )
    return CheckpointDamaged(
        f"the stored tensor {recipe.source} has the shape {list(stored.shape)}, which does not give"
        f" {recipe.name} its expected shape {list(recipe.shape)}{f' ({way})' if way else ''};"
        " the file is damaged or of another model"
    )
