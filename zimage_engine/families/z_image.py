"""Z-Image and Z-Image-Turbo: a single-stream transformer on Qwen3 text states and a Flux-like VAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zimage_engine.checkpoint.match import config_class, config_has, config_is, config_lacks, pipeline_class
from zimage_engine.families.family import ComponentRow, Editing, GoodRange, ModelFamily

#: `max_sequence_length` of diffusers' ZImagePipeline: longer prompts are cut there.
PIPELINE_TOKENS = 512
#: The transformer pads captions to a multiple of this (SEQ_MULTI_OF in diffusers).
CAPTION_MULTIPLE = 32
#: The maker trained around 1024; attention's work grows with the fourth power of the side.
MAX_SIDE_PX = 2048


def to_pipeline_guidance(guidance_scale: float) -> float:
    """diffusers computes `pos + g (pos - neg)`, we speak of `neg + w (pos - neg)`: g = w - 1, 0 is off."""
    return max(0.0, guidance_scale - 1.0)


def max_side_px(transformer: Mapping[str, Any], size_multiple: int) -> int:
    """One token is `size_multiple` pixels wide; the rotary tables hold axes_lens[1:] tokens."""
    lengths = transformer.get("axes_lens") or ()
    return min([MAX_SIDE_PX, *(int(length) * size_multiple for length in lengths[1:])])


def caption_tokens(transformer: Mapping[str, Any]) -> int:
    """Caption positions count from 1 and the picture takes the one after the padded caption."""
    lengths = transformer.get("axes_lens") or (PIPELINE_TOKENS + 2,)
    room = (int(lengths[0]) - 2) // CAPTION_MULTIPLE * CAPTION_MULTIPLE
    return min(PIPELINE_TOKENS, room)


_STRUCTURE = (
    pipeline_class("ZImagePipeline")
    & config_class("transformer", "ZImageTransformer2DModel")
    & config_has("transformer", "cap_feat_dim")
    # Set only for the Omni models, which take pictures as well and have a pipeline of their own.
    & config_lacks("transformer", "siglip_feat_dim")
    & config_class("scheduler", "FlowMatchEulerDiscreteScheduler")
)

_COMPONENTS = {
    "scheduler": ComponentRow("diffusers", ("FlowMatchEulerDiscreteScheduler",)),
    "text_encoder": ComponentRow(
        "transformers",
        ("Qwen3Model", "Qwen3ForCausalLM"),
        {
            "rope_theta": 1_000_000,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "attention_bias": False,
            "max_position_embeddings": 40_960,
            "bos_token_id": 151_643,
            "eos_token_id": 151_645,
            "tie_word_embeddings": True,
        },
    ),
    "tokenizer": ComponentRow(
        "transformers",
        ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": 131_072,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
    ),
    "transformer": ComponentRow(
        "diffusers",
        ("ZImageTransformer2DModel",),
        # The class's default for axes_lens is [1024, 512, 512]: shorter captions than it was trained for.
        {
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "norm_eps": 1e-5,
            "qk_norm": True,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
        },
    ),
    "vae": ComponentRow(
        "diffusers",
        ("AutoencoderKL",),
        {
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "act_fn": "silu",
            "norm_num_groups": 32,
            "sample_size": 1024,
            "force_upcast": True,
        },
    ),
}

#: What both published models' schedulers say beside the shift.
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
}

Z_IMAGE_TURBO = ModelFamily(
    name="z-image-turbo",
    title="Z-Image-Turbo",
    fingerprint=_STRUCTURE & config_is("scheduler", "shift", 3.0),
    pipeline_class="ZImagePipeline",
    # The class defaults are Stable Diffusion's scaling and no shift at all, and the pipeline adds the shift.
    needed_config=("vae.scaling_factor", "vae.shift_factor"),
    denoiser="transformer",
    # Activations reach 6.6e4, near float16's end (65504): that gives black pictures, bfloat16 holds.
    dtype="bfloat16",
    default_steps=8,
    default_guidance_scale=1.8,
    good_steps=GoodRange(
        4, 12, below="only blobs, the detail is not drawn", above="blurred and desaturated, and slower"
    ),
    good_guidance=GoodRange(1.5, 2.5, below="grey and weak", above="blown highlights and torn edges"),
    # Seen with the demo model: at twice its side things are repeated or missing; at 1.25 a little, in scenes.
    # Not measured with the published model.
    good_side_ratio=(0.7, 1.3),
    to_pipeline_guidance=to_pipeline_guidance,
    native_side_px=1024,
    max_side_px=max_side_px,
    caption_tokens=caption_tokens,
    components=_COMPONENTS,
    # Distilled at shift 3.0: without it every step lands on the wrong noise level.
    scheduler_defaults={**_SCHEDULER, "shift": 3.0},
    published_id="Tongyi-MAI/Z-Image-Turbo",
    editing=Editing(
        image_to_image="ZImageImg2ImgPipeline",
        inpaint="ZImageInpaintPipeline",
        strength=0.65,
        masked_strength=0.9,
        variation_strength=0.3,
        # On the CPU of an AMD EPYC.
        because="of twelve variations with the demo model all showed what their picture shows at 0.3 and "
        "eight at 0.4, by `python -m tests.benchmarks.edit_strength --strengths 0.3 0.4 --pictures 6`; edits "
        "of its pictures follow their prompt at the other two, as the tests show. Not measured with the "
        "published model",
    ),
    # Attention and feed-forward, nearly all of the weights. In the demo model the embedder of the picture and
    # the final layer move pictures far for how small they are; modulation and the other embedders meet one
    # row a picture, or its prompt alone, where a product in a small type is no quicker. To leave out a block
    # changes less than rounding does: `python -m tests.benchmarks.quantisation --parts`.
    quantised_layers=r"(layers|noise_refiner|context_refiner)\.\d+"
    r"\.(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])",
    has_chat_template=True,
    can_end_guidance=True,
)

Z_IMAGE = replace(
    Z_IMAGE_TURBO,
    name="z-image",
    title="Z-Image",
    fingerprint=_STRUCTURE & config_is("scheduler", "shift", 6.0),
    # Commonly advised: 28 to 50 steps and 3 to 5 in the pipeline's terms, so w is one more. Not measured.
    default_steps=50,
    default_guidance_scale=5.0,
    good_steps=GoodRange(28, 50, below="soft and unfinished", above="slower and no better"),
    good_guidance=GoodRange(4.0, 6.0, below="grey, and off the prompt", above="oversaturated and hard"),
    scheduler_defaults={**_SCHEDULER, "shift": 6.0},
    published_id="Tongyi-MAI/Z-Image",
)
