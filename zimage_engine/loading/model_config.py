"""The configuration of a found model: its own, a base folder's where it fits, or what the shapes tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zimage_engine.checkpoint.features import CheckpointFeatures
from zimage_engine.checkpoint.schemas import (
    FETCH_CONFIG,
    SCHEMAS,
    config_from_tensors,
    expected_tensors,
    has_schema,
    optional_tensors,
)
from zimage_engine.errors import CheckpointDamaged, UnknownFamily
from zimage_engine.families.family import ComponentRow
from zimage_engine.loading.found_models import FoundModel


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The values to load a model with. `told_by` is "" where they are those of its own config.json as it is,
    else a clause about where they come from and what is wrong with the file."""

    values: Mapping[str, Any]
    told_by: str = ""


def config_of(model: FoundModel, row: ComponentRow, base: CheckpointFeatures | None) -> ModelConfig:
    """The configuration to load `model` with. Raises CheckpointDamaged where it cannot be told.

    A file that names another class keeps its values where they describe these very tensors; where they do
    not, it is another model's, and counts as missing.
    """
    damage = _what_is_wrong(model, row)
    if not damage:
        return ModelConfig(model.config)
    class_name = model.part.class_name
    corrected = {**model.config, "_class_name": class_name}
    if model.config and row.library == "diffusers" and _fits(model, corrected):
        return ModelConfig(corrected, f"{damage}; its other values fit the tensors and are kept")
    lent = _lent(model, base)
    if lent and base is not None:
        return ModelConfig(lent, f"{len(lent)} values for {class_name}, as {base.path} has them; {damage}")
    values = _told_by_shapes(model, row, damage)
    return ModelConfig(values, f"{len(values)} values for {class_name}; {damage}")


def _what_is_wrong(model: FoundModel, row: ComponentRow) -> str:
    """What keeps the model's own config.json from being used, as a clause; "" where nothing does."""
    if not model.config:
        return model.config_damage or "there is no config.json"
    if row.library == "diffusers":
        named = model.config.get("_class_name")
        if named is None or named in row.class_names:
            return ""
        return f"config.json names the class {str(named)[:80]!r}, the tensors are a {model.part.class_name}'s"
    # transformers goes by the class it is asked for, so another type alone does no harm.
    named, expected = model.config.get("model_type"), _model_type(model.part.class_name)
    if named is None or named == expected or _fits(model, model.config):
        return ""
    return f"config.json is of a model of type {str(named)[:80]!r}, the tensors are of {expected!r}"


def _model_type(class_name: str) -> str:
    schema = SCHEMAS.get(class_name)
    return str(schema.stamp.get("model_type", "")) if schema else ""


def _lent(model: FoundModel, base: CheckpointFeatures | None) -> Mapping[str, Any]:
    """The base's configuration of the same component, if these tensors are exactly what it describes."""
    component = base.components.get(model.name) if base else None
    class_name = model.part.class_name
    if component is None or not component.config:
        return {}
    if component.config.get("_class_name", class_name) != class_name:
        return {}
    return component.config if _fits(model, component.config) else {}


def _fits(model: FoundModel, config: Mapping[str, Any]) -> bool:
    """Whether the model's tensors are exactly those that `config` describes."""
    class_name = model.part.class_name
    if not has_schema(class_name):
        return False
    try:
        expected = expected_tensors(class_name, config)
        needed = set(expected) - optional_tensors(class_name, config)
    except (CheckpointDamaged, UnknownFamily):
        return False
    shapes = model.shapes
    return needed <= set(shapes) and all(expected.get(name, shape) == shape for name, shape in shapes.items())


def _told_by_shapes(model: FoundModel, row: ComponentRow, damage: str) -> Mapping[str, Any]:
    class_name = model.part.class_name
    what = f"{model.place} holds a {class_name} without settings ({damage})"
    advice = "put its config.json beside it, or name a folder that has it with --base"
    try:
        config = config_from_tensors(class_name, model.shapes, row.constants)
    except CheckpointDamaged as error:
        told = str(error).removesuffix(FETCH_CONFIG)
        raise CheckpointDamaged(f"{what}, and {told}; {advice}") from error
    groups = config.get("norm_num_groups")
    channels = config.get("block_out_channels") or ()
    if groups and any(width % groups for width in channels):
        raise CheckpointDamaged(
            f"{what}, and its norm_num_groups cannot be told from shapes: the published {groups} does not "
            f"divide its {min(channels)} channels; {advice}"
        )
    return config
