"""What a hub holds of a model at one commit, and which of its files are wanted.

Knows names, sizes and hashes; moves no bytes and touches no disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from zimage_engine.errors import DownloadError, DownloadIncomplete

#: How a hub names the content of a file: large files by sha256, small ones as git does.
HashKind = Literal["sha256", "git-sha1"]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as the hub announces it; `path` is relative to the model, with forward slashes."""

    path: str
    size_bytes: int
    hash_kind: HashKind
    hash_hex: str


@dataclass(frozen=True, slots=True)
class Listing:
    """All files of a model at one commit. `revision` is what was asked for, a branch, tag or commit."""

    model_id: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A kind of file that is not fetched, and why. `applies` gets the path and all paths of the model."""

    name: str
    applies: Callable[[PurePosixPath, frozenset[PurePosixPath]], bool]
    because: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The files to fetch, and the path and reason of each that is not."""

    wanted: tuple[RemoteFile, ...]
    left_out: tuple[tuple[RemoteFile, str], ...]


PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
OTHER_FRAMEWORK_SUFFIXES = frozenset({".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".mlmodel"})
SHOWCASE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg", ".mp4", ".mov", ".pdf"})
SINGLE_FILE_SUFFIXES = frozenset({".safetensors", ".ckpt", ".gguf"})

_SHARD = r"(?:-\d+-of-\d+)?"
_VARIANT = r"(?:fp16|bf16|fp32|fp8|ema|non_ema)"
_VARIANT_WEIGHTS = re.compile(
    rf"(?P<stem>[^.]+)\.(?:{_VARIANT}{_SHARD}\.safetensors|safetensors\.index\.{_VARIANT}\.json)"
)


def _is_pickle_beside_safetensors(path: PurePosixPath, all_paths: frozenset[PurePosixPath]) -> bool:
    weights = path.name.removesuffix(".index.json")
    return PurePosixPath(weights).suffix in PICKLE_SUFFIXES and any(
        other.parent == path.parent and other.suffix == ".safetensors" for other in all_paths
    )


def _is_variant_of_plain_weights(path: PurePosixPath, all_paths: frozenset[PurePosixPath]) -> bool:
    variant = _VARIANT_WEIGHTS.fullmatch(path.name)
    if variant is None:
        return False
    plain = re.compile(rf"{re.escape(variant['stem'])}{_SHARD}\.safetensors")
    return any(other.parent == path.parent and plain.fullmatch(other.name) for other in all_paths)


def _is_single_file_beside_folders(path: PurePosixPath, all_paths: frozenset[PurePosixPath]) -> bool:
    at_the_top = len(path.parts) == 1
    return (
        at_the_top and path.suffix in SINGLE_FILE_SUFFIXES and PurePosixPath("model_index.json") in all_paths
    )


LEFT_OUT: tuple[LeftOut, ...] = (
    LeftOut(
        name="pickled weights",
        applies=_is_pickle_beside_safetensors,
        because="a pickle can run code when it is opened, and safetensors stand in the same folder",
    ),
    LeftOut(
        name="weights of other frameworks",
        applies=lambda path, _: path.suffix in OTHER_FRAMEWORK_SUFFIXES or path.name.startswith("openvino_"),
        because="the same weights for a framework that is not used here",
    ),
    LeftOut(
        name="variants",
        applies=_is_variant_of_plain_weights,
        because="a second copy in another precision of weights that are fetched already",
    ),
    LeftOut(
        name="single-file copies",
        applies=_is_single_file_beside_folders,
        because="the whole model once more in one file, beside the folders that are fetched",
    ),
    LeftOut(
        name="showcase",
        applies=lambda path, _: path.suffix.lower() in SHOWCASE_SUFFIXES,
        because="pictures and films for the model's page, not for the model",
    ),
    LeftOut(
        name="git's own",
        applies=lambda path, _: path.name in {".gitattributes", ".gitignore"},
        because="tells git how to store the model, and nothing about it",
    ),
)


def choose(files: Iterable[RemoteFile], named_by_an_index: Iterable[str] = ()) -> Choice:
    """Split the files into those to fetch and those to leave, by the table above.

    A file that an index names (`named_by_an_index`) is fetched whatever the table says: without it
    the weights would have a hole.
    """
    files = tuple(files)
    all_paths = frozenset(PurePosixPath(file.path) for file in files)
    kept_anyway = frozenset(named_by_an_index)
    wanted: list[RemoteFile] = []
    left_out: list[tuple[RemoteFile, str]] = []
    for file in files:
        reasons = [row.because for row in LEFT_OUT if row.applies(PurePosixPath(file.path), all_paths)]
        if reasons and file.path not in kept_anyway:
            left_out.append((file, reasons[0]))
        else:
            wanted.append(file)
    return Choice(tuple(wanted), tuple(left_out))


def is_index(file: RemoteFile) -> bool:
    """Whether the file is an index that says which shard holds which tensor."""
    return PurePosixPath(file.path).match("*.index.json") or ".index." in PurePosixPath(file.path).name


def shards_named(index_path: str, index_json: str) -> tuple[str, ...]:
    """The shards that an index names, as paths relative to the model, each once."""
    try:
        names = sorted(set(json.loads(index_json)["weight_map"].values()))
        return tuple(str(PurePosixPath(index_path).parent / name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as broken:
        raise DownloadIncomplete(
            f"expected {index_path} to be JSON with a weight_map that names the shards, got something else"
            f" ({broken}); choose another revision, or tell the publisher"
        ) from broken


def refuse_missing_shards(listing: Listing, index_path: str, shards: Iterable[str]) -> None:
    """Raise DownloadIncomplete if the hub itself does not hold a shard that an index names."""
    held = {file.path for file in listing.files}
    missing = [shard for shard in shards if shard not in held]
    if missing:
        raise DownloadIncomplete(
            f"{index_path} names {len(missing)} shard(s) that {listing.model_id} does not hold at revision"
            f" {listing.revision}: {', '.join(missing)}; the model would have holes, so nothing of it is"
            " used: choose another revision, or tell the publisher"
        )


def refuse_paths_that_lead_outside(listing: Listing) -> None:
    """Raise DownloadError if a file's name would be written outside the model's folder."""
    for file in listing.files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts or "\\" in file.path or not path.parts:
            raise DownloadError(
                f"{listing.model_id} holds a file named {file.path!r}, which would lie outside the model's"
                " own folder; nothing was fetched: do not use this model"
            )
