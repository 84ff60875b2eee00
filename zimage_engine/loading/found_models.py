"""Finds the models of a checkpoint: which component holds which tensors, in what layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zimage_engine.checkpoint.features import CheckpointFeatures, ComponentFeatures
from zimage_engine.checkpoint.layouts import PartsFound, read_parts
from zimage_engine.checkpoint.parts import Part
from zimage_engine.checkpoint.repair import AppliedRepair
from zimage_engine.checkpoint.schemas import expected_tensors, has_schema, optional_tensors
from zimage_engine.checkpoint.tensors import WeightFile
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.families import FAMILIES
from zimage_engine.loading import repairs as known
from zimage_engine.loading.stored_weights import StoredWeights, choose_weights

#: An entry of a folder that is no model of its own.
_KINDS_WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "FeatureExtractor")


@dataclass(frozen=True, slots=True)
class FoundModel:
    """One component with weights: where they are, what they are, and how it is configured ({} unknown)."""

    name: str
    place: str
    folder: ComponentFeatures | None
    stored: StoredWeights = field(repr=False)
    part: Part = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    repairs: tuple[AppliedRepair, ...]
    unknown: tuple[str, ...] = field(default=(), repr=False)
    config_damage: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The model's own tensor names and shapes, as they will be after mending."""
        return {recipe.name: recipe.shape for recipe in self.part.recipes}


def found_models(features: CheckpointFeatures) -> dict[str, FoundModel]:
    """All models of the checkpoint by component: from the components' folders, then from loose files."""
    found: dict[str, FoundModel] = {}
    for component in features.components.values():
        if has_no_weights(component):
            continue
        place = f"{features.path / component.name}"
        stored = choose_weights(place, component)
        if stored is None:
            continue
        parts = read_parts(stored.tensors)
        part = _part_for(component, place, parts)
        if part is not None:
            found[component.name] = FoundModel(
                component.name,
                place,
                component,
                stored,
                part,
                component.config,
                stored.repairs,
                parts.unknown if len(parts.parts) == 1 else (),
                component.config_damage,
            )
    lacking = [
        name
        for name, component in features.components.items()
        if name not in found and not has_no_weights(component)
    ]
    if not features.components or lacking or not found:
        for model in _models_in_files(features.loose_files):
            found.setdefault(model.name, model)
    return found


def has_no_weights(component: ComponentFeatures) -> bool:
    class_name = component.class_name or str(component.config.get("_class_name", ""))
    named = component.name.startswith(("tokenizer", "scheduler", "feature_extractor"))
    return class_name.endswith(_KINDS_WITHOUT_WEIGHTS) or (not class_name and named)


def _part_for(component: ComponentFeatures, place: str, found: PartsFound) -> Part | None:
    """The one model among the component's tensors; None where the arrangement is of no known model."""
    mine = [part for part in found.parts if part.component in ("", component.name)] or list(found.parts)
    if len(mine) > 1:
        names = ", ".join(part.class_name for part in mine)
        raise CheckpointDamaged(f"{place} holds several models ({names}); expected one; remove the others")
    return mine[0] if mine else None


def _models_in_files(files: Iterable[WeightFile]) -> Iterable[FoundModel]:
    """The models of weight files that stand in no component's folder."""
    for file in files:
        if file.damage:
            raise CheckpointDamaged(f"{file.path} {file.damage}; fetch it again")
        for part in read_parts(file.tensors).parts:
            name = part.component or _component_of_class(part.class_name)
            stored = StoredWeights((file,), "", False)
            unpacked = AppliedRepair(known.UNPACK_FILE, name, f"{part.class_name} from {file.name}")
            yield FoundModel(name, str(file.path), None, stored, part, {}, (unpacked,))


def _component_of_class(class_name: str) -> str:
    """The name under which the families' pipelines know a class."""
    for family in FAMILIES:
        for name, row in family.components.items():
            if class_name in row.class_names:
                return name
    return class_name


def check_tensors(model: FoundModel, config: Mapping[str, Any]) -> None:
    """The tensors are exactly those of the model that the config describes. Raises CheckpointDamaged."""
    class_name = model.part.class_name
    if not has_schema(class_name):
        return
    expected = expected_tensors(class_name, config)
    shapes = model.shapes
    optional = optional_tensors(class_name, config)
    missing = sorted(set(expected) - set(shapes) - optional)
    surplus = sorted({*model.unknown, *(set(shapes) - set(expected) - optional)})
    if missing or surplus:
        parts = []
        if missing:
            parts.append(
                f"{len(missing)} of the {len(expected)} tensors are missing, the first is {missing[0]}"
            )
        if surplus:
            parts.append(f"{len(surplus)} are not of this model, the first is {surplus[0]}")
        raise CheckpointDamaged(
            f"{model.place}: for a {class_name} as its config describes, {' and '.join(parts)}; a file is "
            "missing or of another model: fetch it again"
        )
    sources = {recipe.name: recipe.source for recipe in model.part.recipes}
    for name, shape in shapes.items():
        if shape != expected.get(name, shape):
            raise CheckpointDamaged(
                f"{model.place}: {sources[name]} in {_file_of(model, sources[name])} is {list(shape)}, "
                f"expected {list(expected[name])}; the file is of another model: fetch it again"
            )


def _file_of(model: FoundModel, tensor: str) -> str:
    for file in model.stored.files:
        if any(facts.name == tensor for facts in file.tensors):
            return file.name
    return "no file"
