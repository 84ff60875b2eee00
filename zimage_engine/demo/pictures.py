"""What the demo model is taught to see: flat shapes on a coloured ground, and small illustrated scenes.

A picture is described by a frozen spec, and `draw` turns the spec into pixels.
This module knows nothing of words: `captions` says the same spec in English or Chinese.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

SIDE_PX = 256
#: Drawn at this multiple of the side and reduced, which is what makes the edges smooth.
SUPERSAMPLE = 2

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 45, 45),
    "green": (45, 165, 75),
    "blue": (45, 95, 225),
    "yellow": (250, 212, 45),
    "purple": (142, 62, 185),
    "orange": (245, 138, 30),
    "white": (250, 250, 250),
    "black": (25, 25, 28),
}
SHAPES = ("circle", "square", "triangle", "star", "heart")
SIZES = ("small", "medium", "big")
PLACES = ("left", "right", "top", "bottom", "centre")
RELATIONS = ("above", "below", "left of", "right of")

TIMES = ("day", "night", "sunset")
GROUNDS = ("field", "sea", "mountains")
SCENE_ITEMS = ("house", "tree", "boat", "flower", "sun", "moon")

#: One colour-shape-background triple in this many is never drawn in training, and likewise one
#: pair of colour-shapes: the held-out test asks only for these.
HELD_OUT_ONE_IN = 7

RADIUS_PX = {"small": (27, 33), "medium": (48, 56), "big": (76, 86)}
RADIUS_OF_TWO_PX = {"small": (24, 28), "medium": (35, 40), "big": (44, 48)}


@dataclass(frozen=True)
class Thing:
    """One flat shape; `place` is None where a relation to another thing says where it stands."""

    colour: str
    shape: str
    size: str = "medium"
    place: str | None = "centre"


@dataclass(frozen=True)
class ShapesSpec:
    """One or two things on a plain ground. `relation` reads: first thing, relation, second thing."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None


@dataclass(frozen=True)
class SceneSpec:
    """A landscape in a flat illustration style."""

    time: str
    ground: str
    items: tuple[str, ...]
    house_colour: str | None = None
    boat_colour: str | None = None
    flower_colour: str | None = None


Spec = ShapesSpec | SceneSpec


def _one_in(key: str, modulus: int) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % modulus == 0


def is_held_out(spec: Spec) -> bool:
    """Whether the spec's combination is kept out of training, by a hash that no run changes."""
    if isinstance(spec, SceneSpec):
        return False
    triples = any(
        _one_in(f"{thing.colour}/{thing.shape}/{spec.background}", HELD_OUT_ONE_IN) for thing in spec.things
    )
    if triples or len(spec.things) < 2:
        return triples
    pair = "+".join(sorted(f"{thing.colour}/{thing.shape}" for thing in spec.things))
    return _one_in(pair, HELD_OUT_ONE_IN)


def random_single(rng: random.Random) -> ShapesSpec:
    """One thing; the attributes that captions may leave unsaid are common ones more often."""
    background = "white" if rng.random() < 0.3 else rng.choice(tuple(COLOURS))
    colour = rng.choice([name for name in COLOURS if name != background])
    size = "medium" if rng.random() < 0.4 else rng.choice(SIZES)
    place = "centre" if rng.random() < 0.4 else rng.choice(PLACES)
    return ShapesSpec(background, (Thing(colour, rng.choice(SHAPES), size, place),))


def random_pair(rng: random.Random) -> ShapesSpec:
    """Two things that differ in colour or shape, placed by a relation or each by its own place."""
    background = "white" if rng.random() < 0.3 else rng.choice(tuple(COLOURS))
    colours = [name for name in COLOURS if name != background]
    first = Thing(rng.choice(colours), rng.choice(SHAPES))
    second = first
    while (second.colour, second.shape) == (first.colour, first.shape):
        second = Thing(rng.choice(colours), rng.choice(SHAPES))
    if rng.random() < 0.65:
        relation = rng.choice(RELATIONS)
        first, second = (
            replace(thing, size="medium" if rng.random() < 0.6 else rng.choice(SIZES), place=None)
            for thing in (first, second)
        )
        return ShapesSpec(background, (first, second), relation)
    style = rng.random()
    if style < 0.5:  # the first in the middle, the second at an edge
        places = ("centre", rng.choice(tuple(_AWAY_FROM)))
    else:
        places = rng.choice((("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top")))
    sizes = ["medium" if rng.random() < 0.5 else rng.choice(SIZES) for _ in range(2)]
    things = tuple(
        replace(thing, size=size, place=place)
        for thing, size, place in zip((first, second), sizes, places, strict=True)
    )
    return ShapesSpec(background, things)


