"""Odd files as pictures to draw from: each gives the right colours and mask, or a sentence."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from serve_app import picture_input
from serve_app.error_mapping import RequestRefused
from serve_app.picture_input import MAX_PIXELS, source_picture
from zimage_engine.types import SourcePicture

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
WIDE = (24, 16)
#: EXIF's tag of the orientation, and the transposition that puts a picture so that each value mends it.
ORIENTATION = 0x0112
UNDONE_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def quarters() -> Image.Image:
    """Red, green, blue and white, from the top left as one reads; wider than high."""
    picture = Image.new("RGB", WIDE, WHITE)
    for colour, at in ((RED, (0, 0)), (GREEN, (12, 0)), (BLUE, (0, 8))):
        picture.paste(colour, (*at, at[0] + 12, at[1] + 8))
    return picture


def with_alpha() -> Image.Image:
    """The quarters with the left half transparent."""
    alpha = Image.new("L", WIDE, 255)
    alpha.paste(0, (0, 0, 12, 16))
    picture = quarters().convert("RGBA")
    picture.putalpha(alpha)
    return picture


def packed(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int, kind: str) -> bytes:
    """The quarters stored as a camera held so stores them."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = (
        {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    )
    stored = quarters().transpose(UNDONE_BY[orientation])
    return packed(stored, kind, exif=exif.tobytes(), **options)


def png_of(width: int, height: int, depth: int, colour_type: int, rows: bytes, more: bytes = b"") -> bytes:
    """A PNG made by hand, for kinds that Pillow does not write, and for sizes that nobody unpacks."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + more
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def rgb_in_16_bits() -> bytes:
    values = (np.asarray(quarters()).astype(">u2") * 257).reshape(WIDE[1], -1)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return png_of(*WIDE, 16, 2, rows)


def grey_in_16_bits() -> bytes:
    values = np.linspace(0, 65535, WIDE[0] * WIDE[1]).astype(np.uint16).reshape(WIDE[1], WIDE[0])
    return packed(Image.fromarray(values))


def palette(transparent: bool) -> bytes:
    picture = quarters().quantize(4)
    if not transparent:
        return packed(picture)
    return packed(picture, transparency=picture.getpixel((0, 0)))  # red is seen through


def animation(kind: str) -> bytes:
    frames = [quarters(), ImageOps.invert(quarters())]
    return packed(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)


def jpeg_with_a_second_picture() -> bytes:
    """As phones store them: a still picture, with another behind it (MPO)."""
    return packed(quarters(), "MPO", save_all=True, append_images=[quarters()], quality=100, subsampling=0)


def colours(source: SourcePicture) -> Image.Image:
    return Image.frombytes("RGB", (source.width, source.height), source.rgb)


def far(source: SourcePicture, expected: Image.Image) -> int:
    assert (source.width, source.height) == expected.size
    ours, theirs = (np.asarray(each).astype(int) for each in (colours(source), expected))
    return int(np.abs(ours - theirs).max())


def left_half(source: SourcePicture) -> bool:
    """Whether the mask is the left half."""
    assert source.mask is not None
    mask = np.frombuffer(source.mask, np.uint8).reshape(source.height, source.width)
    return bool((mask[:, :12] == 255).all() and (mask[:, 12:] == 0).all())


GREY = ImageOps.grayscale(quarters())
ON_WHITE = Image.composite(quarters(), Image.new("RGB", WIDE, WHITE), with_alpha().getchannel("A"))

#: File, its colours, how far they may be off (JPEG, printing colours), whether it has a mask of its own.
RIGHT: dict[str, tuple[Callable[[], bytes], Image.Image, int, bool]] = {
    "png": (lambda: packed(quarters()), quarters(), 0, False),
    "jpeg": (lambda: packed(quarters(), "JPEG", quality=100, subsampling=0), quarters(), 4, False),
    "progressive jpeg": (
        lambda: packed(quarters(), "JPEG", quality=100, subsampling=0, progressive=True),
        quarters(),
        4,
        False,
    ),
    "lossless webp": (lambda: packed(quarters(), "WEBP", lossless=True), quarters(), 0, False),
    **{
        f"{kind} held {orientation}": (
            lambda orientation=orientation, kind=kind: turned(orientation, kind),  # type: ignore[misc]
            quarters(),
            4 if kind == "JPEG" else 0,
            False,
        )
        for kind in ("JPEG", "PNG", "WEBP")
        for orientation in UNDONE_BY
    },
    "broken exif": (lambda: packed(quarters(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), quarters(), 0, False),
    "rgb in 16 bits": (rgb_in_16_bits, quarters(), 0, False),
    "grey": (lambda: packed(GREY), GREY.convert("RGB"), 0, False),
    "grey jpeg": (lambda: packed(GREY, "JPEG", quality=100), GREY.convert("RGB"), 4, False),
    "grey with transparency": (
        lambda: packed(with_alpha().convert("LA")),
        ImageOps.grayscale(ON_WHITE).convert("RGB"),
        1,
        True,
    ),
    "black and white": (
        lambda: packed(GREY.point(lambda value: 255 * (value > 100), "1")),
        GREY.point(lambda value: 255 * (value > 100)).convert("RGB"),
        0,
        False,
    ),
    "palette": (lambda: palette(False), quarters(), 0, False),
    "cmyk jpeg": (
        lambda: packed(quarters().convert("CMYK"), "JPEG", quality=100, subsampling=0),
        quarters(),
        6,
        False,
    ),
    "rgba": (lambda: packed(with_alpha()), ON_WHITE, 0, True),
    "rgba webp": (lambda: packed(with_alpha(), "WEBP", lossless=True), ON_WHITE, 0, True),
    "opaque rgba": (lambda: packed(quarters().convert("RGBA")), quarters(), 0, False),
    "a still and another behind it": (jpeg_with_a_second_picture, quarters(), 4, False),
    "a jpeg called png": (
        lambda: packed(quarters(), "JPEG", quality=100, subsampling=0),
        quarters(),
        4,
        False,
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_an_odd_file_gives_its_colours_and_its_mask(name: str) -> None:
    make, expected, most_off, has_mask = RIGHT[name]
    source = source_picture(make())
    assert far(source, expected) <= most_off
    assert (source.mask is not None) == has_mask
    if has_mask:
        assert left_half(source)
    assert source_picture(make(), own_mask=False).mask is None


def test_grey_in_16_bits_keeps_its_whole_range() -> None:
    source = source_picture(grey_in_16_bits())
    values = np.frombuffer(source.rgb, np.uint8)[::3]
    assert (values[0], values[-1]) == (0, 255)
    assert (np.diff(values.astype(int)) >= 0).all() and len(np.unique(values)) == 256


LARGE_PIXELS = 16_000_000
BYTES_A_PIXEL = 16
#: Unpacks a large picture in a process of its own, and tells by how many bytes that grew it at most.
GROWN = """
import sys
from serve_app.picture_input import source_picture

