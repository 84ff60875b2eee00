"""The light pass over a finished picture: fine detail gets more contrast, flat regions stay as they are."""

from zimage_engine.refiner.picture import (
    DEFAULT_STRENGTH,
    MAX_STRENGTH,
    RefinedPicture,
    refine,
    refine_colours,
)

__all__ = ["DEFAULT_STRENGTH", "MAX_STRENGTH", "RefinedPicture", "refine", "refine_colours"]
