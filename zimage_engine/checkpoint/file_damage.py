"""What is wrong with a file of weights, said as a clause; knows nothing of any form of file."""

from __future__ import annotations

#: Names in a damaged file can be anything: more than this of one is not repeated to the reader.
_MAX_QUOTED_CHARACTERS = 100


class FileDamage(Exception):
    """A clause that follows the file's name, such as "is cut off". It never leaves `read_weight_file`."""


def quoted(name: str) -> str:
    """`name` as it may stand in a sentence: one line, printable, not endless."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in name[:_MAX_QUOTED_CHARACTERS])
    return shown + ("..." if len(name) > _MAX_QUOTED_CHARACTERS else "")
