"""A LoRA that somebody wants: its file and how strongly it acts; knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from zimage_engine.errors import CheckpointNotFound, InvalidRequest


@dataclass(frozen=True, slots=True)
class LoraWeight:
    """A LoRA file and how strongly it acts: 1 as trained, 0 not at all, negative the other way.

    Raises InvalidRequest for a weight that is not finite.
    """

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise InvalidRequest(
                f"the weight of a LoRA must be a finite number, got {self.weight} for {self.path.name}; "
                "1 is as trained",
                "weight",
            )


def parse_lora(text: str) -> LoraWeight:
    """`PATH` or `PATH=WEIGHT` as a person types it; what follows the last `=` is a weight if it is a number.

    So a path may hold `=` itself. Raises InvalidRequest for no path or a weight that is not finite.
    """
    path, equals, tail = text.rpartition("=")
    weight = _number(tail) if equals else None
    if weight is None:
        path, weight = text, 1.0
    if not path.strip():
        raise InvalidRequest(f"a LoRA is PATH or PATH=WEIGHT, such as style.safetensors=0.8, got {text!r}")
    return LoraWeight(Path(path.strip()).expanduser(), weight)


def require_lora(lora: LoraWeight) -> None:
    """Raise CheckpointNotFound where there is nothing at the path of `lora`."""
    if lora.path.exists():
        return
    before, _, tail = lora.path.name.rpartition("=")
    meant = f" ({tail!r} is no number, so it was read as part of the name)" if before else ""
    raise CheckpointNotFound(
        f"there is no LoRA at {lora.path}{meant}; expected a .safetensors file, or a folder that holds one"
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
