"""How the tensors of an image autoencoder are arranged in files."""

from __future__ import annotations

from zimage_engine.checkpoint.layouts.rewrite import Drop, Layout, Rewrite, Shapes, both, has, lacks, same
from zimage_engine.checkpoint.repair import Repair

_LDM = Repair("rename-ldm-vae", "the file uses the names of the latent-diffusion code, diffusers its own")
_OLD = Repair("rename-old-attention", "diffusers has since renamed the parts of this attention")
_CODER, _WB = r"((?:en|de)coder)", r"\.(weight|bias)"
_BLOCK = r"(?:down_blocks|up_blocks)\.\d+\.resnets\.\d+|mid_block\.resnets\.\d+"
_ATTENTION = rf"{_CODER}\.mid_block\.attentions\.0"
_RESNET_PARTS = r"(?:norm[12]|conv[12])"
_SAMPLERS = r"(?:down_blocks\.\d+\.downsamplers|up_blocks\.\d+\.upsamplers)\.0\.conv\.(?:weight|bias)"
_COMMON = (
    same(r"(?:en|de)coder\.conv_(?:in|out)\.(?:weight|bias)|(?:post_)?quant_conv\.(?:weight|bias)"),
    same(rf"(?:en|de)coder\.(?:(?:{_BLOCK})\.{_RESNET_PARTS}\.(?:weight|bias)|{_SAMPLERS})"),
)


def _attention(names: dict[str, str], repair: Repair) -> tuple[Rewrite, ...]:
    """Weights that were convolutions of one pixel are matrices in the model."""
    return tuple(
        row
        for old, new in names.items()
        for row in (
            Rewrite(
                rf"{_ATTENTION}\.{old}\.weight", (rf"\1.mid_block.attentions.0.{new}.weight",), repair, dims=2
            ),
            Rewrite(rf"{_ATTENTION}\.{old}\.bias", (rf"\1.mid_block.attentions.0.{new}.bias",), repair),
        )
    )


def _places(shapes: Shapes) -> dict[str, str]:
    """Where each block of the file stands in the model: the decoder's levels count the other way round."""
    ups = [int(name.split(".")[2]) for name in shapes if name.startswith("decoder.up.")]
    downs = [int(name.split(".")[2]) for name in shapes if name.startswith("encoder.down.")]
    places = {}
    for coder in ("encoder", "decoder"):
        places[f"{coder}.mid.block_1"] = f"{coder}.mid_block.resnets.0"
        places[f"{coder}.mid.block_2"] = f"{coder}.mid_block.resnets.1"
        places[f"{coder}.mid.attn_1"] = f"{coder}.mid_block.attentions.0"
    for level in set(downs):
        places[f"encoder.down.{level}.block"] = f"encoder.down_blocks.{level}.resnets"
        places[f"encoder.down.{level}.downsample"] = f"encoder.down_blocks.{level}.downsamplers.0"
    for level in set(ups):
        places[f"decoder.up.{level}.block"] = f"decoder.up_blocks.{max(ups) - level}.resnets"
        places[f"decoder.up.{level}.upsample"] = f"decoder.up_blocks.{max(ups) - level}.upsamplers.0"
    return places


LAYOUTS = (
    Layout(
        "diffusers",
        "AutoencoderKL",
        both(
            has("decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"),
            lacks("decoder.up.", "time_embedding."),
        ),
        "an encoder and a decoder of diffusers' blocks are an autoencoder",
        (
            *_COMMON,
            same(rf"(?:en|de)coder\.(?:conv_norm_out|(?:{_BLOCK})\.conv_shortcut)\.(?:weight|bias)"),
            same(
                r"(?:en|de)coder\.mid_block\.attentions\.0\.(?:group_norm|to_[qkv]|to_out\.0)\.(?:weight|bias)"
            ),
            *_attention({"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}, _OLD),
        ),
    ),
    Layout(
        "latent diffusion",
        "AutoencoderKL",
        both(has("decoder.conv_in.weight", "decoder.mid.block_1.conv1.weight"), lacks("decoder.up_blocks.")),
        "an encoder and a decoder with a middle of blocks 1 and 2 are a latent-diffusion autoencoder",
        (
            *_COMMON,
            Rewrite(rf"{_CODER}\.norm_out{_WB}", (r"\1.conv_norm_out.\2",), _LDM),
            Rewrite(rf"{_CODER}\.({_BLOCK})\.nin_shortcut{_WB}", (r"\1.\2.conv_shortcut.\3",), _LDM),
            *_attention({"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}, _LDM),
            Rewrite(rf"{_ATTENTION}\.norm{_WB}", (r"\1.mid_block.attentions.0.group_norm.\2",), _LDM),
        ),
        (Drop(r"loss\..+", "the judge of the training, no part of the autoencoder"),),
        places=_places,
        renumbering=_LDM,
    ),
)
