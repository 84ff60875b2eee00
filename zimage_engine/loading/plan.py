"""Decides how a checkpoint is loaded, from its measured features alone; touches neither disk nor torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from zimage_engine.checkpoint.features import CheckpointFeatures, ComponentFeatures, WeightFile
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.families import ModelFamily
from zimage_engine.loading.stored_weights import rank, stock_weights


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What the stock call will be given, and the files it will read.

    `variant` is None for plain files. `weights` holds, for each component that has any, the files that
    will be read. `reasons` are sentences for `explain()`.
    """

    family: ModelFamily
    variant: str | None
    use_safetensors: bool | None
    weights: Mapping[str, tuple[WeightFile, ...]] = field(repr=False)
    reasons: tuple[str, ...]


def plan_load(features: CheckpointFeatures, family: ModelFamily) -> LoadPlan:
    """Decide variant and file form. Raises CheckpointDamaged, naming the file that is not there or whole."""
    for component in features.components.values():
        if not component.is_there:
            raise CheckpointDamaged(
                f"{features.path}: model_index.json names '{component.name}', but there is no such folder; "
                "fetch it again"
            )
    for address in family.needed_config:
        if features.value(address) is None:
            component_name, _, key = address.partition(".")
            raise CheckpointDamaged(
                f"{features.path / component_name}: its config has no {key}, and nothing can be drawn "
                "without it; fetch its config.json again"
            )
    weighted = [component for component in features.components.values() if component.is_model]
    variant = _choose_variant(features, weighted)
    weights = {
        component.name: stock_weights(f"{features.path / component.name}", component, variant or "")
        for component in weighted
    }
    all_safetensors = all(file.form == "safetensors" for files in weights.values() for file in files)
    reasons = [
        f"{family.dtype}: said outright, because without it diffusers mixes dtypes",
        f"variant {variant}: the plain files are not all there"
        if variant
        else "no variant: the plain files are there",
        "safetensors only: every component has them"
        if all_safetensors
        else "pickled weights are allowed: a component has no safetensors",
    ]
    return LoadPlan(family, variant, True if all_safetensors else None, weights, tuple(reasons))


def _choose_variant(features: CheckpointFeatures, weighted: Iterable[ComponentFeatures]) -> str | None:
    """None where every component has plain files, else a variant that all of the others have."""
    common: set[str] | None = None
    for component in weighted:
        there = {file.variant for file in component.weight_files} | {
            index.variant for index in component.indexes
        }
        if not there:
            raise CheckpointDamaged(
                f"{features.path / component.name} holds no weights; fetch the folder again"
            )
        if "" not in there:
            common = there if common is None else common & there
    if common is None:
        return None
    if not common:
        raise CheckpointDamaged(f"{features.path}: no variant of the weights is there for every component")
    return min(common, key=rank)
