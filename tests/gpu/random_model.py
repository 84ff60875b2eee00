"""A Z-Image pipeline of the published shape with random weights: nothing is downloaded, nothing is trained.

Its pictures are noise and its weights the same for the same device. The tokenizer is the tiny model's, one
token a byte, so that text becomes ids without a file from the hub.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests.zimage_engine.tiny_models import write_tiny_z_image
from zimage_engine.families import ModelFamily, family_named
from zimage_engine.memory.footprint import footprint_from_shapes, published_footprint
from zimage_engine.memory.published import PUBLISHED_CONFIGS
from zimage_engine.memory.residency import Footprint

FAMILY_NAME = "z-image-turbo"
SEED = 20_251_127
#: Biases and the like: what is small beside a unit activation.
SMALL = 0.02

Component = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class RandomModel:
    """The pipeline with its weights on the host, and what it weighs.

    `has_published_shape`: the modules' own tensors weigh, block by block, what the planner computes for the
    published model.
    """

    pipeline: Any
    family: ModelFamily
    footprint: Footprint
    has_published_shape: bool


def build(device: str, tiny: bool) -> RandomModel:
    """Make the model. The values come from `device`'s generator, tensor by tensor, and lie on the host, so
    that a card too small for the whole can be measured too. `tiny` takes the smallest shape there is."""
    configs = tiny_model().configs if tiny else published_configs()
    return build_from(configs, device)


def build_from(configs: Mapping[str, Component], device: str) -> RandomModel:
    """The model whose components have these classes and configs."""
    family = family_named(FAMILY_NAME)
    modules = {name: _module(*configs[name], device) for name in configs}
    tokenizer = tiny_model().tokenizer
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(family.scheduler_defaults))
    pipeline = diffusers.ZImagePipeline(scheduler=scheduler, tokenizer=tokenizer, **modules)
    pipeline.set_progress_bar_config(disable=True)
    footprint = footprint_of_modules(modules, configs)
    published = published_footprint(family)
    return RandomModel(pipeline, family, footprint, footprint.components == published.components)


@dataclass(frozen=True)
class TinyModel:
    """What is used of the tiny model's folder: its tokenizer, and for `tiny` its shapes."""

    tokenizer: Any
    configs: Mapping[str, Component]


@cache
def tiny_model() -> TinyModel:
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_tiny_z_image(Path(scratch) / "tiny")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
        return TinyModel(tokenizer, _tiny_configs(folder))


def published_configs() -> dict[str, Component]:
    """The shapes that the planner knows, and what else the pipeline needs to be told to draw at all."""
    family = family_named(FAMILY_NAME)
    published = PUBLISHED_CONFIGS[family.name]
    return {
        name: (class_name, {**family.components[name].constants, **config})
        for name, (class_name, config) in published.items()
    }


def _tiny_configs(folder: Path) -> dict[str, Component]:
    found: dict[str, Component] = {}
    for name in ("transformer", "text_encoder", "vae"):
        known = {"transformer": "ZImageTransformer2DModel", "text_encoder": "Qwen3Model"}
        class_name = known.get(name, "AutoencoderKL")
        if name == "text_encoder":
            found[name] = (class_name, transformers.AutoConfig.from_pretrained(folder / name).to_dict())
        else:
            config = dict(getattr(diffusers, class_name).load_config(folder / name))
            found[name] = (class_name, {key: value for key, value in config.items() if key[0] != "_"})
    return found


def shape_of(class_name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """The class in this configuration, without memory."""
    with torch.device("meta"):
        if hasattr(diffusers, class_name):
            module = getattr(diffusers, class_name).from_config(dict(config))
        else:
            known = getattr(transformers, class_name)
            module = known(known.config_class(**config))
    return module


def _module(class_name: str, config: Mapping[str, Any], device: str) -> torch.nn.Module:
    """The class without memory first, then host memory, then values made on the device."""
    module = shape_of(class_name, config)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    module = module.to_empty(device="cpu")
    _restore_buffers(module)
    _fill(module, device)
    return module.requires_grad_(False).eval()


def _restore_buffers(module: torch.nn.Module) -> None:
    """Buffers that are computed and not stored (rotary frequencies) were lost with the memory."""
    for path, part in list(module.named_modules()):
        if any(True for _ in part.buffers(recurse=False)):
            owner = module.get_submodule(path.rpartition(".")[0])
            setattr(owner, path.rpartition(".")[2], type(part)(config=part.config))


def _fill(module: torch.nn.Module, device: str) -> None:
    """Values under which every layer's answer is about as large as what it is given; norms keep ones."""
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
                continue
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else SMALL
            values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            parameter.copy_(values.normal_(0, spread, generator=generator))


def footprint_of_modules(
    modules: Mapping[str, torch.nn.Module], configs: Mapping[str, Component]
) -> Footprint:
    """What the planner is told of these modules."""
    shapes = {
        name: {path: tuple(tensor.shape) for path, tensor in module.named_parameters()}
        for name, module in modules.items()
    }
    settings = {name: config for name, (_, config) in configs.items()}
    return footprint_from_shapes(family_named(FAMILY_NAME), shapes, settings, "the modules in memory")
