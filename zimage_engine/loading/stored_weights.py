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
    variants = {file.variant for file in component.weight_files}
    variants |= {index.variant for index in component.indexes}
    sets = [each for variant in sorted(variants, key=rank) for each in _stock_sets(component, variant)]
    whole = next((each for each in sets if each.is_whole), None)
    if whole is None:
        best = _unlisted(component)
    elif whole is sets[0]:
        best = StoredWeights(whole.files, whole.variant, True)
    else:
        detail = _index_detail(component, component.weight_files)
        repair = _repair(REBUILD_INDEX, component.name, detail)
        best = StoredWeights(whole.files, whole.variant, False, (repair,))
    _check_whole(place, best.files)
    return best


def stock_weights(place: str, component: ComponentFeatures, variant: str) -> tuple[WeightFile, ...]:
    """The files that the stock loader reads of `component`: those of `variant`, else the plain ones.

    Raises CheckpointDamaged, naming the file that is not there or not whole.
    """
    if all(file.variant != variant for file in component.weight_files):
        variant = ""
    first = next(iter(_stock_sets(component, variant)), None)
    if first is None:
        shards = [file for file in component.weight_files if file.variant == variant]
        if shards:
            raise CheckpointDamaged(
                f"{place} holds {len(shards)} numbered {shards[0].form} files but no index that lists them; "
                "fetch the file whose name ends in .index.json"
            )
        raise CheckpointDamaged(f"{place} holds no weights; fetch the folder again")
    if first.index is not None and not first.is_whole:
        raise _lost(place, first.index, first.absent)
    _check_whole(place, first.files)
    return first.files


def rank(variant: str) -> tuple[int, str]:
    """Sorts variants from the best to the worst."""
    known = variant in VARIANT_ORDER
    return (VARIANT_ORDER.index(variant) if known else len(VARIANT_ORDER), variant)


@dataclass(frozen=True, slots=True)
class _StockSet:
    """Files that the stock loader takes together; `absent` are those that `index` names and are not there."""

    variant: str
    files: tuple[WeightFile, ...]
    index: ShardIndex | None = None
    absent: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        return bool(self.files) and not self.absent


def _stock_sets(component: ComponentFeatures, variant: str) -> Iterable[_StockSet]:
    """The sets of one variant as the stock loader looks for them: safetensors first, an index before a file.

    It takes the first, whole or not.
    """
    by_name = {file.name: file for file in component.weight_files}
    for form in ("safetensors", "bin"):
        for index in component.indexes:
            if index.form == form and index.variant == variant:
                files = tuple(by_name[shard] for shard in index.shards if shard in by_name)
                absent = tuple(shard for shard in index.shards if shard not in by_name)
                yield _StockSet(variant, files, index, absent)
        for file in by_name.values():
            if file.form == form and file.variant == variant and not file.is_shard:
                yield _StockSet(variant, (file,))


def _check_whole(place: str, files: Iterable[WeightFile]) -> None:
    for file in files:
        if file.damage:
            raise CheckpointDamaged(f"{place}/{file.name} {file.damage}; fetch it again")


def _unlisted(component: ComponentFeatures) -> StoredWeights:
    """Files that no good index lists and that have no stock name: all of one variant, if they add up."""
    all_files = (*component.weight_files, *component.other_weight_files)
    variant = min({file.variant for file in all_files}, key=rank)
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
