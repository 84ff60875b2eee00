"""Reads what a file of weights says of itself, in whichever form it is; reads no weights, knows no model.

The form is told by the file's first bytes: names lie. Nothing here imports torch or runs a pickle.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zimage_engine.checkpoint.gguf_header import read_gguf_header
from zimage_engine.checkpoint.safetensors_header import read_safetensors_header
from zimage_engine.checkpoint.tensors import TensorFacts, WeightFile
from zimage_engine.checkpoint.torch_pickle import read_legacy_pickle, read_torch_archive

#: `stem[.variant][-00001-of-00003][.variant]`: diffusers has put the variant in both places.
_NAME = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5}(?:\.(?P<late_variant>\w+))?)?\.\w+",
    re.ASCII,
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?:\.\w+)+", re.ASCII)
#: Enough to tell any form, and a web page behind a few blank lines.
_FIRST_BYTES = 512
#: The first two bytes of a pickle, for protocols 2 to 5.
_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
_Listing = tuple[tuple[TensorFacts, ...], str]


@dataclass(frozen=True, slots=True)
class _Form:
    """A form of file: how its first bytes look, and who lists its tensors. No two rows fit one file."""

    name: str
    begins: Callable[[bytes], bool]
    read: Callable[[Path], _Listing]


def _read_gguf(path: Path) -> _Listing:
    header = read_gguf_header(path)
    return tuple(tensor.facts for tensor in header.tensors), header.damage


#: In a safetensors file these would be a header length of gigabytes, or of exactly 67,324,752 bytes.
_OTHER_MAGIC = (b"GGUF", b"PK\x03\x04")
_FORMS = (
    _Form(
        "safetensors",
        lambda first: first[8:9] == b"{" and not first.startswith(_OTHER_MAGIC),
        read_safetensors_header,
    ),
    _Form("bin", lambda first: first.startswith(b"PK\x03\x04"), read_torch_archive),
    # A short safetensors header may begin like a pickle too, but has "{" behind its length.
    _Form("bin", lambda first: first.startswith(_PICKLES) and first[8:9] != b"{", read_legacy_pickle),
    _Form("gguf", lambda first: first.startswith(b"GGUF"), _read_gguf),
)


@dataclass(frozen=True, slots=True)
class _Mistake:
    """What is often found where weights should be. No two rows fit one file."""

    begins: Callable[[bytes], bool]
    damage: str


_MISTAKES = (
    _Mistake(lambda first: not first, "is empty"),
    _Mistake(
        lambda first: first.startswith(b"version https://git-lfs"),
        "is a git-lfs pointer, not the weights: `git lfs pull` fetches them",
    ),
    _Mistake(
        lambda first: first.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")),
        "is a web page, not weights",
    ),
)


def read_weight_file(path: Path, name: str | None = None) -> WeightFile:
    """What the file at `path` holds; `name` is what to call it, by default the file's own name.

    Never raises: whatever is wrong with the file, or with reading it, is a clause in `damage`. `form` is
    "safetensors", "bin" or "gguf", and "" for a file of none of these. Only headers are read.
    """
    name = path.name if name is None else name
    form, damage, size_bytes = "", "", 0
    tensors: tuple[TensorFacts, ...] = ()
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(_FIRST_BYTES)
        form, reader = next(((row.name, row.read) for row in _FORMS if row.begins(first)), ("", None))
        tensors, damage = reader(path) if reader else ((), _mistake(first))
    except OSError as error:
        damage = f"cannot be read ({error.strerror})"
    file_name = name.rpartition("/")[2]
    match = _NAME.fullmatch(file_name)
    return WeightFile(
        name=name,
        variant=(match["late_variant"] or match["variant"] or "") if match else "",
        form=form,
        is_shard=_SHARD.search(file_name) is not None,
        size_bytes=size_bytes,
        tensors=tensors,
        damage=damage,
        path=path,
    )


def _mistake(first: bytes) -> str:
    named = next((row.damage for row in _MISTAKES if row.begins(first)), "")
    return named or f"is neither safetensors, nor torch's, nor GGUF: it begins with {first[:8]!r}"
