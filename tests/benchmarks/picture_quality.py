"""What the picture check flags: of good pictures, wrongly, and of damaged ones, rightly; and what it costs.

    python -m tests.benchmarks.picture_quality [--seeds 4]

Good pictures are the demo model's own and synthetic ones; damaged ones are demo pictures and synthetic
photographs that were spoilt in a known way. Everything is drawn from fixed seeds, so the table is the same
each time, but for the milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ZImagePipeline
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import zimage_engine
from zimage_engine.quality import measure, notices

Pixels = NDArray[np.uint8]

PROMPTS = (
    "a red circle on a white background",
    "a black square on a white background",
    "a white star on a black background",
    "a big purple heart on a yellow background",
    "绿色三角形在紫色圆形的左边，黄色背景",
    "a big black square on a red background",
    "a blue square on a green background",
    "a red house and trees in front of mountains by day, the sun",
    "夜晚的大海，月亮和白色的小船",
    "a yellow house, red flowers, a meadow, sunset",
    "夕阳下的大海，太阳，红色的小船",
    "a small white circle on a blue background",
)
NATIVE_PX = 256
STEPS = (1, 2, 4, 8)
INTERRUPTED_AT = (2, 3, 4, 5, 6)
LATENT_NOISE = (0.5, 1.0, 2.0)
PIXEL_NOISE = (25, 50, 100)
BORDER_SHARES = (0.01, 0.03, 0.1, 0.2)
PHOTO_SIZES = (256, 512, 1024)


@dataclass(frozen=True)
class Sample:
    """One picture, the row of the table that it counts in, and the notice it should get (None: none)."""

    row: str
    expected: str | None
    image: Image.Image


# --- the demo model's pictures --------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """One run of the stock pipeline: the latents after each of its steps, those of the last step last."""

    latents: list[torch.Tensor]


def demo_pipeline() -> Any:
    """The demo model in the stock pipeline: what is drawn here passes no check."""
    folder = Path(zimage_engine.__file__).parent / "demo" / "model"
    pipeline = ZImagePipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: str, steps: int, seed: int, side_px: int = NATIVE_PX) -> Drawing:
    """Draw with the stock pipeline as its family's defaults say, and keep what each step left."""
    kept: list[torch.Tensor] = []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept.append(tensors["latents"].clone())
        return tensors

    pipeline(
        prompt=prompt,
        width=side_px,
        height=side_px,
        num_inference_steps=steps,
        guidance_scale=0.8,  # the pipeline's own scale: conventional w - 1
        generator=torch.Generator("cpu").manual_seed(seed),
        callback_on_step_end=keep,
        output_type="latent",
    )
    return Drawing(kept)


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor) -> Image.Image:
    """The picture of latents (1, C, h, w), as the pipeline decodes them."""
    vae = pipeline.vae
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    decoded = vae.decode(scaled, return_dict=False)[0]
    return pipeline.image_processor.postprocess(decoded, output_type="pil")[0]


def demo_samples(pipeline: Any, seeds: int) -> Iterator[Sample]:
    """Good demo pictures at each number of steps, and what is left of the same ones when they are spoilt."""
    for index, prompt in enumerate(PROMPTS):
        for seed in range(seeds):
            for steps in STEPS:
                drawing = draw(pipeline, prompt, steps, seed)
                picture = decode(pipeline, drawing.latents[-1])
                yield Sample(f"demo, {steps} steps", None, picture)
                if steps == 8:
                    rng = np.random.default_rng(1000 * index + seed)
                    yield from spoilt_latents(pipeline, drawing, rng)
                    yield from spoilt_pixels("demo", picture, rng)
        wide = draw(pipeline, prompt, 8, 100 + index, side_px=384)
        yield Sample("demo, 8 steps, 384 px", None, decode(pipeline, wide.latents[-1]))


