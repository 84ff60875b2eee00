"""Tells of which family the found models are; what the JSON files leave out is taken from the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zimage_engine.checkpoint.features import CheckpointFeatures, ComponentFeatures
from zimage_engine.checkpoint.match import config_class, config_lacks
from zimage_engine.errors import CheckpointDamaged, CheckpointError, UnknownFamily
from zimage_engine.families import FAMILIES, ModelFamily, family_named, fitting, not_one_of
from zimage_engine.loading.found_models import FoundModel
from zimage_engine.loading.known_schedulers import listed_scheduler
from zimage_engine.loading.model_config import config_of
from zimage_engine.loading.scheduler_mending import CONFIG_FILE, Schedule, schedule_of

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


@dataclass(frozen=True, slots=True)
class Recognised:
    """The family and by what it was told. `doubt`: what to raise once the rest was found to be whole."""

    family: ModelFamily
    because: str
    doubt: CheckpointError | None = None


def recognise(
    features: CheckpointFeatures,
    models: Mapping[str, FoundModel],
    family_name: str | None,
    base: CheckpointFeatures | None = None,
) -> Recognised:
    """The family that was said, or the one whose fingerprint fits what was measured.

    Each family judges the features with what it would complete them by, so that two of them fit where only
    what is missing tells them apart. `base` lends its settings where the checkpoint has none. Raises
    UnknownFamily; CheckpointDamaged where a known denoiser lacks the configuration that only its own
    config.json tells.
    """
    if family_name is not None:
        return Recognised(family_named(family_name), f"family={family_name!r} was given")
    untold: list[CheckpointDamaged] = []

    def as_seen_by(family: ModelFamily) -> CheckpointFeatures:
        try:
            return _as_measured(features, models, family, base)
        except CheckpointDamaged as error:
            untold.append(error)
            return features

    found = fitting(features, as_seen_by)
    # Those of one pipeline class differ in the schedule; a single file's base folder is asked for first.
    if len({family.pipeline_class for family in found}) != 1:
        raise untold[-1] if untold and not found else not_one_of(features, found, as_seen_by)
    return Recognised(found[0], str(found[0].fingerprint), _doubt(features, found, base))


def _doubt(
    features: CheckpointFeatures, found: Sequence[ModelFamily], base: CheckpointFeatures | None
) -> CheckpointError | None:
    """Why the schedule must be asked for; None where the files or the one family that fits tell it."""
    component = features.components.get("scheduler")
    stated = component.config if component else {}
    gone = f"{features.path} has no scheduler/{CONFIG_FILE} that could be read"
    options = " or ".join(f"--family {family.name}" for family in found)
    what_to_do = (
        f"say which with family= (on the command line {options}), or put {CONFIG_FILE} back as it was "
        "published, or name a folder that has it with --base"
    )
    if len(found) > 1:
        titles = " or ".join(family.title for family in found)
        words = {address for family in found for address in family.fingerprint.addresses}
        keys = sorted(
            address.partition(".")[2]
            for address in words
            if address.startswith("scheduler.") and features.value(address) is None
        )
        lacks = f"{features.path / 'scheduler' / CONFIG_FILE} has no {', '.join(keys)}" if stated else gone
        return UnknownFamily(f"{lacks}, and nothing else tells whether it is {titles}; {what_to_do}")
    schedule = _schedule(features, found[0], base)
    if schedule.is_told:
        return None
    return CheckpointDamaged(
        f"{gone}, and model_index.json lists a {schedule.class_name}, with which {found[0].title} was not "
        f"published, so that nothing tells its settings; put the file back, or name a folder that has it "
        f"with --base, or say family= (on the command line {options}) to draw with the published "
        f"{found[0].scheduler_defaults['_class_name']}"
    )


def _schedule(features: CheckpointFeatures, family: ModelFamily, base: CheckpointFeatures | None) -> Schedule:
    component = features.components.get("scheduler")
    return schedule_of(
        family,
        component.config if component else {},
        listed_scheduler(features.model_index),
        lent_schedule(base),
    )


def lent_schedule(base: CheckpointFeatures | None) -> Mapping[str, Any]:
    """What the base folder's scheduler is set to, {} where there is none."""
    component = base.components.get("scheduler") if base else None
    return component.config if component else {}


def _as_measured(
    features: CheckpointFeatures,
    models: Mapping[str, FoundModel],
    family: ModelFamily,
    base: CheckpointFeatures | None,
) -> CheckpointFeatures:
    """The features with what the tensors tell, and what `family` knows of its scheduler, in place of what the
    JSON files leave out."""
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
    schedule = _schedule(features, family, base)
    values = {**schedule.values, "_class_name": schedule.class_name}
    components["scheduler"] = replace(scheduler, config=values)
    return replace(features, model_index=model_index, components=components)


def _empty_component(name: str) -> ComponentFeatures:
    return ComponentFeatures(name, "", "", False, {}, (), (), ())
