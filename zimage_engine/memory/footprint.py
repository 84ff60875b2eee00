"""How many bytes a model's weights take on the device, by component and by repeated block; knows no torch.

Everything is read from headers and configs, or computed from the published shapes. The figures are those of
the final dtype, whatever is stored.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zimage_engine.checkpoint.features import CheckpointFeatures, ComponentFeatures
from zimage_engine.checkpoint.schemas import expected_tensors, has_schema, optional_tensors
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.families import ModelFamily, family_named
from zimage_engine.memory.published import PUBLISHED_CONFIGS
from zimage_engine.memory.residency import QUANTISATIONS, ComponentFootprint, Footprint

Shape = tuple[int, ...]

#: What the family's dtype takes.
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

#: Paths of the blocks that can be fetched one by one. The refiners of Z-Image are called outside its row of
#: layers, so they stay with the rest. A unet's blocks are taken apart: what is fetched needs two places as
#: large as the largest piece, and up_blocks.0 alone is nearly half of SDXL's unet.
_BLOCKS = re.compile(
    r"(?P<block>(?:transformer_blocks|layers|model\.layers|encoder\.block|(?:text_model\.)?encoder\.layers)\.\d+"
    r"|(?:(?:down|up)_blocks\.\d+|mid_block)\.(?:attentions\.\d+\.transformer_blocks|resnets)\.\d+)\."
)
#: Of a VAE nothing is fetched by blocks: it is small, and its activations are not.
_WHOLE = frozenset({"vae"})
#: A piece of a unet: its block, and its place in it. A resnet is called before the attention of its number.
_UNET_PIECE = re.compile(
    r"(?P<block>(?P<side>down|up|mid)_blocks?(?:\.(?P<number>\d+))?)\.(?P<kind>attentions|resnets)"
    r"\.(?P<place>\d+)(?:\.transformer_blocks\.(?P<layer>\d+))?"
)
_CALLED = {"down": 0, "mid": 1, "up": 2}

#: Layers that diffusers' layerwise casting leaves in their own dtype: one that matches is never float8.
_KEPT_FROM_FLOAT8 = re.compile(r"pos_embed|patch_embed|norm|^proj_in$|^proj_out$|t_embedder|cap_embedder")


def footprint_of(
    features: CheckpointFeatures,
    family: ModelFamily,
    *,
    float8_storage: bool = False,
    quantize: str | None = None,
) -> Footprint:
    """The weights of the checkpoint that `features` measured.

    A component's config and class tell its tensors where they are known; else the headers of its files do.
    Raises CheckpointDamaged where a component of the family shows neither.
    """
    shapes = {name: _shapes_in(features, features.components.get(name), name) for name in _weighted(family)}
    configs = {name: features.components[name].config for name in shapes if name in features.components}
    return footprint_from_shapes(
        family,
        shapes,
        configs,
        f"the headers of {features.path}",
        float8_storage=float8_storage,
        quantize=quantize,
    )


def published_footprint(
    family: ModelFamily | str, *, float8_storage: bool = False, quantize: str | None = None
) -> Footprint:
    """The weights of the model that the family's maker published. Raises UnknownFamily."""
    row = family_named(family) if isinstance(family, str) else family
    shapes = {
        name: _without_doubles(class_name, config)
        for name, (class_name, config) in PUBLISHED_CONFIGS[row.name].items()
    }
    configs = {name: config for name, (_, config) in PUBLISHED_CONFIGS[row.name].items()}
    source = f"the published config.json of {row.published_id}"
    return footprint_from_shapes(
        row, shapes, configs, source, float8_storage=float8_storage, quantize=quantize
    )


def footprint_of_pipeline(
    pipeline: Any, family: ModelFamily, *, float8_storage: bool = False, quantize: str | None = None
) -> Footprint:
    """The weights of a loaded diffusers pipeline, before any plan is in force on it."""
    modules = {name: getattr(pipeline, name) for name in _weighted(family)}
    shapes = {
        name: {
            tensor: tuple(value.shape)
            for values in (module.named_parameters(), module.named_buffers())
            for tensor, value in values
        }
        for name, module in modules.items()
    }
    configs = {
        name: module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
        for name, module in modules.items()
    }
    return footprint_from_shapes(
        family, shapes, configs, "the loaded weights", float8_storage=float8_storage, quantize=quantize
    )


def footprint_from_shapes(
    family: ModelFamily,
    shapes: Mapping[str, Mapping[str, Shape]],
    configs: Mapping[str, Mapping[str, Any]],
    source: str,
    *,
    float8_storage: bool = False,
    quantize: str | None = None,
) -> Footprint:
    """The footprint of components whose tensors have these names and shapes.

    With `float8_storage` the denoiser's matrices and convolutions take one byte a value, but for those that
    diffusers' layerwise casting leaves alone. With `quantize` those that the family names take one byte a
    value and what goes with each row. `configs` may lack components: the published ones stand in.
    """
    published = {name: config for name, (_, config) in PUBLISHED_CONFIGS[family.name].items()}
    value_bytes = _BYTES[family.dtype]
    stored = {
        family.denoiser: _quantised(family, value_bytes, quantize)
        if quantize is not None
        else _in_float8(value_bytes)
        if float8_storage
        else _plain(value_bytes)
    }
    components = {
        name: _component(name, tensors, value_bytes, stored.get(name, _plain(value_bytes)))
        for name, tensors in shapes.items()
    }
    return Footprint(
        family=family.name,
        components=components,
        denoiser=family.denoiser,
        text_encoders=tuple(name for _, name in family.text_encoders if name in components),
        vae="vae",
        source=source,
        float8_storage=float8_storage,
        quantize=quantize,
        configs={name: configs.get(name) or published[name] for name in components},
        value_bytes=value_bytes,
    )


