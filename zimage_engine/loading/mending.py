"""Decides what must be mended before the stock loader is called: from measured features, touching no disk.

    mending = plan_mending(read_features(path))
    mending.view      # None: the checkpoint is healthy as it is; else the folder that `ensure_view` will make

Every model's tensors are accounted for here, name by name and shape by shape, before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zimage_engine.checkpoint.features import CheckpointFeatures, ComponentFeatures
from zimage_engine.checkpoint.repair import AppliedRepair, Repair
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.families import ModelFamily
from zimage_engine.families.family import ComponentRow
from zimage_engine.loading import repairs as known
from zimage_engine.loading.found_models import FoundModel, check_tensors, found_models, has_no_weights
from zimage_engine.loading.model_config import config_of
from zimage_engine.loading.recognise import recognise
from zimage_engine.loading.view_plan import LinkedFile, ViewPlan, WrittenText, WrittenWeights

#: What the stock loaders look for, by the library of the component's class.
_STOCK_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


@dataclass(frozen=True, slots=True)
class Companions:
    """Checkpoints named beside a file that does not hold everything; each a measured folder or file."""

    base: CheckpointFeatures | None = None
    text_encoder: CheckpointFeatures | None = None
    vae: CheckpointFeatures | None = None


@dataclass(frozen=True, slots=True)
class Mending:
    """What was recognised and what will be done. `view` is None where nothing needs to be."""

    family: ModelFamily
    because: str
    view: ViewPlan | None
    repairs: tuple[AppliedRepair, ...]
    models: tuple[FoundModel, ...] = field(repr=False)


def plan_mending(
    features: CheckpointFeatures, family_name: str | None = None, companions: Companions | None = None
) -> Mending:
    """Recognise the checkpoint and decide every repair.

    Raises UnknownFamily, or CheckpointDamaged naming what cannot be mended and what to do.
    """
    beside = companions or Companions()
    models = found_models(features)
    family, because = recognise(features, models, family_name, beside.base)
    return _Builder(features, models, family, beside).mending(because)


class _Builder:
    """Collects repairs and files component by component; the view is asked for at the end."""

    def __init__(
        self,
        features: CheckpointFeatures,
        models: dict[str, FoundModel],
        family: ModelFamily,
        companions: Companions,
    ) -> None:
        self._features = features
        self._family = family
        self._companions = companions
        self._models = dict(models)
        self._homes: dict[str, CheckpointFeatures] = dict.fromkeys(features.components, features)
        self._repairs: list[AppliedRepair] = []
        self._linked: list[LinkedFile] = []
        self._texts: list[WrittenText] = []
        self._weights: list[WrittenWeights] = []
        self._listed: dict[str, Any] = {}

    def mending(self, because: str) -> Mending:
        """Go through the components of the family, then the list of them."""
        self._borrow()
        unified = self._variants_differ()
        for name, row in self._family.components.items():
            self._take(name, row, unified)
        self._take_model_index()
        view = None
        if self._repairs:
            title = f"{self._features.path.name} ({self._family.title})"
            view = ViewPlan(
                title, self._features.path, tuple(self._linked), tuple(self._texts), tuple(self._weights)
            )
        return Mending(
            self._family,
            because,
            view,
            tuple(self._repairs),
            tuple(self._models[name] for name in self._order()),
        )

    def _order(self) -> list[str]:
        return [name for name in self._family.components if name in self._models]

    def _borrow(self) -> None:
        """Take from the companions what the checkpoint itself does not hold."""
        for name, source in self._sources_beside():
            if name in self._models or (name in self._homes and not self._is_model(name)):
                continue
            for model in found_models(source).values():
                if model.name == name:
                    taken = AppliedRepair(known.TAKE_FROM_BASE, name, f"taken from {source.path}")
                    self._models[name] = replace(model, repairs=(taken, *model.repairs))
            if name in source.components and name not in self._homes:
                self._homes[name] = source
                if name not in self._models:
                    self._repairs.append(
                        AppliedRepair(known.TAKE_FROM_BASE, name, f"taken from {source.path}")
                    )

    def _sources_beside(self) -> Iterable[tuple[str, CheckpointFeatures]]:
        named = {"text_encoder": self._companions.text_encoder, "vae": self._companions.vae}
        for name in self._family.components:
            special = named.get(name)
            for source in (special, self._companions.base):
                if source is not None:
                    yield name, source

    def _is_model(self, name: str) -> bool:
        component = self._features.components.get(name)
        return component is not None and not has_no_weights(component)

    def _variants_differ(self) -> bool:
        """Whether no one variant serves all components whose plain files are missing."""
        variants = {model.stored.variant for model in self._models.values() if model.stored.is_stock}
        return len(variants - {""}) > 1

    def _take(self, name: str, row: ComponentRow, unify: bool) -> None:
        library = row.library
        model = self._models.get(name)
        if model is not None:
            class_name = model.part.class_name
            if class_name not in row.class_names:
                raise CheckpointDamaged(
                    f"{model.place} holds a {class_name}, where {self._family.title} needs "
                    f"{' or '.join(row.class_names)}; it is of another model"
                )
            self._list(name, library, class_name)
            self._take_model(model, row, library, unify)
            return
        if name == "scheduler":
            self._take_scheduler(row)
            return
        component = self._component(name)
        if component is not None and component.is_there and has_no_weights(component) and component.files:
            self._list(name, library, component.class_name or row.class_names[0])
            self._link_files(name, component, component.files)
            return
        if row.optional:
            return
        raise CheckpointDamaged(self._absent(name, row))

    def _absent(self, name: str, row: ComponentRow) -> str:
        wanted = row.class_names[0]
        if self._features.path.is_file():
            beside = {"text_encoder": " (or --text-encoder)", "vae": " (or --vae)"}.get(name, "")
            return (
                f"{self._features.path} does not hold the {name} ({wanted}) that {self._family.title} draws "
                f"with; name a folder that does with --base{beside}"
            )
        listed = name in self._features.model_index
        there = self._features.components.get(name)
        if there is not None and there.is_there:
            files = (*there.weight_files, *there.other_weight_files)
            if not files:
                return f"{self._features.path / name} holds no weights; fetch the folder again"
            return (
                f"{self._features.path / name}: {', '.join(file.name for file in files[:3])} "
                f"{'alone make' if len(files) > 1 else 'alone makes'} no {wanted}: a file or a tensor is "
                "missing, or it is of another model; fetch the folder again"
            )
        said = (
            f"model_index.json names '{name}', but there is" if listed else f"it has no '{name}' ({wanted}):"
        )
        return f"{self._features.path}: {said} no such folder; fetch it again, or name one with --base"

    def _component(self, name: str) -> ComponentFeatures | None:
        home = self._homes.get(name)
        return home.components.get(name) if home else None

    def _list(self, name: str, library: str, class_name: str) -> None:
        entry = self._features.model_index.get(name)
        stated = isinstance(entry, list) and len(entry) == 2 and entry[0] == library
        self._listed[name] = entry if stated else [library, class_name]

    def _take_model(self, model: FoundModel, row: ComponentRow, library: str, unify: bool) -> None:
        config = self._config_of(model, row)
        check_tensors(model, config)
        self._repairs += [*model.repairs, *(_placed(repair, model.name) for repair in model.part.repairs)]
        stem = _STOCK_STEMS[library]
        if not model.part.is_stock or len({file.form for file in model.stored.files}) > 1:
            self._weights.append(
                WrittenWeights(
                    f"{model.name}/{stem}.safetensors",
                    model.part.recipes,
                    model.stored.files,
                    self._family.dtype,
                )
            )
            if not model.part.repairs and not model.repairs:
                self._repairs.append(AppliedRepair(known.UNPACK_FILE, model.name, model.part.layout))
        else:
            self._link_weights(model, stem, unify)
        if model.folder is not None:
            settings = [
                name
                for name in model.folder.files
                if name.endswith(".json")
                and ".index." not in name
                and (name != "config.json" or model.config)
            ]
            self._link_files(model.name, model.folder, settings)
            if "config.json" in settings:
                return
        self._write_json(f"{model.name}/config.json", config)

    def _config_of(self, model: FoundModel, row: ComponentRow) -> Mapping[str, Any]:
        if model.config:
            return model.config
        config = config_of(model, row, self._companions.base)
        detail = f"{len(config)} values for {model.part.class_name}"
        base = self._companions.base
        if base is not None and config is (base.components.get(model.name) or model).config:
            detail += f", as {base.path} has them"
        if model.folder is not None:
            self._repairs.append(AppliedRepair(known.WRITE_CONFIG, model.name, detail))
        return config

    def _link_weights(self, model: FoundModel, stem: str, unify: bool) -> None:
        files = model.stored.files
        if unify and model.stored.variant:
            detail = f"the {model.stored.variant} files are taken as the plain ones"
            self._repairs.append(AppliedRepair(known.UNIFY_VARIANTS, model.name, detail))
        if len(files) == 1:
            form = files[0].form
            stock = "pytorch_model" if (stem == "model" and form == "bin") else stem
            self._linked.append(LinkedFile(f"{model.name}/{stock}.{form}", files[0].path))
            return
        form = files[0].form
        stock = "pytorch_model" if (stem == "model" and form == "bin") else stem
        names = [f"{stock}-{number:05}-of-{len(files):05}.{form}" for number in range(1, len(files) + 1)]
        weight_map: dict[str, str] = {}
        for name, file in zip(names, files, strict=True):
            self._linked.append(LinkedFile(f"{model.name}/{name}", file.path))
            for tensor in file.tensors:
                weight_map.setdefault(tensor.name, name)
        total = sum(file.size_bytes for file in files)
        self._write_json(
            f"{model.name}/{stock}.{form}.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )

    def _take_scheduler(self, row: ComponentRow) -> None:
        component = self._component("scheduler")
        config = dict(component.config) if component else {}
        defaults = self._family.scheduler_defaults
        self._list("scheduler", row.library, str(config.get("_class_name", defaults["_class_name"])))
        if component is None or not config:
            self._repair(known.WRITE_SCHEDULER, "scheduler", f"{defaults['_class_name']}, as published")
            self._write_json("scheduler/scheduler_config.json", defaults)
            return
        absent = {}
        if config.get("_class_name", defaults["_class_name"]) == defaults["_class_name"]:
            absent = {key: value for key, value in defaults.items() if key not in config}
        if absent:
            self._repair(known.COMPLETE_SCHEDULER, "scheduler", f"set {', '.join(sorted(absent))}")
            self._write_json("scheduler/scheduler_config.json", config | absent)
            return
        self._link_files("scheduler", component, component.files)

    def _take_model_index(self) -> None:
        stated = self._features.model_index
        kept = {
            key: value
            for key, value in stated.items()
            if key not in self._listed and (not isinstance(value, list) or value == [None, None])
        }
        wanted = {**kept, **self._listed}
        if stated.get("_class_name") != self._family.pipeline_class:
            wanted["_class_name"] = self._family.pipeline_class
        wanted.setdefault("_diffusers_version", "0.42.1")
        surplus_ok = {key for key in stated if key not in wanted}
        if not stated:
            self._repair(known.WRITE_MODEL_INDEX, "model_index.json", f"{len(self._listed)} components")
        elif any(stated.get(key) != value for key, value in wanted.items() if key != "_diffusers_version"):
            changed = sorted(key for key, value in wanted.items() if stated.get(key) != value)
            self._repair(known.COMPLETE_MODEL_INDEX, "model_index.json", f"set {', '.join(changed)}")
        elif surplus_ok:
            detail = f"left out {', '.join(sorted(surplus_ok))}, which the pipeline does not take"
            self._repair(known.COMPLETE_MODEL_INDEX, "model_index.json", detail)
        self._write_json("model_index.json", wanted)

    def _repair(self, repair: Repair, place: str, detail: str) -> None:
        self._repairs.append(AppliedRepair(repair, place, detail))

    def _link_files(self, name: str, component: ComponentFeatures, files: Iterable[str]) -> None:
        home = self._homes.get(name, self._features)
        root = home.path if home.path.is_dir() else home.path.parent
        self._linked += [LinkedFile(f"{name}/{each}", root / component.name / each) for each in files]

    def _write_json(self, target: str, content: Mapping[str, Any]) -> None:
        self._texts.append(
            WrittenText(target, json.dumps(dict(content), indent=2, ensure_ascii=False) + "\n")
        )


def _placed(repair: AppliedRepair, place: str) -> AppliedRepair:
    return replace(repair, place=place)
