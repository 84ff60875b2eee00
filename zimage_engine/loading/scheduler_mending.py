"""The scheduler's settings: what is stated, completed by what a base folder lends or the family publishes.

Recognition judges each family by the schedule as that family would complete it, and mending writes the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_engine.checkpoint.features import ComponentFeatures
from zimage_engine.checkpoint.repair import AppliedRepair
from zimage_engine.families import ModelFamily
from zimage_engine.loading import repairs as known
from zimage_engine.loading.component_plan import ComponentPlan, linked_files, written_json
from zimage_engine.loading.known_schedulers import is_known_scheduler

CONFIG_FILE = "scheduler_config.json"

#: How the model was trained, whichever of its family's schedulers draws; the other fields are one class's.
_TRAINING_FIELDS = frozenset(
    {"beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type"}
)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A scheduler's class and its settings. `is_told`: the files or the family tell all of them."""

    class_name: str
    values: Mapping[str, Any]
    is_told: bool = True


def schedule_of(
    family: ModelFamily, stated: Mapping[str, Any], listed: str, lent: Mapping[str, Any]
) -> Schedule:
    """The schedule that a checkpoint of `family` has.

    `stated` is what its scheduler_config.json says, `listed` the class in its model_index.json ("" where
    there is none that diffusers has), `lent` what a base folder's scheduler_config.json says.
    """
    defaults = family.scheduler_defaults
    published = str(defaults["_class_name"])
    if not stated:
        if is_known_scheduler(lent.get("_class_name")):
            return Schedule(str(lent["_class_name"]), lent)
        if listed in ("", published):
            return Schedule(published, defaults)
        training = {key: value for key, value in defaults.items() if key in _TRAINING_FIELDS}
        return Schedule(listed, {"_class_name": listed, **training}, is_told=False)
    named = stated.get("_class_name")
    class_name = str(named) if is_known_scheduler(named) else listed or published
    filled: dict[str, Any] = {}
    if class_name == published:
        filled |= defaults
    elif class_name in family.components["scheduler"].class_names:
        filled |= {key: value for key, value in defaults.items() if key in _TRAINING_FIELDS}
    if lent.get("_class_name") == class_name:
        filled |= {key: lent[key] for key in filled if key in lent}
    values = {**stated, **{key: value for key, value in filled.items() if stated.get(key) is None}}
    if named is not None:
        values["_class_name"] = class_name
    return Schedule(class_name, values)


def plan_scheduler(
    family: ModelFamily,
    component: ComponentFeatures | None,
    folder: Path,
    listed: str,
    lent: Mapping[str, Any],
) -> ComponentPlan:
    """The scheduler's part of the view. `folder` is where the files of `component` are."""
    stated = component.config if component else {}
    schedule = schedule_of(family, stated, listed, lent)
    if component is None or not stated:
        # A class that the family was not published with has settings that nothing tells.
        values = schedule.values if schedule.is_told else family.scheduler_defaults
        class_name = str(values["_class_name"])
        origin = "as the base folder has it" if values is lent else f"as published for {family.title}"
        damage = component.config_damage if component else ""
        return ComponentPlan(
            class_name,
            (class_name,),
            (_repair(known.WRITE_SCHEDULER, "; ".join(filter(None, [f"{class_name}, {origin}", damage]))),),
            texts=(written_json(f"scheduler/{CONFIG_FILE}", values),),
        )
    accepted = (listed or schedule.class_name,)
    named = stated.get("_class_name")
    changed = sorted(key for key, value in schedule.values.items() if stated.get(key) != value)
    if not changed:
        linked = linked_files("scheduler", folder, component.files)
        return ComponentPlan(schedule.class_name, accepted, linked=linked)
    detail = f"set {', '.join(changed)}"
    if "_class_name" in changed and named is not None:
        detail += f"; {str(named)[:80]!r} is no scheduler of diffusers"
    return ComponentPlan(
        schedule.class_name,
        accepted,
        (_repair(known.COMPLETE_SCHEDULER, detail),),
        texts=(written_json(f"scheduler/{CONFIG_FILE}", schedule.values),),
    )


def _repair(repair: known.Repair, detail: str) -> AppliedRepair:
    return AppliedRepair(repair, "scheduler", detail)
