"""Says what stands in a picture: which ground, which flat things, of what colour and shape, and where.

An independent judge of drawn pictures: colour segmentation and geometry by numpy alone. It knows the
reference values of the colour names and textbook forms of the shapes, nothing of how pictures are drawn.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from zimage_engine.demo.pictures import COLOURS, ShapesSpec, Thing

UNKNOWN = "unknown"

_NAMES = (*COLOURS, UNKNOWN)
#: The longer side of the picture while it is looked at; what is reported is in the picture's own pixels.
_WORK_PX = 256
#: A colour further than this from every reference (CIE76 in Lab) has no name: grey, brown, pink.
_NAMED_WITHIN = 42.0
#: Pixels with a neighbour two to either side that differs by more (0..255) lie on an edge.
_FLAT_WITHIN = 36
#: Two colours of one picture closer than this (RGB, Euclid) are one colour that lies between two names.
_SAME_COLOUR_WITHIN = 46.0
#: A colour this near (RGB) to the way from one colour to another may be no more than a mixture of them,
#: and then has to fill a square of this many pixels to each side, which seams along edges do not.
_MIXED_WITHIN = 80.0
_SEAM_DEPTH = 5
#: Less than this share of the picture is a speck, not a thing.
_SPECK_SHARE = 0.004
#: The ring along the border where the ground is read, as a share of the side.
_RING_SHARE = 0.03
#: A thing overlaps the ideal of its shape by at least this (intersection over union): a little less than
#: blurred, bent and noisy drawings were measured to do, and more than a pentagon overlaps a circle, an
#: outline of a house a square, a heart on its head a triangle. Thin points lose most by a bent outline.
_LEAST_OVERLAP = {"circle": 0.9, "square": 0.89, "triangle": 0.85, "star": 0.8, "heart": 0.86}
#: A thing has left the centre when it has used up this share of the free room towards an edge.
_OFF_CENTRE = 0.38
#: It stands in a corner when the lesser of its two shifts is more than this share of the greater.
_DIAGONAL = 0.6


@dataclass(frozen=True)
class SeenThing:
    """One connected region: `centre_px` is the middle of `box` (left, top, right, bottom), right-open."""

    colour: str
    shape: str
    centre_px: tuple[float, float]
    area_px: int
    box: tuple[int, int, int, int]
    picture_px: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """What was seen; the largest thing comes first."""

    background: str
    things: tuple[SeenThing, ...]


@dataclass(frozen=True)
class Verdict:
    """What of an asked picture is right. Colour, shape and position need the asked number of things."""

    background_ok: bool
    count_ok: bool
    colour_ok: bool
    shape_ok: bool
    position_ok: bool

    @property
    def content_ok(self) -> bool:
        """Every thing has its colour and shape, nothing else is there, and the ground is right."""
        return self.background_ok and self.count_ok and self.colour_ok and self.shape_ok

    @property
    def all_ok(self) -> bool:
        return self.content_ok and self.position_ok


def detect(image: Image.Image) -> Scene:
    """Find the ground and the things. `unknown` is a colour or shape that no name fits."""
    pixels = _softened(image)
    regions, names = _regions(pixels)
    ring = _ring(pixels.shape[0], pixels.shape[1])
    counts = np.bincount(names[regions[ring]], minlength=len(_NAMES))
    ground = int(counts.argmax())
    background = _NAMES[ground] if 2 * counts[ground] > counts.sum() else UNKNOWN
    scale = max(image.size) / max(pixels.shape[:2])
    areas = np.bincount(regions.ravel(), minlength=len(names))
    things = [
        _thing(regions == region, _NAMES[names[region]], scale, image.size)
        for region in np.argsort(-areas)
        if names[region] != ground and areas[region] >= _SPECK_SHARE * regions.size
    ]
    return Scene(background, tuple(things))


def place(thing: SeenThing) -> str:
    """left, right, top, bottom or centre; a thing in a corner is at e.g. "top left"."""
    right, down = (
        (centre - side / 2) / max(1.0, (side - (high - low)) / 2)
        for centre, side, low, high in zip(
            thing.centre_px, thing.picture_px, thing.box[:2], thing.box[2:], strict=True
        )
    )
    across, along = ("left" if right < 0 else "right"), ("top" if down < 0 else "bottom")
    lesser, greater = sorted((abs(right), abs(down)))
    if greater < _OFF_CENTRE:
        return "centre"
    if lesser > max(_OFF_CENTRE, _DIAGONAL * greater):
        return f"{along} {across}"
    return across if abs(right) > abs(down) else along


def relation(first: SeenThing, second: SeenThing) -> str:
    """How the first stands to the second: above, below, left of, right of."""
    right = first.centre_px[0] - second.centre_px[0]
    down = first.centre_px[1] - second.centre_px[1]
    if abs(right) > abs(down):
        return "left of" if right < 0 else "right of"
    return "above" if down < 0 else "below"


def judge(spec: ShapesSpec, image: Image.Image) -> Verdict:
    """Compare a picture with what was asked; seen things are given to asked things as fits best."""
    return judge_scene(spec, detect(image))


def judge_scene(spec: ShapesSpec, scene: Scene) -> Verdict:
    """Compare what was seen with what was asked."""
    background_ok = scene.background == spec.background
    if len(scene.things) != len(spec.things):
        return Verdict(background_ok, False, False, False, False)
    verdicts = (
        Verdict(
            background_ok,
            True,
            colour_ok=all(seen.colour == asked.colour for seen, asked in pairs),
            shape_ok=all(seen.shape == asked.shape for seen, asked in pairs),
            position_ok=_position_ok(spec, pairs),
        )
        for order in itertools.permutations(scene.things)
        for pairs in [tuple(zip(order, spec.things, strict=True))]
    )
    return max(verdicts, key=lambda it: (it.content_ok, it.colour_ok + it.shape_ok, it.position_ok))


def _position_ok(spec: ShapesSpec, pairs: tuple[tuple[SeenThing, Thing], ...]) -> bool:
    if spec.relation is not None:
        return relation(pairs[0][0], pairs[1][0]) == spec.relation
    return all(asked.place is None or place(seen) == asked.place for seen, asked in pairs)


# --- segmentation -------------------------------------------------------------------------------


def _softened(image: Image.Image) -> NDArray[np.int16]:
    """The picture at working size, `(H, W, 3)`, with pixel noise averaged away."""
    image = image.convert("RGB")
    share = _WORK_PX / max(image.size)
    if share != 1:
        size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
        image = image.resize(size, Image.Resampling.BOX if share < 1 else Image.Resampling.BILINEAR)
    return np.asarray(image.filter(ImageFilter.BoxBlur(1)), dtype=np.int16)


def _ring(height: int, width: int) -> NDArray[np.bool_]:
    ring = np.ones((height, width), dtype=bool)
    depth = max(2, round(_RING_SHARE * max(height, width)))
    ring[depth:-depth, depth:-depth] = False
    return ring


def _regions(pixels: NDArray[np.int16]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Cut the picture into connected regions of one colour: each pixel's region, each region's name.

    Pixels of an edge are mixtures and may look like a third colour (orange between red and yellow), so
    only flat pixels tell which colours there are, and a region without a flat core goes to its neighbours.
    """
    flat = _flat(pixels)
    nearest = _nearest_names()[tuple(np.moveaxis(pixels >> 3, -1, 0))]
    present, colours = _palette(pixels, nearest, flat)
    # squared, less the square of the pixel, which is the same for all colours
    distances = np.square(colours).sum(-1) - 2 * (pixels.astype(np.float32) @ colours.T)
    label = distances.argmin(-1)
    regions, count = _components(label)
    label_of = np.zeros(count, dtype=np.intp)
    label_of[regions.ravel()] = label.ravel()
    seams = _between_others(colours)[label_of]
    thin = np.bincount(regions[_deep_inside(label, 2) & flat], minlength=count) == 0
    thin |= seams & (np.bincount(regions[_deep_inside(label, _SEAM_DEPTH)], minlength=count) == 0)
    sizes = np.bincount(regions.ravel(), minlength=count)
    kept = ~thin & (sizes >= _SPECK_SHARE * regions.size)
    if not kept.any():
        kept[sizes.argmax()] = True
    number = np.cumsum(kept) - 1
    grown = _grow(np.where(kept[regions], number[regions], -1), distances, label_of[kept])
    return grown, present[label_of[kept]]


