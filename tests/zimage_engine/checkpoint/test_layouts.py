"""diffusers' own converters are the judge: same names, same values, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.checkpoints.original_layouts import ldm_unet, ldm_vae, open_clip, original_pixart
from zimage_engine.checkpoint.layouts import read_parts
from zimage_engine.checkpoint.parts import Part
from zimage_engine.checkpoint.tensors import TensorFacts
from zimage_engine.errors import CheckpointDamaged

Tensors = dict[str, torch.Tensor]
WORDS = {torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}


def facts(tensors: Mapping[str, torch.Tensor]) -> list[TensorFacts]:
    return [TensorFacts(name, WORDS[t.dtype], tuple(t.shape)) for name, t in tensors.items()]


def the_part(tensors: Mapping[str, torch.Tensor]) -> Part:
    found = read_parts(facts(tensors))
    assert found.unknown == ()
    (part,) = found.parts
    return part


def made(part: Part, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    result = {}
    for recipe in part.recipes:
        tensor = tensors[recipe.source]
        if recipe.scale:
            tensor = tensor.float() * tensors[recipe.scale]
        if recipe.rows:
            tensor = tensor[recipe.rows[0] : recipe.rows[1]]
        if recipe.transpose:
            tensor = tensor.T
        result[recipe.name] = tensor.reshape(recipe.shape)
    return result


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def filled(model: torch.nn.Module) -> Tensors:
    """Every value its own, so that no two rows can be taken for one another."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}


def z_image() -> Tensors:
    model = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[8, 8, 8],
    )  # fmt: skip
    return filled(model)


def z_image_single(tensors: Tensors) -> Tensors:
    single = {}
    for name, tensor in tensors.items():
        if name.endswith("to_q.weight"):
            front = name.removesuffix("to_q.weight")
            fused = [tensors[f"{front}to_{part}.weight"] for part in "qkv"]
            single[f"{front}qkv.weight"] = torch.cat(fused)
        elif not re.search(r"to_[kv]\.", name):
            new = name.replace("all_x_embedder.2-1", "x_embedder").replace(
                "all_final_layer.2-1", "final_layer"
            )
            new = re.sub(r"norm_([qk])\.", r"\1_norm.", new).replace("to_out.0", "out")
            single[new] = tensor
    return single


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "_orig_mod.module."])
def test_a_z_image_single_file_becomes_what_diffusers_makes_of_it(prefix: str) -> None:
    own = z_image()
    single = z_image_single(own)
    stored = {prefix + name: tensor for name, tensor in single.items()}
    part = the_part(stored)
    assert (part.class_name, part.component, part.is_stock) == (
        "ZImageTransformer2DModel",
        "transformer",
        False,
    )
    assert_same(made(part, stored), convert_z_image_transformer_checkpoint_to_diffusers(dict(single)))
    assert_same(made(part, stored), own)
    assert "split-fused-qkv" in [applied.repair.name for applied in part.repairs]


def test_diffusers_own_z_image_is_stock_and_damage_to_it_is_told() -> None:
    own = z_image()
    part = the_part(own)
    assert (part.is_stock, part.repairs) == (True, ())
    damaged = {re.sub(r"norm_([qk])\.", r"\1_norm.", name): tensor for name, tensor in own.items()}
    damaged["x_pad_token"] = damaged["x_pad_token"][0]
    damaged |= {"num_updates": torch.zeros(1), "optimizer.state.0.step": torch.zeros(1)}
    part = the_part(damaged)
    assert_same(made(part, damaged), own)
    assert not part.is_stock
    assert [applied.repair.name for applied in part.repairs] == [
        "drop-training-tensors", "rename-norms", "shape-pad-tokens",
    ]  # fmt: skip
    assert set(part.dropped) == {"num_updates", "optimizer.state.0.step"}


