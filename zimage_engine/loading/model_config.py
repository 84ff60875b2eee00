"""The configuration of a found model: its own, a base folder's where it fits, or what the shapes tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zimage_engine.checkpoint.features import CheckpointFeatures
from zimage_engine.checkpoint.schemas import (
    config_from_tensors,
    expected_tensors,
    has_schema,
    optional_tensors,
)
from zimage_engine.errors import CheckpointDamaged, UnknownFamily
from zimage_engine.families.family import ComponentRow
from zimage_engine.loading.found_models import FoundModel


def config_of(model: FoundModel, row: ComponentRow, base: CheckpointFeatures | None) -> Mapping[str, Any]:
    """The configuration to load `model` with. Raises CheckpointDamaged where it cannot be told."""
    return model.config or _lent(model, base) or _told_by_shapes(model, row)


def _lent(model: FoundModel, base: CheckpointFeatures | None) -> Mapping[str, Any]:
    """The base's configuration of the same component, if these tensors are exactly what it describes."""
    component = base.components.get(model.name) if base else None
    class_name = model.part.class_name
    if component is None or not component.config or not has_schema(class_name):
        return {}
    if component.config.get("_class_name", class_name) != class_name:
        return {}
    try:
        expected = expected_tensors(class_name, component.config)
        needed = set(expected) - optional_tensors(class_name, component.config)
    except (CheckpointDamaged, UnknownFamily):
        return {}
    shapes = model.shapes
    fits = needed <= set(shapes) and all(expected.get(name, shape) == shape for name, shape in shapes.items())
    return component.config if fits else {}


def _told_by_shapes(model: FoundModel, row: ComponentRow) -> Mapping[str, Any]:
    class_name = model.part.class_name
    try:
        config = config_from_tensors(class_name, model.shapes, row.constants)
    except CheckpointDamaged as error:
        raise CheckpointDamaged(
            f"{model.place} holds a {class_name} without its config.json, and {str(error).rstrip('.')}; "
            "put the config.json beside it, or name a folder that has it with --base"
        ) from error
    groups = config.get("norm_num_groups")
    channels = config.get("block_out_channels") or ()
    if groups and any(width % groups for width in channels):
        raise CheckpointDamaged(
            f"{model.place} holds a {class_name} without its config.json, and its norm_num_groups cannot be "
            f"told from shapes: the published {groups} does not divide its {min(channels)} channels; put the "
            "config.json beside it, or name a folder that has it with --base"
        )
    return config