def random_scene(rng: random.Random) -> SceneSpec:
    """A landscape whose items can stand together: boats need water, the moon belongs to the night."""
    time = rng.choice(TIMES)
    ground = rng.choice(GROUNDS)
    items: list[str] = []
    if ground == "sea":
        if rng.random() < 0.6:
            items.append("boat")
    else:
        items += [
            item for item, share in (("house", 0.5), ("tree", 0.5), ("flower", 0.35)) if rng.random() < share
        ]
    if time == "night":
        if rng.random() < 0.7:
            items.append("moon")
    elif rng.random() < 0.7:
        items.append("sun")

    def colour_of(item: str, palette: tuple[str, ...]) -> str | None:
        return rng.choice(palette) if item in items else None

    return SceneSpec(
        time,
        ground,
        tuple(items),
        house_colour=colour_of("house", ("red", "blue", "yellow", "white", "purple", "orange")),
        boat_colour=colour_of("boat", ("red", "white", "yellow", "orange")),
        flower_colour=colour_of("flower", ("red", "yellow", "purple", "white", "orange")),
    )


def draw(spec: Spec, rng: random.Random) -> Image.Image:
    """Draw the spec as a 256x256 RGB picture; `rng` gives the small differences between two drawings."""
    side = SIDE_PX * SUPERSAMPLE
    image = Image.new("RGB", (side, side), (255, 255, 255))
    pen = _Pen(ImageDraw.Draw(image), rng)
    if isinstance(spec, SceneSpec):
        _draw_scene(pen, spec)
    else:
        _draw_shapes(pen, spec)
    return image.reduce(SUPERSAMPLE)