def test_fp8_with_a_scale_is_made_whole() -> None:
    own = z_image_single(z_image())
    name = "layers.0.attention.qkv.weight"
    stored = own | {
        name: own[name].to(torch.float8_e4m3fn),
        "layers.0.attention.qkv.weight_scale": torch.tensor(0.5),
        "layers.0.attention.qkv.comfy_quant": torch.zeros(3),
        "layers.0.attention.qkv.input_scale": torch.tensor(1.0),
        "scaled_fp8": torch.zeros(2),
    }
    part = the_part(stored)
    whole = stored[name].float() * 0.5
    assert torch.equal(made(part, stored)["layers.0.attention.to_v.weight"], whole[64:])
    assert "apply-fp8-scales" in [applied.repair.name for applied in part.repairs]
    assert len(part.dropped) == 3


def test_what_cannot_be_read_is_damage_that_names_the_tensor() -> None:
    with pytest.raises(CheckpointDamaged, match=r"nunchaku.*'layers\.0\.attention\.to_qkv\.qweight'"):
        read_parts([TensorFacts("layers.0.attention.to_qkv.qweight", "I8", (4, 4))])
    stored = z_image_single(z_image())
    stored["layers.0.attention.qkv.weight"] = torch.zeros(95, 32)
    with pytest.raises(CheckpointDamaged, match=r"'layers\.0\.attention\.qkv\.weight'.*multiple of 3"):
        read_parts(facts(stored))
    both = z_image_single(z_image()) | {"layers.0.attention.to_q.weight": torch.zeros(32, 32)}
    with pytest.raises(CheckpointDamaged, match=r"only one can be"):
        read_parts(facts(both))
    scaled = z_image() | {"layers.0.attention.to_q.weight_scale": torch.tensor(1.0)}
    with pytest.raises(CheckpointDamaged, match=r"should be fp8, got F32"):
        read_parts(facts(scaled))


def test_names_of_no_model_are_unknown() -> None:
    found = read_parts([TensorFacts("a.weight", "F32", (1,)), TensorFacts("b.weight", "F32", (1,))])
    assert (found.parts, found.unknown) == ((), ("a.weight", "b.weight"))


def unet(layers_per_block: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=layers_per_block, attention_head_dim=(2, 4),  # noqa: E501
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8, cross_attention_dim=16,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64, time_cond_proj_dim=16,
    )  # fmt: skip


@pytest.mark.parametrize("layers_per_block", [1, 2])
def test_an_ldm_unet_becomes_what_diffusers_makes_of_it(layers_per_block: int) -> None:
    model = unet(layers_per_block)
    own = filled(model)
    stored = {f"model.diffusion_model.{n}": t for n, t in ldm_unet(own, layers_per_block).items()}
    part = the_part(stored)
    assert (part.class_name, part.component, part.is_stock) == ("UNet2DConditionModel", "unet", False)
    theirs = convert_ldm_unet_checkpoint(stored, dict(model.config))
    ours = made(part, stored)
    # diffusers' converter leaves this one out, though an LCM unet cannot do without it.
    cond_proj = "time_embedding.cond_proj.weight"
    assert_same({name: t for name, t in ours.items() if name != cond_proj}, theirs)
    assert_same(ours, own)
    assert the_part(own).is_stock


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1,
    )  # fmt: skip


@pytest.mark.parametrize(("prefix", "component"), [("", ""), ("first_stage_model.", "vae"), ("vae.", "vae")])
def test_an_ldm_vae_becomes_what_diffusers_makes_of_it(prefix: str, component: str) -> None:
    model = vae()
    own = filled(model)
    ldm = ldm_vae(own, 3)
    stored = {prefix + name: tensor for name, tensor in ldm.items()}
    part = the_part(stored)
    assert (part.class_name, part.component, part.is_stock) == ("AutoencoderKL", component, False)
    assert_same(made(part, stored), convert_ldm_vae_checkpoint(dict(ldm), dict(model.config)))
    assert_same(made(part, stored), own)
    assert the_part(own).is_stock


