"""Judges a finished picture: black, flat, framed in black, in parts destroyed, or noise that was left over.

Knows nothing of how the picture was made. It may be meant to look so: what is found is a notice, never an
error. The thresholds rest on the pictures of `tests/benchmarks/picture_quality.py`:

    python -m tests.benchmarks.picture_quality

Of 708 good pictures, 204 of them the demo model's, it flags 1 (coloured discs all over). It finds all black
borders of 1 % to 20 % (288 of 288), 96 % of black and gray rectangles on the grid in photographs and 98 % in
the demo model's pictures, all pictures that were stopped after 2 to 5 of 8 steps (192 of 192) and 97 % of
those with noise of 25 to 100 levels on their pixels. It misses what is faint or soft: 60 % of those stopped
after step 6, 77 % of those with noise of 1 on their latents and all with 0.5 (2 is always found), 21 % of
white rectangles in the demo model's pictures (many have a white ground), rows of tiles as wide as the
picture, and latent cells set to 0, which decode to a soft blot like a drawn one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zimage_engine.types import Notice

if TYPE_CHECKING:
    from PIL.Image import Image

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

#: A picture is black where no more than one pixel in a thousand is brighter than this (of 255).
BLACK_LEVEL = 12
BLACK_TOLERANCE = 1e-3
#: A picture is flat where each channel spreads (standard deviation, of 255) less than this:
#: JPEG noise and a VAE's ripple on one even colour stay below, any visible shape is above.
FLAT_SPREAD = 2.0

#: A bar is rows (columns) of which no more than this share is lit, 2 of them at least: 1 % of 256 pixels.
DARK_LINE_SHARE = 0.005
THINNEST_BAR_PX = 2
#: Where a bar ends, so much of the next lines must be lit: a hard straight edge. Round things on a black
#: ground begin with a few lit pixels, a bar laid over a picture ends all along.
LIT_EDGE_SHARE = 0.7
#: So many lines after a bar may lie on the ramp of a resampled edge.
EDGE_RAMP_PX = 2
#: Inside the bars so much must be lit, or the picture is a dark one.
LIT_INSIDE_SHARE = 0.5

#: The VAE's pixels for each latent cell; tiled decoding starts its tiles on multiples of it too.
CELL_PX = 8
#: A cell is of one colour where no channel varies by more (of 255); so do two cells of the same colour.
EVEN_LEVELS = 2
#: The shortest side of a block. Shorter ones are common in any drawing.
SMALLEST_BLOCK_CELLS = 4
#: An edge is hard where the next pixel differs by more than this (of 255), along this much of the outline.
#: A decoder draws an edge over two pixels or more, and not along its grid.
HARD_EDGE_LEVELS = 12
HARD_OUTLINE_SHARE = 0.75
#: Beyond the blocks, no more of the cells may be of one colour: pixel art and chequers are even all over (1),
#: what blocks left of the demo model's pictures, with their plain grounds, is up to 0.82.
EVEN_ELSEWHERE_SHARE = 0.9
#: More candidates than these are a pattern.
MOST_BLOCKS = 64

#: Noise is judged in strips as high as its coarsest octave of detail, with so many pixels in all at the
#: most: all of 256x256, every eighth strip of 1024x1024.
STRIP_PX = 32
MOST_STRIP_PIXELS = 2**17
#: The side of the windows of which the calmest tenth tells whether anything in the picture is calm.
WINDOW_PX = 16
CALMEST_SHARE = 0.1
#: Pixels or small cells of noise: detail falls by 4 over two octaves in white noise, by 1.6 in the roughest
#: texture that counts as natural (1 / f**0.8), so 2.2 is the middle (of their logarithms). The contrast is
#: that of noise of 8.5 levels (times sqrt 2: a difference of two channels); below, film grain begins.
WHITE_FALL = 2.2
PIXEL_NOISE_LEVELS = 12.0
#: Cells of noise that a decoder has rounded: 8 to 16 pixels wide, smooth inside, everywhere. Detail of 8
#: pixels is above 4 times that of one pixel in unfinished pictures, up to 2.6 times in textures and among
#: discs of any size; and it does not grow towards 16 pixels, as it does in gradients (2 times).
CELL_RISE = 3.2
CELL_GROWTH = 1.2
#: The calmest tenth of finished pictures (2 steps or more) has up to 4.1 levels, that of unfinished ones,
#: stopped at the latest after 5 of 8 steps, 9 and more.
CELL_NOISE_LEVELS = 6.0
#: Of noise at most 5 % of neighbouring pixels are equal, of pixel art 78 % and more.
EQUAL_NEIGHBOURS_SHARE = 0.3

_WHAT_TO_DO = "if the prompt did not ask for that, draw again with another seed"


@dataclass(frozen=True, slots=True)
class PictureQuality:
    """Facts of one picture. Shares are of 1, levels are of 255.

    `brighter_share`: pixels above BLACK_LEVEL.
    `spread_levels`: standard deviation of the most varied channel.
    `black_border_share`: the part of the picture under hard-edged black bars on opposite edges.
    `block_share`: the part under rectangles of one colour on the VAE's grid, with hard edges.
    `even_elsewhere_share`: the cells of one colour among those outside of such rectangles.
    `calmest_contrast_levels`: the contrast of colour in the window that a tenth of all windows stay below.
    `colour_detail_levels`: contrast of colour between pixels, pairs, fours, eights and sixteens of them.
    `equal_neighbours_share`: pixels that equal the next one.
    """

    brighter_share: float
    spread_levels: float
    black_border_share: float
    block_share: float
    even_elsewhere_share: float
    calmest_contrast_levels: float
    colour_detail_levels: tuple[float, ...]
    equal_neighbours_share: float

    @property
    def is_black(self) -> bool:
        return self.brighter_share <= BLACK_TOLERANCE

    @property
    def is_flat(self) -> bool:
        return self.spread_levels < FLAT_SPREAD

    @property
    def has_black_borders(self) -> bool:
        return self.black_border_share > 0

    @property
    def has_blocks(self) -> bool:
        return self.block_share > 0 and self.even_elsewhere_share <= EVEN_ELSEWHERE_SHARE

    @property
    def is_noise(self) -> bool:
        """Noise of pixels or of cells lies over nearly all of the picture."""
        if self.equal_neighbours_share > EQUAL_NEIGHBOURS_SHARE:
            return False
        return self._is_pixel_noise or self._is_cell_noise

    @property
    def _is_pixel_noise(self) -> bool:
        detail = self.colour_detail_levels
        falls = any(fine > WHITE_FALL * coarse for fine, coarse in zip(detail[:-2], detail[2:], strict=True))
        return falls and self.calmest_contrast_levels >= PIXEL_NOISE_LEVELS

    @property
    def _is_cell_noise(self) -> bool:
        pixels, *_, eights, sixteens = self.colour_detail_levels
        peaks = eights > CELL_RISE * pixels and sixteens < CELL_GROWTH * eights
        return peaks and self.calmest_contrast_levels >= CELL_NOISE_LEVELS

    @property
    def findings(self) -> tuple[str, ...]:
        """The codes of what is suspicious in the picture; a black or flat one is nothing else besides."""
        found = tuple(finding.code for finding in _FINDINGS if finding.is_in(self))
        return found[:1] if self.is_black or self.is_flat else found

    @property
    def is_suspicious(self) -> bool:
        return bool(self.findings)


class Finding(NamedTuple):
    code: str
    is_in: Callable[[PictureQuality], bool]
    sentence: str


_FINDINGS: tuple[Finding, ...] = (
    Finding("picture_black", lambda quality: quality.is_black, "the picture is black all over"),
    Finding("picture_flat", lambda quality: quality.is_flat, "the picture is one even colour"),
    Finding(
        "picture_black_borders",
        lambda quality: quality.has_black_borders,
        "black bars lie along the edges of the picture",
    ),
    Finding(
        "picture_blocks",
        lambda quality: quality.has_blocks,
        "rectangles of one even colour cover parts of the picture",
    ),
    Finding("picture_noise", lambda quality: quality.is_noise, "noise covers the picture, as if unfinished"),
)
CODES: tuple[str, ...] = tuple(finding.code for finding in _FINDINGS)


def measure(image: Image) -> PictureQuality:
    """Measure a PIL picture, of any mode and size. Under 10 ms for 1024x1024 on one core (the benchmark)."""
    from PIL import ImageChops

    picture = image.convert("RGB")
    channels = picture.split()
    brightest = ImageChops.lighter(ImageChops.lighter(channels[0], channels[1]), channels[2])
    histogram = brightest.histogram()
    pixels: Bytes = np.asarray(picture)
    block_share, even_elsewhere_share = _blocks(pixels)
    contrast, detail, equal = _noise(pixels)
    return PictureQuality(
        brighter_share=sum(histogram[BLACK_LEVEL + 1 :]) / sum(histogram),
        spread_levels=_spread_levels(picture),
        black_border_share=_black_border_share(np.asarray(brightest) > BLACK_LEVEL),
        block_share=block_share,
        even_elsewhere_share=even_elsewhere_share,
        calmest_contrast_levels=contrast,
        colour_detail_levels=detail,
        equal_neighbours_share=equal,
    )


def _spread_levels(picture: Image) -> float:
    """The standard deviation of the most varied channel, bit for bit that of PIL's ImageStat."""
    counts = np.asarray(picture.histogram(), dtype=np.int64).reshape(3, -1)
    levels = np.arange(counts.shape[1])
    pixels = picture.width * picture.height
    sums, squares = (counts @ levels).tolist(), (counts @ levels**2).tolist()
    return max(
        math.sqrt(max(0.0, square - total**2.0 / pixels) / pixels)
        for total, square in zip(sums, squares, strict=True)
    )


