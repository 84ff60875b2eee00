"""The models that the suite draws with: random weights of the published shape, or of the tiny model's."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import transformers

from tests.zimage_engine.tiny_models import write_tiny_z_image
from zimage_engine.bench import random_model
from zimage_engine.bench.random_model import (
    Component,
    RandomModel,
    footprint_of_modules,
    published_configs,
    shape_of,
)

__all__ = ["RandomModel", "build", "build_from", "footprint_of_modules", "published_configs", "shape_of"]


def build(device: str, tiny: bool) -> RandomModel:
    """Make the model. The values come from `device`'s generator, tensor by tensor, and lie on the host, so
    that a card too small for the whole can be measured too. `tiny` takes the smallest shape there is."""
    configs = tiny_model().configs if tiny else published_configs()
    return build_from(configs, device)


def build_from(configs: Mapping[str, Component], device: str) -> RandomModel:
    """The model whose components have these classes and configs; one token a byte, so that text fills all the
    places that there are."""
    return random_model.build_from(configs, device, tiny_model().tokenizer)


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
