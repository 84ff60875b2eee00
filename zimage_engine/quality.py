"""Judges a finished picture: is it black, is it flat. Knows nothing of how it was made.

A picture may be meant to be black or flat, so what is found is a notice, never an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zimage_engine.types import Notice

if TYPE_CHECKING:
    from PIL.Image import Image

#: A picture is black where no more than one pixel in a thousand is brighter than this (of 255).
BLACK_LEVEL = 12
BLACK_TOLERANCE = 1e-3
#: A picture is flat where each channel spreads (standard deviation, of 255) less than this:
#: JPEG noise and a VAE's ripple on one even colour stay below, any visible shape is above.
FLAT_SPREAD = 2.0

_WHAT_TO_DO = "if the prompt did not ask for that, draw again with another seed"


@dataclass(frozen=True, slots=True)
class PictureQuality:
    """Facts of one picture; `brighter_share` is the share of pixels above BLACK_LEVEL, spread is of 255."""

    brighter_share: float
    spread: float

    @property
    def is_black(self) -> bool:
        return self.brighter_share <= BLACK_TOLERANCE

    @property
    def is_flat(self) -> bool:
        return self.spread < FLAT_SPREAD


def measure(image: Image) -> PictureQuality:
    """Measure a PIL picture; `spread` is that of the most varied channel."""
    from PIL import ImageChops, ImageStat

    red, green, blue = image.convert("RGB").split()
    brightest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    histogram = brightest.histogram()
    return PictureQuality(
        brighter_share=sum(histogram[BLACK_LEVEL + 1 :]) / sum(histogram),
        spread=max(ImageStat.Stat(channel).stddev[0] for channel in (red, green, blue)),
    )


def notices(quality: PictureQuality) -> tuple[Notice, ...]:
    """What the caller should know of such a picture; nothing for an ordinary one."""
    if quality.is_black:
        return (
            Notice(
                "picture_black",
                f"the picture is black all over; {_WHAT_TO_DO}",
            ),
        )
    if quality.is_flat:
        return (
            Notice(
                "picture_flat",
                f"the picture is one even colour; {_WHAT_TO_DO}",
            ),
        )
    return ()
