"""Chooses, of the weight files of one component, those that hold its tensors; reads nothing itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zimage_engine.checkpoint.features import ComponentFeatures, ShardIndex
from zimage_engine.checkpoint.repair import AppliedRepair, Repair
from zimage_engine.checkpoint.tensors import TensorFacts, WeightFile
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading.repairs import LINK_UNDER_STOCK_NAME, REBUILD_INDEX, REWRITE_PICKLE

#: Plain files first, then the nearest to bfloat16.
VARIANT_ORDER = ("", "bf16", "fp32", "fp16")


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The files of one component. `variant` is "" for plain ones.

    `is_stock`: the stock loader finds these files under their names. `repairs` says what keeps it from that.
    """

    files: tuple[WeightFile, ...]
    variant: str
    is_stock: bool
    repairs: tuple[AppliedRepair, ...] = ()

    @property
    def tensors(self) -> tuple[TensorFacts, ...]:
        """All tensors; one that several files hold is counted once, as the first of them has it."""
        found: dict[str, TensorFacts] = {}
        for file in self.files:
            for tensor in file.tensors:
                found.setdefault(tensor.name, tensor)
        return tuple(found.values())


def choose_weights(place: str, component: ComponentFeatures) -> StoredWeights | None:
    """The best set of files of `component`, or None where it has none at all.

    Raises CheckpointDamaged where files are not whole, or an index names some whose tensors are nowhere.
    """
    if not component.weight_files and not component.other_weight_files:
        if component.indexes:
            raise _lost(place, component.indexes[0], component.indexes[0].shards)
        return None
    sets = [*_indexed(component), *_single(component)]
    if sets:
        best = min(sets, key=lambda weights: (_rank(weights.variant), weights.files[0].form != "safetensors"))
    else:
        best = _unlisted(component)
    for file in best.files:
        if file.damage:
            raise CheckpointDamaged(f"{place}/{file.name} {file.damage}; fetch it again")
    return best


def _rank(variant: str) -> tuple[int, str]:
    known = variant in VARIANT_ORDER
    return (VARIANT_ORDER.index(variant) if known else len(VARIANT_ORDER), variant)


def _indexed(component: ComponentFeatures) -> Iterable[StoredWeights]:
    """One set for each index whose files are all there."""
    by_name = {file.name: file for file in component.weight_files}
    for index in component.indexes:
        if index.shards and all(shard in by_name for shard in index.shards):
            yield StoredWeights(tuple(by_name[shard] for shard in index.shards), index.variant, True)


def _single(component: ComponentFeatures) -> Iterable[StoredWeights]:
    for file in component.weight_files:
        if not file.is_shard:
            yield StoredWeights((file,), file.variant, True)


def _unlisted(component: ComponentFeatures) -> StoredWeights:
    """Files that no good index lists and that have no stock name: all of one variant, if they add up."""
    all_files = (*component.weight_files, *component.other_weight_files)
    variant = min({file.variant for file in all_files}, key=_rank)
    files = tuple(file for file in all_files if file.variant == variant)
    forms = {file.form for file in files}
    repairs = [_repair(REBUILD_INDEX, component.name, _index_detail(component, files))]
    if not any(file.is_shard for file in files) and not component.indexes:
        names = ", ".join(file.name for file in files)
        repairs = [_repair(LINK_UNDER_STOCK_NAME, component.name, f"the weights are called {names}")]
    if len(forms) > 1:
        repairs.append(_repair(REWRITE_PICKLE, component.name, f"{len(files)} files in {len(forms)} forms"))
    # Safetensors first: where two files hold the same tensor, the one that needs no unpickling counts.
    ordered = tuple(sorted(files, key=lambda file: (file.form != "safetensors", file.name)))
    return StoredWeights(ordered, variant, False, tuple(repairs))


def _index_detail(component: ComponentFeatures, files: Sequence[WeightFile]) -> str:
    for index in component.indexes:
        absent = sorted(set(index.shards) - {file.name for file in files})
        if absent:
            return f"{index.name} names {len(absent)} files that are not there, such as {absent[0]}"
    return f"{len(files)} files and no index that lists them"


def _repair(repair: Repair, place: str, detail: str) -> AppliedRepair:
    return AppliedRepair(repair, place, detail)


def _lost(place: str, index: ShardIndex, absent: Sequence[str]) -> CheckpointDamaged:
    if not absent:
        return CheckpointDamaged(
            f"{place}: {index.name} lists no files, and there are none; fetch the folder again"
        )
    return CheckpointDamaged(
        f"{place}: {len(absent)} of the {len(index.shards)} files that {index.name} names are missing, "
        f"the first is {absent[0]}; fetch it again"
    )
