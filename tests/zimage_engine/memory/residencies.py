"""Tiny models under a plan: what the tests of the memory package draw and look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.zimage_engine.tiny_models import write_tiny_pixart, write_tiny_sdxl, write_tiny_z_image
from zimage_engine.engine import Engine
from zimage_engine.families import family_named
from zimage_engine.memory.residency import ComponentFootprint, Footprint, OffloadPlan, Residency
from zimage_engine.types import GenerationRequest

WRITERS: Mapping[str, Callable[[Path], Path]] = {
    "z-image": lambda folder: write_tiny_z_image(folder),
    "sdxl": lambda folder: write_tiny_sdxl(folder),
    "pixart": lambda folder: write_tiny_pixart(folder),
}
ASKED = GenerationRequest(
    prompt="a red circle", seed=5, width=64, height=64, num_inference_steps=3, guidance_scale=1.8
)


def plan_for(residency: Residency, **changes: Any) -> OffloadPlan:
    """A plan that nobody predicted: the strategies read no figures."""
    values: dict[str, Any] = {
        "residency": residency,
        "blocks": 0,
        "resident_blocks": 0,
        "release_text_encoder": False,
        "vae_tile_px": None,
        "float8_storage": False,
        "peak_bytes": 1,
        "relative_speed": 1.0,
        "width_px": 64,
        "height_px": 64,
        "guided": True,
        "because": "asked for",
    }
    return OffloadPlan(**{**values, **changes})


def footprint_of(engine: Engine) -> Footprint:
    """The components as they are in memory; blocks are the members of their module lists, in order."""
    family = family_named(engine.description.family)
    components = {}
    for name, module in engine.pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            blocks = _blocks(module) if name != "vae" else {}
            whole = sum(parameter.nbytes for parameter in module.parameters())
            components[name] = ComponentFootprint(name, whole - sum(blocks.values()), blocks)
    return Footprint(
        family.name,
        components,
        family.denoiser,
        tuple(name for _, name in family.text_encoders),
        "vae",
        "the modules",
    )


def _blocks(module: torch.nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for path, part in module.named_modules():
        if isinstance(part, torch.nn.ModuleList) and not any(path.startswith(f"{each}.") for each in found):
            for index, block in enumerate(part):
                found[f"{path}.{index}"] = sum(parameter.nbytes for parameter in block.parameters())
    return found


def pixels(engine: Engine, request: GenerationRequest = ASKED) -> bytes:
    return engine.generate(request).images[0].tobytes()


def traces(engine: Engine) -> list[str]:
    """Hooks, registries and replaced forwards on any module of the pipeline."""
    found = []
    for component, model in engine.pipeline.components.items():
        if not isinstance(model, torch.nn.Module):
            continue
        for path, part in model.named_modules():
            where = f"{component}.{path}"
            found += [f"{where}: {name}" for name in ("_diffusers_hook", "_hf_hook") if hasattr(part, name)]
            hooks = {**part._forward_hooks, **part._forward_pre_hooks}
            found += [f"{where}: {hook}" for hook in hooks.values()]
            if "forward" in vars(part):
                found.append(f"{where}: forward")
    return found


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Every weight's value, by where it is."""
    return {
        f"{component}.{name}": tensor.detach().clone()
        for component, model in engine.pipeline.components.items()
        if isinstance(model, torch.nn.Module)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
