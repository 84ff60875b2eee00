"""Every schema is compared with the real class, built without memory on the meta device."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
import transformers

from zimage_engine.checkpoint.schemas import (
    SCHEMAS,
    config_from_tensors,
    expected_tensors,
    has_schema,
    optional_tensors,
)
from zimage_engine.errors import CheckpointDamaged, UnknownFamily

TRANSFORMERS_CONFIGS = {
    "Qwen3Model": transformers.Qwen3Config,
    "CLIPTextModel": transformers.CLIPTextConfig,
    "CLIPTextModelWithProjection": transformers.CLIPTextConfig,
    "T5EncoderModel": transformers.T5Config,
}


@dataclass(frozen=True)
class Case:
    """A config, the constants that a family would add to its shapes, and what is published of its size."""

    name: str
    class_name: str
    config: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    n_tensors: int | None = None
    n_parameters: int | None = None


def vae_config(channels: list[int], **other: Any) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": 2,
        **other,
    }


def unet_config(channels: list[int], depths: list[Any], heads: list[int], **other: Any) -> dict[str, Any]:
    """The SDXL kind: no transformers in the first block, linear projections, text and time added."""
    n_with = len(channels) - 1
    return {
        "block_out_channels": channels,
        "transformer_layers_per_block": depths,
        "attention_head_dim": heads,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * n_with],
        "up_block_types": [*["CrossAttnUpBlock2D"] * n_with, "UpBlock2D"],
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
        **other,
    }


Z_AXES = {"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512]}
Z_TINY = {"axes_dims": [4, 6, 6], "axes_lens": [64, 32, 32], "dim": 48, "n_heads": 3, "cap_feat_dim": 24}
SDXL_SCALE = {"scaling_factor": 0.13025, "shift_factor": None}
FLUX_SCALE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
SDXL_DEPTHS, SDXL_HEADS, SDXL_CHANNELS = [1, 2, 10], [5, 10, 20], [320, 640, 1280]
TIME_DIM = {"addition_time_embed_dim": 256}
PIXART = {"caption_channels": 4096, "num_layers": 28}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
TINY_CLIP = {
    "vocab_size": 99,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "projection_dim": 7,
    "max_position_embeddings": 11,
}
QWEN3_4B = {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
}
T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}
ROPE = {"rope_theta": 1000000.0}

CASES = (
    Case(
        "Z-Image-Turbo",
        "ZImageTransformer2DModel",
        {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "cap_feat_dim": 2560, **Z_AXES},
        Z_AXES,
        n_tensors=521,
        n_parameters=6_154_908_736,
    ),
    Case(
        "tiny Z-Image",
        "ZImageTransformer2DModel",
        {**Z_TINY, "n_layers": 3, "n_refiner_layers": 1, "in_channels": 5},
        Z_TINY,
    ),
    Case(
        "Z-Image with two patch sizes, a picture encoder and no q/k norms",
        "ZImageTransformer2DModel",
        {
            **Z_TINY,
            "n_layers": 1,
            "all_patch_size": [2, 4],
            "all_f_patch_size": [1, 2],
            "siglip_feat_dim": 10,
            "qk_norm": False,
        },
        Z_TINY,
    ),
    Case("SDXL VAE", "AutoencoderKL", vae_config([128, 256, 512, 512]), SDXL_SCALE, 248, 83_653_863),
    Case(
        "Flux VAE",
        "AutoencoderKL",
        vae_config([128, 256, 512, 512], latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
        FLUX_SCALE,
        244,
    ),
    Case(
        "tiny VAE without attention",
        "AutoencoderKL",
        vae_config([8, 16], layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False),
        {**SDXL_SCALE, "norm_num_groups": 4},
    ),
    Case("Qwen3-4B", "Qwen3Model", QWEN3_4B, ROPE, 398),
    Case(
        "tiny Qwen3 with biases",
        "Qwen3Model",
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 40,
            "vocab_size": 77,
            "attention_bias": True,
        },
        ROPE,
    ),
    Case(
        "SDXL base",
        "UNet2DConditionModel",
        unet_config(SDXL_CHANNELS, SDXL_DEPTHS, SDXL_HEADS),
        TIME_DIM,
        1680,
        2_567_463_684,
    ),
    Case(
        "SDXL LCM",
        "UNet2DConditionModel",
        unet_config(SDXL_CHANNELS, SDXL_DEPTHS, SDXL_HEADS, time_cond_proj_dim=256),
        TIME_DIM,
        1681,
    ),
    Case(
        "SDXL with lists of depths and a plain middle",
        "UNet2DConditionModel",
        unet_config(
            SDXL_CHANNELS,
            [1, [2, 1], [4, 4]],
            SDXL_HEADS,
            reverse_transformer_layers_per_block=[[4, 4, 10], [2, 1, 1], 1],
            mid_block_type="UNetMidBlock2D",
        ),
        TIME_DIM,
    ),
    Case(
        "small unet of two blocks",
        "UNet2DConditionModel",
        unet_config(
            [8, 16],
            [1, 2],
            [2, 4],
            norm_num_groups=4,
            cross_attention_dim=12,
            layers_per_block=1,
            projection_class_embeddings_input_dim=60,
        ),
        {**TIME_DIM, "attention_head_dim": [2, 4], "norm_num_groups": 4},
    ),
    Case(
        "Stable Diffusion 1 kind",
        "UNet2DConditionModel",
        {"cross_attention_dim": 768, "attention_head_dim": 8},
        {"attention_head_dim": 8},
        686,
    ),
    Case("CLIP-L", "CLIPTextModel", CLIP_L, {"hidden_act": "quick_gelu"}, 196),
    Case("tiny CLIP", "CLIPTextModel", TINY_CLIP, {"hidden_act": "quick_gelu", "num_attention_heads": 3}),
    Case("OpenCLIP bigG", "CLIPTextModelWithProjection", BIG_G, {"hidden_act": "gelu"}, 517),
    Case(
        "tiny CLIP with projection",
        "CLIPTextModelWithProjection",
        TINY_CLIP,
        {"hidden_act": "gelu", "num_attention_heads": 3},
    ),
    Case("PixArt-Alpha 1024", "PixArtTransformer2DModel", {**PIXART, "sample_size": 128}),
    Case("PixArt-Alpha 512", "PixArtTransformer2DModel", {**PIXART, "sample_size": 64}, {"sample_size": 64}),
    Case(
        "PixArt-Sigma 1024",
        "PixArtTransformer2DModel",
        {**PIXART, "sample_size": 128, "use_additional_conditions": False},
        {"sample_size": 128},
    ),
    Case(
        "tiny PixArt with affine norms, gated feed-forward and no biases",
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 6,
            "num_layers": 2,
            "cross_attention_dim": 10,
            "sample_size": 8,
            "out_channels": 4,
            "activation_fn": "geglu",
            "norm_elementwise_affine": True,
            "attention_bias": False,
        },
        {"sample_size": 8, "attention_head_dim": 6},
    ),
    Case("T5-XXL encoder", "T5EncoderModel", T5_XXL, {}, 220),
    Case(
        "tiny first T5",
        "T5EncoderModel",
        {
            "vocab_size": 50,
            "d_model": 12,
            "d_ff": 20,
            "d_kv": 5,
            "num_heads": 3,
            "num_layers": 2,
            "relative_attention_num_buckets": 8,
        },
    ),
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def real_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        if case.class_name in TRANSFORMERS_CONFIGS:
            config = TRANSFORMERS_CONFIGS[case.class_name](**case.config)
            model = getattr(transformers, case.class_name)(config)
        else:
            model = getattr(diffusers, case.class_name)(**case.config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def for_each_block(key: str, value: Any, config: Mapping[str, Any]) -> Any:
    """`value` as lists, where one number may stand for a number that each block, or each transformer, has."""
    if key in ("transformer_layers_per_block", "attention_head_dim") and "down_block_types" in config:
        entries = value if isinstance(value, list | tuple) else [value] * len(config["down_block_types"])
        return [entry[0] if isinstance(entry, list) and len(set(entry)) == 1 else entry for entry in entries]
    return list(value) if isinstance(value, list | tuple) else value


@every_case
def test_names_and_shapes_are_those_of_the_real_class(case: Case) -> None:
    expected = expected_tensors(case.class_name, case.config)

    assert expected == real_shapes(case)
    if case.n_tensors is not None:
        assert len(expected) == case.n_tensors
    if case.n_parameters is not None:
        assert sum(int(torch.Size(shape).numel()) for shape in expected.values()) == case.n_parameters


@pytest.mark.parametrize("class_name", SCHEMAS)
def test_missing_keys_take_the_defaults_of_the_class(class_name: str) -> None:
    assert expected_tensors(class_name, {}) == real_shapes(Case("defaults", class_name, {}))


@every_case
def test_shapes_lead_back_to_the_config(case: Case) -> None:
    shapes = expected_tensors(case.class_name, case.config)
    stored = {
        name: shape for name, shape in shapes.items() if name not in optional_tensors(case.class_name, {})
    }

    found = config_from_tensors(case.class_name, stored, case.constants)

    assert expected_tensors(case.class_name, found) == shapes
    meant = {**SCHEMAS[case.class_name].defaults, **case.config}
    for key, value in meant.items():
        # PixArt-Alpha's config is silent here, and the class decides by the sample size.
        if key in found and not (key == "use_additional_conditions" and value is None):
            assert for_each_block(key, found[key], found) == for_each_block(key, value, meant), key


@pytest.mark.parametrize(
    ("name", "prefix"), [("CLIP-L", "text_model."), ("tiny Qwen3 with biases", "model.")]
)
def test_the_prefix_of_published_text_encoders_is_understood(name: str, prefix: str) -> None:
    case = case_named(name)
    shapes = expected_tensors(case.class_name, case.config)

    found = config_from_tensors(
        case.class_name, {f"{prefix}{key}": shape for key, shape in shapes.items()}, case.constants
    )

    assert expected_tensors(case.class_name, found) == shapes


def test_an_old_position_table_tells_the_sample_size() -> None:
    case = case_named("PixArt-Alpha 512")
    shapes = expected_tensors(case.class_name, case.config)

    found = config_from_tensors(case.class_name, {**shapes, "pos_embed.pos_embed": (1, 1024, 1152)}, {})

    assert found["sample_size"] == 64


def test_measured_values_win_over_constants() -> None:
    case = case_named("tiny Z-Image")
    shapes = expected_tensors(case.class_name, case.config)

    found = config_from_tensors(case.class_name, shapes, {**case.constants, "n_layers": 30})

    assert found["n_layers"] == 3


@pytest.mark.parametrize("case", [case for case in CASES if "tiny" in case.name], ids=lambda case: case.name)
def test_one_tensor_missing_or_of_another_size_is_never_overlooked(case: Case) -> None:
    shapes = expected_tensors(case.class_name, case.config)
    optional = optional_tensors(case.class_name, case.config)
    for name, shape in shapes.items():
        without = {other: sides for other, sides in shapes.items() if other != name}
        for damaged in (without, {**shapes, name: (*shape[:-1], shape[-1] + 1)}):
            try:
                found = config_from_tensors(case.class_name, damaged, case.constants)
            except CheckpointDamaged:
                continue
            # Else the damaged set is a whole model of another config, or a double is missing.
            expected = expected_tensors(case.class_name, found)
            assert {key: damaged.get(key, shape) for key, shape in expected.items()} == expected
            assert set(expected) - set(damaged) <= optional


@pytest.mark.parametrize("case", [case for case in CASES if case.constants], ids=lambda case: case.name)
def test_without_constants_the_key_that_cannot_be_told_is_named(case: Case) -> None:
    shapes = expected_tensors(case.class_name, case.config)

    with pytest.raises(CheckpointDamaged) as refused:
        config_from_tensors(case.class_name, shapes, {})

    assert any(f"'{key}'" in str(refused.value) for key in (*case.constants, "num_attention_heads"))


def test_an_unknown_class_or_variant_is_named() -> None:
    assert has_schema("AutoencoderKL")
    assert not has_schema("FluxTransformer2DModel")
    with pytest.raises(UnknownFamily, match="FluxTransformer2DModel"):
        expected_tensors("FluxTransformer2DModel", {})
    with pytest.raises(UnknownFamily, match=r"down_block_types='AttnDownBlock2D'"):
        expected_tensors("UNet2DConditionModel", {"down_block_types": ["AttnDownBlock2D"] * 4})
    with pytest.raises(UnknownFamily, match="class_embed_type"):
        expected_tensors("UNet2DConditionModel", {"class_embed_type": "projection"})


BAD_VALUES = (10**9, -1, 10**5000, 1.5, "30", True, None, [], [10**9], [[1]], {}, float("nan"), [1] * 10**6)


@pytest.mark.parametrize("class_name", SCHEMAS)
def test_a_wrong_or_gigantic_value_is_refused_quickly(class_name: str) -> None:
    for key in SCHEMAS[class_name].defaults:
        for value in BAD_VALUES:
            began = time.monotonic()
            try:
                expected_tensors(class_name, {key: value})
            except (CheckpointDamaged, UnknownFamily) as error:
                assert len(str(error)) < 400
            assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("class_name", "key"),
    [
        ("ZImageTransformer2DModel", "n_layers"),
        ("ZImageTransformer2DModel", "n_refiner_layers"),
        ("AutoencoderKL", "layers_per_block"),
        ("Qwen3Model", "num_hidden_layers"),
        ("UNet2DConditionModel", "layers_per_block"),
        ("UNet2DConditionModel", "transformer_layers_per_block"),
        ("CLIPTextModel", "num_hidden_layers"),
        ("PixArtTransformer2DModel", "num_layers"),
        ("T5EncoderModel", "num_layers"),
    ],
)
@pytest.mark.parametrize("value", [10**9, 10**7, -3, "12", 2.0, True])
def test_a_count_that_no_model_has_is_damage(class_name: str, key: str, value: Any) -> None:
    with pytest.raises(CheckpointDamaged, match=r"fetch its config\.json again"):
        expected_tensors(class_name, {key: value})


@pytest.mark.parametrize("class_name", SCHEMAS)
def test_hostile_tensor_names_end_in_an_error(class_name: str) -> None:
    case = next(case for case in CASES if case.class_name == class_name)
    shapes = expected_tensors(class_name, case.config)
    for hostile in ("9" * 5000, "99999999", "7" * 7):
        # The name of every stack's last layer, with an absurd number in its place.
        for name in list(shapes)[-40:]:
            renamed = ".".join(hostile if piece.isdigit() else piece for piece in name.split("."))
            if renamed == name:
                continue
            try:
                config_from_tensors(class_name, {**shapes, renamed: shapes[name]}, case.constants)
            except CheckpointDamaged as error:
                assert len(str(error)) < 800
