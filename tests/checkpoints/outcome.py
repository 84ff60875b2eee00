"""What came of one case: loaded like the undamaged model, or refused, and what stock diffusers made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints.bounded import MAX_BYTES, MAX_SECONDS, stock_picture_within_bounds
from tests.checkpoints.cases import Case
from tests.checkpoints.models import adapter_for, damaged, picture, stock_picture
from zimage_engine.errors import EngineError

#: Mean difference in levels of 255. Measured 1.5 to 1.7 with weights in 8 bits; two unlike pictures of these
#: models differ by some 59.
ROUNDING_LEVELS = 4.0


def outcome(case: Case, healthy: Path, expected: np.ndarray, work: Path) -> dict[str, Any]:
    """Load and draw; a dictionary of the form that `expected.json` has, without stock's part."""
    path, folder = damaged(case, healthy, work)
    adapter = adapter_for(case, path, folder, work / "views")
    try:
        drawn = picture(adapter)
    except EngineError as error:
        return {"error": type(error).__name__, "message": str(error).replace(str(work), "...")}
    return {
        "family": adapter.family.name,
        "repairs": sorted({made.repair.name for made in adapter.mending.repairs}),
        "picture": compared(drawn, expected, case.rounding),
    }


def compared(drawn: np.ndarray, expected: np.ndarray, rounding: bool) -> str:
    """In words how `drawn` relates to what the undamaged model draws."""
    if drawn.shape != expected.shape:
        return "of another size"
    difference = np.abs(drawn - expected)
    if not difference.any():
        return "equal"
    if rounding and difference.mean() <= ROUNDING_LEVELS:
        return "within rounding"
    return "different"


def stock_outcome(case: Case, healthy: Path, expected: np.ndarray, work: Path) -> str:
    """What stock diffusers does with the same files: fine, silently another picture, or how it fails."""
    path, folder = damaged(case, healthy, work)
    if case.stock_may_not_end:
        drawn = stock_picture_within_bounds(path, healthy)
        if isinstance(drawn, str):
            return f"fails: {drawn}" if drawn else f"given up after {MAX_SECONDS} s or {MAX_BYTES >> 30} GiB"
    else:
        try:
            drawn = stock_picture(path, adapter_for(case, healthy, folder, work / "views"))
        except Exception as error:  # whatever the stock call raises is the finding
            return f"fails: {type(error).__name__}"
    found = compared(drawn, expected, case.rounding)
    return "fine" if found in ("equal", "within rounding") else "silently draws another picture"
