"""Tells of which family the found models are; what the JSON files leave out is taken from the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from zimage_engine.checkpoint.features import CheckpointFeatures, ComponentFeatures
from zimage_engine.checkpoint.match import config_class, config_lacks
from zimage_engine.errors import CheckpointDamaged, UnknownFamily
from zimage_engine.families import FAMILIES, ModelFamily, family_named, identify
from zimage_engine.loading.found_models import FoundModel
from zimage_engine.loading.known_schedulers import is_known_scheduler, listed_scheduler
from zimage_engine.loading.model_config import config_of

#: What a person should know of an unusual mixture: where it is met, the family it is of, and what to do.
_NOTES = (
    (
        "sdxl",
        config_class("scheduler", "LCMScheduler") & config_lacks("unet", "time_cond_proj_dim"),
        "the scheduler is LCM's, but the unet takes no guidance embedding, as where an LCM-LoRA was merged "
        "into SDXL: it is drawn as SDXL with that scheduler, whose few steps must be asked for (4 to 8, at a "
        "guidance of 1 to 2); the defaults are SDXL's",
    ),
)


def notes_on(features: CheckpointFeatures, family: ModelFamily) -> tuple[str, ...]:
    """Sentences about what is unusual in a checkpoint of `family` and yet sound."""
    return tuple(
        note
        for name, condition, note in _NOTES
        if name == family.name and condition.first_failure(features) is None
    )


def recognise(
    features: CheckpointFeatures,
    models: Mapping[str, FoundModel],
    family_name: str | None,
    base: CheckpointFeatures | None = None,
) -> tuple[ModelFamily, str]:
    """The family that was said, or the one whose fingerprint fits what was measured.

    `base` lends its settings where the checkpoint has none. Raises UnknownFamily; CheckpointDamaged where a
    known denoiser lacks the configuration that only its own config.json tells.
    """
    if family_name is not None:
        return family_named(family_name), f"family={family_name!r} was given"
    untold: list[CheckpointDamaged] = []

    def as_seen_by(family: ModelFamily) -> CheckpointFeatures:
        try:
            return _as_measured(features, models, family, base)
        except CheckpointDamaged as error:
            untold.append(error)
            return features

    try:
        family = identify(features, as_seen_by)
    except UnknownFamily:
        if untold:
            raise untold[-1] from None
        raise
    return family, str(family.fingerprint)


def alike_but_for_the_schedule(
    features: CheckpointFeatures, models: Mapping[str, FoundModel], family: ModelFamily
) -> tuple[str, ...]:
    """The names of the other families that this would be, had it their scheduler: nothing else differs."""
    found = []
    for other in FAMILIES:
        if other.name == family.name:
            continue
        scheduler = replace(_empty_component("scheduler"), config=dict(other.scheduler_defaults))
        theirs = replace(features, components={**features.components, "scheduler": scheduler})
        try:
            seen = _as_measured(theirs, models, other, None)
        except CheckpointDamaged:
            continue
        if other.fingerprint.first_failure(seen) is None:
            found.append(other.name)
    return tuple(found)


def _as_measured(
    features: CheckpointFeatures,
    models: Mapping[str, FoundModel],
    family: ModelFamily,
    base: CheckpointFeatures | None,
) -> CheckpointFeatures:
    """The features with what the tensors tell in place of what the JSON files leave out.

    The scheduler's fields are never filled in here: some families differ in nothing else.
    """
    model_index = dict(features.model_index)
    # A tuple, because what a file says need not be hashable.
    pipeline_classes = tuple(each.pipeline_class for each in FAMILIES)
    if model_index.get("_class_name") not in pipeline_classes:
        model_index["_class_name"] = family.pipeline_class
    components = dict(features.components)
    for name, model in models.items():
        row = family.components.get(name)
        config = dict(model.config)
        if row is not None and name == family.denoiser and model.part.class_name in row.class_names:
            config = dict(config_of(model, row, base).values)
        config.setdefault("_class_name", model.part.class_name)
        component = components.get(name) or _empty_component(name)
        components[name] = replace(component, is_there=True, config=config)
    scheduler = components.get("scheduler") or _empty_component("scheduler")
    if not scheduler.config and base is not None:
        scheduler = base.components.get("scheduler") or scheduler
    if not is_known_scheduler(scheduler.config.get("_class_name")):
        listed = listed_scheduler(features.model_index)
        class_name = listed or family.scheduler_defaults["_class_name"]
        scheduler = replace(scheduler, config={**scheduler.config, "_class_name": class_name})
    components["scheduler"] = scheduler
    return replace(features, model_index=model_index, components=components)


def _empty_component(name: str) -> ComponentFeatures:
    return ComponentFeatures(name, "", "", False, {}, (), (), ())
