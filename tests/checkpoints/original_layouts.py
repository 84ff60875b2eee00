"""Models in the layouts of their makers' own code, made from diffusers' tensors."""

from __future__ import annotations

import re

import torch

Tensors = dict[str, torch.Tensor]

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0",
    "conv_out": "out.2",
}  # fmt: skip


def ldm_unet(tensors: Tensors, layers_per_block: int) -> Tensors:
    steps = layers_per_block + 1

    def rename(name: str) -> str:
        for own, ldm in UNET_ENDS.items():
            if name.startswith(own + "."):
                return name.replace(own, ldm, 1)
        name = re.sub(r"\.resnets\.(\d+)\.(\w+)\.", lambda m: f".resnets.{m[1]}.{RESNET[m[2]]}.", name)
        name = re.sub(r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}", name)
        name = re.sub(r"^mid_block\.attentions\.0", "middle_block.1", name)
        down = re.match(r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)", name)
        if down:
            block = 1 + steps * int(down[1]) + int(down[3])
            return f"input_blocks.{block}.{int(down[2] == 'attentions')}" + name[down.end() :]
        name = re.sub(
            r"^down_blocks\.(\d)\.downsamplers\.0\.conv",
            lambda m: f"input_blocks.{steps * (int(m[1]) + 1)}.0.op",
            name,
        )
        up = re.match(r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)", name)
        if up:
            block = steps * int(up[1]) + int(up[3])
            return f"output_blocks.{block}.{int(up[2] == 'attentions')}" + name[up.end() :]
        return re.sub(
            r"^up_blocks\.(\d)\.upsamplers\.0",
            lambda m: f"output_blocks.{steps * (int(m[1]) + 1) - 1}.2",
            name,
        )

    return {rename(name): tensor for name, tensor in tensors.items()}


def ldm_vae(tensors: Tensors, levels: int) -> Tensors:
    stored = {}
    for name, tensor in tensors.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", new)
        new = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", new
        )
        if "mid_block.attentions" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            new = new.replace("to_out.0", "proj_out").replace("to_", "")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        stored[new] = tensor
    return stored


def open_clip(tensors: Tensors) -> Tensors:
    names = {
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    stored = {"text_projection": tensors["text_projection.weight"].T.contiguous()}
    for name, tensor in tensors.items():
        if name in names:
            stored[names[name]] = tensor
        elif "q_proj" in name:
            fused = torch.cat([tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            new = name.replace("self_attn.q_proj.", "attn.in_proj_")
            stored[new.replace("text_model.encoder.layers", "transformer.resblocks")] = fused
        elif name != "text_projection.weight" and not re.search(r"[kv]_proj", name):
            new = name.replace("text_model.encoder.layers", "transformer.resblocks").replace(
                "self_attn", "attn"
            )
            new = new.replace("layer_norm", "ln_").replace("fc1", "c_fc").replace("fc2", "c_proj")
            stored[new] = tensor
    return stored


PIXART = (
    ("pos_embed.proj", "x_embedder.proj"),
    ("caption_projection.linear_", "y_embedder.y_proj.fc"),
    ("adaln_single.emb.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("adaln_single.emb.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("adaln_single.emb.resolution_embedder.linear_1", "csize_embedder.mlp.0"),
    ("adaln_single.emb.resolution_embedder.linear_2", "csize_embedder.mlp.2"),
    ("adaln_single.emb.aspect_ratio_embedder.linear_1", "ar_embedder.mlp.0"),
    ("adaln_single.emb.aspect_ratio_embedder.linear_2", "ar_embedder.mlp.2"),
    ("adaln_single.linear", "t_block.1"),
    ("proj_out", "final_layer.linear"),
    ("attn1.to_out.0", "attn.proj"),
    ("attn2.to_q", "cross_attn.q_linear"),
    ("attn2.to_out.0", "cross_attn.proj"),
    ("ff.net.0.proj", "mlp.fc1"),
    ("ff.net.2", "mlp.fc2"),
    ("transformer_blocks.", "blocks."),
)  # fmt: skip


def original_pixart(own: Tensors) -> Tensors:
    """The names of PixArt's own code, with what it keeps beside the weights."""
    stored: Tensors = {"pos_embed": torch.zeros(1, 4, 8), "y_embedder.y_embedding": torch.zeros(3, 16)}
    for name, tensor in own.items():
        new = "final_layer.scale_shift_table" if name == "scale_shift_table" else name
        for fused, parts, first in (
            ("attn.qkv", "qkv", "attn1.to_q"),
            ("cross_attn.kv_linear", "kv", "attn2.to_k"),
        ):
            if first in name:
                front = first[:-1]
                tensor = torch.cat([own[name.replace(first, front + part)] for part in parts])
                new = name.replace(first, fused)
        if re.search(r"attn1\.to_[kv]|attn2\.to_v", name):
            continue
        for ours, theirs in PIXART:
            new = new.replace(ours, theirs)
        stored[new] = tensor
    return stored
