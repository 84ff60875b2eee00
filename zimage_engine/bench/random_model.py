"""A Z-Image pipeline of the published shape with random weights: nothing is downloaded, nothing is trained.

Its pictures are noise and its weights the same for the same device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers

from zimage_engine.engine import DEMO_MODEL_PATH
from zimage_engine.families import ModelFamily, family_named
from zimage_engine.memory.footprint import footprint_from_shapes, published_footprint
from zimage_engine.memory.published import PUBLISHED_CONFIGS
from zimage_engine.memory.residency import Footprint

FAMILY_NAME = "z-image-turbo"
SEED = 20_251_127
#: Biases and the like: what is small beside a unit activation.
SMALL = 0.02

Component = tuple[str, Mapping[str, Any]]
Configs = Mapping[str, Component]

#: The published model with all its kinds of layers, as narrow as they can be, and two deep.
_NARROW: Mapping[str, Mapping[str, Any]] = {
    "transformer": {"dim": 128, "n_heads": 1, "n_kv_heads": 1, "cap_feat_dim": 32},
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 32,
    },
    "vae": {"block_out_channels": (32, 32, 32, 32)},
}
_NARROW_LAYERS = 2
#: What says how deep a component is.
_DEPTHS = {"transformer": "n_layers", "text_encoder": "num_hidden_layers"}


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


def build_from(configs: Configs, device: str, tokenizer: Any = None) -> RandomModel:
    """The model whose components have these classes and configs; its tokenizer is the demo model's, where
    none is given.

    The values come from `device`'s generator, tensor by tensor, and lie on the host, so that a card too small
    for the whole can be measured too.
    """
    family = family_named(FAMILY_NAME)
    modules = {name: _module(*configs[name], device) for name in configs}
    if tokenizer is None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL_PATH / "tokenizer")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(family.scheduler_defaults))
    pipeline = diffusers.ZImagePipeline(scheduler=scheduler, tokenizer=tokenizer, **modules)
    pipeline.set_progress_bar_config(disable=True)
    footprint = footprint_of_modules(modules, configs)
    published = published_footprint(family)
    return RandomModel(pipeline, family, footprint, footprint.components == published.components)


def published_configs() -> dict[str, Component]:
    """The shapes that the planner knows, and what else the pipeline needs to be told to draw at all."""
    family = family_named(FAMILY_NAME)
    published = PUBLISHED_CONFIGS[family.name]
    return {
        name: (class_name, {**family.components[name].constants, **config})
        for name, (class_name, config) in published.items()
    }


def narrow_configs() -> dict[str, Component]:
    """The published model's kinds of layers, few and narrow: drawn with in no time."""
    narrow = {
        name: (class_name, {**config, **_NARROW[name]})
        for name, (class_name, config) in published_configs().items()
    }
    return with_layers(narrow, _NARROW_LAYERS)


def with_layers(configs: Configs, layers: int) -> dict[str, Component]:
    """The same, no deeper than `layers` in the denoiser's main part and in the text encoder."""
    cut: dict[str, Component] = {}
    for name, (class_name, config) in configs.items():
        key = _DEPTHS.get(name)
        depth = {} if key is None else {key: min(layers, config[key])}
        cut[name] = (class_name, {**config, **depth})
    return cut


def shape_of(class_name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """The class in this configuration, without memory."""
    with torch.device("meta"):
        if hasattr(diffusers, class_name):
            module: torch.nn.Module = getattr(diffusers, class_name).from_config(dict(config))
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


def footprint_of_modules(modules: Mapping[str, torch.nn.Module], configs: Configs) -> Footprint:
    """What the planner is told of these modules."""
    shapes = {
        name: {path: tuple(tensor.shape) for path, tensor in module.named_parameters()}
        for name, module in modules.items()
    }
    settings = {name: config for name, (_, config) in configs.items()}
    return footprint_from_shapes(family_named(FAMILY_NAME), shapes, settings, "the modules in memory")
