"""Decides what must be mended before the stock loader is called: from measured features.

    mending = plan_mending(read_features(path))
    mending.view      # None: the checkpoint is healthy as it is; else the folder that `ensure_view` will make

Every model's tensors are accounted for here, name by name and shape by shape, before anything is loaded.
Nothing is read anew, but for a tokenizer's file that another tokenizer's is made from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zimage_engine.checkpoint.features import CheckpointFeatures, ComponentFeatures
from zimage_engine.checkpoint.repair import AppliedRepair, Repair
from zimage_engine.checkpoint.tokenizer_files import TokenizerFiles
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.families import ModelFamily
from zimage_engine.families.family import ComponentRow
from zimage_engine.loading import repairs as known
from zimage_engine.loading.found_models import FoundModel, check_tensors, found_models, has_no_weights
from zimage_engine.loading.known_schedulers import is_known_scheduler, listed_scheduler
from zimage_engine.loading.model_config import ModelConfig, config_of
from zimage_engine.loading.precision import dtype_for
from zimage_engine.loading.recognise import alike_but_for_the_schedule, notes_on, recognise
from zimage_engine.loading.tokenizer_mending import Tokenizer, plan_tokenizer
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
    notes: tuple[str, ...] = ()


def plan_mending(
    features: CheckpointFeatures,
    family_name: str | None = None,
    companions: Companions | None = None,
    dtype: str | None = None,
) -> Mending:
    """Recognise the checkpoint and decide every repair. `dtype` None is the family's own.

    Raises UnknownFamily, or CheckpointDamaged naming what cannot be mended and what to do.
    """
    beside = companions or Companions()
    models = found_models(features)
    family, because = recognise(features, models, family_name, beside.base)
    family = replace(family, dtype=dtype_for(family, dtype, models))
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
            notes_on(self._features, self._family),
        )

    def _order(self) -> list[str]:
        return [name for name in self._family.components if name in self._models]

    def _borrow(self) -> None:
        """Take from the companions what the checkpoint itself does not hold."""
        for name, source in self._sources_beside():
            if name in dict(self._family.text_encoders) and self._is_better_tokenizer(name, source):
                self._homes[name] = source
                self._repairs.append(AppliedRepair(known.TAKE_FROM_BASE, name, f"taken from {source.path}"))
                continue
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
            self._list(name, library, class_name, row.class_names)
            self._take_model(model, row, library, unify)
            return
        if name == "scheduler":
            self._take_scheduler(row)
            return
        if name in dict(self._family.text_encoders):
            self._take_tokenizer(name, row)
            return
        component = self._component(name)
        if component is not None and component.is_there and has_no_weights(component) and component.files:
            self._list(name, library, row.class_names[0], row.class_names)
            self._link_files(name, component, component.files)
            return
        if row.optional:
            return
        raise CheckpointDamaged(self._absent(name, row))

    def _take_tokenizer(self, name: str, row: ComponentRow) -> None:
        own, sibling = self._tokenizer(name), self._whole_sibling(name)
        if not own.files.names and sibling is None:
            raise CheckpointDamaged(self._absent(name, row))
        self._list(name, row.library, row.class_names[0], row.class_names)
        plan = plan_tokenizer(own, sibling, row.constants, self._family.has_chat_template)
        self._repairs += plan.repairs
        self._linked += [LinkedFile(f"{name}/{each}", path) for each, path in plan.linked.items()]
        self._texts += [WrittenText(f"{name}/{each}", text) for each, text in plan.texts.items()]

    def _tokenizer(self, name: str) -> Tokenizer:
        component, home = self._component(name), self._homes.get(name, self._features)
        root = home.path if home.path.is_dir() else home.path.parent
        files = component.tokenizer if component else None
        return Tokenizer(name, root / name, files or TokenizerFiles())

    def _is_better_tokenizer(self, name: str, source: CheckpointFeatures) -> bool:
        """Whether `source` has the whole tokenizer that the checkpoint itself lacks."""
        theirs = source.components.get(name)
        if theirs is None or theirs.tokenizer is None or self._tokenizer(name).is_whole:
            return False
        return Tokenizer(name, source.path / name, theirs.tokenizer).is_whole

    def _whole_sibling(self, name: str) -> Tokenizer | None:
        """Another tokenizer of the family that is whole and whose text encoder has as many words."""
        encoders = dict(self._family.text_encoders)
        words = self._words_of(encoders[name])
        for other, encoder in encoders.items():
            tokenizer = self._tokenizer(other)
            if (
                other != name
                and tokenizer.is_whole
                and words is not None
                and self._words_of(encoder) == words
            ):
                return tokenizer
        return None

    def _words_of(self, text_encoder: str) -> int | None:
        model = self._models.get(text_encoder)
        tables = [shape for name, shape in model.shapes.items() if "token_embedding" in name] if model else []
        return tables[0][0] if tables else None

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

    def _list(self, name: str, library: str, class_name: str, accepted: Iterable[str]) -> None:
        entry = self._features.model_index.get(name)
        stated = isinstance(entry, list) and entry in [[library, each] for each in accepted]
        self._listed[name] = entry if stated else [library, class_name]

    def _take_model(self, model: FoundModel, row: ComponentRow, library: str, unify: bool) -> None:
        told = self._config_of(model, row)
        check_tensors(model, told.values)
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
                and (name != "config.json" or not told.told_by)
            ]
            self._link_files(model.name, model.folder, settings)
            if "config.json" in settings:
                return
        self._write_json(f"{model.name}/config.json", told.values)

    def _config_of(self, model: FoundModel, row: ComponentRow) -> ModelConfig:
        told = config_of(model, row, self._companions.base)
        if told.told_by and model.folder is not None:
            is_of_another = bool(model.config)
            repair = known.CORRECT_CONFIG if is_of_another else known.WRITE_CONFIG
            self._repair(repair, model.name, told.told_by)
        return told

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
        named = config.get("_class_name")
        usual = listed_scheduler(self._features.model_index) or defaults["_class_name"]
        class_name = str(named) if is_known_scheduler(named) else str(usual)
        listed = listed_scheduler(self._features.model_index) or class_name
        self._list("scheduler", row.library, class_name, (listed,))
        if component is None or not config:
            damage = component.config_damage if component else ""
            others = alike_but_for_the_schedule(self._features, self._models, self._family)
            unsure = f"; say family= if it is {' or '.join(others)}" if others else ""
            detail = f"{defaults['_class_name']}, as published for {self._family.title}"
            self._repair(
                known.WRITE_SCHEDULER, "scheduler", "; ".join(filter(None, [detail, damage])) + unsure
            )
            self._list("scheduler", row.library, defaults["_class_name"], (defaults["_class_name"],))
            self._write_json("scheduler/scheduler_config.json", defaults)
            return
        changed = {}
        if named is not None and named != class_name:
            changed["_class_name"] = class_name
        if class_name == defaults["_class_name"]:
            changed |= {key: value for key, value in defaults.items() if key not in config}
        if changed:
            detail = f"set {', '.join(sorted(changed))}"
            if "_class_name" in changed and named is not None:
                detail += f"; {str(named)[:80]!r} is no scheduler of diffusers"
            self._repair(known.COMPLETE_SCHEDULER, "scheduler", detail)
            self._write_json("scheduler/scheduler_config.json", config | changed)
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
            damage = self._features.model_index_damage
            detail = f"{len(self._listed)} components" + (f"; the file {damage}" if damage else "")
            self._repair(known.WRITE_MODEL_INDEX, "model_index.json", detail)
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
        self._texts.append(WrittenText(target, json.dumps(dict(content), indent=2) + "\n"))


def _placed(repair: AppliedRepair, place: str) -> AppliedRepair:
    return replace(repair, place=place)
