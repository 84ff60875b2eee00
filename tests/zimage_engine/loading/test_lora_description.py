"""A LoRA file is told from a model, and from its names what it was made for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.zimage_engine.tiny_models import write_tiny_sdxl, write_tiny_z_image
from tests.zimage_engine.tiny_models.lora import write_lora
from zimage_engine import ModelLoaderAdapter
from zimage_engine.errors import CheckpointDamaged, UnknownFamily
from zimage_engine.loading.lora_description import adapted_modules, describe_lora, is_lora

PEFT = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")

#: Stored module name, its ends, its input width; what it was made for, and whether we draw with that.
NAMES = (
    ("transformer.layers.0.attention.to_q", PEFT, 3840, "Z-Image (3840 wide)", True),
    ("lora_unet_layers_0_attention_qkv", KOHYA, 3840, "Z-Image (3840 wide)", True),
    ("diffusion_model.noise_refiner.1.attention.to_k", PEFT, 2304, "Lumina 2 (2304 wide)", False),
    ("layers.3.feed_forward.w1", PEFT, 3840, "Z-Image or a model built like it", True),
    (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        KOHYA,
        2048,
        "SDXL (2048 wide)",
        True,
    ),
    ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v", PEFT, 2048, "SDXL (2048 wide)", True),
    (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
        KOHYA,
        768,
        "Stable Diffusion 1.5 (768 wide)",
        False,
    ),
    (
        "lora_unet_down_blocks_0_attentions_0_proj_in",
        KOHYA,
        320,
        "Stable Diffusion (XL, 1.5 or 2)",
        True,
    ),
    ("lora_unet_double_blocks_0_img_attn_qkv", KOHYA, 3072, "Flux or one of its relatives", False),
    (
        "transformer.single_transformer_blocks.0.attn.to_q",
        PEFT,
        3072,
        "Flux or one of its relatives",
        False,
    ),
    ("lora_unet_joint_blocks_0_x_block_attn_qkv", KOHYA, 1536, "Stable Diffusion 3", False),
    (
        "transformer.transformer_blocks.0.attn.to_q",
        PEFT,
        3072,
        "PixArt, Qwen-Image or another model of 'transformer_blocks'",
        False,
    ),
    ("diffusion_model.blocks.0.self_attn.q", PEFT, 5120, "Wan or another model of 'blocks'", False),
    ("encoder.0.linear", PEFT, 64, "a model that its names do not tell", True),
)


@pytest.mark.parametrize(("stem", "ends", "width", "made_for", "is_drawn_here"), NAMES)
def test_names_and_widths_tell_what_it_was_made_for(
    stem: str, ends: tuple[str, str], width: int, made_for: str, is_drawn_here: bool, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    save_file({f"{stem}.{ends[0]}": torch.zeros(2, width), f"{stem}.{ends[1]}": torch.zeros(width, 2)}, file)
    assert is_lora(file)
    lora = describe_lora(file)
    assert (lora.made_for, lora.is_drawn_here) == (made_for, is_drawn_here)
    assert (lora.pairs, lora.ranks, lora.dtypes) == (1, (2,), ("F32",))


def test_a_lora_of_diffusers_is_described_and_counted_in_its_model(tiny_model: Path, tmp_path: Path) -> None:
    file = write_lora(tiny_model, tmp_path / "style.safetensors", modules=("to_q", "w1"))
    lora = describe_lora(file)
    assert lora.ranks == (4,)
    assert lora.layouts == ("PEFT, diffusers",)
    assert "Z-Image or a model built like it, " in lora.made_for
    (denoiser,) = (m for m in ModelLoaderAdapter(tiny_model).mending.models if m.name == "transformer")
    assert adapted_modules(file, denoiser.shapes) == lora.pairs


def test_models_are_no_loras(tiny_model: Path, tmp_path: Path) -> None:
    assert not is_lora(tiny_model)
    for file in tiny_model.rglob("*.*"):
        assert not is_lora(file), file
    assert not is_lora(tmp_path / "nothing")
    assert not is_lora(tmp_path)
    for content in (b"", b"{}", b"PK\x03\x04", b"\xff" * 100):
        (tmp_path / "strange.safetensors").write_bytes(content)
        assert not is_lora(tmp_path / "strange.safetensors")


def test_a_model_with_unmerged_loras_is_a_model(tmp_path: Path) -> None:
    """PEFT keeps the layer's own weight beside the pair."""
    file = tmp_path / "unmerged.safetensors"
    ends = ("base_layer.weight", *PEFT)
    save_file({f"layers.{n}.attention.to_q.{end}": torch.zeros(4, 4) for n in range(9) for end in ends}, file)
    assert not is_lora(file)


@pytest.mark.parametrize("write", [write_tiny_z_image, write_tiny_sdxl])
def test_a_lora_in_place_of_a_model_is_refused_with_advice(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    model = write(tmp_path / "tiny")
    file = write_lora(model, tmp_path / "lora" / "style.safetensors")
    for path in (file, file.parent):
        with pytest.raises(UnknownFamily, match=r"is a LoRA and no model.*--lora"):
            ModelLoaderAdapter(path).check()


def test_a_lora_that_is_none_of_the_plain_kind_is_known_and_refused(tmp_path: Path) -> None:
    file = tmp_path / "lokr.safetensors"
    save_file({f"layers.0.attention.to_q.lokr_w{n}": torch.zeros(4, 4) for n in (1, 2)}, file)
    assert is_lora(file)
    with pytest.raises(CheckpointDamaged, match="it is a LoKr"):
        describe_lora(file)
