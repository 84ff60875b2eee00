"""Measures a model folder: its JSON files and the headers of its weights; reads no weights, knows no family.

A folder that lacks something is measured all the same, so that whoever judges it can say what is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zimage_engine.errors import CheckpointDamaged

#: A component's settings stand in the first of these that its folder has.
CONFIG_FILES = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")

#: `stem[.variant][-00001-of-00003].safetensors`, as diffusers and transformers write weights.
_WEIGHT_FILE = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<variant>[A-Za-z0-9_]+))?"
    r"(?P<shard>-\d{5}-of-\d{5})?"
    r"\.(?P<form>safetensors|bin)"
)
_INDEX_FILE = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)\.(?P<form>safetensors|bin)\.index"
    r"(?:\.(?P<variant>[A-Za-z0-9_]+))?\.json"
)
#: Components of these libraries are models, and have weights, unless their class is of one of these kinds.
_MODEL_LIBRARIES = frozenset({"diffusers", "transformers"})
_KINDS_WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "FeatureExtractor")
#: The format's own limit: a longer header is taken for damage before it is read into memory.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One tensor as a safetensors header names it; `dtype` is the format's word, such as `BF16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file of weights. `tensors` is empty where the form has no readable header (`.bin`).

    `variant` is "" for a plain file. `damage` is a clause saying what is wrong with the file, "" if nothing.
    """

    name: str
    variant: str
    form: str
    is_shard: bool
    size_bytes: int
    tensors: tuple[TensorFacts, ...] = field(repr=False, default=())
    damage: str = ""
    path: Path = field(repr=False, default=Path())


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """An index file and the names of the shards that it expects beside it."""

    name: str
    variant: str
    form: str
    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ComponentFeatures:
    """One folder of the checkpoint. `class_name` is what model_index.json says, "" where it is silent."""

    name: str
    library: str
    class_name: str
    is_there: bool
    config: Mapping[str, Any]
    files: tuple[str, ...]
    weight_files: tuple[WeightFile, ...]
    indexes: tuple[ShardIndex, ...]

    @property
    def is_model(self) -> bool:
        """Whether model_index.json names a class that has weights."""
        return self.library in _MODEL_LIBRARIES and not self.class_name.endswith(_KINDS_WITHOUT_WEIGHTS)


@dataclass(frozen=True, slots=True)
class CheckpointFeatures:
    """A whole model folder, measured. `model_index` is empty where the file is missing."""

    path: Path
    model_index: Mapping[str, Any]
    components: Mapping[str, ComponentFeatures]

    def value(self, address: str) -> Any:
        """The value at `model_index.<key>` or `<component>.<key of its config>`; None where there is none."""
        place, _, key = address.partition(".")
        if place == "model_index":
            return self.model_index.get(key)
        component = self.components.get(place)
        return component.config.get(key) if component else None


def read_features(folder: Path) -> CheckpointFeatures:
    """Measure `folder`. Raises CheckpointDamaged where a JSON file of it cannot be read as an object."""
    model_index = _read_json(folder / "model_index.json")
    listed = {
        name: entry
        for name, entry in model_index.items()
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    }
    found = {
        child.name
        for child in folder.iterdir()
        if child.is_dir() and any((child / config).is_file() for config in CONFIG_FILES)
    }
    components = {
        name: _read_component(folder / name, *listed.get(name, ("", "")))
        for name in sorted({*listed, *found})
    }
    return CheckpointFeatures(folder, model_index, components)


def _read_component(folder: Path, library: str, class_name: str) -> ComponentFeatures:
    files = (
        tuple(sorted(child.name for child in folder.iterdir() if child.is_file())) if folder.is_dir() else ()
    )
    config_file = next((name for name in CONFIG_FILES if name in files), "")
    return ComponentFeatures(
        name=folder.name,
        library=library,
        class_name=class_name,
        is_there=folder.is_dir(),
        config=_read_json(folder / config_file) if config_file else {},
        files=files,
        weight_files=tuple(
            _read_weight_file(folder / name, match)
            for name in files
            if (match := _WEIGHT_FILE.fullmatch(name)) is not None
        ),
        indexes=tuple(
            _read_index(folder / name, match)
            for name in files
            if (match := _INDEX_FILE.fullmatch(name)) is not None
        ),
    )


def _read_weight_file(path: Path, match: re.Match[str]) -> WeightFile:
    tensors, damage = read_safetensors_header(path) if match["form"] == "safetensors" else ((), "")
    return WeightFile(
        name=path.name,
        variant=match["variant"] or "",
        form=match["form"],
        is_shard=match["shard"] is not None,
        size_bytes=path.stat().st_size,
        tensors=tensors,
        damage=damage,
        path=path,
    )


def _read_index(path: Path, match: re.Match[str]) -> ShardIndex:
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointDamaged(f"{path} has no 'weight_map'; fetch this file again")
    shards = tuple(sorted({str(shard) for shard in weight_map.values()}))
    return ShardIndex(path.name, match["variant"] or "", match["form"], shards)


def read_safetensors_header(path: Path) -> tuple[tuple[TensorFacts, ...], str]:
    """The tensors that the file at `path` announces, and a clause on what is wrong with it ("" if nothing).

    The format: 8 bytes little-endian header length, the header as JSON, then the bytes that
    `data_offsets` point into, counted from the header's end; so the file's whole length is known.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size_bytes < 8 or header_bytes > min(size_bytes - 8, _MAX_HEADER_BYTES):
            return (), "is not a whole safetensors file: its header is cut off"
        try:
            header = json.loads(file.read(header_bytes))
            entries = {name: facts for name, facts in header.items() if name != "__metadata__"}
            tensors = tuple(
                TensorFacts(name, str(facts["dtype"]), tuple(int(side) for side in facts["shape"]))
                for name, facts in entries.items()
            )
            data_bytes = max((int(facts["data_offsets"][1]) for facts in entries.values()), default=0)
        except (ValueError, AttributeError, KeyError, IndexError, TypeError):
            return (), "is not a safetensors file: its header is not the JSON that it should be"
    announced_bytes = 8 + header_bytes + data_bytes
    if size_bytes != announced_bytes:
        return tensors, f"has {size_bytes} bytes where its header announces {announced_bytes}"
    return tensors, ""


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file at `path`; an empty one where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointDamaged(f"{path} is not valid JSON ({error}); fetch this file again") from error
    if not isinstance(content, dict):
        raise CheckpointDamaged(f"{path} should hold a JSON object, got a {type(content).__name__}")
    return content
