"""Says what a picture can be traced back to: the content of its model's files, the program and the device.

Files are sampled as in view_key and not read whole, but without their time, so that the same files have the
same digest on every machine. Knows no pipeline.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from zimage_engine.loading.view_key import sample_into
from zimage_engine.types import DrawnWith

#: What of a model's folder is read to draw with it; the rest, such as its cards and examples, may differ.
_READ_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".sft", ".json", ".txt", ".model", ".jinja"}
)
_LIBRARIES = ("zimage-turbo", "torch", "diffusers", "transformers")


def digest_of(sources: Iterable[Path]) -> str:
    """32 hex digits for what lies in these files and folders, by their names in them; "" for what cannot be
    read, or is a folder of more than a model."""
    digest = hashlib.sha256()
    try:
        for source in sources:
            for name, file in _files_of(source):
                digest.update(f"{name}\0{file.stat().st_size}\0".encode())
                sample_into(digest, file)
    except (OSError, _TooMany):
        return ""
    return digest.hexdigest()[:32]


def drawn_with(device: str) -> DrawnWith:
    """The program and the device as they are now."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        name = torch.cuda.get_device_name(device)
    elif kind == "cpu":
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    else:
        name = platform.machine()
    threads = torch.get_num_threads() if kind == "cpu" else None
    return DrawnWith(name, threads, tuple((library, _version(library)) for library in _LIBRARIES))


#: More files than this are no model.
_MOST_FILES = 400


class _TooMany(Exception):
    """A folder with more files than a model has."""


def _files_of(source: Path) -> list[tuple[str, Path]]:
    if source.is_file():
        return [("", source)]
    found: list[tuple[str, Path]] = []
    for folder, folders, files in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(folder) / name for name in files if Path(name).suffix in _READ_SUFFIXES]
        found += [(path.relative_to(source).as_posix(), path) for path in paths]
        if len(found) > _MOST_FILES:
            raise _TooMany
    return sorted(found)


@lru_cache
def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # a folder that was never installed
        return "unknown"
