"""model_index.json of a view: the file as it is where it is right, else what the components say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zimage_engine.checkpoint.repair import AppliedRepair
from zimage_engine.loading import repairs as known

PLACE = "model_index.json"
#: Said where the file says nothing; from_pretrained only reports it.
_DIFFUSERS_VERSION = "0.42.1"


def mended_model_index(
    stated: Mapping[str, Any], damage: str, pipeline_class: str, components: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[AppliedRepair, ...]]:
    """The file's new content, and what of it had to be changed.

    `stated` is what stands there and `damage` why that could not be read; `components` is the entry of each
    component of the view.
    """
    kept = {
        key: value
        for key, value in stated.items()
        if key not in components and (not isinstance(value, list) or value == [None, None])
    }
    wanted = {**kept, **components}
    if stated.get("_class_name") != pipeline_class:
        wanted["_class_name"] = pipeline_class
    wanted.setdefault("_diffusers_version", _DIFFUSERS_VERSION)
    if not stated:
        detail = f"{len(components)} components" + (f"; the file {damage}" if damage else "")
        return wanted, (AppliedRepair(known.WRITE_MODEL_INDEX, PLACE, detail),)
    changed = sorted(key for key, value in wanted.items() if stated.get(key) != value)
    if set(changed) - {"_diffusers_version"}:
        detail = f"set {', '.join(changed)}"
        return wanted, (AppliedRepair(known.COMPLETE_MODEL_INDEX, PLACE, detail),)
    surplus = sorted(set(stated) - set(wanted))
    if surplus:
        detail = f"left out {', '.join(surplus)}, which the pipeline does not take"
        return wanted, (AppliedRepair(known.COMPLETE_MODEL_INDEX, PLACE, detail),)
    return wanted, ()
