"""Reads the header of a safetensors file and checks every promise in it; reads no weights.

The format (huggingface/safetensors, README): 8 bytes little-endian header length, the header as JSON,
then the bytes that `data_offsets` point into, counted from the header's end, without a hole or an overlap.
We are as strict as the library: what passes here opens there. Nothing that the header announces is
allocated before it is known to be in the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from zimage_engine.checkpoint.file_damage import FileDamage, quoted
from zimage_engine.checkpoint.tensors import TensorFacts

#: The format's own limit: a longer header is taken for damage before it is read into memory.
MAX_HEADER_BYTES = 100_000_000
#: Bits of one element; sub-byte types are packed.
BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4,
}  # fmt: skip
#: No file is as long as this; beyond it the library's 64-bit arithmetic overflows.
_MAX_ELEMENTS = 2**56
_CUT_OFF = "is not a whole safetensors file: its header is cut off"
_NOT_JSON = "is not a safetensors file: its header is not the JSON that it should be"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


def read_safetensors_header(path: Path) -> tuple[tuple[TensorFacts, ...], str]:
    """The tensors that the file at `path` announces, and a clause on what is wrong with it ("" if nothing).

    A file of the wrong length is listed all the same; any other damage leaves the list empty.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size_bytes < 8 or header_bytes > min(size_bytes - 8, MAX_HEADER_BYTES):
            return (), _CUT_OFF
        header = file.read(header_bytes)
    try:
        entries = _parse(header)
        tensors = tuple(_facts(name, entry) for name, entry in entries.items())
        announced_bytes = 8 + header_bytes + _data_bytes(entries)
    except FileDamage as damage:
        return (), str(damage)
    if size_bytes != announced_bytes:
        return tensors, f"has {size_bytes} bytes where its header announces {announced_bytes}"
    return tensors, ""


def _parse(header: bytes) -> dict[str, Any]:
    """The entries by tensor name, still unchecked, without the format's `__metadata__`."""
    if not header.startswith(
        b"{"
    ):  # the format allows no space before, and json would pass a byte order mark
        raise FileDamage(_NOT_JSON)
    try:
        # Spelled out because json.loads guesses among UTF-8, 16 and 32.
        text = header.decode("utf-8")
        entries = json.loads(
            text, object_pairs_hook=_once_each, parse_int=_natural, parse_constant=_no_such_number
        )
    except (ValueError, RecursionError) as error:
        raise FileDamage(_NOT_JSON) from error
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise FileDamage(_NOT_JSON)
    # Half a surrogate pair, such as \ud800, is no character: the library refuses it, and printing it fails.
    for text in (*entries, *(metadata or {}), *(metadata or {}).values()):
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise FileDamage(_NOT_JSON)
    return entries


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    collected = dict(pairs)
    if len(collected) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return collected


def _natural(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"{digits[:20]} is negative")
    return int(digits)


def _no_such_number(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


def _facts(name: str, entry: Any) -> TensorFacts:
    """One entry, checked on its own: known dtype, a shape of counts, as many bytes as the two ask for."""
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        raise FileDamage(_NOT_JSON)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise FileDamage(_NOT_JSON)
    if dtype not in BITS:
        raise FileDamage(f"has the tensor {quoted(name)} of the unknown type {quoted(dtype)}")
    # Sides of 0 are left out of the first product: [huge, huge, 0] overflows in the library.
    elements = elements_in(side for side in shape if side)
    if elements is None:
        raise FileDamage(f"announces the tensor {quoted(name)} with more elements than any file can hold")
    bits = (elements if all(shape) else 0) * BITS[dtype]
    start, end = offsets
    if start > end or (end - start) * 8 != bits:
        raise FileDamage(
            f"gives the tensor {quoted(name)} {_spoken(end - start)} bytes "
            f"where its shape and type need {_spoken(bits // 8)}"
        )
    return TensorFacts(name, dtype, tuple(shape))


def _data_bytes(entries: Mapping[str, Any]) -> int:
    """Where the last tensor ends. Raises FileDamage where two overlap or a hole lies between them."""
    in_order = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
    for (_, end, before), (start, _, name) in pairwise([(0, 0, "the header"), *in_order]):
        if start != end:
            fault = "overlaps" if start < end else "leaves a hole after"
            raise FileDamage(f"has the tensor {quoted(name)}, which {fault} {quoted(before)}")
    return in_order[-1][1] if in_order else 0


def elements_in(shape: Any) -> int | None:
    """The product of the sides; None where it is more than any file holds. Huge numbers cost nothing."""
    elements = 1
    for side in shape:
        elements *= side
        if elements > _MAX_ELEMENTS:
            return None
    return elements


def _are_counts(value: Any) -> bool:
    """Whether it is a list of whole numbers from 0 up; True and False are not numbers here."""
    return isinstance(value, list) and all(type(one) is int and one < 2**63 for one in value)


def _spoken(number: int) -> str:
    return str(number) if -(2**64) < number < 2**64 else "endlessly many"
