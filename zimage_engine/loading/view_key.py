"""Names a view by the content of what it is made from; knows nothing of where views are kept.

Files are not read whole: 20 GB would take minutes at every start. What is noticed: another size, another
header, another modification time, and other bytes in any of 64 blocks spread over the file, the first and
the last among them. Training or converting changes nearly every byte, so it is always noticed. What is not
noticed: a few bytes changed between the blocks by a program that puts the old modification time back. A
file of the Hugging Face cache carries the SHA-256 of its content as its name, and that name is believed:
bytes changed in the cache's own blob are noticed only if its size changes.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from zimage_engine.checkpoint.parts import Recipe
from zimage_engine.loading.view_plan import ViewPlan

#: Raise it when the same plan would be written differently.
FORMAT_VERSION = 1

_BLOCK_BYTES = 64 * 1024
_BLOCKS = 64
#: A header that claims more than this is not one.
_MAX_HEADER_BYTES = 100_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")


def key_of(plan: ViewPlan) -> str:
    """32 hex digits: the same for the same plan over the same content, wherever the files stand.

    Title and origin do not count. Raises OSError where a file cannot be read.
    """
    facts = {
        "format": FORMAT_VERSION,
        "linked": sorted([link.target, content_of(link.source)] for link in plan.linked),
        "texts": sorted([text.target, text.text] for text in plan.texts),
        "weights": [
            {
                "target": weights.target,
                "dtype": weights.dtype,
                "recipes": [_facts_of(recipe) for recipe in weights.recipes],
                "sources": [content_of(source.path) for source in weights.sources],
            }
            for weights in sorted(plan.weights, key=lambda weights: weights.target)
        ],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def content_of(file: Path) -> str:
    """A word that changes when the content of `file` does, as far as this module's first lines promise."""
    real = file.resolve(strict=True)
    stat = real.stat()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return f"sha256:{real.name}:{stat.st_size}"
    digest = hashlib.sha256()
    sample_into(digest, file)
    return f"sample:{digest.hexdigest()}:{stat.st_size}:{stat.st_mtime_ns}"


def sample_into(digest: hashlib._Hash, file: Path) -> None:
    """Feed `digest` a weight file's header and the sampled blocks of `file`."""
    with file.open("rb") as opened:
        # The suffix of the name as given: in a cache of links the real file has none.
        if file.suffix == ".safetensors":
            header_bytes = int.from_bytes(opened.read(8), "little")
            digest.update(opened.read(min(header_bytes, _MAX_HEADER_BYTES)))
        for offset in block_offsets(file.stat().st_size):
            opened.seek(offset)
            digest.update(opened.read(_BLOCK_BYTES))


def block_offsets(size_bytes: int) -> tuple[int, ...]:
    """Where the sampled blocks begin: everywhere in a small file, else evenly from the first to the last."""
    if size_bytes <= _BLOCKS * _BLOCK_BYTES:
        return tuple(range(0, size_bytes, _BLOCK_BYTES))
    last = size_bytes - _BLOCK_BYTES
    return tuple(number * last // (_BLOCKS - 1) for number in range(_BLOCKS))


def _facts_of(recipe: Recipe) -> list[Any]:
    return [recipe.name, recipe.shape, recipe.source, recipe.rows, recipe.transpose, recipe.scale]