def spoilt_latents(pipeline: Any, drawing: Drawing, rng: np.random.Generator) -> Iterator[Sample]:
    """Unfinished ones, noised ones, and ones with a rectangle of their cells set to 0."""
    for step in INTERRUPTED_AT:
        image = decode(pipeline, drawing.latents[step - 1])
        yield Sample(f"demo, stopped after step {step} of 8", "picture_noise", image)
    final = drawing.latents[-1]
    for strength in LATENT_NOISE:
        noise = torch.from_numpy(rng.standard_normal(tuple(final.shape), np.float32))
        image = decode(pipeline, final + strength * noise)
        yield Sample(f"demo, latents + {strength} noise", "picture_noise", image)
    zeroed = final.clone()
    rows, columns = zeroed.shape[-2:]
    top, left = (int(rng.integers(1, size // 2)) for size in (rows, columns))
    zeroed[..., top : top + rows // 3, left : left + columns // 3] = 0
    yield Sample("demo, latent cells set to 0", "picture_blocks", decode(pipeline, zeroed))


def spoilt_pixels(kind: str, picture: Image.Image, rng: np.random.Generator) -> Iterator[Sample]:
    """Pixel noise, rectangles of one colour on the 8-pixel grid, and black borders."""
    pixels = np.asarray(picture)
    for sigma in PIXEL_NOISE:
        noisy = pixels + rng.normal(0, sigma, pixels.shape)
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        yield Sample(f"{kind}, pixels + {sigma} noise", "picture_noise", image)
    for name, colour in (("black", 0), ("gray", 128), ("white", 255)):
        yield Sample(f"{kind}, {name} blocks", "picture_blocks", with_blocks(pixels, colour, rng))
    for share in BORDER_SHARES:
        bars = ("frame", "top and bottom", "left and right")[int(rng.integers(3))]
        image = with_border(picture, share, bars)
        yield Sample(f"{kind}, border of {share:.0%}", "picture_black_borders", image)


def with_blocks(pixels: Pixels, colour: int, rng: np.random.Generator) -> Image.Image:
    """One to three rectangles of at least an eighth of each side, on the grid of 8."""
    spoilt = pixels.copy()
    for _ in range(int(rng.integers(1, 4))):
        height, width = (8 * int(rng.integers(max(size // 64, 4), size // 24)) for size in pixels.shape[:2])
        top = 8 * int(rng.integers(0, (pixels.shape[0] - height) // 8))
        left = 8 * int(rng.integers(0, (pixels.shape[1] - width) // 8))
        spoilt[top : top + height, left : left + width] = colour
    return Image.fromarray(spoilt)


def with_border(picture: Image.Image, share: float, bars: str) -> Image.Image:
    width, height = picture.size
    framed = picture.copy()
    paint = ImageDraw.Draw(framed)
    high, wide = max(2, round(share * height)), max(2, round(share * width))
    if bars != "left and right":
        paint.rectangle((0, 0, width, high - 1), fill=0)
        paint.rectangle((0, height - high, width, height), fill=0)
    if bars != "top and bottom":
        paint.rectangle((0, 0, wide - 1, height), fill=0)
        paint.rectangle((width - wide, 0, width, height), fill=0)
    return framed


# --- synthetic pictures ---------------------------------------------------------------------------------


def natural(side_px: int, slope: float, rng: np.random.Generator, *, saturation: float = 0.4) -> Image.Image:
    """Random phases under an amplitude of 1 / f**slope: 1 is what photographs have, less is rougher."""
    frequency = np.hypot(np.fft.fftfreq(side_px)[:, None], np.fft.rfftfreq(side_px)[None])
    frequency[0, 0] = np.inf

    def field() -> NDArray[np.float64]:
        white = np.fft.rfft2(rng.standard_normal((side_px, side_px)))
        made = np.fft.irfft2(white / frequency**slope, s=(side_px, side_px))
        return made / made.std()

    luma = field()
    channels = [luma * (1 - saturation) + field() * saturation for _ in range(3)]
    pixels = np.stack(channels, axis=-1) * 45 + rng.uniform(90, 160, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def gradient(side_px: int, angle: float, rng: np.random.Generator) -> Image.Image:
    y, x = np.mgrid[0:side_px, 0:side_px] / side_px
    along = (x * np.cos(angle) + y * np.sin(angle))[..., None]
    first, second = rng.uniform(0, 255, 3), rng.uniform(0, 255, 3)
    return Image.fromarray((first + (second - first) * along).clip(0, 255).astype(np.uint8))


def checkerboard(side_px: int, cell_px: int, first: int = 0, second: int = 255) -> Image.Image:
    y, x = np.mgrid[0:side_px, 0:side_px] // cell_px
    return Image.fromarray(np.where((x + y) % 2, second, first).astype(np.uint8)).convert("RGB")


def lines(side_px: int, period_px: int, horizontal: bool) -> Image.Image:
    across = np.arange(side_px) // max(1, period_px // 2) % 2 * 255
    pixels = np.broadcast_to(across[:, None] if horizontal else across[None], (side_px, side_px))
    return Image.fromarray(np.ascontiguousarray(pixels, np.uint8)).convert("RGB")


def text_page(side_px: int, size_px: int, rng: np.random.Generator, *, inverse: bool = False) -> Image.Image:
    page = Image.new("RGB", (side_px, side_px), "black" if inverse else "white")
    paint = ImageDraw.Draw(page)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz     ABCDEFGH0123456789,.;"))
    for y in range(size_px // 2, side_px, int(size_px * 1.3)):
        row = "".join(rng.choice(letters, 4 * side_px // size_px))
        font = ImageFont.load_default(size_px)
        paint.text((size_px, y), row, fill="white" if inverse else "black", font=font)
    return page


def pixel_art(side_px: int, cell_px: int, colours: int, rng: np.random.Generator) -> Image.Image:
    palette = rng.integers(0, 256, (colours, 3), dtype=np.uint8)
    cells = rng.integers(0, colours, (side_px // cell_px + 1, side_px // cell_px + 1))
    return Image.fromarray(palette[cells].repeat(cell_px, 0).repeat(cell_px, 1)[:side_px, :side_px])


def photo_with_shapes(side_px: int, rng: np.random.Generator) -> Image.Image:
    """Things with sharp outlines in front of a natural ground; one is a rectangle on no grid."""
    picture = natural(side_px, 1.2, rng)
    paint = ImageDraw.Draw(picture)
    third = side_px // 3
    colour = tuple(int(value) for value in rng.integers(0, 256, 3))
    paint.rectangle((third + 3, third + 5, 2 * third + 1, 2 * third - 2), fill=colour)
    paint.ellipse((third // 2, 10, third, third // 2 + 10), fill=(0, 0, 0))
    return picture


def dead_leaves(side_px: int, smallest_px: int, rng: np.random.Generator) -> Image.Image:
    """Opaque discs of any colour, one on another; sizes as in photographs (radius**-3)."""
    picture = Image.new("RGB", (side_px, side_px), (90, 110, 70))
    paint = ImageDraw.Draw(picture)
    biggest_px = side_px / 4
    share = rng.random(min(30_000, 6 * (side_px // smallest_px) ** 2))
    radii = (smallest_px**-2.0 - share * (smallest_px**-2.0 - biggest_px**-2.0)) ** -0.5
    for radius in radii:
        x, y = rng.uniform(0, side_px, 2)
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        paint.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    soft = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.8)), np.float64)
    grain = np.asarray(natural(side_px, 1.0, rng, saturation=0.1), np.float64) - 128
    return Image.fromarray((soft + 0.15 * grain).clip(0, 255).astype(np.uint8))


def sand(side_px: int, rng: np.random.Generator) -> Image.Image:
    """Grains and grass: nearly as rough as noise, and nearly of one hue."""
    return natural(side_px, 0.3, rng, saturation=0.08)


def night(side_px: int, rng: np.random.Generator) -> Image.Image:
    """A black sky over a lit town on a straight horizon."""
    pixels = np.zeros((side_px, side_px, 3), np.uint8)
    town = np.asarray(natural(side_px, 1.0, rng))
    pixels[side_px // 2 :] = town[side_px // 2 :]
    return Image.fromarray(pixels)


def spotlight(side_px: int) -> Image.Image:
    """A lit middle that fades to pure black before it comes to the edges."""
    y, x = np.mgrid[0:side_px, 0:side_px] / side_px - 0.5
    light = (1 - (np.hypot(x, y) / 0.42) ** 2).clip(0, 1) * 220
    return Image.fromarray(light.astype(np.uint8)).convert("RGB")


def black_wall(side_px: int, rng: np.random.Generator) -> Image.Image:
    """Dark plaster: nearly black, with a texture that can be seen."""
    pixels = np.asarray(natural(side_px, 1.0, rng, saturation=0.05), np.float64)
    return Image.fromarray((pixels * 0.15).astype(np.uint8))


def plain_grounds(side_px: int, rng: np.random.Generator) -> Image.Image:
    """Flat art: an ellipse, a polygon and a bar on one even colour."""
    colours = [tuple(int(value) for value in rng.integers(0, 256, 3)) for _ in range(4)]
    picture = Image.new("RGB", (side_px, side_px), colours[0])
    paint = ImageDraw.Draw(picture)
    paint.ellipse((side_px // 5, side_px // 5, side_px // 2, side_px // 2), fill=colours[1])
    corners = [tuple(int(value) for value in rng.integers(0, side_px, 2)) for _ in range(3)]
    paint.polygon(corners, fill=colours[2])
    paint.rectangle((0, side_px * 3 // 4 + 3, side_px, side_px), fill=colours[3])
    return picture


def synthetic_good(rng: np.random.Generator) -> Iterator[tuple[str, Image.Image]]:
    for side_px in PHOTO_SIZES:
        for slope in (0.8, 1.0, 1.2, 1.5):
            yield "1/f texture", natural(side_px, slope, rng)
        yield "1/f texture", natural(side_px, 1.0, rng, saturation=0.0)
        yield "photograph with shapes", photo_with_shapes(side_px, rng)
        yield "gradient", gradient(side_px, float(rng.uniform(0, 3)), rng)
        for smallest_px in (3, 8):
            yield "dead leaves", dead_leaves(side_px, smallest_px, rng)
        yield "sand", sand(side_px, rng)
        yield "gradient", gradient(side_px, 0.0, rng)
        for cell_px in (1, 3, 8, 32, 64):
            yield "checkerboard", checkerboard(side_px, cell_px)
        yield "checkerboard", checkerboard(side_px, 16, 90, 200)
        for period_px in (2, 5, 16, 40):
            yield "lines", lines(side_px, period_px, horizontal=True)
            yield "lines", lines(side_px, period_px, horizontal=False)
        for size_px in (8, 12, 24, 60):
            yield "text", text_page(side_px, size_px, rng)
        yield "text", text_page(side_px, 16, rng, inverse=True)
        for cell_px, colours in ((4, 8), (5, 8), (8, 16), (11, 5), (16, 5), (32, 4)):
            yield "pixel art", pixel_art(side_px, cell_px, colours, rng)
        yield "night", night(side_px, rng)
        yield "spotlight", spotlight(side_px)
        yield "black wall", black_wall(side_px, rng)
        for _ in range(3):
            yield "plain grounds", plain_grounds(side_px, rng)


def synthetic_samples(seeds: int) -> Iterator[Sample]:
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        for kind, image in synthetic_good(rng):
            yield Sample(f"synthetic, {kind}", None, image)
        for side_px in PHOTO_SIZES:
            for picture in (natural(side_px, 1.0, rng), photo_with_shapes(side_px, rng)):
                yield from spoilt_pixels("synthetic", picture, rng)
            white = rng.normal(128, 60, (side_px, side_px, 3)).clip(0, 255).astype(np.uint8)
            yield Sample("synthetic, white noise alone", "picture_noise", Image.fromarray(white))
            for cell_px in (2, 4, 8):
                cells = Image.fromarray(white[: side_px // cell_px, : side_px // cell_px])
                image = cells.resize((side_px, side_px), Image.Resampling.BICUBIC)
                yield Sample(f"synthetic, noise of {cell_px}-pixel cells", "picture_noise", image)


# --- the table ------------------------------------------------------------------------------------------


@dataclass
class Row:
    """How many pictures of a kind there were, and how many got the notice they should, or a wrong one."""

    expected: str | None
    pictures: int = 0
    found: int = 0
    wrong: int = 0

    def count(self, codes: set[str]) -> None:
        self.pictures += 1
        self.found += self.expected in codes
        self.wrong += bool(codes - {self.expected})


def judge(samples: Iterable[Sample]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for sample in samples:
        row = rows.setdefault(sample.row, Row(sample.expected))
        row.count({notice.code for notice in notices(measure(sample.image))})
    return rows


def milliseconds(image: Image.Image, times: int = 20) -> float:
    """The median of so many measurements, in time of the one core that they ran on."""
    taken = []
    for _ in range(times):
        started = time.thread_time()
        measure(image)
        taken.append(time.thread_time() - started)
    return 1000 * statistics.median(taken)


def main() -> None:
    """Draw, judge, print."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--seeds", type=int, default=4, help="demo pictures of each prompt and steps")
    seeds = asked.parse_args().seeds
    torch.set_num_threads(1)
    pipeline = demo_pipeline()
    rows = judge(chain(demo_samples(pipeline, seeds), synthetic_samples(seeds)))
    _print(f"{'pictures':42}{'n':>5}  {'should be told':24}{'told':>6}{'told else':>11}")
    for name, row in rows.items():
        _print(f"{name:42}{row.pictures:5}  {row.expected or 'nothing':24}{row.found:6}{row.wrong:11}")
    good = [row for row in rows.values() if row.expected is None]
    _print(
        f"good pictures told of anything: {sum(row.wrong for row in good)} of {sum(r.pictures for r in good)}"
    )
    rng = np.random.default_rng(0)
    timed = {"photograph": natural(1024, 1.0, rng), "flat art": plain_grounds(1024, rng)}
    for name, image in timed.items():
        _print(f"1024x1024 {name}: {milliseconds(image):.1f} ms")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
