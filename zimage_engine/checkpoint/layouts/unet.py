"""How the tensors of an SDXL denoiser are arranged in files."""

from __future__ import annotations

from zimage_engine.checkpoint.layouts.rewrite import Layout, Rewrite, Shapes, both, has, lacks, same
from zimage_engine.checkpoint.repair import Repair

_NAMES = Repair("rename-ldm-unet", "the file uses the names of the latent-diffusion code, diffusers its own")
_R, _WB = r"((?:down_blocks|up_blocks)\.\d+\.resnets\.\d+|mid_block\.resnets\.\d+)", r"\.(weight|bias)"
_RESNET = {
    r"in_layers\.0": "norm1",
    r"in_layers\.2": "conv1",
    r"emb_layers\.1": "time_emb_proj",
    r"out_layers\.0": "norm2",
    r"out_layers\.3": "conv2",
    r"skip_connection": "conv_shortcut",
}
_ENDS = {
    r"time_embed\.0": "time_embedding.linear_1",
    r"time_embed\.2": "time_embedding.linear_2",
    r"label_emb\.0\.0": "add_embedding.linear_1",
    r"label_emb\.0\.2": "add_embedding.linear_2",
    r"input_blocks\.0\.0": "conv_in",
    r"out\.0": "conv_norm_out",
    r"out\.2": "conv_out",
}
_ATTENTION = (
    r"(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.(?:(?:norm|proj_in|proj_out)\.(?:weight|bias)"
    r"|transformer_blocks\.\d+\.(?:norm[123]|attn[12]|ff)\..+)"
)
_SAMPLERS = r"(?:down_blocks\.\d+\.downsamplers|up_blocks\.\d+\.upsamplers)\.0\.conv\.(?:weight|bias)"


def _places(shapes: Shapes) -> dict[str, str]:
    """Where each numbered block of the file stands in the model: a level ends where the size changes."""
    places: dict[str, str] = {}
    level = at = 0
    for number in range(1, _count(shapes, "input_blocks")):
        block = f"input_blocks.{number}"
        if f"{block}.0.op.weight" in shapes:
            places[f"{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            level, at = level + 1, 0
            continue
        places[f"{block}.0"] = f"down_blocks.{level}.resnets.{at}"
        places[f"{block}.1"] = f"down_blocks.{level}.attentions.{at}"
        at += 1
    resnets = attentions = 0
    for number in range(_count(shapes, "middle_block")):
        block = f"middle_block.{number}"
        if f"{block}.in_layers.0.weight" in shapes:
            places[block], resnets = f"mid_block.resnets.{resnets}", resnets + 1
        else:
            places[block], attentions = f"mid_block.attentions.{attentions}", attentions + 1
    level = at = 0
    for number in range(_count(shapes, "output_blocks")):
        block = f"output_blocks.{number}"
        places[f"{block}.0"] = f"up_blocks.{level}.resnets.{at}"
        places[f"{block}.1"] = f"up_blocks.{level}.attentions.{at}"
        at += 1
        for last in ("1", "2"):
            if f"{block}.{last}.conv.weight" in shapes:
                places[f"{block}.{last}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
                level, at = level + 1, 0
                break
    return places


def _count(shapes: Shapes, front: str) -> int:
    numbers = [name.split(".")[1] for name in shapes if name.startswith(f"{front}.")]
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1


LAYOUTS = (
    Layout(
        "diffusers",
        "UNet2DConditionModel",
        both(
            has("conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"),
            lacks("controlnet_"),
        ),
        "a net of down and up blocks that is told the time is a unet",
        (
            same(r"(?:conv_in|conv_norm_out|conv_out)\.(?:weight|bias)"),
            same(r"(?:time_embedding|add_embedding|class_embedding|encoder_hid_proj)\..+"),
            same(
                _R.replace("(", "(?:", 1) + r"\.(?:norm1|conv1|time_emb_proj|norm2|conv2|conv_shortcut)\..+"
            ),
            same(_ATTENTION),
            same(_SAMPLERS),
        ),
        (),
        "unet",
    ),
    Layout(
        "latent diffusion",
        "UNet2DConditionModel",
        both(
            has("input_blocks.0.0.weight", "time_embed.0.weight", "label_emb.0.0.weight"),
            lacks("input_hint_block."),
        ),
        "numbered input and output blocks beside an embedding of size and crop are an SDXL unet",
        (
            *(Rewrite(old + _WB, (new + r".\1",), _NAMES) for old, new in _ENDS.items()),
            *(Rewrite(rf"{_R}\.{old}{_WB}", (rf"\1.{new}.\2",), _NAMES) for old, new in _RESNET.items()),
            Rewrite(r"time_embed\.cond_proj\.weight", ("time_embedding.cond_proj.weight",), _NAMES),
            Rewrite(f"({_ATTENTION}|{_SAMPLERS})", (r"\1",), _NAMES),
        ),
        (),
        "unet",
        _places,
    ),
)
