"""The tensors of AutoencoderKL, made of DownEncoderBlock2D and UpDecoderBlock2D."""

from __future__ import annotations

from typing import Any

from zimage_engine.checkpoint.schemas.blocks import add_attention, add_resnet
from zimage_engine.checkpoint.schemas.schema import Measured, Schema, Settings, TensorTable
from zimage_engine.errors import UnknownFamily

_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def _expect(settings: Settings, table: TensorTable) -> None:
    channels = settings.wholes("block_out_channels")
    for key, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if any(entry != known for entry in settings.entries(key, length=len(channels))):
            raise UnknownFamily(
                f"the config of AutoencoderKL has other {key} than '{known}', the one known here"
            )
    layers = settings.whole("layers_per_block")
    latent = settings.whole("latent_channels")

    table.conv("encoder.conv_in", channels[0], settings.whole("in_channels"), kernel=3)
    size = channels[0]
    for index, out_size in enumerate(channels):
        for layer in range(layers):
            add_resnet(table, f"encoder.down_blocks.{index}.resnets.{layer}", size, out_size, None)
            size = out_size
        if index < len(channels) - 1:
            table.conv(f"encoder.down_blocks.{index}.downsamplers.0.conv", size, size, kernel=3)
    _add_middle(settings, table, "encoder.mid_block", size)
    table.norm("encoder.conv_norm_out", size)
    # Mean and log variance of each latent channel.
    table.conv("encoder.conv_out", 2 * latent, size, kernel=3)

    table.conv("decoder.conv_in", size, latent, kernel=3)
    _add_middle(settings, table, "decoder.mid_block", size)
    for index, out_size in enumerate(reversed(channels)):
        for layer in range(layers + 1):
            add_resnet(table, f"decoder.up_blocks.{index}.resnets.{layer}", size, out_size, None)
            size = out_size
        if index < len(channels) - 1:
            table.conv(f"decoder.up_blocks.{index}.upsamplers.0.conv", size, size, kernel=3)
    table.norm("decoder.conv_norm_out", size)
    table.conv("decoder.conv_out", settings.whole("out_channels"), size, kernel=3)

    if settings.flag("use_quant_conv"):
        table.conv("quant_conv", 2 * latent, 2 * latent, kernel=1)
    if settings.flag("use_post_quant_conv"):
        table.conv("post_quant_conv", latent, latent, kernel=1)


def _add_middle(settings: Settings, table: TensorTable, name: str, size: int) -> None:
    if settings.flag("mid_block_add_attention"):
        table.norm(f"{name}.attentions.0.group_norm", size)
        add_attention(table, f"{name}.attentions.0", size, size, size, bias=True)
    for index in range(2):
        add_resnet(table, f"{name}.resnets.{index}", size, size, None)


def _measure(measured: Measured) -> dict[str, Any]:
    n_blocks = measured.count("encoder.down_blocks")
    channels = [
        measured.shape(f"encoder.down_blocks.{index}.resnets.0.conv1.weight", 4, "block_out_channels")[0]
        for index in range(n_blocks)
    ]
    if not channels:
        raise measured.untold("block_out_channels", "no tensor of 'encoder.down_blocks' is there")
    return {
        "in_channels": measured.shape("encoder.conv_in.weight", 4, "in_channels")[1],
        "out_channels": measured.shape("decoder.conv_out.weight", 4, "out_channels")[0],
        "down_block_types": ["DownEncoderBlock2D"] * n_blocks,
        "up_block_types": ["UpDecoderBlock2D"] * n_blocks,
        "block_out_channels": channels,
        "layers_per_block": measured.count("encoder.down_blocks.0.resnets"),
        "latent_channels": measured.shape("decoder.conv_in.weight", 4, "latent_channels")[1],
        "use_quant_conv": measured.has("quant_conv.weight"),
        "use_post_quant_conv": measured.has("post_quant_conv.weight"),
        "mid_block_add_attention": measured.count("decoder.mid_block.attentions") > 0,
    }


AUTOENCODER_KL = Schema(
    class_name="AutoencoderKL",
    stamp={"_class_name": "AutoencoderKL"},
    defaults=_DEFAULTS,
    expect=_expect,
    measure=_measure,
    # Both are numbers that the latents are multiplied by and shifted with; the class's defaults are those of
    # Stable Diffusion 1 and give wrong colours, not an error, with any other VAE.
    untold=(("scaling_factor",), ("shift_factor",)),
)
