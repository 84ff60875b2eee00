"""Which picture sizes the page offers for a model, and how a typed size is read.

Knows nothing of limits: whether a size fits is the engine's to say.
"""

from __future__ import annotations

import re

from zimage_engine.types import ModelDescription

#: Width to height, the common shapes of screens, prints and phones.
ASPECTS: tuple[tuple[int, int], ...] = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16), (3, 2), (2, 3))

_TYPED_SIZE = re.compile(r"\s*(\d{1,5})\s*(?:[xX×*,，]|\s)\s*(\d{1,5})\s*")


def sizes_that_fit(description: ModelDescription) -> dict[str, tuple[int, int]]:
    """For each aspect, such as "4:3", a size (width, height) in pixels of about the native area.

    They lie on the model's grid, and no side is longer than the model can draw.
    """
    grid = description.size_multiple
    area = description.native_width * description.native_height
    longest = description.max_side // grid * grid
    return {
        f"{across}:{down}": (
            min(longest, _to_grid((area * across / down) ** 0.5, grid)),
            min(longest, _to_grid((area * down / across) ** 0.5, grid)),
        )
        for across, down in ASPECTS
    }


def read_size(typed: str) -> tuple[int, int] | None:
    """Width and height from "640x480", "640 × 480" or the like; None where that is not what it says."""
    match = _TYPED_SIZE.fullmatch(typed)
    return (int(match[1]), int(match[2])) if match else None


def _to_grid(pixels: float, grid: int) -> int:
    return max(grid, round(pixels / grid) * grid)
