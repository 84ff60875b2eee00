"""Which files of a component are taken: mending and the stock call must speak of the same ones."""

from __future__ import annotations

import re

import pytest

from zimage_engine.checkpoint.features import ComponentFeatures, ShardIndex, WeightFile
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.loading.stored_weights import choose_weights, stock_weights


def file(name: str, damage: str = "") -> WeightFile:
    variant = "fp16" if ".fp16" in name else ""
    form = "bin" if name.endswith(".bin") else "safetensors"
    return WeightFile(name, variant, form, "-of-" in name, size_bytes=1, damage=damage)


def index(*shards: str, form: str = "safetensors", variant: str = "") -> ShardIndex:
    return ShardIndex(f"m.{form}.index.json", variant, form, shards)


def component(names: tuple[str, ...], *indexes: ShardIndex) -> ComponentFeatures:
    files = tuple(file(name) for name in names)
    return ComponentFeatures("unet", "diffusers", "Some", True, {}, names, files, indexes)


ONE, TWO = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"

#: What is there, what mending takes, and whether the stock loader takes the same without any repair.
CHOSEN: dict[str, tuple[ComponentFeatures, list[str], bool]] = {
    "one file": (component(("m.safetensors",)), ["m.safetensors"], True),
    "both forms": (component(("m.bin", "m.safetensors")), ["m.safetensors"], True),
    "an index and its shards": (component((ONE, TWO), index(ONE, TWO)), [ONE, TWO], True),
    "an index goes before a file": (
        component(("m.safetensors", ONE, TWO), index(ONE, TWO)),
        [ONE, TWO],
        True,
    ),
    "plain goes before a variant": (component(("m.fp16.safetensors", "m.bin")), ["m.bin"], True),
    "a variant alone": (component(("m.fp16.safetensors",)), ["m.fp16.safetensors"], True),
    "a shard gone, the pickle whole": (component((ONE, "m.bin"), index(ONE, TWO)), ["m.bin"], False),
    "a shard gone, one file whole": (
        *(component((ONE, "m.safetensors"), index(ONE, TWO)), ["m.safetensors"], False),
    ),
    "an index of nothing": (component(("m.safetensors",), index()), ["m.safetensors"], False),
    "a shard gone, a variant whole": (
        *(component((ONE, "m.fp16.safetensors"), index(ONE, TWO)), ["m.fp16.safetensors"], False),
    ),
    "shards without an index": (component((ONE, TWO)), [ONE, TWO], False),
}


@pytest.mark.parametrize("row", CHOSEN.values(), ids=CHOSEN)
def test_without_repairs_the_stock_call_reads_what_mending_takes(
    row: tuple[ComponentFeatures, list[str], bool],
) -> None:
    folder, names, is_stock = row
    chosen = choose_weights("/model/unet", folder)
    assert chosen is not None
    assert [each.name for each in chosen.files] == names
    assert chosen.is_stock is is_stock
    assert bool(chosen.repairs) is not is_stock
    if is_stock:
        assert stock_weights("/model/unet", folder, chosen.variant) == chosen.files
    else:
        with pytest.raises(CheckpointDamaged):
            stock_weights("/model/unet", folder, "")


def test_a_file_that_is_not_whole_is_named_by_both() -> None:
    broken = ComponentFeatures(
        "unet", "diffusers", "Some", True, {}, (), (file("m.safetensors", "is empty"),), ()
    )
    message = re.escape("/model/unet/m.safetensors is empty; fetch it again")
    with pytest.raises(CheckpointDamaged, match=message):
        choose_weights("/model/unet", broken)
    with pytest.raises(CheckpointDamaged, match=message):
        stock_weights("/model/unet", broken, "")