def notices(quality: PictureQuality) -> tuple[Notice, ...]:
    """What the caller should know of such a picture; nothing for an ordinary one."""
    sentences = {finding.code: finding.sentence for finding in _FINDINGS}
    return tuple(Notice(code, f"{sentences[code]}; {_WHAT_TO_DO}") for code in quality.findings)


def same_finding(first: PictureQuality, second: PictureQuality) -> bool:
    """Whether both pictures are suspicious of the same, or neither is of anything."""
    return first.findings == second.findings


# --- black borders --------------------------------------------------------------------------------------


def _black_border_share(lit: Mask) -> float:
    """The part of the picture (h, w) that is under bars on both of two opposite edges, or on all four."""
    height, width = lit.shape
    top, bottom = _bars(lit)
    left, right = _bars(lit[top : height - bottom].T)
    if not left and not top:  # columns of a frame are dark only between its upper and its lower bar
        return 0.0
    inside = lit[top : height - bottom, left : width - right]
    if inside.mean() < LIT_INSIDE_SHARE:
        return 0.0
    return 1 - inside.size / lit.size


def _bars(lit: Mask) -> tuple[int, int]:
    """How many dark rows lie at the top and at the bottom; none unless both are bars with hard edges.

    A picture with a dark line inside too is a pattern of lines, or an open one with dark parts.
    """
    dark = np.count_nonzero(lit, axis=1) <= DARK_LINE_SHARE * lit.shape[1]
    if dark.all():
        return 0, 0
    top, bottom = int(np.argmin(dark)), int(np.argmin(dark[::-1]))
    is_bar = min(top, bottom) >= THINNEST_BAR_PX and np.count_nonzero(dark) == top + bottom
    if is_bar and _lit_edge(lit[top:]) and _lit_edge(lit[::-1][bottom:]):
        return top, bottom
    return 0, 0


