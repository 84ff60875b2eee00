"""Whether a picture that was drawn again is the same, and what is likely to blame where it is not.

Compares files and receipts; knows neither who draws nor how it was asked for.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve_app.image_codec import PILLOW_FORMATS, pixel_sum, read_receipt
from serve_app.receipt import Difference, check_receipt, differences, request_of
from zimage_engine.errors import InvalidRequest
from zimage_engine.types import GenerationRequest, SourcePicture

#: A picture of more is none that was drawn here.
MOST_SIDE = 4096
#: In files of these formats the pixels are as they were drawn.
_LOSSLESS = ("PNG",)


@dataclass(frozen=True, slots=True)
class Given:
    """What is to be drawn again: its receipt, and its pixels (RGB, row by row) where they are as drawn."""

    receipt: Mapping[str, Any]
    rgb: bytes | None = field(default=None, repr=False)

    def request(self, source: SourcePicture | None = None) -> GenerationRequest:
        """What draws it, from `source` if it was drawn from a picture; raises as `request_of` does."""
        return request_of(self.receipt, source)


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What came of drawing it again.

    `identical` is None where there was nothing to compare with; `changed_pixels` None where the pixels
    themselves were not there. `differences` are what the two receipts have apart, the likeliest cause first.
    """

    identical: bool | None
    changed_pixels: int | None
    differences: tuple[Difference, ...]

    @property
    def sentence(self) -> str:
        """What came of it, for a person."""
        if self.identical:
            return "identical: every pixel is the same"
        causes = "; ".join(str(each) for each in self.differences) or (
            "nothing of what was recorded differs, so the computation itself is not repeatable here"
        )
        if self.identical is None:
            return f"drawn again, with no pixels to compare with; {causes}"
        pixels = "" if self.changed_pixels is None else f" in {self.changed_pixels:,} pixels"
        return f"differs{pixels}: {causes}"


def read_given(content: bytes) -> Given:
    """The receipt and the pixels of a picture's file. Raises InvalidRequest for one without a receipt."""
    from PIL import Image, UnidentifiedImageError

    try:
        receipt = read_receipt(content)
        if receipt is None:
            raise InvalidRequest(
                "the picture has no receipt: it was not drawn by zimage-turbo, or by a version before "
                "receipts, or another program has saved it since",
                "image",
            )
        check_receipt(receipt)
        width, height = receipt["width"], receipt["height"]
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=PILLOW_FORMATS) as image:
                if image.size != (width, height) or max(image.size) > MOST_SIDE:
                    raise InvalidRequest(
                        f"the picture is {image.width}x{image.height}, and its receipt tells of "
                        f"{width}x{height}: it was cut or scaled since; give the original",
                        "image",
                    )
                return Given(receipt, image.convert("RGB").tobytes() if image.format in _LOSSLESS else None)
    except UnidentifiedImageError as error:
        raise InvalidRequest("this is no picture; give a PNG, JPEG or WebP file", "image") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as e:
        raise InvalidRequest("the picture cannot be read: its file is damaged or cut short", "image") from e


def compare(given: Given, drawn: bytes) -> Reproduction:
    """Compare with the PNG file of the picture that was drawn again, which has its receipt in it."""
    import numpy as np

    now = read_given(drawn)
    assert now.rgb is not None
    found = differences(given.receipt, now.receipt)
    sum_then = given.receipt.get("pixels")
    if given.rgb is None:
        identical = None if sum_then is None else sum_then == now.receipt["pixels"]
        return Reproduction(identical, None, found)
    if sum_then is not None and pixel_sum(given.rgb) != sum_then:
        found = (Difference("picture", "as it was drawn", "changed by another program since"), *found)
    if given.rgb == now.rgb:
        return Reproduction(True, 0, found)
    if len(given.rgb) != len(now.rgb):
        return Reproduction(False, None, found)
    then, again = (np.frombuffer(rgb, dtype=np.uint8).reshape(-1, 3) for rgb in (given.rgb, now.rgb))
    return Reproduction(False, int((then != again).any(axis=1).sum()), found)
