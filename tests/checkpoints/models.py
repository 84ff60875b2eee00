"""The healthy models that the cases start from, and what each draws."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints.cases import Case
from tests.checkpoints.damages import edit_json
from tests.zimage_engine import tiny_models as tiny
from zimage_engine import Engine, GenerationRequest, ModelLoaderAdapter


def _write_z_image_base(folder: Path) -> Path:
    tiny.write_tiny_z_image(folder, head_dim=128)
    edit_json(folder / "scheduler" / "scheduler_config.json", lambda content: content.update(shift=6.0))
    return folder


#: Said outright: the native size stands in configurations that some cases lack.
SIZE = {"width": 64, "height": 64}

WRITERS: dict[str, Callable[[Path], Path]] = {
    "z-image": partial(tiny.write_tiny_z_image, head_dim=128),
    "z-image-base": _write_z_image_base,
    "sdxl": tiny.write_tiny_sdxl,
    "sdxl-lcm": partial(tiny.write_tiny_sdxl, lcm=True),
    "sdxl-turbo": partial(tiny.write_tiny_sdxl, turbo=True),
    "sdxl-mini": partial(tiny.write_tiny_sdxl, unet=tiny.REDUCED_UNETS["nested"]),
    "sdxl-mini-lcm": partial(tiny.write_tiny_sdxl, lcm=True, unet=tiny.REDUCED_UNETS["nested"]),
    "sdxl-no-middle": partial(tiny.write_tiny_sdxl, unet=tiny.REDUCED_UNETS["no-middle"]),
    "sdxl-no-middle-lcm": partial(tiny.write_tiny_sdxl, lcm=True, unet=tiny.REDUCED_UNETS["no-middle"]),
    "pixart-alpha": partial(tiny.write_tiny_pixart, kind="alpha"),
    "pixart-alpha-1024": partial(tiny.write_tiny_pixart, kind="alpha-1024"),
    "pixart-sigma": partial(tiny.write_tiny_pixart, kind="sigma"),
}


def damaged(case: Case, healthy: Path, folder: Path) -> tuple[Path, Path]:
    """A copy of the healthy model with the damage done: what is to be loaded, and the folder."""
    copy = folder / "model"
    shutil.copytree(healthy, copy)
    return case.damage(copy), copy


def adapter_for(case: Case, path: Path, folder: Path, cache_folder: Path) -> ModelLoaderAdapter:
    base = folder if case.base else None
    return ModelLoaderAdapter(path, family=case.family or None, base=base, cache_folder=cache_folder)


def picture(adapter: ModelLoaderAdapter) -> np.ndarray:
    """What the loaded model draws for one prompt and seed, `(height, width, 3)`."""
    engine = Engine(adapter.load(), adapter.family, "model", "cpu")
    request = GenerationRequest(prompt="a red circle", seed=3, num_inference_steps=2, enhance=False, **SIZE)
    return np.asarray(engine.generate(request).images[0]).astype(np.int16)


def stock_picture(path: Path, adapter: ModelLoaderAdapter) -> np.ndarray:
    """The same by stock diffusers alone: `from_pretrained` with the dtype said, and no help."""
    import diffusers
    import torch

    pipeline_class: Any = getattr(diffusers, adapter.family.pipeline_class)
    pipeline = pipeline_class.from_pretrained(path, torch_dtype=torch.bfloat16, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    engine = Engine(pipeline, adapter.family, "model", "cpu")
    request = GenerationRequest(prompt="a red circle", seed=3, num_inference_steps=2, enhance=False, **SIZE)
    return np.asarray(engine.generate(request).images[0]).astype(np.int16)
