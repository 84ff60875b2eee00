"""Puts LoRA files on a pipeline through diffusers' own loader, checked, and takes them off again."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from zimage_engine.errors import CheckpointDamaged, EngineError
from zimage_engine.loading.lora_description import check_unet_lora
from zimage_engine.loading.lora_layouts import (
    AdaptedModule,
    LoraFeatures,
    LoraPlan,
    normalise,
    read_lora,
    stored_pairs,
)
from zimage_engine.loading.lora_weight import LoraWeight


@dataclass(frozen=True, slots=True)
class LoraReport:
    """A LoRA that is on the pipeline. `adapted_modules` counts modules of the pipeline, not stored pairs."""

    path: Path
    weight: float
    adapter_name: str
    adapted_modules: int
    dropped_tensors: int


def apply_loras(pipeline: Any, loras: Sequence[LoraWeight]) -> tuple[LoraReport, ...]:
    """Put `loras` on `pipeline`, beside any that are on it already; all of them or, on an error, none.

    Raises CheckpointNotFound or CheckpointDamaged where a file does not fit the pipeline's denoiser whole.
    """
    if not loras:
        return ()
    _require_loader(pipeline)
    features = [read_lora(lora.path) for lora in loras]
    had_layers = bool(_layers(pipeline))
    before = _active_weights(pipeline)
    names = _free_names(pipeline, len(loras))
    try:
        with _quiet_peft():
            reports = tuple(
                _load(pipeline, lora, measured, name)
                for lora, measured, name in zip(loras, features, names, strict=True)
            )
        weights = {**before, **{name: lora.weight for name, lora in zip(names, loras, strict=True)}}
        pipeline.set_adapters(list(weights), list(weights.values()))
    except BaseException:
        if had_layers:
            _delete(pipeline, [name for name in names if name in _all_adapters(pipeline)])
            pipeline.set_adapters(list(before), list(before.values()))
        else:
            remove_loras(pipeline)
        raise
    return reports


def remove_loras(pipeline: Any) -> None:
    """Take every LoRA off `pipeline`; it draws what it drew before, to the bit."""
    if hasattr(pipeline, "unload_lora_weights"):
        pipeline.unload_lora_weights()


def activate_loras(pipeline: Any, names: list[str], weights: list[float]) -> None:
    """Let these LoRAs that are on `pipeline` act, in this order, and no others; none: all are idle.

    With none it draws to the bit what it draws with none on it.
    """
    if names:
        pipeline.set_adapters(names, weights)
        return
    for _, _, layer in _layers(pipeline):  # diffusers knows no empty list
        layer.set_adapter([])


def delete_loras(pipeline: Any, names: list[str]) -> None:
    """Take some of the LoRAs off `pipeline`; `activate_loras` has to follow. Others have to stay on it."""
    _delete(pipeline, names)


def adapted_components(pipeline: Any, name: str) -> set[str]:
    """The components, such as unet and text_encoder, in which the LoRA of that name adapts something."""
    return {component for component, _ in _adapted_by(pipeline, name)}


def adapter_bytes(pipeline: Any, name: str) -> int:
    """What the LoRA of that name takes beside the weights that it adapts."""
    return sum(
        weight.nbytes
        for _, _, layer in _layers(pipeline)
        for parts in (layer.lora_A, layer.lora_B)
        if name in parts
        for weight in parts[name].parameters()
    )


def lora_checker(pipeline: Any) -> Callable[[LoraFeatures], None]:
    """What raises CheckpointDamaged for a file that does not fit `pipeline`, from the file's header alone.

    Where diffusers places the pairs (SDXL), a file that passes may still be refused when it is put on.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        return lambda _: _require_loader(pipeline)
    denoiser = getattr(pipeline, "transformer", None)
    if denoiser is None:
        width = pipeline.unet.config.cross_attention_dim
        return lambda features: check_unet_lora(features, width)
    shapes = _weight_shapes(denoiser)

    def check(features: LoraFeatures) -> None:
        normalise(features, shapes)

    return check


def _delete(pipeline: Any, names: list[str]) -> None:
    with _quiet_peft():
        pipeline.delete_adapters(names)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """No advice on what is done on purpose: several adapters in a model, and one that acts taken away."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        yield


def _require_loader(pipeline: Any) -> None:
    if not hasattr(pipeline, "load_lora_weights"):
        raise CheckpointDamaged(
            f"{type(pipeline).__name__} takes no LoRAs in diffusers; expected a Z-Image or SDXL model; "
            "draw without LoRAs"
        )
    if importlib.util.find_spec("peft") is None:
        raise EngineError("LoRAs need the package peft, which is not installed; run: pip install peft")


def _load(pipeline: Any, lora: LoraWeight, features: LoraFeatures, name: str) -> LoraReport:
    if getattr(pipeline, "transformer", None) is not None:
        expected, dropped = _load_normalised(pipeline, features, name)
    else:
        expected, dropped = _load_stock(pipeline, features, name), 0
    return LoraReport(features.path, lora.weight, name, expected, dropped)


def _load_normalised(pipeline: Any, features: LoraFeatures, name: str) -> tuple[int, int]:
    """Place the file's pairs ourselves, under the names that diffusers takes without a guess."""
    denoiser = pipeline.transformer
    plan = normalise(features, _weight_shapes(denoiser))
    weights = _normalised_weights(plan, denoiser)
    pipeline.load_lora_weights(
        {f"transformer.{key}": tensor for key, tensor in weights.items()}, adapter_name=name
    )
    expected = {module.module for module in plan.modules}
    got = {path for component, path in _adapted_by(pipeline, name) if component == "transformer"}
    if got != expected:
        odd = ", ".join(sorted(expected ^ got)[:3])
        raise CheckpointDamaged(
            f"{features.path} adapts {len(expected)} modules of this denoiser, but diffusers adapted "
            f"{len(got)} (the first that differ: {odd}); use the diffusers version that this project asks for"
        )
    return len(expected), len(plan.dropped)