def test_old_attention_names_of_a_vae_are_renamed() -> None:
    own = filled(vae())
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    stored = dict(own)
    for name in own:
        for new_part, old_part in old.items():
            if f".{new_part}." in name:
                stored[name.replace(new_part, old_part)] = stored.pop(name)
    part = the_part(stored)
    assert_same(made(part, stored), own)
    assert [applied.repair.name for applied in part.repairs] == ["rename-old-attention"]


CLIP = {
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def test_an_open_clip_becomes_what_diffusers_makes_of_it() -> None:
    # As many projections as hidden sides, as SDXL's: diffusers cuts the fused rows by the projection's size.
    model = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP, projection_dim=8))
    own = filled(model)
    prefix = "conditioner.embedders.1.model."
    stored = {prefix + name: tensor for name, tensor in open_clip(own).items()}
    part = the_part(stored)
    assert (part.class_name, part.component) == ("CLIPTextModelWithProjection", "text_encoder_2")
    assert_same(made(part, stored), convert_open_clip_checkpoint(model, stored, prefix))
    assert_same(made(part, stored), own)


@pytest.mark.parametrize(
    ("prefix", "component", "is_stock"),
    [
        ("", "", True),
        ("text_model.", "", True),
        ("conditioner.embedders.0.transformer.text_model.", "text_encoder", False),
    ],
)
def test_clip_with_and_without_its_prefix(prefix: str, component: str, is_stock: bool) -> None:
    own = filled(CLIPTextModel(CLIPTextConfig(**CLIP)))
    stored = {prefix + name: tensor for name, tensor in own.items()}
    part = the_part(stored)
    assert (part.class_name, part.component, part.is_stock) == ("CLIPTextModel", component, is_stock)
    assert_same(made(part, stored), own)


@pytest.mark.parametrize(
    ("prefix", "extra", "is_stock"),
    [
        ("", (), True),
        ("model.", (), True),
        ("model.", ("lm_head.weight",), True),
        ("text_encoders.qwen3_4b.transformer.model.", (), False),
    ],
)
def test_qwen3_under_each_prefix(prefix: str, extra: tuple[str, ...], is_stock: bool) -> None:
    config = Qwen3Config(
        vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    own = filled(Qwen3Model(config))
    stored = {prefix + name: t for name, t in own.items()} | {name: torch.zeros(10, 8) for name in extra}
    part = the_part(stored)
    assert (part.class_name, part.is_stock, tuple(part.dropped)) == ("Qwen3Model", is_stock, extra)
    assert_same(made(part, stored), own)


def test_t5_is_stock() -> None:
    config = T5Config(
        vocab_size=10, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    own = filled(T5EncoderModel(config))
    part = the_part(own)
    assert (part.class_name, part.is_stock) == ("T5EncoderModel", True)
    assert_same(made(part, own), own)


@pytest.mark.parametrize("sample_size", [8, 128], ids=["without sizes", "with sizes"])
def test_an_original_pixart_becomes_the_diffusers_model(sample_size: int) -> None:
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2,
        sample_size=sample_size, cross_attention_dim=8, caption_channels=16,
    )  # fmt: skip
    own = filled(model)
    stored = {f"state_dict.{name}": tensor for name, tensor in original_pixart(own).items()}
    part = the_part(stored)
    assert (part.class_name, part.component, part.is_stock) == (
        "PixArtTransformer2DModel",
        "transformer",
        False,
    )
    assert_same(made(part, stored), own)
    assert len(part.dropped) == 2
    assert the_part(own).is_stock


def test_a_packed_file_gives_its_parts() -> None:
    stored = {f"model.diffusion_model.{name}": t for name, t in z_image_single(z_image()).items()}
    stored |= {f"vae.{name}": t for name, t in ldm_vae(filled(vae()), 3).items()}
    found = read_parts(facts(stored))
    assert {(part.component, part.class_name) for part in found.parts} == {
        ("transformer", "ZImageTransformer2DModel"), ("vae", "AutoencoderKL"),
    }  # fmt: skip
    assert found.unknown == ()