def _lit_edge(inside: Mask) -> bool:
    """Whether one of the first lines is lit nearly all along, apart from bars at its own two ends."""
    for line in inside[: EDGE_RAMP_PX + 1]:
        places = np.flatnonzero(line)
        if places.size and places.size >= LIT_EDGE_SHARE * max(
            places[-1] - places[0] + 1, LIT_INSIDE_SHARE * line.size
        ):
            return True
    return False


# --- blocks of one colour -------------------------------------------------------------------------------


class Block(NamedTuple):
    """A rectangle of cells."""

    top: int
    left: int
    bottom: int
    right: int


def _blocks(pixels: Bytes) -> tuple[float, float]:
    """The share of cells under blocks, and the share of even ones among the rest; 0, 1 for tiny pictures."""
    rows, columns = pixels.shape[0] // CELL_PX, pixels.shape[1] // CELL_PX
    if min(rows, columns) < SMALLEST_BLOCK_CELLS:
        return 0.0, 1.0
    pixels = pixels[: rows * CELL_PX, : columns * CELL_PX]
    lowest, highest = _cell_extremes(pixels, np.minimum), _cell_extremes(pixels, np.maximum)
    even = _alike(highest, lowest)
    covered = np.zeros_like(even)
    for block in _rectangles(even, lowest) if even.any() else ():
        if _hard_outline_share(pixels, block) >= HARD_OUTLINE_SHARE:
            covered[block.top : block.bottom, block.left : block.right] = True
    elsewhere = even[~covered]
    return float(covered.mean()), float(elsewhere.mean()) if elsewhere.size else 1.0


