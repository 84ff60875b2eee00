"""Puts a short text into a picture's pixels where no eye sees it, and reads it back.

Quantisation index modulation (Chen and Wornell, IEEE Transactions on Information Theory 47, 2001) of the
three lowest frequencies of brightness in squares of 16 pixels: as low as that, JPEG and WebP keep them. It is
read at the place and in the size in which it was written, so cutting or scaling removes it. Knows nothing of
files, HTTP and the engine.

Of the packages that do this, invisible-watermark's marks do not survive WebP of quality 75, nor most of them
JPEG; blind-watermark's do, but are almost three times as strong, and made in loops that hold the interpreter;
and TrustMark fetches its weights when it is first used.
"""

from __future__ import annotations

import math
import unicodedata
import zlib
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

#: The longest text in bytes of UTF-8. Every text takes as much room, so that none has to be known to be read.
MOST_BYTES = 20

_SUM_BYTES = 4
_BITS = 8 * (MOST_BYTES + _SUM_BYTES)
_SIDE = 16
#: How often the cosine turns down and across a square. What is lower is the square's own brightness.
_WAVES = ((0, 1), (1, 0), (1, 1))
#: Distance of the values that tell the same bit. Of 40 photographs of 512x512 and 768x512 all were read again
#: after JPEG and WebP of quality 75, at 46.3 dB of PSNR and more; with 40 (45.3 dB), four of WebP's were not.
_STEP = 36.0
#: Each row of squares begins so many bits further on: no bit may stand in one column, which may be empty.
_SHIFT = 37
#: Rounding and clipping to whole values undo a part, which is put in again; four times is enough on white.
_ROUNDS = 4
#: Sums of products differ in their last digits between processors and numbers of threads; the same picture
#: has to come out of them.
_DIGITS = 6
#: Rec. 601, as JPEG and WebP take it.
_LUMA = (0.299, 0.587, 0.114)


class NotMarkable(Exception):
    """The picture has no room for the text, or does not keep it; the message says which."""


def check_text(text: str) -> str:
    """The text as it can be read back. Raises ValueError, with a sentence, for one that cannot be put in."""
    text = unicodedata.normalize("NFC", text.strip())
    size = len(text.encode("utf-8", "replace"))
    if not text.isprintable() or not 1 <= size <= MOST_BYTES:
        raise ValueError(
            f"setting watermark must be printable text of at most {MOST_BYTES} bytes in UTF-8, got {size}; "
            "take a name or a number that says whose pictures they are"
        )
    return text


def marked(image: Image, text: str) -> Image:
    """The picture (RGB) with the text in it; the same picture and text give the same pixels.

    Raises NotMarkable where it could not be read back.
    """
    import numpy as np
    from PIL import Image as Pillow

    rows, columns = image.height // _SIDE, image.width // _SIDE
    if rows * columns * len(_WAVES) < _BITS:
        needed = math.ceil(_BITS / len(_WAVES))
        raise NotMarkable(
            f"{image.width}x{image.height} is too small for a watermark: it has {rows * columns} squares of "
            f"{_SIDE}x{_SIDE} pixels, and {needed} are needed"
        )
    bits = np.unpackbits(np.frombuffer(_framed(text), np.uint8))
    offsets = bits[_places(rows, columns)] * (_STEP / 2) + _dither(rows, columns)
    wanted = np.asarray(image, dtype=np.float64)
    pixels, aimed = wanted, None
    for _ in range(_ROUNDS):
        found = _frequencies(pixels, rows, columns)
        if aimed is None:
            aimed = np.round((found - offsets) / _STEP) * _STEP + offsets
        if np.abs(aimed - found).max() < _STEP / 8:
            break
        wanted = pixels.copy()
        wanted[: rows * _SIDE, : columns * _SIDE] += _as_pixels(aimed - found, rows, columns)[..., None]
        pixels = np.clip(np.round(wanted, _DIGITS).round(), 0, 255)
    result = Pillow.fromarray(pixels.astype(np.uint8), "RGB")
    if read(result) != text:
        raise NotMarkable(
            f"at {image.width}x{image.height} too much of it is at the end of its colours' range, as pure "
            "white and black are, to keep a watermark"
        )
    return result


def read(image: Image) -> str | None:
    """The text that `marked` put into the picture, None where there is none to be read."""
    import numpy as np

    rows, columns = image.height // _SIDE, image.width // _SIDE
    if rows * columns * len(_WAVES) < _BITS:
        return None
    found = _frequencies(np.asarray(image.convert("RGB"), dtype=np.float64), rows, columns)
    # +1 in the middle of a value that tells 0, -1 in that of a 1, and what is uncertain counts little.
    told = np.cos(2 * np.pi * (found - _dither(rows, columns)) / _STEP)
    sums = np.bincount(_places(rows, columns).ravel(), weights=told.ravel(), minlength=_BITS)
    frame = np.packbits(sums < 0).tobytes()
    content, check = frame[:MOST_BYTES], frame[MOST_BYTES:]
    if zlib.crc32(content).to_bytes(_SUM_BYTES, "big") != check:
        return None
    try:
        return content.rstrip(b"\0").decode() or None
    except UnicodeDecodeError:
        return None


def _framed(text: str) -> bytes:
    content = text.encode().ljust(MOST_BYTES, b"\0")
    return content + zlib.crc32(content).to_bytes(_SUM_BYTES, "big")


def _places(rows: int, columns: int) -> NDArray[np.intp]:
    """Which bit each of the frequencies of each square tells: (squares, 3)."""
    import numpy as np

    along = np.arange(columns * len(_WAVES))
    return ((along[None, :] + _SHIFT * np.arange(rows)[:, None]) % _BITS).reshape(-1, len(_WAVES))


def _dither(rows: int, columns: int) -> NDArray[np.float64]:
    """What each wave's values are shifted by: (squares, 3).

    Of a plain surface WebP keeps no waves at all: without the shift every square of it would tell 0, with it
    one speaks against the other. Multiples of the golden ratio lie evenly.
    """
    import numpy as np

    places = np.arange(rows * columns * len(_WAVES)).reshape(-1, len(_WAVES))
    return np.asarray(_STEP * (places * ((math.sqrt(5) - 1) / 2) % 1), dtype=np.float64)


@cache
def _cosines() -> NDArray[np.float64]:
    """The waves in a square, orthonormal: (256, 3)."""
    import numpy as np

    phases = np.pi * (2 * np.arange(_SIDE) + 1) / (2 * _SIDE)

    def along(turns: int) -> NDArray[np.float64]:
        return np.asarray(np.cos(turns * phases) * math.sqrt((1 if turns == 0 else 2) / _SIDE))

    return np.stack([np.outer(along(down), along(across)).ravel() for down, across in _WAVES], axis=1)


def _frequencies(pixels: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.float64]:
    """How strong each wave is in the brightness of each square: (squares, 3)."""
    import numpy as np

    luma = pixels[: rows * _SIDE, : columns * _SIDE] @ np.array(_LUMA)
    squares = luma.reshape(rows, _SIDE, columns, _SIDE).transpose(0, 2, 1, 3).reshape(-1, _SIDE * _SIDE)
    return np.round(squares @ _cosines(), _DIGITS)


def _as_pixels(strengths: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.float64]:
    """The brightness that waves of those strengths make: (rows of pixels, columns of pixels)."""
    squares = (strengths @ _cosines().T).reshape(rows, columns, _SIDE, _SIDE)
    return squares.transpose(0, 2, 1, 3).reshape(rows * _SIDE, columns * _SIDE)
