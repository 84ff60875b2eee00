"""Measures a model folder: its JSON files and the headers of its weights; reads no weights, knows no family.

A folder that lacks something is measured all the same, so that whoever judges it can say what is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zimage_engine.checkpoint.tensors import WeightFile
from zimage_engine.checkpoint.tokenizer_files import TokenizerFiles, read_tokenizer_files
from zimage_engine.checkpoint.weight_files import read_weight_file
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
#: What weights are called elsewhere: ComfyUI's files, renamed shards, other programs' pickles.
_OTHER_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"})
_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}\.")
_INDEX_FILE = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)\.(?P<form>safetensors|bin)\.index"
    r"(?:\.(?P<variant>[A-Za-z0-9_]+))?\.json"
)
#: Components of these libraries are models, and have weights, unless their class is of one of these kinds.
_MODEL_LIBRARIES = frozenset({"diffusers", "transformers"})
_KINDS_WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "FeatureExtractor")


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """An index file and the names of the shards that it expects beside it."""

    name: str
    variant: str
    form: str
    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ComponentFeatures:
    """One folder of the checkpoint. `class_name` is what model_index.json says, "" where it is silent.

    `weight_files` have the names that the stock loaders look for; `other_weight_files` are read only where
    there are none of those. `config_damage` says, as a clause about the file, why the settings that stand
    there could not be read; `config` is empty then. `tokenizer` is None for what is no tokenizer.
    """

    name: str
    library: str
    class_name: str
    is_there: bool
    config: Mapping[str, Any]
    files: tuple[str, ...]
    weight_files: tuple[WeightFile, ...]
    indexes: tuple[ShardIndex, ...]
    other_weight_files: tuple[WeightFile, ...] = ()
    config_damage: str = ""
    tokenizer: TokenizerFiles | None = None

    @property
    def is_model(self) -> bool:
        """Whether model_index.json names a class that has weights."""
        return self.library in _MODEL_LIBRARIES and not self.class_name.endswith(_KINDS_WITHOUT_WEIGHTS)


@dataclass(frozen=True, slots=True)
class CheckpointFeatures:
    """A whole model folder, or a single file, measured. `model_index` is empty where the file is missing.

    `loose_files` are weights that stand in no component's folder: the single file, or those at the root.
    `model_index_damage` says, as a clause, why the file that is there could not be read.
    """

    path: Path
    model_index: Mapping[str, Any]
    components: Mapping[str, ComponentFeatures]
    loose_files: tuple[WeightFile, ...] = ()
    model_index_damage: str = ""

    def value(self, address: str) -> Any:
        """The value at `model_index.<key>` or `<component>.<key of its config>`; None where there is none."""
        place, _, key = address.partition(".")
        if place == "model_index":
            return self.model_index.get(key)
        component = self.components.get(place)
        return component.config.get(key) if component else None


def read_features(path: Path, *, is_our_view: bool = False) -> CheckpointFeatures:
    """Measure the folder or file at `path`. A repaired view of ours may link to files elsewhere.

    Settings that cannot be read are measured as damage, not refused: the tensors may tell the same. Raises
    CheckpointDamaged where a shard index cannot be read, or a name leads out of the folder.
    """
    if path.is_file():
        return CheckpointFeatures(path, {}, {}, (_read_other_file(path),))
    folder = path
    model_index, damage = _read_settings(folder / "model_index.json")
    listed = {
        name: entry
        for name, entry in model_index.items()
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    }
    found = {child.name for child in folder.iterdir() if child.is_dir() and _is_component(child)}
    components = {
        name: _read_component(folder, name, is_our_view, *listed.get(name, ("", "")))
        for name in sorted({*listed, *found})
    }
    loose = tuple(
        _read_other_file(child)
        for child in sorted(folder.iterdir())
        if child.suffix in _OTHER_SUFFIXES and child.is_file()
    )
    return CheckpointFeatures(folder, model_index, components, loose, damage)


def _is_component(folder: Path) -> bool:
    """Whether a folder that no list names has a configuration, or weights under their stock names."""
    return any(child.name in CONFIG_FILES or _WEIGHT_FILE.fullmatch(child.name) for child in folder.iterdir())


def _read_component(
    root: Path, name: str, is_our_view: bool, library: str, class_name: str
) -> ComponentFeatures:
    folder = _inside(root, root / name)
    files = (
        tuple(sorted(child.name for child in folder.iterdir() if child.is_file())) if folder.is_dir() else ()
    )
    for each in () if is_our_view else files:
        _inside(root, folder / each)
    config_file = next((name for name in CONFIG_FILES if name in files), "")
    config, damage = _read_settings(folder / config_file) if config_file else ({}, "")
    return ComponentFeatures(
        name=folder.name,
        library=library,
        class_name=class_name,
        is_there=folder.is_dir(),
        config=config,
        files=files,
        weight_files=tuple(
            _read_stock_file(folder / name, match)
            for name in files
            if (match := _WEIGHT_FILE.fullmatch(name)) is not None
        ),
        indexes=tuple(
            _read_index(folder / name, match)
            for name in files
            if (match := _INDEX_FILE.fullmatch(name)) is not None
        ),
        other_weight_files=tuple(
            _read_other_file(folder / name)
            for name in files
            if Path(name).suffix in _OTHER_SUFFIXES and _WEIGHT_FILE.fullmatch(name) is None
        ),
        config_damage=f"{config_file} {damage}" if damage else "",
        tokenizer=(
            read_tokenizer_files(folder)
            if folder.is_dir() and (name.startswith("tokenizer") or "Tokenizer" in class_name)
            else None
        ),
    )


def _inside(root: Path, path: Path) -> Path:
    """`path`, if it is in `root` once links are followed; CheckpointDamaged where it leads elsewhere.

    The hub's cache keeps the files themselves beside its snapshots, in `blobs`.
    """
    real, real_root = path.resolve(), root.resolve()
    homes = [real_root]
    if real_root.parent.name == "snapshots":
        homes.append(real_root.parent.parent / "blobs")
    if not any(real.is_relative_to(home) for home in homes):
        raise CheckpointDamaged(
            f"{path} is a link that leads out of the model's folder; put the file itself there"
        )
    return path


def _read_other_file(path: Path) -> WeightFile:
    return replace(read_weight_file(path), is_shard=_SHARD_NUMBER.search(path.name) is not None)


def _read_stock_file(path: Path, match: re.Match[str]) -> WeightFile:
    file = read_weight_file(path)
    return replace(
        file,
        variant=match["variant"] or "",
        form=file.form or match["form"],
        is_shard=match["shard"] is not None,
    )


def _read_index(path: Path, match: re.Match[str]) -> ShardIndex:
    index, damage = _read_settings(path)
    if damage:
        raise CheckpointDamaged(f"{path} {damage}, so it has no 'weight_map'; fetch this file again")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointDamaged(f"{path} has no 'weight_map'; fetch this file again")
    shards = tuple(sorted({str(shard) for shard in weight_map.values()}))
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointDamaged(
                f"{path} names '{shard[:100]}', which is not a file beside it; fetch this file again"
            )
    return ShardIndex(path.name, match["variant"] or "", match["form"], shards)


def _read_settings(path: Path) -> tuple[dict[str, Any], str]:
    """The object in the JSON file at `path` and "", or nothing and what is wrong with the file.

    Nothing and "" where there is no file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            return {}, "is empty"
        content = json.loads(text)
    except FileNotFoundError:
        return {}, ""
    # RecursionError: brackets nested deeper than the parser can follow.
    except (ValueError, RecursionError) as error:
        return {}, f"is not valid JSON ({error})"
    if not isinstance(content, dict):
        return {}, f"should hold a JSON object, got a {type(content).__name__}"
    return content, "" if content else "holds nothing"
