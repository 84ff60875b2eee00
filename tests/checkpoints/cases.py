"""The cases: which healthy model, what was done to it, and what must come of it.

A case loads (and draws what the undamaged model draws) unless `error` says how it is refused. `base`: the
folder that was damaged is named beside the file. `family`: said by the caller. `rounding`: stored in another
dtype on the way, so that the picture may differ by that rounding. `together`: two or three damages at once.
`stock_may_not_end`: stock diffusers is tried on it in a process of its own, with limits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tests.checkpoints import damages as d
from tests.checkpoints.damages_text_files import TEXT_FILES, cut_off


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
    family: str = ""
    rounding: bool = False
    together: bool = False
    stock_may_not_end: bool = False

    @property
    def title(self) -> str:
        """What was done, whichever model it was done to."""
        return self.name.removeprefix(f"{self.model}-")


def _set(key: str, value: object):
    return lambda content: content.__setitem__(key, value)


def _drop(*keys: str):
    return lambda content: [content.pop(key, None) for key in keys] and None


CORRUPT = "CheckpointDamaged"
Z_MODELS = ("z-image",)
#: Of UNets in the layout of the latent-diffusion code: it has no net without a middle.
SDXL_MODELS = ("sdxl", "sdxl-lcm", "sdxl-turbo", "sdxl-mini", "sdxl-mini-lcm")
WITHOUT_MIDDLE = ("sdxl-no-middle", "sdxl-no-middle-lcm")
PIXART_MODELS = ("pixart-alpha", "pixart-alpha-1024", "pixart-sigma")
ALL_MODELS = ("z-image", "z-image-base", *SDXL_MODELS, *WITHOUT_MIDDLE, *PIXART_MODELS)
ONE_OF_EACH = ("z-image", "sdxl", "pixart-sigma")
#: Each family and each structure once.
MOST_MODELS = (
    *("z-image", "z-image-base", "sdxl", "sdxl-lcm", "sdxl-turbo", "sdxl-mini", "sdxl-no-middle-lcm"),
    *PIXART_MODELS,
)
SOME_MODELS = ("z-image", "sdxl", "sdxl-turbo", "sdxl-no-middle-lcm", "pixart-alpha-1024", "pixart-sigma")

#: What any model meets sooner or later.
COMMON: tuple[tuple[str, d.Damage, dict[str, object]], ...] = (
    ("compiled", d.renamed_keys(lambda n: f"_orig_mod.{n}"), {"repairs": ("strip-compile-prefix",)}),
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
    ("averaged-beside-plain", d.averaged(), {"repairs": ("take-averaged-weights",)}),
    ("model-index-missing", d.without("model_index.json"), {"repairs": ("write-model-index",)}),
    ("vae-config-missing", d.without("vae/config.json"), {"repairs": ("write-config",)}),
    ("denoiser-config-missing", d.without_denoiser_config, {"repairs": ("write-config",)}),
    ("truncated", d.truncated, {"error": CORRUPT, "message": "bytes where its header announces"}),
    ("shard-gone", d.shard_gone, {"error": CORRUPT, "message": "missing"}),
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
)

#: Met less often; what mends them depends on no model.
RARE: tuple[tuple[str, d.Damage, dict[str, object]], ...] = (
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
        "pipeline-class-unknown",
        d.edited("model_index.json", _set("_class_name", "MyOwnTurboPipeline")),
        {"repairs": ("complete-model-index",)},
    ),
    ("evil-pickle", d.evil_pickle, {"error": CORRUPT, "message": "would run code"}),
    ("index-leaves-folder", d.index_leaves_folder, {"error": CORRUPT, "message": "not a file beside it"}),
    ("link-leaves-folder", d.link_leaves_folder, {"error": CORRUPT, "message": "leads out of"}),
    ("lying-header", d.lying_header, {"error": CORRUPT, "message": ""}),
)

#: Two and three together.
COMBINED: tuple[tuple[str, d.Damage, dict[str, object]], ...] = (
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
    (
        "averaged-and-vae-config-missing",
        d.chained(d.averaged(), d.without("vae/config.json")),
        {"repairs": ("take-averaged-weights", "write-config")},
    ),
    (
        "prefixed-float32-without-denoiser-config",
        d.chained(
            d.renamed_keys(lambda n: f"diffusion_model.{n}"),
            d.retyped(torch.float32),
            d.without_denoiser_config,
        ),
        {"repairs": ("strip-container-prefix", "write-config")},
    ),
    (
        "renamed-weights-without-vae-config",
        d.chained(d.renamed_weights, d.without("vae/config.json")),
        {"repairs": ("link-under-stock-name", "write-config")},
    ),
    (
        "parallel-mixed-dtypes-in-float16-variant",
        d.chained(
            d.renamed_keys(lambda n: f"module.{n}"), d.retyped(torch.float32, every=2), d.variant_only("fp16")
        ),
        {"repairs": ("strip-parallel-prefix",)},
    ),
    (
        "float16-variant-without-model-index",
        d.chained(d.variant_only("fp16"), d.without("model_index.json")),
        {"repairs": ("write-model-index",)},
    ),
    (
        "compiled-and-truncated",
        d.chained(d.renamed_keys(lambda n: f"_orig_mod.{n}"), d.truncated),
        {"error": CORRUPT, "message": "bytes where its header announces"},
    ),
    (
        "prefixed-and-tensor-missing",
        d.chained(
            d.changed_tensor(r"(attn1|attention)\.to_k\.weight", lambda t: None),
            d.renamed_keys(lambda n: f"model.diffusion_model.{n}"),
        ),
        {"error": CORRUPT, "message": "missing"},
    ),
    (
        "wrong-size-without-index",
        d.chained(
            d.changed_tensor(r"(attn1|attention)\.to_q\.weight", lambda t: t[:-1]), d.shards_without_index
        ),
        {"error": CORRUPT, "message": "expected"},
    ),
)
#: What depends on the structure of the denoiser.
OF_STRUCTURE = tuple(row for row in COMMON if row[0] in ("compiled", "denoiser-config-missing"))

TEXT_CONFIG_MODELS = ("sdxl", "sdxl-mini", "pixart-alpha", "pixart-sigma")
TEXT_CONFIG = (
    (
        "text-encoder-config-missing",
        d.without("text_encoder/config.json", "text_encoder_2/config.json"),
        {"repairs": ("write-config",)},
    ),
)

#: Without a config stock transformers builds the class's default, which has 8 billion numbers.
WITHOUT_END = (
    Case(
        "z-image-text-encoder-config-missing",
        "z-image",
        d.without("text_encoder/config.json"),
        ("write-config",),
        stock_may_not_end=True,
    ),
)

#: Fields that the family's published schedule has and the class's defaults may not.
SCHEDULER_FIELDS: dict[str, tuple[str, ...]] = {
    "z-image": ("num_train_timesteps", "use_dynamic_shifting"),
    "sdxl": ("beta_schedule", "beta_start", "steps_offset"),
    "sdxl-lcm": ("set_alpha_to_one", "original_inference_steps", "clip_sample"),
    "sdxl-turbo": ("beta_schedule", "beta_end", "steps_offset"),
    "sdxl-mini": ("beta_schedule", "prediction_type"),
    "sdxl-no-middle-lcm": ("set_alpha_to_one", "timestep_spacing"),
    "pixart-alpha": ("beta_schedule", "beta_end"),
    "pixart-alpha-1024": ("solver_order", "algorithm_type"),
    "pixart-sigma": ("beta_schedule", "prediction_type", "num_train_timesteps"),
}

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
    (
        "compiled-single-layout",
        d.chained(d.z_image_single_layout(), d.renamed_keys(lambda n: f"_orig_mod.{n}")),
        {"repairs": ("strip-compile-prefix",), "together": True},
    ),
)

ONLY_SDXL: tuple[tuple[str, d.Damage, dict[str, object]], ...] = (
    ("single-file-with-base", d.sdxl_single_file, {"base": True}),
    ("single-file-alone", d.sdxl_single_file, {"error": CORRUPT, "message": "--base"}),
    ("ldm-unet", d.ldm_unet_layout, {}),
    ("ldm-vae", d.ldm_vae_layout, {}),
    (
        "ldm-unet-compiled",
        d.chained(d.ldm_unet_layout, d.renamed_keys(lambda n: f"_orig_mod.{n}")),
        {"together": True},
    ),
    (
        "ldm-unet-without-config-or-model-index",
        d.chained(d.ldm_unet_layout, d.without("unet/config.json", "model_index.json")),
        {"repairs": ("rename-ldm-unet", "write-config", "write-model-index"), "together": True},
    ),
)

ONLY_PIXART: tuple[tuple[str, d.Damage, dict[str, object]], ...] = (
    ("original-layout", d.original_pixart_layout(), {}),
    ("original-layout-in-a-checkpoint", d.original_pixart_layout("state_dict"), {}),
    (
        "original-layout-averaged-without-config",
        d.chained(d.original_pixart_layout("state_dict_ema"), d.without_denoiser_config),
        {"repairs": ("take-averaged-weights", "write-config"), "together": True},
    ),
)

#: What alone tells two families apart is gone: whoever loads it is asked which it is. Model, its family,
#: the damage, and what mends it once the family was said.
SCHEDULER = "scheduler/scheduler_config.json"
FAMILY_ASKED: tuple[tuple[str, str, str, d.Damage, str], ...] = (
    *(
        (model, family, title, damage, repair)
        for model, family in (("z-image", "z-image-turbo"), ("z-image-base", "z-image"))
        for title, damage, repair in (
            ("scheduler-missing", d.without("scheduler"), "write-scheduler-config"),
            ("scheduler-config-garbled", cut_off(SCHEDULER), "write-scheduler-config"),
            ("shift-missing", d.edited(SCHEDULER, _drop("shift")), "complete-scheduler-config"),
        )
    ),
    ("sdxl-turbo", "sdxl-turbo", "scheduler-missing", d.without("scheduler"), "write-scheduler-config"),
    (
        *("sdxl-turbo", "sdxl-turbo", "spacing-missing"),
        *(d.edited(SCHEDULER, _drop("timestep_spacing")), "complete-scheduler-config"),
    ),
    (
        *("pixart-alpha", "pixart-alpha-512", "model-index-and-vae-config-missing"),
        *(d.without("model_index.json", "vae/config.json"), "write-model-index"),
    ),
    (
        *("z-image", "z-image-turbo", "single-layout-without-shift-or-model-index"),
        d.chained(
            d.z_image_single_layout(), d.without("model_index.json"), d.edited(SCHEDULER, _drop("shift"))
        ),
        "complete-scheduler-config",
    ),
    (
        *("sdxl-turbo", "sdxl-turbo", "scheduler-and-model-index-missing"),
        *(d.without("scheduler", "model_index.json"), "write-scheduler-config"),
    ),
)
#: The list of components still names the class, and of that class only one family was published.
CLASS_IS_LISTED = (
    Case("sdxl-scheduler-missing", "sdxl", d.without("scheduler"), ("write-scheduler-config",)),
    Case("sdxl-lcm-scheduler-missing", "sdxl-lcm", d.without("scheduler"), ("write-scheduler-config",)),
    Case(
        "pixart-sigma-scheduler-missing", "pixart-sigma", d.without("scheduler"), ("write-scheduler-config",)
    ),
    Case(
        "sdxl-of-another-sampler-scheduler-missing",
        "sdxl",
        d.chained(
            d.edited("model_index.json", _set("scheduler", ["diffusers", "DPMSolverMultistepScheduler"])),
            d.without("scheduler"),
        ),
        error=CORRUPT,
        message="--family sdxl",
        together=True,
    ),
)


def _cases(models: tuple[str, ...], rows: tuple[tuple[str, d.Damage, dict[str, object]], ...]) -> list[Case]:
    return [
        Case(f"{model}-{title}", model, damage, **facts)  # type: ignore[arg-type]
        for model in models
        for title, damage, facts in rows
    ]


def _scheduler_fields_missing(model: str, fields: tuple[str, ...]) -> Case:
    damage = d.edited("scheduler/scheduler_config.json", _drop(*fields))
    return Case(f"{model}-scheduler-fields-missing", model, damage, ("complete-scheduler-config",))


CASES: tuple[Case, ...] = (
    *(Case(f"{model}-healthy", model, _as_is) for model in ALL_MODELS),
    *_cases(MOST_MODELS, COMMON),
    *WITHOUT_END,
    *_cases(ONE_OF_EACH, RARE),
    *_cases(TEXT_CONFIG_MODELS, TEXT_CONFIG),
    *(replace(case, together=True) for case in _cases(SOME_MODELS, COMBINED)),
    *(_scheduler_fields_missing(model, fields) for model, fields in SCHEDULER_FIELDS.items()),
    *_cases(SDXL_MODELS, ONLY_SDXL),
    *_cases(PIXART_MODELS, ONLY_PIXART),
    *_cases(Z_MODELS, ONLY_Z_IMAGE),
    *_cases(("sdxl-mini-lcm", "sdxl-no-middle"), OF_STRUCTURE),
    *(
        Case(f"{model}-{title}-family-said", model, damage, (repair,), family=family)
        for model, family, title, damage, repair in FAMILY_ASKED
    ),
    *(
        Case(
            f"{model}-{title}",
            model,
            damage,
            error="UnknownFamily",
            message="family=",
            together="-and-" in title,
        )
        for model, _, title, damage, _ in FAMILY_ASKED
    ),
    *CLASS_IS_LISTED,
    *(case for models, rows in TEXT_FILES for case in _cases(models, rows)),
)
