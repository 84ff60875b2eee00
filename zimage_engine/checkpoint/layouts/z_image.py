"""How the tensors of Z-Image's denoiser are arranged in files."""

from __future__ import annotations

from zimage_engine.checkpoint.layouts.rewrite import Drop, Layout, Rewrite, both, has, lacks, same
from zimage_engine.checkpoint.repair import Repair

_BLOCK = r"((?:layers|noise_refiner|context_refiner)\.\d+)"
_SPLIT = Repair(
    "split-fused-qkv", "the model has query, key and value apart; the file holds their rows in turn"
)
_NORMS = Repair("rename-norms", "the model calls the norms of query and key norm_q and norm_k")
_NAMES = Repair("rename-single-file", "single files use the names of the original code, diffusers its own")
_PADS = Repair("shape-pad-tokens", "the model holds each pad token as one row of a matrix")

_ROWS = (
    same(
        _BLOCK.replace("(", "(?:", 1)
        + r"\.(?:feed_forward\.w[123]\.weight|(?:attention|ffn)_norm[12]\.weight"
        r"|adaLN_modulation\.0\.(?:weight|bias)|attention\.(?:to_[qkv]|norm_[qk])\.weight"
        r"|attention\.to_out\.0\.(?:weight|bias))"
    ),
    same(r"all_(?:x_embedder|final_layer)\.\d+-\d+\..+"),
    same(r"t_embedder\.mlp\.[02]\.(?:weight|bias)"),
    same(r"cap_embedder\.(?:0\.weight|1\.(?:weight|bias))"),
    Rewrite(r"((?:x|cap)_pad_token)", (r"\1",), _PADS, dims=2),
    Rewrite(
        _BLOCK + r"\.attention\.qkv\.weight",
        tuple(rf"\1.attention.to_{part}.weight" for part in "qkv"),
        _SPLIT,
    ),
    Rewrite(_BLOCK + r"\.attention\.([qk])_norm\.weight", (r"\1.attention.norm_\2.weight",), _NORMS),
    Rewrite(_BLOCK + r"\.attention\.out\.(weight|bias)", (r"\1.attention.to_out.0.\2",), _NAMES),
    # The patch of two pixels by two and one frame is the only one that any released Z-Image has.
    Rewrite(r"(x_embedder|final_layer)\.(.+)", (r"all_\1.2-1.\2",), _NAMES),
)
_DROPS = (Drop(r"norm_final\.weight", "the model does not use this norm"),)

LAYOUTS = (
    Layout(
        "diffusers",
        "ZImageTransformer2DModel",
        both(
            has("cap_embedder.1.weight"), lambda shapes: any(n.startswith("all_x_embedder.") for n in shapes)
        ),
        "only Z-Image has a caption embedder beside one patch embedder for each patch size",
        _ROWS,
        _DROPS,
        "transformer",
    ),
    Layout(
        "single file",
        "ZImageTransformer2DModel",
        both(
            has("cap_embedder.1.weight", "x_embedder.weight", "cap_pad_token"),
            lacks("all_x_embedder.", "all_final_layer."),
        ),
        "a Lumina-like denoiser whose captions have a pad token is Z-Image in its original names",
        _ROWS,
        _DROPS,
        "transformer",
    ),
)