def most_kib():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    return int(line.split()[1])

source_picture(sys.stdin.buffer.read(int(sys.argv[1])))
large = sys.stdin.buffer.read()
before = most_kib()
source_picture(large)
print((most_kib() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells how large a process has been")
@pytest.mark.parametrize("mode", ["I;16", "RGBA"])
def test_a_large_picture_takes_little_more_room_than_its_pixels(mode: str) -> None:
    small, large = (
        packed(Image.new(mode, (width, 5000)), compress_level=1) for width in (8, LARGE_PIXELS // 5000)
    )
    done = subprocess.run(
        [sys.executable, "-c", GROWN, str(len(small))], input=small + large, capture_output=True, check=True
    )
    assert int(done.stdout) < LARGE_PIXELS * BYTES_A_PIXEL


def test_one_colour_of_a_palette_may_be_transparent() -> None:
    source = source_picture(palette(True))
    assert source.mask is not None
    mask = np.frombuffer(source.mask, np.uint8).reshape(16, 24)
    assert (mask[:8, :12] == 255).all() and mask[8:].max() == 0 and mask[:, 12:].max() == 0


def test_half_of_a_pixels_transparency_is_half_of_a_mask() -> None:
    picture = quarters().convert("RGBA")
    picture.putalpha(100)
    source = source_picture(packed(picture))
    assert source.mask is not None and set(source.mask) == {155}


def test_a_faint_transparency_everywhere_is_no_mask() -> None:
    picture = quarters().convert("RGBA")
    picture.putalpha(200)
    assert source_picture(packed(picture)).mask is None
    with pytest.raises(RequestRefused, match="opaque everywhere, or nearly"):
        source_picture(packed(quarters()), packed(picture))


def test_a_mask_marks_what_is_transparent_in_it() -> None:
    source = source_picture(packed(quarters()), packed(with_alpha(), "WEBP", lossless=True))
    assert far(source, quarters()) == 0 and left_half(source)


def test_a_mask_comes_before_the_pictures_own_transparency() -> None:
    half = with_alpha()
    picture = quarters().convert("RGBA")
    picture.putalpha(ImageOps.flip(half.getchannel("A")).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert left_half(source_picture(packed(picture), packed(half)))


def test_a_turned_picture_and_its_mask_are_compared_upright() -> None:
    source = source_picture(turned(6, "JPEG"), packed(with_alpha()))
    assert left_half(source)


def test_a_very_large_picture_is_shrunk_and_says_from_what() -> None:
    large = quarters().resize((3600, 2400), Image.Resampling.NEAREST)
    source = source_picture(packed(large, "JPEG", quality=80), packed(with_alpha().resize(large.size)))
    assert source.shrunk_from == (3600, 2400)
    assert source.width * source.height <= picture_input.KEPT_PIXELS
    assert source.mask is not None and len(source.mask) == source.width * source.height
    assert abs(source.width / source.height - 1.5) < 0.01


PICTURE = packed(quarters())
#: Picture, mask, the field that is named, a part of the sentence.
WRONG: dict[str, tuple[Callable[[], bytes], Callable[[], bytes] | None, str, str]] = {
    "no bytes": (lambda: b"", None, "image", "is empty"),
    "text": (lambda: b"a red circle", None, "image", "must be a PNG, JPEG or WebP"),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', None, "image", "is an SVG"),
    "svg behind a declaration": (lambda: b'<?xml version="1.0"?><svg/>', None, "image", "is an SVG"),
    "bmp": (lambda: packed(quarters(), "BMP"), None, "image", "is a BMP"),
    "gif": (lambda: packed(quarters(), "GIF"), None, "image", "is a GIF"),
    "animated gif": (lambda: animation("GIF"), None, "image", "is a GIF"),
    "tiff": (lambda: packed(quarters(), "TIFF"), None, "image", "is a TIFF"),
    "avif": (lambda: packed(quarters(), "AVIF"), None, "image", "is a HEIC, AVIF or video"),
    "pdf": (lambda: packed(quarters(), "PDF"), None, "image", "is a PDF"),
    "icon": (lambda: packed(quarters(), "ICO"), None, "image", "is none of them"),
    "animated webp": (lambda: animation("WEBP"), None, "image", "is an animation"),
    "animated png": (lambda: animation("PNG"), None, "image", "is an animation"),
    "half a png": (
        lambda: packed(Image.effect_noise((64, 64), 90))[:1500],
        None,
        "image",
        "damaged or cut off",
    ),
    "half a jpeg": (
        lambda: packed(Image.effect_noise((64, 64), 90), "JPEG")[:1500],
        None,
        "image",
        "damaged or cut off",
    ),
    "half a webp": (
        lambda: packed(Image.effect_noise((64, 64), 90), "WEBP")[:1500],
        None,
        "image",
        "PNG, JPEG or WebP|damaged or cut off",
    ),
    "a png's signature alone": (lambda: b"\x89PNG\r\n\x1a\n", None, "image", "header is damaged"),
    "a jpeg's beginning alone": (lambda: b"\xff\xd8\xff\xe0", None, "image", "header is damaged"),
    "a flipped bit": (
        lambda: PICTURE[:60] + bytes([PICTURE[60] ^ 0x40]) + PICTURE[61:],
        None,
        "image",
        "damaged or cut off",
    ),
    "more pixels than are unpacked": (
        lambda: png_of(8000, 8000, 8, 2, b""),
        None,
        "image",
        f"at most {MAX_PIXELS:,}",
    ),
    "a decompression bomb": (lambda: png_of(100_000, 100_000, 1, 0, b""), None, "image", f"{MAX_PIXELS:,}"),
    "nearly no pixels": (lambda: packed(quarters().resize((24, 1))), None, "image", "at least 8 pixels"),
    "a mask of another size": (
        lambda: PICTURE,
        lambda: packed(with_alpha().resize((48, 32))),
        "mask",
        "48x32 pixels and image 24x16",
    ),
    "a mask without transparency": (lambda: PICTURE, lambda: packed(GREY), "mask", "no transparency"),
    "an opaque mask": (
        lambda: PICTURE,
        lambda: packed(quarters().convert("RGBA")),
        "mask",
        "opaque everywhere",
    ),
    "a jpeg as mask": (lambda: PICTURE, lambda: packed(quarters(), "JPEG"), "mask", "no transparency"),
    "a damaged mask": (lambda: PICTURE, lambda: packed(with_alpha())[:70], "mask", "damaged|header"),
    "an empty mask": (lambda: PICTURE, lambda: b"", "mask", "is empty"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used_is_refused_in_a_sentence_of_ours(name: str) -> None:
    picture, mask, field, said = WRONG[name]
    with pytest.raises(RequestRefused, match=said) as caught:
        source_picture(picture(), None if mask is None else mask())
    refusal = caught.value
    assert (refusal.status, refusal.code, refusal.param) == (400, "invalid_image", field)
    assert refusal.message.startswith(field) and refusal.message.endswith(".")
    for leaked in ("BytesIO", " at 0x", "Traceback", "/", "IDAT", "cannot identify"):
        assert leaked not in refusal.message


# --- colours that a profile tells


#: Display P3's colours as ICC stores them (XYZ under D50), and the way from linear P3 to linear sRGB.
P3_COLOURS = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
P3_TO_SRGB = np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]])


def icc(space: bytes, gamma: float, colours: tuple[tuple[float, float, float], ...] = ()) -> bytes:
    """A profile made by hand of a gamma, and for RGB of three colours."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249)
    tags = {b"wtpt": white}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    for letter, colour in zip((b"r", b"g", b"b"), colours, strict=False):
        tags |= {letter + b"XYZ": b"XYZ " + bytes(4) + fixed(*colour), letter + b"TRC": curve}
    at, table, content = 128 + 4 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        table += name + struct.pack(">II", at + len(content), len(value))
        content += value
    size = at + len(content)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, b"mntr", space, b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + content


DISPLAY_P3 = icc(b"RGB ", 2.2, P3_COLOURS)
MUTED = (180, 90, 60)


def as_srgb_of_p3(colour: tuple[int, int, int]) -> tuple[int, ...]:
    """Reckoned without ICC: a gamma off, the matrix, sRGB's curve on."""
    linear = (P3_TO_SRGB @ (np.array(colour) / 255) ** 2.2).clip(0, 1)
    curved = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple(round(each * 255) for each in curved.tolist())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_colours_of_a_wide_profile_are_brought_to_srgb(kind: str) -> None:
    options = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}[kind]
    file = packed(Image.new("RGB", WIDE, MUTED), kind, icc_profile=DISPLAY_P3, **options)
    expected = as_srgb_of_p3(MUTED)
    assert max(abs(a - b) for a, b in zip(expected, MUTED, strict=True)) > 8
    assert far(source_picture(file), Image.new("RGB", WIDE, expected)) <= 3


def test_the_profile_of_a_picture_with_transparency_and_of_a_palette_counts_too() -> None:
    expected = as_srgb_of_p3(MUTED)
    seen = Image.new("RGBA", WIDE, (*MUTED, 255))
    seen.paste((*MUTED, 0), (0, 0, 12, 16))
    source = source_picture(packed(seen, icc_profile=DISPLAY_P3))
    assert max(abs(a - b) for a, b in zip(colours(source).getpixel((20, 8)), expected, strict=True)) <= 3  # type: ignore[arg-type]
    assert colours(source).getpixel((2, 8)) == WHITE and left_half(source)
    few = packed(Image.new("RGB", WIDE, MUTED).quantize(4), icc_profile=DISPLAY_P3)
    assert far(source_picture(few), Image.new("RGB", WIDE, expected)) <= 3


def test_grey_of_another_gamma_is_brought_to_srgb() -> None:
    file = packed(Image.new("L", WIDE, 128), icc_profile=icc(b"GRAY", 1.0))
    assert far(source_picture(file), Image.new("RGB", WIDE, (188, 188, 188))) <= 2


def test_a_picture_that_says_that_it_is_srgb_stays_as_it_is_to_the_bit() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert far(source_picture(packed(noise, icc_profile=profile)), noise) == 0


@pytest.mark.parametrize(
    "profile",
    [b"no profile", DISPLAY_P3[:150], icc(b"GRAY", 1.0), b"\0" * (picture_input.MAX_PROFILE_BYTES + 1)],
    ids=["nonsense", "cut off", "of another mode", "too large"],
)
def test_a_profile_that_cannot_be_used_says_nothing(profile: bytes) -> None:
    file = packed(quarters(), "WEBP", lossless=True, icc_profile=profile)
    assert far(source_picture(file), quarters()) == 0
