from __future__ import annotations

from pathlib import Path

import pytest

from zimage_engine.checkpoint.features import CheckpointFeatures, ComponentFeatures, ShardIndex, WeightFile
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.families.z_image import Z_IMAGE
from zimage_engine.loading.plan import plan_load

SHARDS = ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors")


def file(name: str, variant: str = "", form: str = "safetensors", is_shard: bool = False) -> WeightFile:
    return WeightFile(name, variant, form, is_shard, size_bytes=1)


PLAIN = file("m.safetensors")
FP16 = file("m.fp16.safetensors", "fp16")
BF16 = file("m.bf16.safetensors", "bf16")
PICKLE = file("m.bin", form="bin")
SHARDED = tuple(file(name, is_shard=True) for name in SHARDS)
INDEX = ShardIndex("m.safetensors.index.json", "", "safetensors", SHARDS)


def component(
    name: str, files: tuple[WeightFile, ...], indexes: tuple[ShardIndex, ...] = (), is_there: bool = True
) -> ComponentFeatures:
    config = {"scaling_factor": 1.0, "shift_factor": 0.0}
    names = ("config.json", *(each.name for each in files))
    return ComponentFeatures(name, "diffusers", "Some", is_there, config, names, files, indexes)


def checkpoint(*components: ComponentFeatures) -> CheckpointFeatures:
    return CheckpointFeatures(Path("/model"), {}, {each.name: each for each in components})


VAE = component("vae", (PLAIN,))


@pytest.mark.parametrize(
    ("transformer", "variant", "use_safetensors", "names"),
    [
        (component("transformer", (PLAIN,)), None, True, ["m.safetensors"]),
        (component("transformer", (PLAIN, FP16)), None, True, ["m.safetensors"]),
        (component("transformer", (FP16,)), "fp16", True, ["m.fp16.safetensors"]),
        (component("transformer", (FP16, BF16)), "bf16", True, ["m.bf16.safetensors"]),
        (
            component("transformer", (file("m.small.safetensors", "small"),)),
            "small",
            True,
            ["m.small.safetensors"],
        ),
        (component("transformer", SHARDED, (INDEX,)), None, True, list(SHARDS)),
        (component("transformer", (PLAIN, *SHARDED), (INDEX,)), None, True, list(SHARDS)),
        (component("transformer", (PLAIN, PICKLE)), None, True, ["m.safetensors"]),
        (component("transformer", (PICKLE,)), None, None, ["m.bin"]),
    ],
)
def test_the_files_that_are_there_decide(transformer, variant, use_safetensors, names) -> None:
    plan = plan_load(checkpoint(transformer, VAE), Z_IMAGE)
    assert (plan.variant, plan.use_safetensors) == (variant, use_safetensors)
    assert [each.name for each in plan.weights["transformer"]] == names
    assert [each.name for each in plan.weights["vae"]] == ["m.safetensors"]


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ((component("transformer", ()), VAE), "/model/transformer holds no weights"),
        (
            (component("transformer", (), is_there=False), VAE),
            "model_index.json names 'transformer', but there is no",
        ),
        (
            (component("transformer", SHARDED[:1], (INDEX,)), VAE),
            f"1 of the 2 files .* the first is {SHARDS[1]}",
        ),
        ((component("transformer", SHARDED), VAE), "2 numbered safetensors files but no index"),
        (
            (component("transformer", (FP16,)), component("vae", (BF16,))),
            "no variant of the weights is there",
        ),
    ],
)
def test_what_cannot_be_read_whole_is_refused_with_its_place(components, message: str) -> None:
    with pytest.raises(CheckpointDamaged, match=message):
        plan_load(checkpoint(*components), Z_IMAGE)
