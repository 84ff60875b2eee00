"""Reads the header of a GGUF file: metadata, names, types and shapes of tensors; reads no weights.

The format: ggml/docs/gguf.md, versions 2 and 3. Lengths in it are promises of a file that may be broken:
each is held against the bytes that are there before anything is read by it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from zimage_engine.checkpoint.file_damage import FileDamage, quoted
from zimage_engine.checkpoint.safetensors_header import elements_in
from zimage_engine.checkpoint.tensors import TensorFacts

_VERSIONS = (2, 3)
#: A tokenizer of 150,000 words makes about 5 MB.
_MAX_HEADER_BYTES = 100_000_000
_MAX_STRINGS = 2_000_000
_MAX_NAME_BYTES = 4096
_MAX_TENSORS = 100_000
#: ggml knows no more than 4; some writers store more sides of 1.
_MAX_SIDES = 8
_MAX_ARRAY_NESTING = 4
#: A metadata array up to this long is kept; longer ones are vocabularies, of no use here.
_KEPT_ITEMS = 16
_DEFAULT_ALIGNMENT = 32
#: ComfyUI's converter flattens shapes that do not split into blocks, and keeps the true one here.
_TRUE_SHAPE_KEY = "comfy.gguf.orig_shape."
_CUT_OFF = "is not a whole GGUF file: its header is cut off"


@dataclass(frozen=True, slots=True)
class GgmlType:
    """`elements_per_block` elements are stored together in `bytes_per_block` bytes."""

    name: str
    elements_per_block: int
    bytes_per_block: int

    @property
    def dtype(self) -> str:
        """The safetensors word for a plain type; `GGUF:Q8_0` for a quantised one."""
        return self.name if self.elements_per_block == 1 else f"GGUF:{self.name}"


#: ggml's types by number: ggml/include/ggml.h, sizes as in ggml-common.h.
GGML_TYPES: Mapping[int, GgmlType] = {
    number: GgmlType(*row)
    for number, row in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
        24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
        2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 22: ("IQ2_S", 256, 82),
        18: ("IQ3_XXS", 256, 98), 21: ("IQ3_S", 256, 110), 19: ("IQ1_S", 256, 50), 29: ("IQ1_M", 256, 56),
        20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
        34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    }.items()
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor; `shape` in torch's order, `start` in bytes from the file's beginning."""

    name: str
    kind: int
    shape: tuple[int, ...]
    start: int
    size_bytes: int

    @property
    def facts(self) -> TensorFacts:
        return TensorFacts(self.name, GGML_TYPES[self.kind].dtype, self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """`architecture` is the file's `general.architecture`, such as "lumina2"; "" where it is silent."""

    architecture: str = ""
    tensors: tuple[GgufTensor, ...] = ()
    damage: str = ""


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of the file at `path`; `damage` is a clause on what is wrong with it, "" if nothing."""
    with path.open("rb") as file:
        try:
            return _read(_Cursor(file))
        except FileDamage as damage:
            return GgufHeader(damage=str(damage))


class _Cursor:
    """Reads numbers and texts from the front of the file. Raises FileDamage where the file ends first."""

    def __init__(self, file: BinaryIO) -> None:
        self.file_bytes = file.seek(0, os.SEEK_END)
        self.position = 0
        self._file = file
        file.seek(0)

    def take(self, count: int) -> bytes:
        self._advance(count)
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self._advance(count)
        self._file.seek(count, os.SEEK_CUR)

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        length = self.number("Q")
        if length > _MAX_NAME_BYTES:
            raise FileDamage("has a name of absurd length in its header")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FileDamage("has a name in its header that is not UTF-8") from error

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position > min(self.file_bytes, _MAX_HEADER_BYTES):
            raise FileDamage(_CUT_OFF)


def _read(cursor: _Cursor) -> GgufHeader:
    if cursor.take(4) != b"GGUF":
        raise FileDamage("is not a GGUF file")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise FileDamage(
            f"is GGUF of version {version}, expected 2 or 3 in little-endian order; convert it anew"
        )
    tensor_count, metadata_count = cursor.number("Q"), cursor.number("Q")
    # Each entry takes more than 8 bytes, so that a count beyond the file's length is a lie.
    if tensor_count > _MAX_TENSORS or metadata_count > cursor.file_bytes // 8:
        raise FileDamage("announces more tensors or settings in its header than it can hold")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.text()
        metadata[key] = _read_value(cursor, cursor.number("I"), nesting=0)
    rows = [_read_row(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise FileDamage("has an alignment in its header that is not a power of two")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = tuple(
        _place(name, kind, sides, metadata.get(_TRUE_SHAPE_KEY + name), data_start + offset)
        for name, kind, sides, offset in rows
    )
    _check_places(tensors, cursor.file_bytes, alignment)
    architecture = metadata.get("general.architecture")
    return GgufHeader(architecture if isinstance(architecture, str) else "", tensors)


def _read_value(cursor: _Cursor, kind: int, nesting: int) -> Any:
    """One value of the metadata; None for what is of no use here: long texts and long arrays."""
    if kind in _NUMBERS:
        return cursor.number(_NUMBERS[kind])
    reader = _LONG_VALUES.get(kind)
    if reader is None or nesting > _MAX_ARRAY_NESTING:
        raise FileDamage(f"has a setting of the unknown kind {kind} in its header")
    return reader(cursor, nesting)


def _read_text(cursor: _Cursor, _: int) -> str | None:
    length = cursor.number("Q")
    if length > _MAX_NAME_BYTES:  # a chat template
        cursor.skip(length)
        return None
    return cursor.take(length).decode("utf-8", errors="replace")


def _read_array(cursor: _Cursor, nesting: int) -> list[Any] | None:
    kind, count = cursor.number("I"), cursor.number("Q")
    if kind in _NUMBERS and count > _KEPT_ITEMS:
        cursor.skip(count * struct.calcsize(_NUMBERS[kind]))
        return None
    if count > _MAX_STRINGS:
        raise FileDamage("has an array of absurd length in its header")
    kept: list[Any] = []
    for index in range(count):
        value = _read_value(cursor, kind, nesting + 1)
        if index < _KEPT_ITEMS:
            kept.append(value)
    return kept if count <= _KEPT_ITEMS else None


#: Kinds of metadata values: gguf_metadata_value_type in gguf.md.
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_LONG_VALUES: Mapping[int, Callable[[_Cursor, int], Any]] = {8: _read_text, 9: _read_array}


def _read_row(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """Name, type, sides in ggml's order (the innermost first), and offset from where the data start."""
    name = cursor.text()
    side_count = cursor.number("I")
    if side_count > _MAX_SIDES:
        raise FileDamage(f"gives the tensor {quoted(name)} {side_count} sides")
    sides = tuple(cursor.number("Q") for _ in range(side_count))
    kind, offset = cursor.number("I"), cursor.number("Q")
    return name, kind, sides, offset


def _place(name: str, kind: int, sides: tuple[int, ...], true_shape: Any, start: int) -> GgufTensor:
    if kind not in GGML_TYPES:
        raise FileDamage(f"has the tensor {quoted(name)} of the unknown type {kind}")
    blocks = GGML_TYPES[kind]
    elements = elements_in(side for side in sides if side)
    if elements is None:
        raise FileDamage(f"announces the tensor {quoted(name)} with more elements than any file can hold")
    elements = elements if all(sides) else 0
    if (sides and sides[0] % blocks.elements_per_block) or elements % blocks.elements_per_block:
        raise FileDamage(f"has the tensor {quoted(name)}, which does not split into {blocks.name} blocks")
    shape = sides[::-1]
    if (
        isinstance(true_shape, list)
        and all(type(side) is int and side >= 0 for side in true_shape)
        and elements_in(true_shape) == elements
    ):
        shape = tuple(true_shape)
    return GgufTensor(
        name, kind, shape, start, elements // blocks.elements_per_block * blocks.bytes_per_block
    )


def _check_places(tensors: tuple[GgufTensor, ...], file_bytes: int, alignment: int) -> None:
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise FileDamage("has two tensors of one name")
    in_order = sorted(tensors, key=lambda tensor: (tensor.start, tensor.size_bytes))
    for tensor in in_order:
        if tensor.start % alignment:
            raise FileDamage(f"has the tensor {quoted(tensor.name)} at a place that is not aligned")
    for before, tensor in pairwise(in_order):
        if before.start + before.size_bytes > tensor.start:
            raise FileDamage(f"has the tensor {quoted(tensor.name)}, which overlaps {quoted(before.name)}")
    announced_bytes = max((tensor.start + tensor.size_bytes for tensor in tensors), default=0)
    if announced_bytes > file_bytes:
        raise FileDamage(f"has {file_bytes} bytes where its header announces {announced_bytes}")
