"""The models of a view: files linked under the names that the stock loaders look for, or written anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zimage_engine.checkpoint.repair import AppliedRepair
from zimage_engine.families.family import ComponentRow
from zimage_engine.loading import repairs as known
from zimage_engine.loading.component_plan import ComponentPlan, linked_files, written_json
from zimage_engine.loading.found_models import FoundModel, check_tensors
from zimage_engine.loading.model_config import ModelConfig
from zimage_engine.loading.view_plan import LinkedFile, WrittenText, WrittenWeights

#: What the stock loaders look for, by the library of the component's class.
_STOCK_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def plan_model(
    model: FoundModel, row: ComponentRow, told: ModelConfig, dtype: str, *, as_plain: bool
) -> ComponentPlan:
    """The part of the view that holds `model`, configured as `told`.

    `dtype` is for weights that are written; `as_plain`: files of a variant are taken as the plain ones.
    Raises CheckpointDamaged where the tensors are not those that its configuration describes.
    """
    check_tensors(model, told.values)
    repairs = [*model.repairs, *(replace(repair, place=model.name) for repair in model.part.repairs)]
    if told.told_by and model.folder is not None:
        repair = known.CORRECT_CONFIG if model.config else known.WRITE_CONFIG
        repairs.insert(0, AppliedRepair(repair, model.name, told.told_by))
    stem = _STOCK_STEMS[row.library]
    linked: tuple[LinkedFile, ...] = ()
    texts: tuple[WrittenText, ...] = ()
    weights: tuple[WrittenWeights, ...] = ()
    if not model.part.is_stock or len({file.form for file in model.stored.files}) > 1:
        target = f"{model.name}/{stem}.safetensors"
        weights = (WrittenWeights(target, model.part.recipes, model.stored.files, dtype),)
        if not model.part.repairs and not model.repairs:
            repairs.append(AppliedRepair(known.UNPACK_FILE, model.name, model.part.layout))
    else:
        if as_plain and model.stored.variant:
            detail = f"the {model.stored.variant} files are taken as the plain ones"
            repairs.append(AppliedRepair(known.UNIFY_VARIANTS, model.name, detail))
        linked, texts = _under_stock_names(model, stem)
    settings = _settings_files(model, told)
    linked += linked_files(model.name, Path(model.place), settings)
    if "config.json" not in settings:
        texts += (written_json(f"{model.name}/config.json", told.values),)
    return ComponentPlan(model.part.class_name, row.class_names, tuple(repairs), linked, texts, weights)


def _settings_files(model: FoundModel, told: ModelConfig) -> list[str]:
    """The component's own settings that stay as they are."""
    return [
        name
        for name in (model.folder.files if model.folder else ())
        if name.endswith(".json") and ".index." not in name and (name != "config.json" or not told.told_by)
    ]


def _under_stock_names(
    model: FoundModel, stem: str
) -> tuple[tuple[LinkedFile, ...], tuple[WrittenText, ...]]:
    """The weight files as they are, and the index of them where there are several."""
    files = model.stored.files
    form = files[0].form
    stock = "pytorch_model" if (stem == "model" and form == "bin") else stem
    if len(files) == 1:
        return (LinkedFile(f"{model.name}/{stock}.{form}", files[0].path),), ()
    names = [f"{stock}-{number:05}-of-{len(files):05}.{form}" for number in range(1, len(files) + 1)]
    weight_map: dict[str, str] = {}
    for name, file in zip(names, files, strict=True):
        for tensor in file.tensors:
            weight_map.setdefault(tensor.name, name)
    index: Mapping[str, Any] = {
        "metadata": {"total_size": sum(file.size_bytes for file in files)},
        "weight_map": weight_map,
    }
    linked = tuple(
        LinkedFile(f"{model.name}/{name}", file.path) for name, file in zip(names, files, strict=True)
    )
    return linked, (written_json(f"{model.name}/{stock}.{form}.index.json", index),)
