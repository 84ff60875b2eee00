"""Decides what must be mended before the stock loader is called: from measured features.

    mending = plan_mending(read_features(path))
    mending.view      # None: the checkpoint is healthy as it is; else the folder that `ensure_view` will make

Every model's tensors are accounted for here, name by name and shape by shape, before anything is loaded.
Nothing is read anew, but for a tokenizer's file that another tokenizer's is made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zimage_engine.checkpoint.features import CheckpointFeatures
from zimage_engine.checkpoint.repair import AppliedRepair
from zimage_engine.errors import CheckpointDamaged
from zimage_engine.families import ModelFamily
from zimage_engine.families.family import ComponentRow
from zimage_engine.loading.companions import Companions, Gathered, gather
from zimage_engine.loading.component_plan import ComponentPlan, linked_files, written_json
from zimage_engine.loading.found_models import FoundModel, found_models, has_no_weights
from zimage_engine.loading.known_schedulers import listed_scheduler
from zimage_engine.loading.model_config import config_of
from zimage_engine.loading.model_index_mending import PLACE, mended_model_index
from zimage_engine.loading.precision import dtype_for
from zimage_engine.loading.recognise import lent_schedule, notes_on, recognise
from zimage_engine.loading.scheduler_mending import plan_scheduler
from zimage_engine.loading.tokenizer_mending import plan_tokenizer
from zimage_engine.loading.view_plan import LinkedFile, ViewPlan, WrittenText
from zimage_engine.loading.weights_mending import plan_model


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
    recognised = recognise(features, models, family_name, beside.base)
    family = replace(recognised.family, dtype=dtype_for(recognised.family, dtype, models))
    gathered = gather(features, models, family, beside)
    plans = _plan_components(gathered, family, beside.base)
    if recognised.doubt is not None:
        raise recognised.doubt
    listed = {
        name: _entry(features.model_index.get(name), family.components[name].library, plan)
        for name, plan in plans.items()
    }
    model_index, index_repairs = mended_model_index(
        features.model_index, features.model_index_damage, family.pipeline_class, listed
    )
    repairs = (
        *gathered.repairs,
        *(repair for plan in plans.values() for repair in plan.repairs),
        *index_repairs,
    )
    return Mending(
        family,
        recognised.because,
        _view(features, family, plans, written_json(PLACE, model_index)) if repairs else None,
        repairs,
        tuple(gathered.models[name] for name in family.components if name in gathered.models),
        notes_on(features, family),
    )


def _view(
    features: CheckpointFeatures,
    family: ModelFamily,
    plans: Mapping[str, ComponentPlan],
    model_index: WrittenText,
) -> ViewPlan:
    return ViewPlan(
        f"{features.path.name} ({family.title})",
        features.path,
        tuple(link for plan in plans.values() for link in plan.linked),
        (*(text for plan in plans.values() for text in plan.texts), model_index),
        tuple(written for plan in plans.values() for written in plan.weights),
    )


def _entry(stated: Any, library: str, plan: ComponentPlan) -> Any:
    """What model_index.json says of a component: what it said, where that names one of its classes."""
    is_right = isinstance(stated, list) and stated in [[library, name] for name in plan.accepted]
    return stated if is_right else [library, plan.class_name]


def _plan_components(
    gathered: Gathered, family: ModelFamily, base: CheckpointFeatures | None
) -> dict[str, ComponentPlan]:
    """The part of each of the family's components in the view; an optional one that is not there has none."""
    as_plain = _variants_differ(gathered)
    plans: dict[str, ComponentPlan] = {}
    for name, row in family.components.items():
        plan = _plan_component(gathered, family, name, row, base, as_plain)
        if plan is not None:
            plans[name] = plan
        elif not row.optional:
            raise CheckpointDamaged(_absent(gathered.features, family, name, row))
    return plans


def _plan_component(
    gathered: Gathered,
    family: ModelFamily,
    name: str,
    row: ComponentRow,
    base: CheckpointFeatures | None,
    as_plain: bool,
) -> ComponentPlan | None:
    """The component's part in the view; None where it is not there."""
    model, component, folder = gathered.models.get(name), gathered.component(name), gathered.folder(name)
    if model is not None:
        if model.part.class_name not in row.class_names:
            raise CheckpointDamaged(
                f"{model.place} holds a {model.part.class_name}, where {family.title} needs "
                f"{' or '.join(row.class_names)}; it is of another model"
            )
        return plan_model(model, row, config_of(model, row, base), family.dtype, as_plain=as_plain)
    if name == "scheduler":
        listed = listed_scheduler(gathered.features.model_index)
        return plan_scheduler(family, component, folder, listed, lent_schedule(base))
    if name in dict(family.text_encoders):
        return _plan_tokenizer(gathered, family, name, row)
    if component is not None and component.is_there and has_no_weights(component) and component.files:
        files = linked_files(name, folder, component.files)
        return ComponentPlan(row.class_names[0], row.class_names, linked=files)
    return None


def _plan_tokenizer(
    gathered: Gathered, family: ModelFamily, name: str, row: ComponentRow
) -> ComponentPlan | None:
    own = gathered.tokenizer(name)
    sibling = gathered.whole_sibling(name, dict(family.text_encoders))
    if not own.files.names and sibling is None:
        return None
    plan = plan_tokenizer(own, sibling, row.constants, family.has_chat_template)
    return ComponentPlan(
        row.class_names[0],
        row.class_names,
        plan.repairs,
        tuple(LinkedFile(f"{name}/{each}", path) for each, path in plan.linked.items()),
        tuple(WrittenText(f"{name}/{each}", text) for each, text in plan.texts.items()),
    )


def _variants_differ(gathered: Gathered) -> bool:
    """Whether no one variant serves all components whose plain files are missing."""
    stored = [model.stored for model in gathered.models.values()]
    return len({each.variant for each in stored if each.is_stock} - {""}) > 1


def _absent(features: CheckpointFeatures, family: ModelFamily, name: str, row: ComponentRow) -> str:
    """Where the component was looked for, and what to do."""
    wanted = row.class_names[0]
    if features.path.is_file():
        beside = {"text_encoder": " (or --text-encoder)", "vae": " (or --vae)"}.get(name, "")
        return (
            f"{features.path} does not hold the {name} ({wanted}) that {family.title} draws "
            f"with; name a folder that does with --base{beside}"
        )
    there = features.components.get(name)
    if there is not None and there.is_there:
        files = (*there.weight_files, *there.other_weight_files)
        if not files:
            return f"{features.path / name} holds no weights; fetch the folder again"
        return (
            f"{features.path / name}: {', '.join(file.name for file in files[:3])} "
            f"{'alone make' if len(files) > 1 else 'alone makes'} no {wanted}: a file or a tensor is "
            "missing, or it is of another model; fetch the folder again"
        )
    is_listed = name in features.model_index
    said = (
        f"model_index.json names '{name}', but there is" if is_listed else f"it has no '{name}' ({wanted}):"
    )
    return f"{features.path}: {said} no such folder; fetch it again, or name one with --base"
