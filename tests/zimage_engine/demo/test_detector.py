"""The detector says what a person would say: of clean drawings, of poor ones, and of wrong ones."""

from __future__ import annotations

import dataclasses
import io
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from zimage_engine.demo.detector import Scene, detect, judge, place, relation
from zimage_engine.demo.pictures import (
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIDE_PX,
    SIZES,
    ShapesSpec,
    Thing,
    draw,
    random_pair,
    random_single,
)

Change = Callable[[Image.Image, random.Random], Image.Image]


def random_spec(index: int, rng: random.Random) -> ShapesSpec:
    return random_pair(rng) if index % 2 else random_single(rng)


# --- what a small decoder and few steps do to a picture ---------------------------------------------


def as_drawn(image: Image.Image, rng: random.Random) -> Image.Image:
    return image


def bent(image: Image.Image, rng: random.Random) -> Image.Image:
    """Every outline wobbles by up to 4 pixels."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    rows, columns = np.mgrid[: image.height, : image.width]
    shifts = []
    for _ in range(2):
        coarse = Image.fromarray(numbers.standard_normal((12, 12)).astype(np.float32))
        shift = np.asarray(coarse.resize(image.size, Image.Resampling.BICUBIC))
        shifts.append(np.rint(shift / np.abs(shift).max() * rng.uniform(2.5, 4)).astype(int))
    down, right = (rows + shifts[0]).clip(0, image.height - 1), (columns + shifts[1]).clip(0, image.width - 1)
    return Image.fromarray(np.asarray(image)[down, right])


def soft(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(2, 3)))


def tinted_and_noisy(image: Image.Image, rng: random.Random) -> Image.Image:
    numbers = np.random.default_rng(rng.randrange(2**32))
    pixels = np.asarray(image) * numbers.uniform(0.94, 1.04, 3) + numbers.uniform(-8, 8, 3)
    pixels += numbers.normal(0, 8, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def strongly_compressed(image: Image.Image, rng: random.Random) -> Image.Image:
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=60)
    return Image.open(stored).convert("RGB")


def all_at_once(image: Image.Image, rng: random.Random) -> Image.Image:
    for change in (bent, soft, tinted_and_noisy, strongly_compressed):
        image = change(image, rng)
    return image


@pytest.mark.parametrize(
    ("change", "pictures", "least_share"),
    [
        (as_drawn, 300, 0.99),
        (bent, 120, 0.97),
        (soft, 120, 0.97),
        (tinted_and_noisy, 120, 0.97),
        (strongly_compressed, 120, 0.97),
        (all_at_once, 300, 0.97),
    ],
)
def test_what_was_drawn_is_seen(change: Change, pictures: int, least_share: float) -> None:
    rng = random.Random(f"seen/{change.__name__}")
    wrong = []
    for index in range(pictures):
        spec = random_spec(index, rng)
        picture = change(draw(spec, rng), rng)
        if not judge(spec, picture).all_ok:
            wrong.append((spec, detect(picture)))
    assert len(wrong) <= (1 - least_share) * pictures, wrong


@pytest.mark.slow
def test_two_thousand_pictures_of_all_kinds_are_seen() -> None:
    rng = random.Random("many")
    wrong = []
    for index in range(2000):
        spec = random_spec(index, rng)
        picture = draw(spec, rng)
        if not judge(spec, picture).all_ok:
            wrong.append((spec, detect(picture)))
    assert len(wrong) <= 20, wrong


@pytest.mark.parametrize("background", COLOURS)
def test_every_colour_and_shape_is_seen_on_every_ground(background: str) -> None:
    rng = random.Random(background)
    for colour in COLOURS:
        for shape in SHAPES if colour != background else ():
            spec = ShapesSpec(background, (Thing(colour, shape, rng.choice(SIZES), rng.choice(PLACES)),))
            picture = draw(spec, rng)
            assert judge(spec, picture).all_ok, (spec, detect(picture))


@pytest.mark.parametrize("asked", RELATIONS)
def test_relations_are_seen_from_the_first_thing(asked: str) -> None:
    first, second = Thing("red", "star", place=None), Thing("blue", "circle", place=None)
    seen = detect(draw(ShapesSpec("white", (first, second), asked), random.Random(1)))
    by_shape = {thing.shape: thing for thing in seen.things}
    assert relation(by_shape["star"], by_shape["circle"]) == asked


def test_a_third_colour_at_a_soft_edge_is_no_thing() -> None:
    """Between red and yellow every edge has orange in it; orange itself is in the picture too."""
    rng = random.Random(2)
    spec = ShapesSpec("red", (Thing("yellow", "star", place="left"), Thing("orange", "heart", place="right")))
    scene = detect(draw(spec, rng).filter(ImageFilter.GaussianBlur(3)))
    assert {(thing.colour, thing.shape) for thing in scene.things} == {
        ("yellow", "star"),
        ("orange", "heart"),
    }


def test_what_is_seen_does_not_depend_on_the_size_of_the_picture() -> None:
    spec = ShapesSpec("purple", (Thing("white", "heart", "medium", "left"),))
    picture = draw(spec, random.Random(3))
    for side in (128, 192, 512, 1024):
        scene = detect(picture.resize((side, side), Image.Resampling.BICUBIC))
        (thing,) = scene.things
        assert (scene.background, thing.colour, thing.shape, place(thing)) == (
            "purple",
            "white",
            "heart",
            "left",
        )
        assert thing.centre_px[0] / side == pytest.approx(62 / SIDE_PX, abs=0.03)
        assert thing.area_px / side**2 == pytest.approx(
            detect(picture).things[0].area_px / SIDE_PX**2, rel=0.05
        )


def test_a_shape_that_the_border_cuts_a_little_is_still_that_shape() -> None:
    for shape in SHAPES:
        spec = ShapesSpec("yellow", (Thing("blue", shape, "medium", "left"),))
        picture = draw(spec, random.Random(4))
        box = detect(picture).things[0].box
        cut = picture.crop((box[0] + 4, 0, SIDE_PX, SIDE_PX))
        assert [(thing.colour, thing.shape) for thing in detect(cut).things] == [("blue", shape)]


def test_a_speck_is_no_thing() -> None:
    spec = ShapesSpec("white", (Thing("red", "circle"),))
    picture = draw(spec, random.Random(5))
    ImageDraw.Draw(picture).ellipse([20, 20, 30, 30], fill=COLOURS["blue"])
    assert judge(spec, picture).all_ok


# --- wrong pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [as_drawn, all_at_once])
def test_one_wrong_answer_is_found_and_the_others_stay_right(change: Change) -> None:
    """Asking for another colour, shape, ground or place than was drawn is refused for just that reason."""
    rng = random.Random(6)
    blamed = {
        "colour": "colour_ok",
        "shape": "shape_ok",
        "place": "position_ok",
        "background": "background_ok",
    }
    for _ in range(30):
        drawn = random_single(rng)
        thing = drawn.things[0]
        picture = change(draw(drawn, rng), rng)
        other_colours = [name for name in COLOURS if name not in (thing.colour, drawn.background)]
        wrong = {
            "colour": dataclasses.replace(thing, colour=rng.choice(other_colours)),
            "shape": dataclasses.replace(thing, shape=rng.choice([s for s in SHAPES if s != thing.shape])),
            "place": dataclasses.replace(thing, place=rng.choice([p for p in PLACES if p != thing.place])),
        }
        asked = {name: ShapesSpec(drawn.background, (other,)) for name, other in wrong.items()}
        asked["background"] = ShapesSpec(rng.choice(other_colours), drawn.things)
        for name, spec in asked.items():
            verdict = judge(spec, picture)
            refused = {part for part in blamed.values() if not getattr(verdict, part)}
            assert refused == {blamed[name]} and not verdict.all_ok, (spec, drawn)


def test_swapped_colours_or_a_turned_relation_are_refused() -> None:
    rng = random.Random(7)
    refused = 0
    while refused < 40:
        spec = random_pair(rng)
        first, second = spec.things
        if first.colour == second.colour or first.shape == second.shape or spec.relation is None:
            continue
        picture = draw(spec, rng)
        swapped = (
            dataclasses.replace(first, colour=second.colour),
            dataclasses.replace(second, colour=first.colour),
        )
        assert not judge(ShapesSpec(spec.background, swapped, spec.relation), picture).content_ok
        verdict = judge(ShapesSpec(spec.background, (second, first), spec.relation), picture)
        assert verdict.content_ok and not verdict.position_ok
        refused += 1


def test_a_missing_thing_and_a_third_thing_are_refused() -> None:
    rng = random.Random(8)
    for _ in range(40):
        pair = random_pair(rng)
        picture = draw(pair, rng)
        one = dataclasses.replace(pair, things=pair.things[:1], relation=None)
        assert not judge(one, picture).count_ok
        single = random_single(rng)
        assert not judge(dataclasses.replace(single, things=single.things * 2), draw(single, rng)).count_ok
        corner = COLOURS[rng.choice([name for name in COLOURS if name != pair.background])]
        ImageDraw.Draw(picture).rectangle([3, 3, 25, 25], fill=corner)
        assert not judge(pair, picture).all_ok


def noise(rng: random.Random) -> Image.Image:
    return Image.fromarray(np.random.default_rng(rng.randrange(99)).integers(0, 256, (256, 256, 3), np.uint8))


def coarse_noise(rng: random.Random) -> Image.Image:
    return noise(rng).crop((0, 0, 9, 9)).resize((256, 256), Image.Resampling.BICUBIC)


def flat(rng: random.Random) -> Image.Image:
    return Image.new("RGB", (256, 256), COLOURS[rng.choice(tuple(COLOURS))])


def grey(rng: random.Random) -> Image.Image:
    return Image.new("RGB", (256, 256), (128, 128, 128))


def gradient(rng: random.Random) -> Image.Image:
    return Image.linear_gradient("L").convert("RGB")


@pytest.mark.parametrize("nothing", [noise, coarse_noise, flat, grey, gradient])
def test_a_picture_of_nothing_answers_no_prompt(nothing: Callable[[random.Random], Image.Image]) -> None:
    rng = random.Random(9)
    for index in range(20):
        picture = nothing(rng)
        scene = detect(picture)
        named = all(thing.shape in SHAPES and thing.colour in COLOURS for thing in scene.things)
        assert not (scene.background in COLOURS and scene.things and named), scene
        assert not judge(random_spec(index, rng), picture).content_ok


def test_grey_has_no_name() -> None:
    assert detect(grey(random.Random())) == Scene("unknown", ())


def _corners(count: int, inner: float = 1.0, turn: float = -math.pi / 2) -> list[tuple[float, float]]:
    return [
        (128 + 60 * reach * math.cos(angle), 128 + 60 * reach * math.sin(angle))
        for index in range(count)
        for reach, angle in [(inner if index % 2 else 1.0, 2 * math.pi * index / count + turn)]
    ]


@pytest.mark.parametrize(
    ("name", "outline"),
    [
        ("pentagon", _corners(5)),
        ("diamond", _corners(4)),
        ("triangle on its point", _corners(3, turn=math.pi / 2)),
        ("star of four points", _corners(8, 0.4)),
        ("star of six points", _corners(12, 0.55)),
        ("star on its head", _corners(10, 0.42, math.pi / 2)),
        ("long box", [(48, 88), (208, 88), (208, 168), (48, 168)]),
        ("house", [(88, 178), (88, 118), (78, 118), (128, 66), (178, 118), (168, 118), (168, 178)]),
        ("half of a square", [(80, 80), (80, 180), (180, 180)]),
    ],
)
def test_other_shapes_have_no_name(name: str, outline: list[tuple[float, float]]) -> None:
    picture = Image.new("RGB", (256, 256), COLOURS["white"])
    ImageDraw.Draw(picture).polygon(outline, fill=COLOURS["red"])
    assert [(thing.colour, thing.shape) for thing in detect(picture).things] == [("red", "unknown")]


@pytest.mark.parametrize("box", [(48, 88, 208, 168), (98, 40, 158, 216)])
def test_a_long_oval_is_no_circle(box: tuple[int, int, int, int]) -> None:
    picture = Image.new("RGB", (256, 256), COLOURS["black"])
    ImageDraw.Draw(picture).ellipse(box, fill=COLOURS["green"])
    assert [thing.shape for thing in detect(picture).things] == ["unknown"]


def test_a_thing_in_a_corner_is_at_no_single_place() -> None:
    picture = Image.new("RGB", (256, 256), COLOURS["black"])
    ImageDraw.Draw(picture).rectangle([190, 20, 240, 70], fill=COLOURS["green"])
    assert [place(thing) for thing in detect(picture).things] == ["top right"]