def _cell_extremes(pixels: Bytes, extreme: np.ufunc) -> NDArray[np.int16]:
    """(h, w, 3) -> (h / CELL_PX, w / CELL_PX, 3).

    Whole rows first, which lie together in memory, then halves of columns: 20 times faster than one
    reduction over short axes.
    """
    height, width, _ = pixels.shape
    rows = extreme.reduce(pixels.reshape(height // CELL_PX, CELL_PX, width * 3), axis=1)
    cells = rows.reshape(height // CELL_PX, width // CELL_PX, CELL_PX, 3)
    while (half := cells.shape[2] // 2) > 0:
        cells = extreme(cells[:, :, :half], cells[:, :, half:])
    return cells[:, :, 0].astype(np.int16)


def _rectangles(even: Mask, colour: NDArray[np.int16]) -> list[Block]:
    """Rectangles of even cells of one colour from a corner on: above it and to its left are others."""
    like_left, like_above = np.zeros_like(even), np.zeros_like(even)
    like_left[:, 1:] = even[:, 1:] & even[:, :-1] & _alike(colour[:, 1:], colour[:, :-1])
    like_above[1:] = even[1:] & even[:-1] & _alike(colour[1:], colour[:-1])
    run_right, run_down = _runs(like_left), _runs(like_above.T).T
    long_enough = (run_right >= SMALLEST_BLOCK_CELLS) & (run_down >= SMALLEST_BLOCK_CELLS)
    corners = np.argwhere(even & ~like_left & ~like_above & long_enough)
    if len(corners) > MOST_BLOCKS:
        return []
    found = []
    for top, left in corners.tolist():
        wide = run_right[top : top + run_down[top, left], left] >= run_right[top, left]
        high = len(wide) if wide.all() else int(np.argmin(wide))
        if high >= SMALLEST_BLOCK_CELLS:
            found.append(Block(top, left, top + high, left + int(run_right[top, left])))
    return found


def _alike(first: NDArray[np.int16], second: NDArray[np.int16]) -> Mask:
    red, green, blue = (np.abs(first[..., channel] - second[..., channel]) for channel in range(3))
    return np.asarray(np.maximum(np.maximum(red, green), blue) <= EVEN_LEVELS)


def _runs(like_left: Mask) -> NDArray[np.int64]:
    """For each cell (r, c), how many from it on to the right are alike, itself counted."""
    height, width = like_left.shape
    columns = np.arange(width)
    breaks = np.full((height, width), width)
    breaks[:, :-1] = np.where(like_left[:, 1:], width, columns[1:])
    next_break = np.minimum.accumulate(breaks[:, ::-1], axis=1)[:, ::-1]
    return np.asarray(next_break - columns)


def _hard_outline_share(pixels: Bytes, block: Block) -> float:
    """How much of the outline inside the picture has another colour on the very next pixel.

    0 without a corner inside the picture: a sky or a floor that ends on a straight line is none.
    """
    top, left, bottom, right = (CELL_PX * edge for edge in block)
    lying, upright = pixels[:, left:right], pixels[top:bottom].swapaxes(0, 1)
    flat_sides = _steps(lying, top, bottom)
    steep_sides = _steps(upright, left, right)
    if not flat_sides or not steep_sides:
        return 0.0
    return float(np.concatenate(flat_sides + steep_sides).mean())


def _steps(lines: Bytes, first: int, end: int) -> list[Mask]:
    """Where the lines before `first` and from `end` on differ from those within, as far as there are any."""
    pairs = [(edge - 1, edge) for edge in (first, end) if 0 < edge < len(lines)]
    return [
        np.abs(lines[one].astype(np.int16) - lines[other]).max(axis=1) > HARD_EDGE_LEVELS
        for one, other in pairs
    ]


# --- leftover noise -------------------------------------------------------------------------------------


def _noise(pixels: Bytes) -> tuple[float, tuple[float, ...], float]:
    """Contrast of the calmest windows, colour detail of five octaves, share of equal neighbours.

    Colour alone is looked at, as red less green and blue less green: noise in latents or in pixels is of all
    colours, while letters, lines, sand and grass vary in brightness and hardly in hue.
    """
    octaves = STRIP_PX.bit_length() - 1
    count, width = pixels.shape[0] // STRIP_PX, pixels.shape[1] // STRIP_PX * STRIP_PX
    if not count or not width:
        return 0.0, (0.0,) * octaves, 1.0
    every = -(-count * STRIP_PX * width // MOST_STRIP_PIXELS)
    strips = pixels[: count * STRIP_PX, :width].reshape(count, STRIP_PX, width, 3)[::every]
    strips = strips.reshape(-1, width, 3)
    red, green, blue = (strips[..., channel].astype(np.float32) for channel in range(3))
    equal = (red[:, 1:] == red[:, :-1]) & (green[:, 1:] == green[:, :-1]) & (blue[:, 1:] == blue[:, :-1])
    level = np.stack((red - green, blue - green))
    energies: list[Floats] = []
    for _ in range(octaves):
        coarser = _halved(level)
        energies.append((_halved(level * level) - coarser * coarser).mean(axis=0))
        level = coarser
    in_windows = sum(_mean_of_squares(energy, WINDOW_PX >> (k + 1)) for k, energy in enumerate(energies[:-1]))
    calmest = float(np.quantile(np.asarray(in_windows), CALMEST_SHARE))
    detail = tuple(float(np.sqrt(max(energy.mean(), 0.0))) for energy in energies)
    return max(calmest, 0.0) ** 0.5, detail, float(equal.mean())


def _halved(level: Floats) -> Floats:
    """Mean of each 2x2, (c, h, w) -> (c, h / 2, w / 2)."""
    rows = level[:, ::2] + level[:, 1::2]
    return np.asarray((rows[..., ::2] + rows[..., 1::2]) * np.float32(0.25))


def _mean_of_squares(energy: Floats, side: int) -> Floats:
    """Mean over each side x side of (h, w)."""
    height, width = energy.shape
    return np.asarray(energy.reshape(height // side, side, width // side, side).mean(axis=(1, 3)))
