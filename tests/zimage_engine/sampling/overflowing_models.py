"""The demo model with one channel of one attention scaled up, and down again behind it: real overflows.

What the model computes stays the same on paper; in a format whose range is too small for the scaled values
it becomes infinite and then not a number. Nothing is injected: pipelines compute it by themselves.

The attention is the first that reads the caption. There every caption is filled up with the same padding
token, whose values do not depend on prompt, noise or step: each picture overflows at each of its steps.

    python -m tests.zimage_engine.sampling.overflowing_models tests/benchmarks/pictures/overflows.png

draws each of them with stock diffusers and with the engine, and puts the pictures side by side.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file

from zimage_engine import Engine, GenerationRequest, GenerationResult
from zimage_engine.demo.pictures import ShapesSpec, Thing
from zimage_engine.engine import DEMO_MODEL_PATH
from zimage_engine.families import family_named

WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")
BLOCK = "context_refiner.0"
NORM_EPS = 1e-5

PROMPT = "a big yellow star on a blue background"
ASKED = ShapesSpec("blue", (Thing("yellow", "star", "big"),))
SEED, STEPS, GUIDANCE, SIDE_PX = 7, 8, 1.8, 256

#: The largest numbers of the formats; bfloat16 has float32's exponents and ends a little earlier.
FLOAT32_MAX = torch.finfo(torch.float32).max
#: Half a unit of the last place above bfloat16's largest number: from here on rounding gives infinity.
BFLOAT16_ROUNDS_TO_INF = (2 - 2**-8) * 2.0**127


@dataclass(frozen=True)
class Overflow:
    """One way to scale the channel.

    `value_factor` multiplies its row of `to_v`; None aims it between the ends of bfloat16 and of float32.
    `output_factor` multiplies all of `to_out`, so that its scaled-down column keeps normal numbers; the
    norm behind it takes the factor out again. `dtype` is what the pipeline is loaded as.
    """

    name: str
    dtype: torch.dtype
    value_factor: float | None
    output_factor: float
    because: str


FLOAT16 = Overflow(
    "float16",
    torch.float16,
    value_factor=2.0**14,
    output_factor=1.0,
    because="a value of 106,000 is beyond float16's 65,504; bfloat16 holds it, bit for bit",
)
BFLOAT16 = Overflow(
    "bfloat16",
    torch.bfloat16,
    value_factor=None,
    output_factor=2.0**40,
    because="a value of 3.400e38 is rounded to infinity in bfloat16; float32 holds it",
)
FUSED_ATTENTION = Overflow(
    "fused_attention",
    torch.bfloat16,
    value_factor=2.0**124,
    output_factor=2.0**40,
    because="a fused kernel sums values of 1.4e38 before it divides by the weights' sum; plain attention "
    "divides first",
)
OVERFLOWS = (FLOAT16, BFLOAT16, FUSED_ATTENTION)


def write_overflowing(overflow: Overflow, folder: Path) -> Path:
    """A copy of the demo model in `folder`, scaled so; every weight in it is a finite bfloat16 number."""
    shutil.copytree(DEMO_MODEL_PATH, folder)
    weights = load_file(folder / WEIGHTS)
    rows = weights[f"{BLOCK}.attention.to_v.weight"]
    columns = weights[f"{BLOCK}.attention.to_out.0.weight"]
    channel = int(_padding_values(weights, rows, narrow=False).abs().argmax())
    factor = overflow.value_factor or _aim(weights, rows, channel)
    rows[channel] = (rows[channel].double() * factor).to(rows.dtype)
    columns *= overflow.output_factor
    columns[:, channel] = (columns[:, channel].double() / factor).to(columns.dtype)
    assert all(bool(torch.isfinite(each).all()) for each in weights.values())
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def _padding_values(weights: dict[str, torch.Tensor], rows: torch.Tensor, narrow: bool) -> torch.Tensor:
    """What `to_v` makes of the padding token, summed exactly; `narrow` rounds its input as bfloat16 does."""
    token = weights["cap_pad_token"][0].float()
    scale = weights[f"{BLOCK}.attention_norm1.weight"]
    normed = token * torch.rsqrt(token.pow(2).mean() + NORM_EPS)
    read = normed.bfloat16() * scale if narrow else normed * scale.float()
    return rows.double() @ read.double()


def _aim(weights: dict[str, torch.Tensor], rows: torch.Tensor, channel: int) -> float:
    """The factor whose row, rounded to bfloat16, gives infinity in bfloat16 and the most room to both ends.

    Less than 0.2 % lies between the two, and rounding the row moves its value, so it is searched for.
    """
    between = (BFLOAT16_ROUNDS_TO_INF + FLOAT32_MAX) / 2
    start = between / abs(float(_padding_values(weights, rows, narrow=False)[channel]))

    def room(factor: float) -> float:
        row = (rows[channel].double() * factor).to(rows.dtype)[None]
        wide = abs(float(_padding_values(weights, row, narrow=False)))
        narrow = abs(float(_padding_values(weights, row, narrow=True)))
        return min(narrow / BFLOAT16_ROUNDS_TO_INF - 1, 1 - wide / FLOAT32_MAX)

    best = max((start * (1 + step / 20_000) for step in range(-80, 81)), key=room)
    assert room(best) > 2e-4, f"only {room(best):.1e} of room between the ends of bfloat16 and float32"
    return best


# --- the same picture by stock diffusers and by the engine ---------------------------------------------


def stock_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """Diffusers' own, its VAE in bfloat16: on a CPU float16 convolutions take half a minute a picture."""
    dtypes = {"default": dtype, "vae": torch.bfloat16}
    pipeline = ZImagePipeline.from_pretrained(str(folder), dtype=dtypes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_picture(pipeline: Any, prompt: str = PROMPT, steps: int = STEPS) -> Image.Image:
    """What diffusers alone draws; its guidance counts from 0."""
    picture: Image.Image = pipeline(
        prompt,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE - 1,
        width=SIDE_PX,
        height=SIDE_PX,
        generator=torch.Generator("cpu").manual_seed(SEED),
    ).images[0]
    return picture


def engine_of(pipeline: Any) -> Engine:
    return Engine(pipeline, family_named("z-image-turbo"), "overflowing", "cpu")


def our_result(engine: Engine, prompt: str = PROMPT, steps: int = STEPS) -> GenerationResult:
    return engine.generate(
        GenerationRequest(
            prompt,
            width=SIDE_PX,
            height=SIDE_PX,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            seed=SEED,
            enhance=False,
        )
    )


# --- side by side --------------------------------------------------------------------------------------

_SHOWN_PX, _MARGIN_PX, _LINE_PX = 192, 8, 22
_SHOWN = ((FLOAT16, "loaded as float16"), (BFLOAT16, "loaded as bfloat16"))


def side_by_side(cells: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """The pictures in a row, each under its words."""
    width = len(cells) * (_SHOWN_PX + _MARGIN_PX) + _MARGIN_PX
    sheet = Image.new("RGB", (width, _SHOWN_PX + 2 * _MARGIN_PX + _LINE_PX), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for index, (words, picture) in enumerate(cells):
        left = _MARGIN_PX + index * (_SHOWN_PX + _MARGIN_PX)
        pen.text((left, _MARGIN_PX - 2), words, fill=(30, 30, 30), font=font)
        shown = picture.resize((_SHOWN_PX, _SHOWN_PX), Image.Resampling.LANCZOS)
        sheet.paste(shown, (left, _MARGIN_PX + _LINE_PX))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the overflowing models, stock and guarded.")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    chosen = parser.parse_args()
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for overflow, words in _SHOWN:
            pipeline = stock_pipeline(
                write_overflowing(overflow, Path(folder, overflow.name)), overflow.dtype
            )
            cells.append((f"{words}: diffusers", stock_picture(pipeline)))
            cells.append((f"{words}: here", our_result(engine_of(pipeline)).images[0]))
    chosen.picture.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(cells).quantize(128).save(chosen.picture, optimize=True)


if __name__ == "__main__":
    main()
