"""Turns an uploaded file into a picture that can be drawn from; what cannot be used is refused in a sentence.

What a file is, is told by its content: names and announced types are not looked at. Its size is read from its
header before anything is unpacked. No sentence holds what the decoder said. Knows no HTTP.
"""

from __future__ import annotations

import functools
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps

from serve_app.error_mapping import RequestRefused
from serve_app.image_codec import PILLOW_FORMATS
from zimage_engine.types import SourcePicture

#: The largest that common cameras make has 24 million. One of so many takes up to 500 MiB for a moment.
MAX_PIXELS = 40_000_000
#: Pictures that are unpacked at the same moment in one process.
UNPACKED_AT_ONCE = 2
MIN_SIDE_PX = 8
#: More is not handed on: no model draws half as many.
KEPT_PIXELS = 8_000_000

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
#: The largest in use, of printing presses, have three.
MAX_PROFILE_BYTES = 8 * 2**20
#: So far apart two colours of 255 steps are the same to the eye, and to profiles that are called sRGB.
SAME_COLOUR = 2
#: So many are computed with at a time where each takes many bytes.
_BAND_PIXELS = 1_000_000
#: What ICC calls the colours of a picture that is held so.
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}


@dataclass(frozen=True, slots=True)
class _Decoded:
    """Upright colours, and where the file has transparency what of them shows (255: all)."""

    colours: Image.Image
    alpha: Image.Image | None


def source_picture(image: bytes, mask: bytes | None = None, *, own_mask: bool = True) -> SourcePicture:
    """The picture to draw from, upright and in 8-bit sRGB, transparency on white.

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


@functools.cache
def unpackers() -> ThreadPoolExecutor:
    """The threads that pictures of requests are unpacked in: what waits for one holds its file alone."""
    return ThreadPoolExecutor(UNPACKED_AT_ONCE, thread_name_prefix="unpack")


def _marked(picture: _Decoded, mask: bytes | None, own_mask: bool) -> Image.Image | None:
    """255 where it is to be drawn anew; None: everywhere."""
    if mask is None:
        # What is less than half transparent everywhere is an edge's softness, and marks nothing.
        if not own_mask or picture.alpha is None or cast(int, picture.alpha.getextrema()[0]) >= 128:
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
    if cast(int, anew.getextrema()[1]) < 128:
        _refuse(
            "mask is opaque everywhere, or nearly, so nothing would be drawn; make transparent what is to be "
            "drawn anew",
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
        return _split(_upright(picture), picture.info.get("icc_profile"))
    except MemoryError:
        raise
    except Exception:  # a decoder's ways to fail on damaged files have no common class
        _refuse(f"{name} is damaged or cut off: it cannot be read to its end. Save it anew", name)


def _opened(name: str, content: bytes) -> Image.Image:
    if not content:
        _refuse(f"{name} is empty: the file has no bytes", name)
    try:
        return Image.open(io.BytesIO(content), formats=PILLOW_FORMATS)
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
        # A copy of it would be as large as it is.
        ImageOps.exif_transpose(picture, in_place=True)
    except MemoryError:
        raise
    except Exception:
        pass
    return picture


def _split(picture: Image.Image, profile: bytes | None) -> _Decoded:
    if picture.mode.startswith("I"):
        picture = _in_8_bits(picture)
    if not picture.has_transparency_data:
        return _Decoded(_in_srgb(picture, profile), None)
    is_grey = picture.mode == "LA"
    whole = picture if picture.mode in ("LA", "RGBA") else picture.convert("RGBA")
    alpha = whole.getchannel("A")
    colours = _in_srgb(whole.convert("L" if is_grey else "RGB"), profile)
    colours.paste(_WHITE, mask=ImageChops.invert(alpha))
    return _Decoded(colours, alpha)


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """The colours in sRGB; a profile that cannot be read, or is of another mode, says nothing."""
    plain = picture if picture.mode in _SPACES else picture.convert("RGB")
    if not profile or len(profile) > MAX_PROFILE_BYTES:
        return _rgb(plain)
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if theirs.profile.xcolor_space.strip() != _SPACES[plain.mode]:
            return _rgb(plain)
        into = ImageCms.buildTransform(
            theirs,
            ImageCms.createProfile("sRGB"),
            plain.mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        # Else a picture that is in sRGB, and says so, would be off by one here and there.
        if plain.mode != "CMYK" and _off_by(into, plain.mode) <= SAME_COLOUR:
            return _rgb(plain)
        return cast(Image.Image, ImageCms.applyTransform(plain, into))
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return _rgb(plain)


def _rgb(picture: Image.Image) -> Image.Image:
    """Not a copy where it is that already."""
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _off_by(into: ImageCms.ImageCmsTransform, mode: str) -> int:
    """How far it moves the colour that it moves most, of some all over the space."""
    steps = np.linspace(0, 255, 256 if mode == "L" else 17).astype(np.uint8)
    axes = np.meshgrid(*([steps] * (1 if mode == "L" else 3)))
    colours = np.stack([axis.ravel() for axis in axes], axis=-1)[None]
    sample = Image.fromarray(colours[..., 0] if mode == "L" else colours)
    moved = cast(Image.Image, ImageCms.applyTransform(sample, into))
    return int(np.abs(np.asarray(moved).astype(int) - np.asarray(sample.convert("RGB")).astype(int)).max())


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """Grey in 16 bits, which Pillow would cut off at 255."""
    width, height = picture.size
    grey = np.empty((height, width), dtype=np.uint8)
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        band: Any = np.asarray(picture.crop((0, top, width, min(height, top + rows))))
        values = band.clip(0, 65535).astype(np.uint32)
        grey[top : top + rows] = (values * 255 + 32767) // 65535
    return Image.fromarray(grey)


def _refuse(message: str, name: str) -> NoReturn:
    raise RequestRefused(f"{message}.", name, "invalid_image")
