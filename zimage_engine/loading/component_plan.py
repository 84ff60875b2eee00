"""What a repaired view will hold of one component, as each kind of component decides it for itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_engine.checkpoint.repair import AppliedRepair
from zimage_engine.loading.view_plan import LinkedFile, WrittenText, WrittenWeights


@dataclass(frozen=True, slots=True)
class ComponentPlan:
    """`class_name` is what it is loaded as, `accepted` all that model_index.json may say in its place."""

    class_name: str
    accepted: tuple[str, ...]
    repairs: tuple[AppliedRepair, ...] = ()
    linked: tuple[LinkedFile, ...] = ()
    texts: tuple[WrittenText, ...] = ()
    weights: tuple[WrittenWeights, ...] = ()


def linked_files(name: str, folder: Path, files: Iterable[str]) -> tuple[LinkedFile, ...]:
    """Each of `files` in `folder` as a file of the component `name`."""
    return tuple(LinkedFile(f"{name}/{each}", folder / each) for each in files)


def written_json(target: str, content: Mapping[str, Any]) -> WrittenText:
    """`content` as a settings file."""
    return WrittenText(target, json.dumps(dict(content), indent=2) + "\n")
