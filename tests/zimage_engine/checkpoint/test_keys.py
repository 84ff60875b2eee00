from __future__ import annotations

import itertools
import random

import pytest

from zimage_engine.checkpoint.keys import RULES, clean
from zimage_engine.errors import CheckpointDamaged

PREFIXES = ("_orig_mod", "module", "state_dict", "model", "diffusion_model")


@pytest.mark.parametrize("order", list(itertools.permutations(PREFIXES, 3)), ids=".".join)
def test_prefixes_in_any_order_leave_the_models_own_name(order: tuple[str, ...]) -> None:
    stored = ".".join((*order, order[0], "layers.0._orig_mod.module.attention.qkv.weight"))
    (keys,) = clean([stored])
    assert keys.stored == {"layers.0.attention.qkv.weight": stored}


def test_the_order_of_the_rules_does_not_matter() -> None:
    names = ["state_dict_ema.module.model.x.weight", "_orig_mod.vae.decoder.y", "ema.unet.module.z", "unet.z"]
    expected = clean(names)
    for seed in range(20):
        rules = list(RULES)
        random.Random(seed).shuffle(rules)
        assert clean(names, rules) == expected


def test_parts_of_a_packed_file_are_kept_apart() -> None:
    names = [
        "model.diffusion_model.out.0.weight",
        "first_stage_model.decoder.conv_in.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        "conditioner.embedders.1.model.ln_final.weight",
    ]
    assert {keys.component: list(keys.stored) for keys in clean(names)} == {
        "": ["out.0.weight"],
        "vae": ["decoder.conv_in.weight"],
        "text_encoder": ["text_model.final_layer_norm.weight"],
        "text_encoder_2": ["ln_final.weight"],
    }


@pytest.mark.parametrize(
    ("plain", "average"),
    [
        ("state_dict.x.0.weight", "state_dict_ema.x.0.weight"),
        ("x.0.weight", "ema.x.0.weight"),
        ("model.diffusion_model.x.0.weight", "model_ema.diffusion_modelx0weight"),
    ],
)
def test_averaged_weights_win_and_the_plain_ones_are_told(plain: str, average: str) -> None:
    for names in ([plain, average], [average, plain]):
        (keys,) = clean(names)
        assert keys.stored == {"x.0.weight": average}
        assert keys.replaced == (plain,)
        assert "take-averaged-weights" in [repair.name for repair, _ in keys.uses]


def test_two_names_that_become_one_are_damage() -> None:
    with pytest.raises(CheckpointDamaged, match=r"'module\.x\.weight' and '_orig_mod\.x\.weight'"):
        clean(["module.x.weight", "_orig_mod.x.weight"])