def _load_stock(pipeline: Any, features: LoraFeatures, name: str) -> int:
    """Let diffusers place the pairs, as it knows the layouts of SDXL, and count that none is left out."""
    pairs = stored_pairs(features)
    for stored_name, tensor in load_file(features.path).items():
        _require_finite(features.path, stored_name, tensor)
    try:
        pipeline.load_lora_weights(
            str(features.path.parent),
            weight_name=features.path.name,
            adapter_name=name,
            local_files_only=True,
        )
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        # Of these classes are all that its converters raise on names or shapes that they do not know.
        raise CheckpointDamaged(
            f"{features.path} cannot be placed in this model ({error}); expected a LoRA made for "
            f"{type(pipeline).__name__}: take one made for this model"
        ) from error
    adapted = len(_adapted_by(pipeline, name))
    if adapted != len(pairs):
        raise CheckpointDamaged(
            f"{features.path} holds {len(pairs)} pairs, but {adapted} modules were adapted "
            f"(the file names {pairs[0].stem} first); this LoRA is for another model: "
            "take one made for this model"
        )
    return adapted


def _weight_shapes(denoiser: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The module paths of `denoiser` as they are without LoRAs, and the shapes of their weights."""
    return {
        path.removesuffix(".base_layer"): tuple(module.weight.shape)
        for path, module in denoiser.named_modules()
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter) and not _is_adapter_part(path)
    }


def _is_adapter_part(path: str) -> bool:
    return ".lora_A." in path or ".lora_B." in path


def _normalised_weights(plan: LoraPlan, denoiser: Any) -> dict[str, torch.Tensor]:
    """`<path>.lora_A.weight` and `<path>.lora_B.weight` in the denoiser's dtype, alpha / rank in A.

    Each holds memory of its own: a B that is shared among modules is cut, not viewed.
    """
    stored = load_file(plan.path)
    shapes = _weight_shapes(denoiser)
    weights: dict[str, torch.Tensor] = {}
    for module in plan.modules:
        a, b = stored[module.a_source].float(), stored[module.b_source].float()
        if module.b_rows is not None:
            b = b[slice(*module.b_rows)]
        scaled = a * _scale(module, stored)
        for tensor, source in ((scaled, module.a_source), (b, module.b_source)):
            _require_finite(plan.path, source, tensor)
        inner = shapes[module.module][1:]
        for end, tensor, shape in (
            ("lora_A", scaled, (module.rank, *inner)),
            ("lora_B", b, (b.shape[0], module.rank, *(1 for _ in inner[1:]))),
        ):
            weights[f"{module.module}.{end}.weight"] = (
                tensor.reshape(shape).to(denoiser.dtype).clone().contiguous()
            )
    return weights


def _require_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise CheckpointDamaged(f"{path}: {name} is not finite; every picture would be black; fetch it again")


def _scale(module: AdaptedModule, stored: dict[str, torch.Tensor]) -> float:
    if module.alpha_source is None:
        return module.scale
    return stored[module.alpha_source].float().item() / module.rank


def _layers(pipeline: Any) -> list[tuple[str, str, Any]]:
    """The pipeline's PEFT layers as (component, module path, layer)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        (component, path, module)
        for component in pipeline._lora_loadable_modules
        if (model := getattr(pipeline, component, None)) is not None
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]


def _adapted_by(pipeline: Any, name: str) -> set[tuple[str, str]]:
    return {(component, path) for component, path, layer in _layers(pipeline) if name in layer.lora_A}


def _all_adapters(pipeline: Any) -> set[str]:
    return {name for names in pipeline.get_list_adapters().values() for name in names}


def _active_weights(pipeline: Any) -> dict[str, float]:
    """The weights of the adapters that act, by name: what `set_adapters` was given."""
    weights: dict[str, float] = {}
    for _, _, layer in _layers(pipeline):
        for name in layer.active_adapters:
            if name in layer.scaling:
                trained = layer.lora_alpha[name] / layer.r[name]
                weights.setdefault(name, layer.scaling[name] / trained)
    return weights


def _free_names(pipeline: Any, count: int) -> list[str]:
    taken = _all_adapters(pipeline)
    numbers = (f"file_{number}" for number in range(1, count + len(taken) + 1))
    return [name for name in numbers if name not in taken][:count]
