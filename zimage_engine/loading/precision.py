"""Which dtype a checkpoint may be loaded in: bfloat16 unless asked for another that it is known to bear."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from zimage_engine.errors import DtypeRefused
from zimage_engine.families import ModelFamily
from zimage_engine.loading.found_models import FoundModel

DTYPES = ("bfloat16", "float32", "float16")

#: ComfyUI's probe of Z-Image: below this the norms were trained so that activations stay under 65504.
MAX_FLOAT16_NORM_STD = 0.42

#: A clause about why float16 overflows, or "" where it does not.
_Check = Callable[[Mapping[str, FoundModel]], str]


def dtype_for(family: ModelFamily, dtype: str | None, models: Mapping[str, FoundModel]) -> str:
    """The dtype to load in: `dtype`, or the family's own where it is None.

    float32 holds whatever bfloat16 does. For float16 one tensor of Z-Image is read. Raises DtypeRefused with
    the reason where float16 overflows, and where `dtype` is none of DTYPES.
    """
    if dtype is None or dtype == family.dtype:
        return family.dtype
    if dtype not in DTYPES:
        raise DtypeRefused(f"dtype must be one of {', '.join(DTYPES)}, got {str(dtype)[:80]!r}", "dtype")
    if dtype == "float16":
        because = _FLOAT16[family.pipeline_class](models)
        if because:
            raise DtypeRefused(
                f"{family.title} cannot be drawn in float16: {because}; ask for {family.dtype} or float32",
                "dtype",
            )
    return dtype


def _z_image_overflows(models: Mapping[str, FoundModel]) -> str:
    """Its activations reach 6.6e4 unless it was trained further to stay below; a late norm tells."""
    from zimage_engine.loading.tensor_files import TensorFiles

    model = models["transformer"]
    blocks = {int(match[1]) for name in model.shapes if (match := re.match(r"layers\.(\d+)\.", name))}
    probed = f"layers.{len(blocks) - 2}.ffn_norm1.weight"
    recipe = next((recipe for recipe in model.part.recipes if recipe.name == probed), None)
    if recipe is None:
        return f"there is no {probed} to tell whether its activations stay below float16's end"
    with TensorFiles(model.stored.files) as files:
        values = files.read(recipe.source).float()
    spread = float(values.std())
    if spread < MAX_FLOAT16_NORM_STD:
        return ""
    return (
        f"the spread of {probed} is {spread:.2f}, and only checkpoints below {MAX_FLOAT16_NORM_STD} keep "
        "their activations under float16's end (65504); the others draw black"
    )


def _t5_overflows(models: Mapping[str, FoundModel]) -> str:
    return "its text encoder, T5, overflows"


def _sdxl_vae_overflows(models: Mapping[str, FoundModel]) -> str:
    """diffusers decodes in float32 where the VAE's config says so."""
    if models["vae"].config.get("force_upcast", True):
        return ""
    return "its VAE overflows, and its config says that it is not to be taken to float32 (force_upcast)"


_FLOAT16: Mapping[str, _Check] = {
    "ZImagePipeline": _z_image_overflows,
    "StableDiffusionXLPipeline": _sdxl_vae_overflows,
    "PixArtAlphaPipeline": _t5_overflows,
    "PixArtSigmaPipeline": _t5_overflows,
}
