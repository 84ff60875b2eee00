"""Model folders as small as the real classes allow, with seeded random weights: they load, and draw noise."""

from tests.zimage_engine.tiny_models.pixart import write_tiny_pixart
from tests.zimage_engine.tiny_models.sdxl import REDUCED_UNETS, write_tiny_sdxl
from tests.zimage_engine.tiny_models.z_image import (
    FRAME_TOKENS,
    NATIVE_SIDE_PX,
    SIZE_MULTIPLE,
    TEXT_WIDTH,
    TOKENS_PER_SIDE,
    write_tiny_z_image,
)

__all__ = [
    "FRAME_TOKENS",
    "NATIVE_SIDE_PX",
    "REDUCED_UNETS",
    "SIZE_MULTIPLE",
    "TEXT_WIDTH",
    "TOKENS_PER_SIDE",
    "write_tiny_pixart",
    "write_tiny_sdxl",
    "write_tiny_z_image",
]
