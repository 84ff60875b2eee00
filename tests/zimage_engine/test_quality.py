"""What a picture is told of; tests/benchmarks/picture_quality.py has the rates over many pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageStat

from tests.benchmarks import picture_quality as samples
from zimage_engine.quality import CODES, PictureQuality, measure, notices, same_finding

Colour = tuple[int, int, int]


def plain(colour: Colour) -> Image.Image:
    return Image.new("RGB", (64, 64), colour)


def with_circle(background: Colour, colour: Colour) -> Image.Image:
    image = plain(background)
    ImageDraw.Draw(image).ellipse((16, 16, 47, 47), fill=colour)
    return image


def with_noise(colour: Colour) -> Image.Image:
    """A colour that ripples by one level, as a decoder leaves it."""
    image = plain(colour)
    for x in range(0, 64, 2):
        for y in range(64):
            image.putpixel((x, y), tuple(channel + 1 for channel in colour))
    return image


def with_star(background: Colour) -> Image.Image:
    image = plain(background)
    ImageDraw.Draw(image).rectangle((30, 30, 32, 32), fill=(255, 255, 255))
    return image


def codes(image: Image.Image) -> list[str]:
    return [notice.code for notice in notices(measure(image))]


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def photograph(side_px: int = 256) -> Image.Image:
    return samples.natural(side_px, 1.0, random())


def with_rectangle(box: tuple[int, int, int, int], colour: Colour, image: Image.Image) -> Image.Image:
    """`box` is left, top, right, bottom; the last two are outside."""
    image = image.copy()
    image.paste(colour, box)
    return image


def softened(image: Image.Image) -> Image.Image:
    """Half the size and back: every edge becomes a ramp."""
    half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
    return half.resize(image.size, Image.Resampling.BICUBIC)


def noisy(image: Image.Image, levels: float) -> Image.Image:
    pixels = np.asarray(image)
    return Image.fromarray((pixels + random().normal(0, levels, pixels.shape)).clip(0, 255).astype(np.uint8))


def dark(image: Image.Image) -> Image.Image:
    """So dark that hardly any of it counts as lit, and not black either."""
    return image.point(lambda level: level // 14)


@pytest.mark.parametrize(
    ("image", "expected"),
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
def test_black_and_flat_pictures_are_told_and_others_are_not(image: Image.Image, expected: list[str]) -> None:
    assert codes(image) == expected


@pytest.mark.parametrize(
    ("image", "is_framed"),
    [
        *((samples.with_border(photograph(), share, "frame"), True) for share in samples.BORDER_SHARES),
        *((samples.with_border(photograph(), share, "top and bottom"), True) for share in (0.01, 0.2)),
        *((samples.with_border(photograph(), share, "left and right"), True) for share in (0.01, 0.2)),
        (samples.with_border(with_circle((250, 250, 250), (255, 0, 0)), 0.05, "frame"), True),
        (photograph(), False),
        (samples.black_wall(256, random()), False),
        (samples.with_border(dark(photograph()), 0.1, "frame"), False),  # its inside is no lighter
        (samples.night(256, random()), False),
        (samples.spotlight(256), False),
        (samples.lines(256, 40, horizontal=True), False),
        (samples.text_page(256, 16, random(), inverse=True), False),
        (with_circle((0, 0, 0), (255, 255, 255)), False),
    ],
)
def test_black_bars_with_hard_edges_are_told_and_dark_grounds_are_not(
    image: Image.Image, is_framed: bool
) -> None:
    assert ("picture_black_borders" in codes(image)) is is_framed


def test_the_share_of_a_border_is_that_of_its_pixels() -> None:
    framed = samples.with_border(photograph(200), 0.1, "frame")
    assert measure(framed).black_border_share == pytest.approx(1 - 0.8 * 0.8)


ON_GRID = (64, 96, 128, 160)


@pytest.mark.parametrize(
    ("image", "is_destroyed"),
    [
        *((with_rectangle(ON_GRID, (grey,) * 3, photograph()), True) for grey in (0, 128, 255)),
        (with_rectangle((0, 0, 64, 64), (0, 0, 0), photograph()), True),  # in a corner: two edges are left
        (with_rectangle((192, 64, 256, 128), (0, 0, 0), photograph()), True),
        (with_rectangle((63, 96, 130, 161), (0, 0, 0), photograph()), False),  # on no grid
        (softened(with_rectangle(ON_GRID, (0, 0, 0), photograph())), False),  # a drawn square
        (with_rectangle((64, 96, 88, 120), (0, 0, 0), photograph()), False),  # too small
        (with_rectangle((0, 0, 256, 128), (0, 0, 0), photograph()), False),  # a black sky
        (photograph(), False),
        (samples.checkerboard(256, 64), False),
        (samples.pixel_art(256, 32, 4, random()), False),
        (samples.plain_grounds(256, random()), False),
        (with_rectangle(ON_GRID, (0, 0, 0), Image.new("RGB", (256, 256), "white")), False),
    ],
)
def test_rectangles_of_one_colour_on_the_grid_of_a_varied_picture_are_told(
    image: Image.Image, is_destroyed: bool
) -> None:
    assert ("picture_blocks" in codes(image)) is is_destroyed


def test_the_share_of_blocks_is_that_of_their_cells() -> None:
    quality = measure(with_rectangle(ON_GRID, (0, 0, 0), photograph()))
    assert quality.block_share == pytest.approx(64 * 64 / 256**2)
    assert quality.even_elsewhere_share == pytest.approx(0, abs=0.01)


def cells(cell_px: int, side_px: int) -> Image.Image:
    """Gaussian noise of smooth cells, as a decoder makes of unfinished latents."""
    small = noisy(Image.new("RGB", (side_px // cell_px,) * 2, (128, 128, 128)), 60)
    return small.resize((side_px, side_px), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("image", "is_noise"),
    [
        *((noisy(photograph(side_px), 40), True) for side_px in (256, 512, 1024)),
        (noisy(plain((240, 240, 240)), 60), True),
        (noisy(with_circle((250, 250, 250), (255, 0, 0)).resize((256, 256)), 50), True),
        *((cells(cell_px, 512), True) for cell_px in (1, 2, 4, 8)),
        *((samples.natural(512, slope, random()), False) for slope in (0.8, 1.0, 1.5)),
        (noisy(photograph(), 4), False),  # film grain
        (samples.sand(512, random()), False),
        *((samples.dead_leaves(256, smallest_px, random()), False) for smallest_px in (3, 8)),
        *((samples.checkerboard(256, cell_px), False) for cell_px in (1, 3, 8)),
        *((samples.lines(256, period_px, horizontal=False), False) for period_px in (2, 5)),
        (samples.text_page(256, 8, random()), False),
        *((samples.pixel_art(256, cell_px, 8, random()), False) for cell_px in (4, 5, 8)),
        (samples.gradient(256, 0.7, random()), False),
    ],
)
def test_noise_all_over_is_told_and_texture_is_not(image: Image.Image, is_noise: bool) -> None:
    assert ("picture_noise" in codes(image)) is is_noise


def test_what_the_demo_model_draws_is_told_only_while_it_is_unfinished(demo_pipeline: object) -> None:
    for prompt in samples.PROMPTS[::4]:
        latents = samples.draw(demo_pipeline, prompt, steps=8, seed=50).latents
        after = {step: codes(samples.decode(demo_pipeline, latents[step - 1])) for step in (2, 4, 8)}
        assert after == {2: ["picture_noise"], 4: ["picture_noise"], 8: []}, prompt


@pytest.fixture(scope="module")
def demo_pipeline() -> object:
    return samples.demo_pipeline()


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (33, 40), (250, 131)])
def test_pictures_of_any_size_can_be_measured(size: tuple[int, int]) -> None:
    assert codes(Image.new("RGB", size, "black")) == ["picture_black"]
    assert codes(photograph().crop((0, 0, *size))) in ([], ["picture_flat"])


def test_every_finding_alone_makes_a_picture_suspicious_and_none_leaves_it_be() -> None:
    ordinary = measure(photograph())
    assert not ordinary.is_suspicious
    spoilt: dict[str, PictureQuality] = {
        "picture_black": replace(ordinary, brighter_share=0.0),
        "picture_flat": replace(ordinary, spread_levels=0.0),
        "picture_black_borders": replace(ordinary, black_border_share=0.1),
        "picture_blocks": replace(ordinary, block_share=0.1),
        "picture_noise": replace(
            ordinary, calmest_contrast_levels=40.0, colour_detail_levels=(40.0, 20.0, 10.0, 5.0, 2.5)
        ),
    }
    assert tuple(spoilt) == CODES
    for code, quality in spoilt.items():
        assert quality.is_suspicious
        assert quality.findings == (code,)
        assert same_finding(quality, replace(quality, even_elsewhere_share=0.5))
        assert not same_finding(quality, ordinary)


def test_a_picture_can_be_told_of_two_things() -> None:
    image = with_rectangle(ON_GRID, (0, 0, 0), samples.with_border(photograph(), 0.03, "frame"))
    assert codes(image) == ["picture_black_borders", "picture_blocks"]


def test_the_spread_is_that_of_the_most_varied_channel_as_pillow_has_it() -> None:
    random = np.random.default_rng(5)
    for height, width in ((1, 1), (7, 5), (64, 48), (301, 299)):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8) // np.array([1, 3, 9], np.uint8)
        image = Image.fromarray(pixels)
        assert measure(image).spread_levels == max(ImageStat.Stat(image).stddev)


@pytest.mark.parametrize("side", [997, 1000, 1021])
def test_an_even_picture_of_any_size_has_no_spread(side: int) -> None:
    for level in (1, 77, 254, 255):
        assert measure(Image.new("RGB", (side, side), (level, 0, level))).spread_levels < 1e-3
