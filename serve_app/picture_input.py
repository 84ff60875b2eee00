"""Turns an uploaded file into a picture that can be drawn from; what cannot be used is refused in a sentence.

What a file is, is told by its content: names and announced types are not looked at. Its size is read from its
header before anything is unpacked. No sentence holds what the decoder said. Knows no HTTP.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from PIL import Image, ImageChops, ImageOps

from serve_app.error_mapping import RequestRefused
from zimage_engine.types import SourcePicture

#: Unpacked, one of these takes 160 MB for a moment; the largest that common cameras make has 24 million.
MAX_PIXELS = 40_000_000
MIN_SIDE_PX = 8
#: More is not handed on: no model draws half as many.
KEPT_PIXELS = 8_000_000

_FORMATS = ("PNG", "JPEG", "WEBP")
#: What other files are by their first bytes, so that their sender can be told.
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"<svg", "an SVG"),
    (b"<?xml", "an SVG or other XML"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"%PDF", "a PDF"),
    (b"\0\0\0\x1cftyp", "a HEIC, AVIF or video"),
    (b"\0\0\0 ftyp", "a HEIC, AVIF or video"),
    (b"\0\0\0\x18ftyp", "a HEIC, AVIF or video"),
)
_WHITE = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class _Decoded:
    """Upright colours, and where the file has transparency what of them shows (255: all)."""

    colours: Image.Image
    alpha: Image.Image | None


def source_picture(image: bytes, mask: bytes | None = None, *, own_mask: bool = True) -> SourcePicture:
    """The picture to draw from, upright and in 8-bit RGB, transparency on white.

    What is transparent in `mask` is to be drawn anew; without one, what is transparent in the picture itself,
    if `own_mask`. Without transparency that is all of it. Takes time: not for an event loop.
    Raises RequestRefused (400) for a file that cannot be used.
    """
    decoded = _decoded("image", image)
    anew = _marked(decoded, mask, own_mask)
    colours = decoded.colours
    size = colours.size
    if (pixels := size[0] * size[1]) > KEPT_PIXELS:
        share = (KEPT_PIXELS / pixels) ** 0.5
        smaller = (max(MIN_SIDE_PX, int(size[0] * share)), max(MIN_SIDE_PX, int(size[1] * share)))
        colours = colours.resize(smaller, Image.Resampling.LANCZOS)
        anew = None if anew is None else anew.resize(smaller, Image.Resampling.BILINEAR)
    return SourcePicture(
        colours.width,
        colours.height,
        colours.tobytes(),
        None if anew is None else anew.tobytes(),
        None if colours.size == size else size,
    )


def _marked(picture: _Decoded, mask: bytes | None, own_mask: bool) -> Image.Image | None:
    """255 where it is to be drawn anew; None: everywhere."""
    if mask is None:
        if not own_mask or picture.alpha is None or picture.alpha.getextrema()[0] == 255:
            return None
        return ImageChops.invert(picture.alpha)
    decoded = _decoded("mask", mask)
    if decoded.colours.size != picture.colours.size:
        _refuse(
            f"mask has {_size(decoded.colours)} pixels and image {_size(picture.colours)} (as they are "
            "shown, upright); send both in one size",
            "mask",
        )
    if decoded.alpha is None:
        _refuse(
            "mask has no transparency: what is transparent in it is drawn anew. Send a PNG or WebP with an "
            "alpha channel",
            "mask",
        )
    anew = ImageChops.invert(decoded.alpha)
    if anew.getextrema()[1] == 0:
        _refuse(
            "mask is opaque everywhere, so nothing would be drawn; make transparent what is to be drawn anew",
            "mask",
        )
    return anew


def _size(picture: Image.Image) -> str:
    return f"{picture.width}x{picture.height}"


def _decoded(name: str, content: bytes) -> _Decoded:
    picture = _opened(name, content)
    width, height = picture.size
    if width * height > MAX_PIXELS:
        _refuse(
            f"{name} has {width}x{height} pixels; at most {MAX_PIXELS:,} are unpacked. Scale it down first",
            name,
        )
    if min(width, height) < MIN_SIDE_PX:
        _refuse(f"{name} must have at least {MIN_SIDE_PX} pixels a side, got {width}x{height}", name)
    # Phones put further pictures behind a JPEG's own one; those are not meant.
    if picture.format in ("PNG", "WEBP") and getattr(picture, "n_frames", 1) > 1:
        _refuse(f"{name} is an animation; send the one frame that is meant as a still picture", name)
    try:
        picture.load()
        return _split(_upright(picture))
    except MemoryError:
        raise
    except Exception:  # a decoder's ways to fail on damaged files have no common class
        _refuse(f"{name} is damaged or cut off: it cannot be read to its end. Save it anew", name)


def _opened(name: str, content: bytes) -> Image.Image:
    if not content:
        _refuse(f"{name} is empty: the file has no bytes", name)
    try:
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    except Image.DecompressionBombError:
        _refuse(f"{name} says it has more than {MAX_PIXELS:,} pixels, the most that are unpacked", name)
    except MemoryError:
        raise
    except Exception:  # as above
        start = content[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
        kind = next((kind for mark, kind in _OTHERS if start.startswith(mark)), None)
        it_is = f"is {kind}" if kind else "is none of them, or its header is damaged"
        _refuse(f"{name} must be a PNG, JPEG or WebP; this file {it_is}. Convert it first", name)


def _upright(picture: Image.Image) -> Image.Image:
    """As its EXIF says that it is to be held; EXIF that cannot be read says nothing."""
    try:
        return ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception:
        return picture


def _split(picture: Image.Image) -> _Decoded:
    if picture.mode.startswith("I"):
        picture = _in_8_bits(picture)
    if not picture.has_transparency_data:
        return _Decoded(picture.convert("RGB"), None)
    whole = picture.convert("RGBA")
    alpha = whole.getchannel("A")
    ground = Image.new("RGB", whole.size, _WHITE)
    ground.paste(whole.convert("RGB"), mask=alpha)
    return _Decoded(ground, alpha)


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """Grey in 16 bits, which Pillow would cut off at 255."""
    values: Any = np.asarray(picture).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _refuse(message: str, name: str) -> NoReturn:
    raise RequestRefused(f"{message}.", name, "invalid_image")
