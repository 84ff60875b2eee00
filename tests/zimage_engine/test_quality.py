from __future__ import annotations

import pytest
from PIL import Image, ImageDraw

from zimage_engine.quality import measure, notices


def plain(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (64, 64), colour)


def with_circle(background: tuple[int, int, int], colour: tuple[int, int, int]) -> Image.Image:
    image = plain(background)
    ImageDraw.Draw(image).ellipse((16, 16, 47, 47), fill=colour)
    return image


def with_noise(colour: tuple[int, int, int]) -> Image.Image:
    """A colour that ripples by one level, as a decoder leaves it."""
    image = plain(colour)
    for x in range(0, 64, 2):
        for y in range(64):
            image.putpixel((x, y), tuple(channel + 1 for channel in colour))
    return image


def with_star(background: tuple[int, int, int]) -> Image.Image:
    image = plain(background)
    ImageDraw.Draw(image).rectangle((30, 30, 32, 32), fill=(255, 255, 255))
    return image


@pytest.mark.parametrize(
    ("image", "codes"),
    [
        (plain((0, 0, 0)), ["picture_black"]),
        (with_noise((0, 0, 0)), ["picture_black"]),
        (plain((255, 255, 255)), ["picture_flat"]),
        (with_noise((200, 30, 30)), ["picture_flat"]),
        (plain((0, 0, 90)), ["picture_flat"]),
        (with_circle((255, 255, 255), (255, 0, 0)), []),
        (with_circle((0, 0, 0), (128, 0, 128)), []),
        (with_circle((0, 0, 0), (0, 0, 255)), []),
        (with_circle((255, 255, 255), (240, 240, 240)), []),
        (with_star((0, 0, 0)), []),
        (plain((0, 0, 0)).convert("L"), ["picture_black"]),
    ],
)
def test_black_and_flat_pictures_are_told_and_others_are_not(image: Image.Image, codes: list[str]) -> None:
    assert [notice.code for notice in notices(measure(image))] == codes
