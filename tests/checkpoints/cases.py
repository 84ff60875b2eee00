"""The cases: which healthy model, what was done to it, and what must come of it.

A case loads (and draws what the undamaged model draws) unless `error` says how it is refused. `base`: the
folder that was damaged is named beside the file. `rounding`: stored in another dtype on the way, so that the
picture may differ by that rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.checkpoints import damages as d


def _as_is(folder):
    return folder


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    damage: d.Damage
    repairs: tuple[str, ...] = ()
    error: str = ""
    message: str = ""
    base: bool = False
    rounding: bool = False


def _set(key: str, value: object):
    return lambda content: content.__setitem__(key, value)


def _drop(*keys: str):
    return lambda content: [content.pop(key, None) for key in keys] and None


CORRUPT = "CheckpointDamaged"
Z_MODELS = ("z-image",)
SDXL_MODELS = ("sdxl", "sdxl-lcm")
PIXART_MODELS = ("pixart-alpha", "pixart-alpha-1024", "pixart-sigma")
ALL_MODELS = ("z-image", "z-image-base", *SDXL_MODELS, *PIXART_MODELS)
ONE_OF_EACH = ("z-image", "sdxl", "pixart-sigma")

#: What any family may meet.
ANYWHERE: tuple[tuple[str, d.Damage, dict[str, object]], ...] = (
    ("compiled", d.renamed_keys(lambda n: f"_orig_mod.{n}"), {"repairs": ("strip-compile-prefix",)}),
    ("parallel", d.renamed_keys(lambda n: f"module.{n}"), {"repairs": ("strip-parallel-prefix",)}),
    (
        "compiled-and-parallel",
        d.renamed_keys(lambda n: f"module._orig_mod.{n}"),
        {"repairs": ("strip-compile-prefix", "strip-parallel-prefix")},
    ),
    (
        "compiled-inside",
        d.renamed_keys(lambda n: n.replace(".", "._orig_mod.", 1)),
        {"repairs": ("strip-compile-prefix",)},
    ),
    (
        "container-prefix",
        d.renamed_keys(lambda n: f"model.diffusion_model.{n}"),
        {"repairs": ("strip-container-prefix",)},
    ),
    ("index-missing", d.shards_without_index, {"repairs": ("rebuild-shard-index",)}),
    ("shards-in-two-forms", d.mixed_shards, {"repairs": ("rebuild-shard-index", "rewrite-pickle")}),
    ("index-names-absent-files", d.index_names_absent_files, {"repairs": ("rebuild-shard-index",)}),
    ("weights-renamed", d.renamed_weights, {"repairs": ("link-under-stock-name",)}),
    ("float32-stored", d.retyped(torch.float32), {}),
    ("mixed-dtypes", d.retyped(torch.float32, every=2), {}),
    ("float16-variant-only", d.variant_only("fp16"), {}),
    ("pickled", d.pickled(), {}),
    ("pickled-in-a-wrapper", d.pickled(wrapper="state_dict"), {"repairs": ("strip-state-dict",)}),
    ("model-index-missing", d.without("model_index.json"), {"repairs": ("write-model-index",)}),
    (
        "pipeline-class-unknown",
        d.edited("model_index.json", _set("_class_name", "MyOwnTurboPipeline")),
        {"repairs": ("complete-model-index",)},
    ),
    ("vae-config-missing", d.without("vae/config.json"), {"repairs": ("write-config",)}),
    ("truncated", d.truncated, {"error": CORRUPT, "message": "bytes where its header announces"}),
    ("shard-gone", d.shard_gone, {"error": CORRUPT, "message": "missing"}),
    ("evil-pickle", d.evil_pickle, {"error": CORRUPT, "message": "would run code"}),
    ("index-leaves-folder", d.index_leaves_folder, {"error": CORRUPT, "message": "not a file beside it"}),
    ("link-leaves-folder", d.link_leaves_folder, {"error": CORRUPT, "message": "leads out of"}),
    ("lying-header", d.lying_header, {"error": CORRUPT, "message": ""}),
    (
        "tensor-of-wrong-size",
        d.changed_tensor(r"(attn1|attention)\.to_q\.weight", lambda t: t[:-1]),
        {"error": CORRUPT, "message": "expected"},
    ),
    (
        "tensor-missing",
        d.changed_tensor(r"(attn1|attention)\.to_k\.weight", lambda t: None),
        {"error": CORRUPT, "message": "missing"},
    ),
    (
        "not-a-number",
        d.changed_tensor(r"(attn1|attention)\.to_v\.weight", lambda t: t * float("nan")),
        {"error": CORRUPT, "message": "NaN"},
    ),
    # two and three together
    (
        "compiled-and-index-missing",
        d.chained(d.renamed_keys(lambda n: f"_orig_mod.{n}"), d.shards_without_index),
        {"repairs": ("strip-compile-prefix", "rebuild-shard-index")},
    ),
    (
        "model-index-and-vae-config-missing",
        d.without("model_index.json", "vae/config.json"),
        {"repairs": ("write-model-index", "write-config")},
    ),
    (
        "compiled-float32-in-two-forms",
        d.chained(
            d.renamed_keys(lambda n: f"module._orig_mod.{n}"), d.retyped(torch.float32), d.mixed_shards
        ),
        {"repairs": ("strip-compile-prefix", "strip-parallel-prefix", "rebuild-shard-index")},
    ),
    (
        "wrapped-pickle-without-model-index",
        d.chained(d.pickled(wrapper="state_dict"), d.without("model_index.json")),
        {"repairs": ("strip-state-dict", "write-model-index")},
    ),
)

_Z_SINGLE = ("convert-z-image-single-file",)
ONLY_Z_IMAGE: tuple[tuple[str, d.Damage, dict[str, object]], ...] = (
    ("single-layout", d.z_image_single_layout(), {}),
    ("single-layout-prefixed", d.z_image_single_layout("model.diffusion_model."), {}),
    ("single-file-with-base", d.z_image_single_file("diffusion_model."), {"base": True}),
    (
        "single-file-all-in-one",
        d.z_image_single_file("model.diffusion_model.", text_and_vae=True),
        {"base": True},
    ),
    (
        "single-file-alone",
        d.z_image_single_file(),
        {"error": CORRUPT, "message": "--base"},
    ),
    ("gguf-with-base", d.z_image_gguf, {"base": True, "rounding": True}),
    ("single-layout-fp8", d.z_image_single_layout(fp8="plain"), {"rounding": True}),
    ("single-layout-scaled-fp8", d.z_image_single_layout(fp8="scaled"), {"rounding": True}),
    (
        "flat-pad-tokens",
        d.chained(
            d.changed_tensor("cap_pad_token", lambda t: t[0]), d.changed_tensor("x_pad_token", lambda t: t[0])
        ),
        {},
    ),
    ("training-leftovers", d.added_tensors(**{"num_updates": torch.tensor(5)}), {}),
    ("scheduler-missing", d.without("scheduler"), {"repairs": ("write-scheduler-config",)}),
    (
        "scheduler-without-shift",
        d.edited("scheduler/scheduler_config.json", _drop("shift")),
        {"repairs": ("complete-scheduler-config",)},
    ),
    (
        "transformer-config-missing",
        d.without("transformer/config.json"),
        {"repairs": ("write-config",)},
    ),
    (
        "compiled-single-layout",
        d.chained(d.z_image_single_layout(), d.renamed_keys(lambda n: f"_orig_mod.{n}")),
        {"repairs": ("strip-compile-prefix",)},
    ),
    (
        "single-layout-without-shift-or-model-index",
        d.chained(
            d.z_image_single_layout(),
            d.without("model_index.json"),
            d.edited("scheduler/scheduler_config.json", _drop("shift")),
        ),
        {"repairs": ("write-model-index", "complete-scheduler-config")},
    ),
)

ONLY_SDXL: tuple[tuple[str, d.Damage, dict[str, object]], ...] = (
    ("single-file-with-base", d.sdxl_single_file, {"base": True}),
    ("single-file-alone", d.sdxl_single_file, {"error": CORRUPT, "message": "--base"}),
    ("ldm-unet", d.ldm_unet_layout, {}),
    ("ldm-vae", d.ldm_vae_layout, {}),
    ("ldm-unet-compiled", d.chained(d.ldm_unet_layout, d.renamed_keys(lambda n: f"_orig_mod.{n}")), {}),
)

ONLY_PIXART: tuple[tuple[str, d.Damage, dict[str, object]], ...] = (
    ("original-layout", d.original_pixart_layout(), {}),
    ("original-layout-in-a-checkpoint", d.original_pixart_layout("state_dict"), {}),
)

CASES: tuple[Case, ...] = (
    *(Case(f"{model}-healthy", model, _as_is) for model in ALL_MODELS),
    *(
        Case(f"{model}-{name}", model, damage, **facts)  # type: ignore[arg-type]
        for model in ONE_OF_EACH
        for name, damage, facts in ANYWHERE
    ),
    *(
        Case(f"{model}-{name}", model, damage, **facts)  # type: ignore[arg-type]
        for model in SDXL_MODELS
        for name, damage, facts in ONLY_SDXL
    ),
    *(
        Case(f"{model}-{name}", model, damage, **facts)  # type: ignore[arg-type]
        for model in PIXART_MODELS
        for name, damage, facts in ONLY_PIXART
    ),
    *(Case(f"z-image-{name}", "z-image", damage, **facts) for name, damage, facts in ONLY_Z_IMAGE),  # type: ignore[arg-type]
)