@dataclass(frozen=True)
class _Pen:
    """Draws in picture pixels; the canvas is larger by `SUPERSAMPLE`."""

    canvas: ImageDraw.ImageDraw
    rng: random.Random

    def near(self, value: float, spread: float) -> float:
        return value + self.rng.uniform(-spread, spread)

    def polygon(self, points: list[tuple[float, float]], fill: tuple[int, int, int]) -> None:
        self.canvas.polygon([(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points], fill=fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: tuple[int, int, int]) -> None:
        self.canvas.rectangle([v * SUPERSAMPLE for v in (left, top, right, bottom)], fill=fill)

    def disc(self, x: float, y: float, radius: float, fill: tuple[int, int, int]) -> None:
        self.canvas.ellipse(
            [v * SUPERSAMPLE for v in (x - radius, y - radius, x + radius, y + radius)], fill=fill
        )


# --- shapes -------------------------------------------------------------------------------------


def _draw_shapes(pen: _Pen, spec: ShapesSpec) -> None:
    pen.box(0, 0, SIDE_PX, SIDE_PX, COLOURS[spec.background])
    radii = RADIUS_PX if len(spec.things) == 1 else RADIUS_OF_TWO_PX
    sized = [(thing, pen.rng.uniform(*radii[thing.size])) for thing in spec.things]
    if spec.relation is None:
        other_place = spec.things[-1].place if len(sized) > 1 else None
        spots = [_spot(pen, thing, radius, other_place) for thing, radius in sized]
    else:
        spots = _spots_by_relation(pen, spec.relation)
    for (thing, radius), (x, y) in zip(sized, spots, strict=True):
        _draw_thing(pen, thing, x, y, radius)


#: A thing in the middle makes room for its neighbour at an edge: (right, down) in pixels.
_AWAY_FROM = {"left": (22, 0), "right": (-22, 0), "top": (0, 22), "bottom": (0, -22)}


def _spot(pen: _Pen, thing: Thing, radius: float, other_place: str | None) -> tuple[float, float]:
    edge = max(radius + 10, 44 if other_place else 62)
    centre = SIDE_PX / 2
    right, down = _AWAY_FROM.get(other_place or "", (0, 0))
    x, y = {
        "left": (edge, centre),
        "right": (SIDE_PX - edge, centre),
        "top": (centre, edge),
        "bottom": (centre, SIDE_PX - edge),
        "centre": (centre + right, centre + down),
    }[thing.place or "centre"]
    return pen.near(x, 4), pen.near(y, 4)


def _spots_by_relation(pen: _Pen, relation: str) -> list[tuple[float, float]]:
    centre, offset = SIDE_PX / 2, pen.near(60, 4)
    first = {
        "above": (centre, centre - offset),
        "below": (centre, centre + offset),
        "left of": (centre - offset, centre),
        "right of": (centre + offset, centre),
    }[relation]
    second = (SIDE_PX - first[0], SIDE_PX - first[1])
    return [(pen.near(x, 4), pen.near(y, 4)) for x, y in (first, second)]


def _draw_thing(pen: _Pen, thing: Thing, x: float, y: float, radius: float) -> None:
    fill = COLOURS[thing.colour]
    if thing.shape == "circle":
        pen.disc(x, y, radius, fill)
    else:
        outline = {"square": _square, "triangle": _triangle, "star": _star, "heart": _heart}[thing.shape]
        pen.polygon([(x + u * radius, y + v * radius) for u, v in outline()], fill)


def _square() -> list[tuple[float, float]]:
    half = 0.86
    return [(-half, -half), (half, -half), (half, half), (-half, half)]


def _triangle() -> list[tuple[float, float]]:
    return [(0, -0.95), (1.0, 0.8), (-1.0, 0.8)]


def _star() -> list[tuple[float, float]]:
    points = []
    for corner in range(10):
        reach = 1.12 if corner % 2 == 0 else 0.45
        angle = math.pi * corner / 5 - math.pi / 2
        points.append((reach * math.cos(angle), reach * math.sin(angle) + 0.05))
    return points


def _heart() -> list[tuple[float, float]]:
    points = []
    for index in range(48):
        t = 2 * math.pi * index / 48
        across = 16 * math.sin(t) ** 3
        up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((across / 16.5, -up / 15.5 - 0.08))
    return points


# --- scenes -------------------------------------------------------------------------------------

_SKY = {
    "day": ((150, 208, 245),),
    "night": ((26, 32, 72),),
    "sunset": ((250, 150, 80), (252, 190, 110), (250, 120, 90)),
}
_GRASS = {"day": (110, 190, 90), "night": (36, 70, 60), "sunset": (130, 130, 60)}
_SEA = {"day": (50, 130, 205), "night": (24, 52, 110), "sunset": (90, 90, 160)}
_MOUNTAIN = {"day": (120, 140, 165), "night": (58, 66, 104), "sunset": (140, 90, 110)}
_SNOW = {"day": (245, 248, 250), "night": (150, 160, 195), "sunset": (252, 220, 200)}
_LEAVES = {"day": (50, 140, 65), "night": (28, 84, 62), "sunset": (84, 110, 50)}
_TRUNK = (112, 76, 46)
_HORIZON_PX = 160


def _draw_scene(pen: _Pen, spec: SceneSpec) -> None:
    horizon = pen.near(_HORIZON_PX, 4)
    _draw_sky(pen, spec.time, horizon)
    if "sun" in spec.items:
        low = spec.time == "sunset"
        at = (pen.near(128 if low else 196, 10), horizon - 26 if low else pen.near(52, 6))
        pen.disc(*at, pen.near(34 if low else 25, 2), (255, 236, 130) if low else (255, 216, 60))
    if "moon" in spec.items:
        x, y = pen.near(72, 10), pen.near(38, 5)
        pen.disc(x, y, 25, (248, 240, 200))
        pen.disc(x + 11, y - 5, 21, _SKY["night"][0])
    if spec.ground == "mountains":
        _draw_mountains(pen, spec.time, horizon)
    land = _SEA if spec.ground == "sea" else _GRASS
    pen.box(0, horizon, SIDE_PX, SIDE_PX, land[spec.time])
    if spec.ground == "sea":
        foam = tuple(min(255, part + 42) for part in _SEA[spec.time])
        for x, y in ((40, 190), (150, 205), (200, 182), (86, 230)):
            left = pen.near(x, 8)
            pen.box(left, y, left + 34, y + 4, foam)  # type: ignore[arg-type]
    if "tree" in spec.items:
        for x in (206, 168) if "house" in spec.items else (70, 186):
            _draw_tree(pen, spec.time, pen.near(x, 6), horizon + pen.near(18, 4))
    if spec.house_colour:
        _draw_house(pen, spec, pen.near(84, 6), horizon + pen.near(26, 4))
    if spec.boat_colour:
        _draw_boat(pen, spec.boat_colour, pen.near(128, 12), horizon + pen.near(26, 4))
    if spec.flower_colour:
        for x in (50, 128, 206):
            _draw_flower(pen, spec.flower_colour, pen.near(x, 8), pen.near(226, 4))


def _draw_sky(pen: _Pen, time: str, horizon: float) -> None:
    bands = _SKY[time]
    for index, colour in enumerate(bands):
        pen.box(0, horizon * index / len(bands), SIDE_PX, horizon, colour)
    if time == "night":
        for star_x, star_y in ((120, 30), (160, 70), (200, 28), (232, 84), (28, 104), (98, 92)):
            pen.disc(pen.near(star_x, 3), pen.near(star_y, 3), 2.6, (245, 240, 210))
    if time == "day":
        x, y = pen.near(74, 10), pen.near(52, 6)
        for dx, dy, radius in ((-20, 4, 12), (0, 0, 17), (20, 4, 12)):
            pen.disc(x + dx, y + dy, radius, (250, 252, 255))


def _draw_mountains(pen: _Pen, time: str, horizon: float) -> None:
    for usual_x, half, usual_height in ((62, 84, 92), (188, 92, 112)):
        x, height = pen.near(usual_x, 8), pen.near(usual_height, 6)
        pen.polygon([(x - half, horizon), (x, horizon - height), (x + half, horizon)], _MOUNTAIN[time])
        pen.polygon(
            [
                (x - half * 0.3, horizon - height * 0.7),
                (x, horizon - height),
                (x + half * 0.3, horizon - height * 0.7),
            ],
            _SNOW[time],
        )


def _draw_tree(pen: _Pen, time: str, x: float, foot: float) -> None:
    pen.box(x - 6, foot - 34, x + 6, foot, _TRUNK)
    pen.disc(x, foot - 56, 28, _LEAVES[time])


def _draw_house(pen: _Pen, spec: SceneSpec, x: float, foot: float) -> None:
    wall = COLOURS[spec.house_colour or "white"]
    roof = (120, 60, 50) if spec.house_colour != "red" else (90, 60, 60)
    pen.box(x - 38, foot - 54, x + 38, foot, wall)
    pen.polygon([(x - 48, foot - 54), (x, foot - 92), (x + 48, foot - 54)], roof)
    pen.box(x - 9, foot - 28, x + 9, foot, (96, 62, 42))
    pane = (255, 226, 120) if spec.time == "night" else (200, 230, 250)
    for dx in (-25, 25):
        pen.box(x + dx - 8, foot - 44, x + dx + 8, foot - 28, pane)


def _draw_boat(pen: _Pen, colour: str, x: float, water: float) -> None:
    pen.polygon(
        [(x - 46, water - 6), (x + 46, water - 6), (x + 28, water + 18), (x - 28, water + 18)],
        COLOURS[colour],
    )
    pen.box(x - 3, water - 80, x + 3, water - 6, _TRUNK)
    pen.polygon([(x + 5, water - 78), (x + 40, water - 16), (x + 5, water - 16)], (250, 248, 240))


def _draw_flower(pen: _Pen, colour: str, x: float, y: float) -> None:
    pen.box(x - 2, y, x + 2, y + 26, (40, 120, 60))
    for petal in range(5):
        angle = 2 * math.pi * petal / 5 - math.pi / 2
        pen.disc(x + 10 * math.cos(angle), y + 10 * math.sin(angle), 7.5, COLOURS[colour])
    pen.disc(x, y, 6, (250, 212, 45) if colour != "yellow" else (245, 138, 30))
