"""Lists the records of a zip archive from its table of contents, within bounds; knows nothing of torch.

Python's zipfile reads a table of any length into memory, and believes what it says of each record; a file of
weights is not trusted that far. Layout: PKWARE APPNOTE 6.3.10, sections 4.3.7, 4.3.12 and 4.3.14 to 4.3.16.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from zimage_engine.checkpoint.file_damage import FileDamage, quoted

#: 5,000 tensors make about half a megabyte; beyond this it is not a table of contents.
_MAX_TABLE_BYTES = 64_000_000
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_TABLE_ROW = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64_POINTER = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_MAX_COMMENT_BYTES = 0xFFFF
#: "The number is too long for this field; see the ZIP64 one."
_SEE_ELSEWHERE = 0xFFFFFFFF
_CUT_OFF = "is not a whole zip archive: its end, with the table of contents, is cut off"
_BROKEN_TABLE = "is not a whole zip archive: its table of contents is broken"


@dataclass(frozen=True, slots=True)
class ZipRecord:
    """One file inside the archive; its local header begins `start` bytes into it."""

    name: str
    start: int
    size_bytes: int
    is_plain: bool  # neither compressed nor encrypted: its bytes stand in the file as they are


def read_zip_records(file: BinaryIO) -> Mapping[str, ZipRecord]:
    """The archive's records by name, all of them inside the file. Raises FileDamage where they are not."""
    size_bytes = file.seek(0, os.SEEK_END)
    table_start, table_bytes = _find_table(file, size_bytes)
    if table_bytes > _MAX_TABLE_BYTES or table_start + table_bytes > size_bytes:
        raise FileDamage(_BROKEN_TABLE)
    file.seek(table_start)
    table = file.read(table_bytes)
    records: dict[str, ZipRecord] = {}
    try:
        position = 0
        while position < len(table):
            record, position = _read_row(table, position)
            if record.name in records:
                raise FileDamage(f"has the record {quoted(record.name)} twice")
            records[record.name] = record
    except (struct.error, UnicodeDecodeError) as error:
        raise FileDamage(_BROKEN_TABLE) from error
    in_order = sorted(records.values(), key=lambda record: record.start)
    next_starts = [*(record.start for record in in_order[1:]), table_start]
    for record, next_start in zip(in_order, next_starts, strict=False):
        if _least_end(record) > next_start:
            raise FileDamage(f"has the record {quoted(record.name)}, which reaches into what follows it")
    return records


def read_plain_record(file: BinaryIO, record: ZipRecord) -> bytes:
    """The whole record. Raises FileDamage where its own header belies the table of contents."""
    file.seek(record.start)
    header = file.read(_LOCAL_HEADER.size)
    if not record.is_plain or len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise FileDamage(f"has the record {quoted(record.name)}, which cannot be read as it stands")
    *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
    content = file.read(record.size_bytes)
    if len(content) != record.size_bytes:
        raise FileDamage(f"has the record {quoted(record.name)} cut off")
    return content


def _find_table(file: BinaryIO, size_bytes: int) -> tuple[int, int]:
    """Where the table of contents starts, and its length, as the archive's last bytes tell."""
    tail_start = max(0, size_bytes - _END.size - _MAX_COMMENT_BYTES)
    file.seek(tail_start)
    tail = file.read(size_bytes - tail_start)
    place = tail.rfind(b"PK\x05\x06")
    if place < 0 or len(tail) - place < _END.size:
        raise FileDamage(_CUT_OFF)
    *_, table_bytes, table_start, _ = _END.unpack_from(tail, place)
    pointer_start = tail_start + place - _END64_POINTER.size
    if pointer_start < 0:
        return table_start, table_bytes
    file.seek(pointer_start)
    signature, _, end64_start, _ = _END64_POINTER.unpack(file.read(_END64_POINTER.size))
    if signature != b"PK\x06\x07":
        return table_start, table_bytes
    if end64_start + _END64.size > size_bytes:
        raise FileDamage(_BROKEN_TABLE)
    file.seek(end64_start)
    signature, *_, table_bytes, table_start = _END64.unpack(file.read(_END64.size))
    if signature != b"PK\x06\x06":
        raise FileDamage(_BROKEN_TABLE)
    return table_start, table_bytes


def _read_row(table: bytes, position: int) -> tuple[ZipRecord, int]:
    """The record described at `position` of the table, and where the next description starts."""
    row = _TABLE_ROW.unpack_from(table, position)
    signature, flags, method, start = row[0], row[3], row[4], row[16]
    stored_bytes, size_bytes, name_bytes, extra_bytes, comment_bytes = row[8:13]
    name_start = position + _TABLE_ROW.size
    extra_start = name_start + name_bytes
    end = extra_start + extra_bytes + comment_bytes
    if signature != b"PK\x01\x02" or end > len(table):
        raise FileDamage(_BROKEN_TABLE)
    name = table[name_start:extra_start].decode("utf-8")
    long_numbers = _zip64_numbers(table[extra_start : extra_start + extra_bytes])
    # The extra field holds only the numbers that did not fit, in this order.
    size_bytes, stored_bytes, start = (
        next(long_numbers, _SEE_ELSEWHERE) if number == _SEE_ELSEWHERE else number
        for number in (size_bytes, stored_bytes, start)
    )
    is_plain = method == 0 and not flags & 1 and stored_bytes == size_bytes
    # A compressed record reaches as far as it is stored, however long it says that it becomes.
    return ZipRecord(name, start, size_bytes if is_plain else stored_bytes, is_plain), end


def _zip64_numbers(extra: bytes) -> Iterator[int]:
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            numbers = extra[position + 4 : position + 4 + length]
            yield from (number for (number,) in struct.iter_unpack("<Q", numbers[: len(numbers) // 8 * 8]))
        position += 4 + length


def _least_end(record: ZipRecord) -> int:
    """Where the record ends if its own header has no padding: it never ends before."""
    return record.start + _LOCAL_HEADER.size + len(record.name.encode()) + record.size_bytes