def _weighted(family: ModelFamily) -> tuple[str, ...]:
    """The components that have weights: the denoiser, the text encoders and the VAE."""
    return (family.denoiser, *(name for _, name in family.text_encoders), "vae")


def _shapes_in(
    features: CheckpointFeatures, component: ComponentFeatures | None, name: str
) -> Mapping[str, Shape]:
    if component is not None:
        class_name = component.class_name or str(component.config.get("_class_name", ""))
        if has_schema(class_name) and component.config:
            return _without_doubles(class_name, component.config)
        files = component.weight_files or component.other_weight_files
        plain = [file for file in files if file.variant == min(f.variant for f in files)]
        found = {facts.name: facts.shape for file in plain for facts in file.tensors}
        if found:
            return found
    raise CheckpointDamaged(
        f"{features.path} shows no weights of its {name}: neither its config.json nor a file's header tells "
        "their shapes; fetch the folder again"
    )


def _without_doubles(class_name: str, config: Mapping[str, object]) -> dict[str, Shape]:
    """The class's tensors but for tied ones, which are another tensor's memory."""
    doubles = optional_tensors(class_name, config)
    return {
        name: shape for name, shape in expected_tensors(class_name, config).items() if name not in doubles
    }


#: What a tensor takes as it is stored, by name and shape, and whether it is quantised.
Stored = Callable[[str, Shape], tuple[int, bool]]


def _plain(value_bytes: int) -> Stored:
    return lambda _, shape: (math.prod(shape) * value_bytes, False)


def _in_float8(value_bytes: int) -> Stored:
    def stored(tensor: str, shape: Shape) -> tuple[int, bool]:
        small = len(shape) > 1 and not _KEPT_FROM_FLOAT8.search(tensor.rpartition(".")[0])
        return math.prod(shape) * (1 if small else value_bytes), False

    return stored


def _quantised(family: ModelFamily, value_bytes: int, quantize: str) -> Stored:
    row, named = QUANTISATIONS[quantize], re.compile(family.quantised_layers)

    def stored(tensor: str, shape: Shape) -> tuple[int, bool]:
        module, _, kind = tensor.rpartition(".")
        if kind == "weight" and named.fullmatch(module):
            return math.prod(shape) + shape[0] * row.row_bytes, True
        return math.prod(shape) * value_bytes, False

    return stored


def _component(
    name: str, tensors: Mapping[str, Shape], value_bytes: int, stored: Stored
) -> ComponentFootprint:
    blocks: dict[str, int] = defaultdict(int)
    modules: dict[str, int] = defaultdict(int)
    other_bytes = largest_quantised_bytes = 0
    quantised_shapes: set[tuple[int, int]] = set()
    for tensor, shape in tensors.items():
        module = tensor.rpartition(".")[0]
        in_use = math.prod(shape) * value_bytes
        modules[module] += in_use
        size, is_quantised = stored(tensor, shape)
        if is_quantised:
            largest_quantised_bytes = max(largest_quantised_bytes, in_use)
            quantised_shapes.add((shape[0], math.prod(shape[1:])))
        block = None if name in _WHOLE else _BLOCKS.match(tensor)
        if block is None:
            other_bytes += size
        else:
            blocks[block["block"]] += size
    ordered = sorted(blocks, key=_place_in_call)
    return ComponentFootprint(
        name=name,
        other_bytes=other_bytes,
        blocks={path: blocks[path] for path in ordered},
        largest_module_bytes=max(modules.values(), default=0),
        two_largest_modules_bytes=sum(sorted(modules.values())[-2:]),
        largest_quantised_bytes=largest_quantised_bytes,
        quantised_shapes=tuple(sorted(quantised_shapes)),
    )


def _place_in_call(path: str) -> tuple[int, ...]:
    piece = _UNET_PIECE.fullmatch(path)
    if piece is None:
        return (int(path.rpartition(".")[2]),)
    return (
        _CALLED[piece["side"]],
        int(piece["number"] or 0),
        int(piece["place"]),
        int(piece["kind"] == "attentions"),
        int(piece["layer"] or 0),
    )


def streamed_first(paths: Sequence[str]) -> tuple[str, ...]:
    """The blocks of a denoiser, the one that should leave the device first in front.

    Of a unet first the least active: the deepest down block and the first up block, where most weights meet
    the smallest picture; then the middle, then the others. Among equals every other one goes first, so that
    between two that are fetched one lies that does not wait for the bus.
    """
    deepest = (f"down_blocks.{_deepest(paths)}.", "up_blocks.0.")
    groups = [
        [path for path in paths if path.startswith(deepest)],
        [path for path in paths if path.startswith("mid_block.")],
    ]
    taken = {path for group in groups for path in group}
    return tuple(path for group in (*groups, [p for p in paths if p not in taken]) for path in _spread(group))


def _deepest(paths: Sequence[str]) -> int:
    pieces = (piece for piece in map(_UNET_PIECE.fullmatch, paths) if piece and piece["side"] == "down")
    return max((int(piece["number"]) for piece in pieces), default=0)


def _spread(paths: Sequence[str]) -> list[str]:
    """`paths` so that any number of them from the front lies about evenly over the row."""
    width = max(1, (len(paths) - 1).bit_length())
    order = sorted(range(len(paths)), key=lambda place: int(f"{place:0{width}b}"[::-1], 2))
    return [paths[place] for place in order]
