"""How the tensors of PixArt's denoiser are arranged in files."""

from __future__ import annotations

from zimage_engine.checkpoint.layouts.rewrite import Drop, Layout, Rewrite, has, same
from zimage_engine.checkpoint.repair import Repair

_NAMES = Repair("rename-pixart", "the file uses the names of the original PixArt code, diffusers its own")
_SPLIT = Repair(
    "split-fused-attention", "the model has query, key and value apart; the file holds their rows in turn"
)
_B, _T, _WB = r"blocks\.(\d+)", r"transformer_blocks.\1", r"\.(weight|bias)"
_EMB = "adaln_single.emb."


def _mlp(name: str, own: str) -> tuple[Rewrite, Rewrite]:
    return (
        Rewrite(rf"{name}\.mlp\.0{_WB}", (rf"{_EMB}{own}.linear_1.\1",), _NAMES),
        Rewrite(rf"{name}\.mlp\.2{_WB}", (rf"{_EMB}{own}.linear_2.\1",), _NAMES),
    )


_ORIGINAL = (
    Rewrite(rf"x_embedder\.proj{_WB}", (r"pos_embed.proj.\1",), _NAMES),
    Rewrite(rf"y_embedder\.y_proj\.fc([12]){_WB}", (r"caption_projection.linear_\1.\2",), _NAMES),
    *_mlp("t_embedder", "timestep_embedder"),
    *_mlp("csize_embedder", "resolution_embedder"),
    *_mlp("ar_embedder", "aspect_ratio_embedder"),
    Rewrite(rf"t_block\.1{_WB}", (r"adaln_single.linear.\1",), _NAMES),
    Rewrite(rf"{_B}\.scale_shift_table", (f"{_T}.scale_shift_table",), _NAMES),
    Rewrite(rf"{_B}\.attn\.qkv{_WB}", tuple(rf"{_T}.attn1.to_{p}.\2" for p in "qkv"), _SPLIT),
    Rewrite(rf"{_B}\.attn\.proj{_WB}", (rf"{_T}.attn1.to_out.0.\2",), _NAMES),
    Rewrite(rf"{_B}\.cross_attn\.q_linear{_WB}", (rf"{_T}.attn2.to_q.\2",), _NAMES),
    Rewrite(rf"{_B}\.cross_attn\.kv_linear{_WB}", tuple(rf"{_T}.attn2.to_{p}.\2" for p in "kv"), _SPLIT),
    Rewrite(rf"{_B}\.cross_attn\.proj{_WB}", (rf"{_T}.attn2.to_out.0.\2",), _NAMES),
    Rewrite(rf"{_B}\.mlp\.fc1{_WB}", (rf"{_T}.ff.net.0.proj.\2",), _NAMES),
    Rewrite(rf"{_B}\.mlp\.fc2{_WB}", (rf"{_T}.ff.net.2.\2",), _NAMES),
    Rewrite(rf"final_layer\.linear{_WB}", (r"proj_out.\1",), _NAMES),
    Rewrite(r"final_layer\.scale_shift_table", ("scale_shift_table",), _NAMES),
)
_DIFFUSERS = (
    same(r"scale_shift_table|transformer_blocks\.\d+\.(?:scale_shift_table|(?:attn[12]|ff)\..+)"),
    same(r"(?:pos_embed\.proj|proj_out)\.(?:weight|bias)|(?:adaln_single|caption_projection)\.linear.*"),
    same(r"adaln_single\.emb\.(?:timestep|resolution|aspect_ratio)_embedder\.linear_[12]\.(?:weight|bias)"),
)

LAYOUTS = (
    Layout(
        "diffusers",
        "PixArtTransformer2DModel",
        has("adaln_single.linear.weight", "caption_projection.linear_1.weight", "pos_embed.proj.weight"),
        "only PixArt has one shared modulation beside a caption projection",
        _DIFFUSERS,
        (
            Drop(r"pos_embed\.pos_embed", "the model computes its positions", stock_ignores=True),
            Drop(r"caption_projection\.y_embedding", "the caption of no words is only for training", True),
        ),
        "transformer",
    ),
    Layout(
        "original",
        "PixArtTransformer2DModel",
        has("blocks.0.attn.qkv.weight", "blocks.0.cross_attn.kv_linear.weight", "t_block.1.weight"),
        "only PixArt has cross attention with key and value fused beside one shared modulation",
        _ORIGINAL,
        (
            Drop(r"pos_embed", "the model computes its positions"),
            Drop(r"y_embedder\.y_embedding", "the caption of no words is only for training"),
        ),
        "transformer",
    ),
)
