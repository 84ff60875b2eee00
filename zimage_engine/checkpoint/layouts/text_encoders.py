"""How the tensors of CLIP, Qwen3 and T5 text encoders are arranged in files."""

from __future__ import annotations

from zimage_engine.checkpoint.layouts.rewrite import Drop, Layout, Rewrite, both, has, lacks, same
from zimage_engine.checkpoint.repair import Repair

_OPEN = Repair("rename-open-clip", "the file uses OpenCLIP's names, transformers its own")
_SPLIT = Repair(
    "split-in-projection", "transformers has query, key and value apart; OpenCLIP holds their rows in turn"
)
_TURN = Repair("turn-text-projection", "OpenCLIP multiplies from the right, a linear layer from the left")
_WB, _L, _T = r"\.(weight|bias)", r"resblocks\.(\d+)", r"text_model.encoder.layers.\1"
_CLIP_NAMES = (
    r"(?:text_model\.)?(embeddings\.(?:token|position)_embedding\.weight|final_layer_norm\.(?:weight|bias)"
    r"|encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12]|layer_norm[12])\.(?:weight|bias))"
)
_BUFFERS = Drop(
    r"(?:text_model\.)?embeddings\.position_ids|(?:.+\.)?rotary_emb\.inv_freq|attn_mask|logit_scale",
    "the model computes it or does not use it",
    stock_ignores=True,
)
_OPEN_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    r"mlp\.c_fc": "mlp.fc1",
    r"mlp\.c_proj": "mlp.fc2",
}
_T5_WORDS, _T5_DOUBLE = "shared.weight", r"encoder\.embed_tokens\.weight"
_T5_ROWS = (
    same(r"encoder\.final_layer_norm\.weight"),
    same(
        r"encoder\.block\.\d+\.layer\.(?:0\.SelfAttention\.(?:[qkvo]|relative_attention_bias)"
        r"|1\.DenseReluDense\.w[io](?:_[01])?|[01]\.layer_norm)\.weight"
    ),
)
_T5_DECODER = Drop(
    r"decoder\..+|lm_head\.weight", "it writes text, which drawing does not need", stock_ignores=True
)
_MARK = "encoder.layers.0.self_attn.q_proj.weight"

LAYOUTS = (
    Layout(
        "transformers",
        "CLIPTextModel",
        both(
            lambda shapes: f"text_model.{_MARK}" in shapes or _MARK in shapes,
            lacks("text_projection.", "vision_model."),
        ),
        "CLIP's layers without a projection are its plain text model",
        (Rewrite(_CLIP_NAMES, (r"\1",)),),
        (_BUFFERS,),
        stock_prefixes=("", "text_model."),
    ),
    Layout(
        "transformers",
        "CLIPTextModelWithProjection",
        both(
            lambda shapes: f"text_model.{_MARK}" in shapes or _MARK in shapes,
            has("text_projection.weight"),
            lacks("vision_model."),
        ),
        "CLIP's layers with a projection are its text model with projection",
        (Rewrite(_CLIP_NAMES, (r"text_model.\1",)), same(r"text_projection\.weight")),
        (_BUFFERS,),
        stock_renames=((r"((?:embeddings|encoder|final_layer_norm)\..+)", r"text_model.\1"),),
    ),
    Layout(
        "OpenCLIP",
        "CLIPTextModelWithProjection",
        both(has("resblocks.0.attn.in_proj_weight", "token_embedding.weight"), lacks("visual.")),
        "numbered residual blocks with one fused projection over a token embedding are OpenCLIP's text model",
        (
            Rewrite(r"positional_embedding", ("text_model.embeddings.position_embedding.weight",), _OPEN),
            Rewrite(r"token_embedding\.weight", ("text_model.embeddings.token_embedding.weight",), _OPEN),
            Rewrite(rf"ln_final{_WB}", (r"text_model.final_layer_norm.\1",), _OPEN),
            Rewrite(r"text_projection", ("text_projection.weight",), _TURN, transpose=True),
            same(r"text_projection\.weight"),
            Rewrite(
                rf"{_L}\.attn\.in_proj_(weight|bias)",
                tuple(rf"{_T}.self_attn.{p}_proj.\2" for p in "qkv"),
                _SPLIT,
            ),
            Rewrite(rf"{_L}\.attn\.out_proj{_WB}", (rf"{_T}.self_attn.out_proj.\2",), _OPEN),
            *(Rewrite(rf"{_L}\.{old}{_WB}", (rf"{_T}.{new}.\2",), _OPEN) for old, new in _OPEN_PARTS.items()),
        ),
        (_BUFFERS,),
    ),
    Layout(
        "transformers",
        "Qwen3Model",
        has("embed_tokens.weight", "layers.0.self_attn.q_norm.weight", "layers.0.mlp.gate_proj.weight"),
        "gated layers whose query and key have norms are Qwen3",
        (
            same(r"(?:embed_tokens|norm)\.weight"),
            same(
                r"layers\.\d+\.(?:self_attn\.(?:[qkvo]_proj|[qk]_norm)|mlp\.(?:gate|up|down)_proj"
                r"|input_layernorm|post_attention_layernorm)\.weight"
            ),
        ),
        (
            _BUFFERS,
            Drop(r"lm_head\.weight", "it writes text, which drawing does not need", stock_ignores=True),
        ),
        stock_prefixes=("", "model."),
    ),
    Layout(
        "transformers",
        "T5EncoderModel",
        has("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight", _T5_WORDS),
        "blocks of self attention under an encoder are T5",
        (same(rf"shared\.weight|{_T5_DOUBLE}"), *_T5_ROWS),
        (_T5_DECODER,),
    ),
    Layout(
        "transformers, words under the encoder",
        "T5EncoderModel",
        both(
            has("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"),
            lacks(_T5_WORDS),
        ),
        "blocks of self attention under an encoder are T5, and the encoder's words are the shared ones",
        (Rewrite(_T5_DOUBLE, (_T5_WORDS,)), *_T5_ROWS),
        (_T5_DECODER,),
        stock_renames=((_T5_DOUBLE, _T5_WORDS),),
    ),
)