def _between_others(colours: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which of the picture's colours could be a mixture of two others, as the seam between them is."""
    between = np.zeros(len(colours), dtype=bool)
    for middle, one, other in itertools.permutations(range(len(colours)), 3):
        way = colours[other] - colours[one]
        share = float((colours[middle] - colours[one]) @ way / (way @ way))
        aside = np.linalg.norm(colours[middle] - colours[one] - share * way)
        between[middle] |= 0.1 < share < 0.9 and aside < _MIXED_WITHIN
    return between


def _flat(pixels: NDArray[np.int16]) -> NDArray[np.bool_]:
    flat = np.ones(pixels.shape[:2], dtype=bool)
    for channel in np.moveaxis(pixels, -1, 0):
        flat[:, 2:-2] &= np.abs(channel[:, 4:] - channel[:, :-4]) < _FLAT_WITHIN
        flat[2:-2] &= np.abs(channel[4:] - channel[:-4]) < _FLAT_WITHIN
    return flat


def _palette(
    pixels: NDArray[np.int16], nearest: NDArray[np.intp], flat: NDArray[np.bool_]
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """The colours that the picture is made of: indices of names, and what they look like here (RGB)."""
    names, shown = nearest[flat], pixels[flat]
    counts = np.bincount(names, minlength=len(_NAMES))
    found: list[tuple[int, NDArray[np.float32]]] = []
    for name in np.argsort(-counts):
        if found and counts[name] < _SPECK_SHARE / 4 * nearest.size:
            break
        mine = shown[names == name] if counts[name] else pixels.reshape(-1, 3)
        colour = np.median(mine, axis=0).astype(np.float32)
        if all(np.linalg.norm(colour - other) > _SAME_COLOUR_WITHIN for _, other in found):
            found.append((int(name), colour))
    return np.array([name for name, _ in found]), np.stack([colour for _, colour in found])


def _deep_inside(label: NDArray[np.intp], depth: int) -> NDArray[np.bool_]:
    """Pixels with no other label (and no border) within `depth` to either side, up or down."""
    height, width = label.shape
    total = np.zeros((height + 1, width + 1), dtype=np.int32)
    total[1:, 2:] += label[:, 1:] != label[:, :-1]
    total[2:, 1:] += label[1:] != label[:-1]
    total = total.cumsum(0).cumsum(1)
    span = 2 * depth + 1
    deep = np.zeros(label.shape, dtype=bool)
    deep[depth : height - depth, depth : width - depth] = (
        total[span:, span:] - total[:-span, span:] - total[span:, :-span] + total[:-span, :-span] == 0
    )
    return deep


def _components(label: NDArray[np.intp]) -> tuple[NDArray[np.intp], int]:
    """Number the 4-connected components of equal labels, from 0: union-find over the runs of each row."""
    starts = np.ones(label.shape, dtype=bool)
    starts[:, 1:] = label[:, 1:] != label[:, :-1]
    run = (np.cumsum(starts.ravel()) - 1).reshape(label.shape)
    joined = label[1:] == label[:-1]
    links = np.stack([run[:-1][joined], run[1:][joined]], axis=1)
    links = links[np.append(True, (links[1:] != links[:-1]).any(1))[: len(links)]]  # each pair of runs once
    parent = list(range(int(run[-1, -1]) + 1))
    for above, below in links.tolist():
        while parent[above] != above:
            parent[above] = above = parent[parent[above]]
        while parent[below] != below:
            parent[below] = below = parent[parent[below]]
        parent[max(above, below)] = min(above, below)
    for index, up in enumerate(parent):  # parents have smaller numbers, so theirs are final already
        parent[index] = parent[up]
    roots, number = np.unique(np.array(parent), return_inverse=True)
    return number[run], len(roots)


def _grow(
    regions: NDArray[np.intp], distances: NDArray[np.float32], label_of: NDArray[np.intp]
) -> NDArray[np.intp]:
    """Give each pixel without a region (-1) to the neighbouring region whose colour it is nearest to."""
    height, width = regions.shape
    padded = np.full((height + 2, width + 2), -1, dtype=np.intp)
    padded[1:-1, 1:-1] = regions
    field = padded.ravel()
    away = np.zeros((height + 2, width + 2, distances.shape[-1]), dtype=np.float32)
    away[1:-1, 1:-1] = distances
    away = away.reshape(-1, distances.shape[-1])
    inside = np.zeros((height + 2, width + 2), dtype=bool)
    inside[1:-1, 1:-1] = True
    left = np.flatnonzero(inside.ravel() & (field < 0))
    while left.size:
        beside = field[left[:, None] + np.array([-1, 1, -(width + 2), width + 2])]
        cost = np.where(beside >= 0, away[left[:, None], label_of[beside]], np.inf)
        best = cost.argmin(1)
        chosen = np.take_along_axis(beside, best[:, None], 1)[:, 0]
        field[left] = chosen
        left = left[chosen < 0]
    return field.reshape(height + 2, width + 2)[1:-1, 1:-1]


# --- colours ------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _nearest_names() -> NDArray[np.intp]:
    """For colours cut to five bits a channel, `(32, 32, 32)`: the index of the nearest name in Lab."""
    levels = np.arange(32) * 8 + 4
    grid = _lab(np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1))
    references = _lab(np.array(list(COLOURS.values())))
    distances = np.linalg.norm(grid[..., None, :] - references, axis=-1)
    return np.where(distances.min(-1) <= _NAMED_WITHIN, distances.argmin(-1), len(COLOURS))


def _lab(rgb: NDArray[np.integer]) -> NDArray[np.float64]:
    """CIE Lab of sRGB values 0..255, white point D65."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / to_xyz.sum(1)
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


# --- shapes -------------------------------------------------------------------------------------

#: Things and ideals are compared in a square of +-1.1 around the centroid where the area is one.
_GRID = 56
_REACH = 1.1


def _thing(mask: NDArray[np.bool_], colour: str, scale: float, picture_px: tuple[int, int]) -> SeenThing:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    left, top, right, bottom = (round(float(edge) * scale) for edge in box)
    return SeenThing(
        colour,
        _shape(mask),
        ((left + right) / 2, (top + bottom) / 2),
        round(float(mask.sum()) * scale**2),
        (left, top, right, bottom),
        picture_px,
    )


def _shape(mask: NDArray[np.bool_]) -> str:
    """The shape whose ideal overlaps the mask best, if it does so well."""
    names, overlaps = shape_overlaps(mask)
    best = int(overlaps.argmax())
    return names[best] if overlaps[best] >= _LEAST_OVERLAP[names[best]] else UNKNOWN


def shape_overlaps(mask: NDArray[np.bool_]) -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Intersection over union with each ideal, both moved to one centroid and scaled to one area."""
    names, ideals = _ideals()
    seen = _normalised(mask)
    common = ideals @ seen
    return names, common / (ideals.sum(1) + seen.sum() - common)


def _normalised(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    rows, columns = np.nonzero(mask)
    unit = math.sqrt(rows.size)
    steps = (np.arange(_GRID) + 0.5) / _GRID * 2 * _REACH - _REACH
    down, right = (np.rint(middle.mean() + steps * unit).astype(int) for middle in (rows, columns))
    height, width = mask.shape
    inside = ((down >= 0) & (down < height))[:, None] & ((right >= 0) & (right < width))
    sampled = mask[np.ix_(down.clip(0, height - 1), right.clip(0, width - 1))] & inside
    return sampled.ravel().astype(np.float32)


@lru_cache(maxsize=1)
def _ideals() -> tuple[tuple[str, ...], NDArray[np.float32]]:
    """Textbook forms with the freedom a drawing hand has: proportions, corners, a slight turn."""
    side = 240
    axis = (np.arange(side) + 0.5) / side * 3 - 1.5
    found: list[tuple[str, NDArray[np.float32]]] = []
    for turn, wide in itertools.product((-0.12, 0.0, 0.12), (0.86, 1.0, 1.16)):
        x = (axis * math.cos(turn) + axis[:, None] * math.sin(turn)) / wide
        y = -axis * math.sin(turn) + axis[:, None] * math.cos(turn)
        forms = {
            "circle": [x**2 + y**2 < 1],
            # from sharp corners to round ones
            "square": [np.abs(x) ** power + np.abs(y) ** power < 0.9**power for power in (40, 8, 5)],
            "triangle": [(y < 0.7) & (y > -1 + 1.7 * np.abs(x))],
            "star": [_star(x, y, inner) for inner in (0.34, 0.42, 0.52, 0.6)],
            "heart": [_lobed_heart(x, y), _sextic_heart(x, y)],
        }
        found += [(name, _normalised(form)) for name, variants in forms.items() for form in variants]
    return tuple(name for name, _ in found), np.stack([form for _, form in found])


def _star(x: NDArray[np.float64], y: NDArray[np.float64], inner: float) -> NDArray[np.bool_]:
    """Five points at radius 1, the first upright, and dents at radius `inner`."""
    wedge = math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + wedge) % (2 * wedge) - wedge)  # from the axis of the nearest point
    radius = np.hypot(x, y)
    # the edge runs from (1, angle 0) to (inner, angle wedge)
    run, rise = 1 - inner * math.cos(wedge), inner * math.sin(wedge)
    return radius * np.cos(angle) * rise + radius * np.sin(angle) * run < rise


def _lobed_heart(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """A square standing on its corner with half a disc on each upper side."""
    half = 0.62
    diamond = np.abs(x) + np.abs(y) < half * math.sqrt(2)
    lobe = half / math.sqrt(2)
    return diamond | (np.hypot(np.abs(x) - lobe, y + lobe) < half)


def _sextic_heart(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The curve (x^2 + y^2 - 1)^3 = x^2 y^3."""
    return (x**2 + y**2 - 1) ** 3 + x**2 * y**3 < 0
