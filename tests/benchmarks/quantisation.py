"""What quantised matrices give, beside what they cost: bytes, seconds a picture, distance from bfloat16.

    python -m tests.benchmarks.quantisation [--ways int8,fp8-dynamic] [--seeds 1] [--compile] [--json FILE]
    python -m tests.benchmarks.quantisation --parts [--ways fp8-dynamic]
    python -m tests.benchmarks.quantisation --synthetic zimage-turbo --device cuda --size 1024x1024 --compile

Eight prompts, enhancement and refiner off, from fixed seeds, 8 steps at the model's own size. Each picture is
drawn by an engine with plain matrices and by one with quantised ones, right after one another, now one first,
now the other: a ratio is the plain one's time over the other's, pair by pair, as median and quartiles, above
1 where quantising is quicker. `--compile` compiles the repeated blocks of both.
The distance is the mean of |difference| over all values of a picture (0 to 255). Plain weights computed with
in float32 stand beside it: what rounding alone does. Distances do not depend on what else the machine does;
those of random weights (--synthetic) say nothing.

`--parts` quantises one part of Z-Image's denoiser at a time, and the blocks without one of theirs: which
layers are sensitive.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zimage_engine import Engine
from zimage_engine.bench.pictures import PictureClock, PictureTimes
from zimage_engine.bench.spread import Spread, ratios
from zimage_engine.families import family_named
from zimage_engine.memory.quantize import QuantisedLayers, quiet_torchao
from zimage_engine.memory.residency import QUANTISATIONS, MemoryWishes
from zimage_engine.memory.snapshot import device_clock
from zimage_engine.memory.streaming import tensors_of
from zimage_engine.sampling.float32 import during_forward, wide
from zimage_engine.types import GenerationRequest

PROMPTS = (
    "a red circle on a white background",
    "a white star on a black background",
    "绿色三角形在紫色圆形的左边，黄色背景",
    "a blue square on a green background",
    "a red house and trees in front of mountains by day, the sun",
    "夜晚的大海，月亮和白色的小船",
    "a yellow house, red flowers, a meadow, sunset",
    "a big purple heart on a yellow background",
)
#: What `--ways` may name, and what an engine is asked for.
WISHES: Mapping[str, MemoryWishes] = {
    "float8": MemoryWishes(float8=True),
    **{word: MemoryWishes(quantize=word) for word in QUANTISATIONS},
}

_BLOCK = r"(layers|noise_refiner|context_refiner)\.\d+"
_MATRIX = r"(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])"
#: Parts of Z-Image's denoiser, as patterns of the paths of their linear layers. `{last}` is the last block.
PARTS: Mapping[str, str] = {
    "attention and feed-forward of all blocks": rf"{_BLOCK}\.{_MATRIX}",
    "  attention alone": rf"{_BLOCK}\.attention\..+",
    "  feed-forward alone": rf"{_BLOCK}\.feed_forward\..+",
    "  without its way out (w2)": rf"{_BLOCK}\.(attention\..+|feed_forward\.w[13])",
    "  without the refiners": rf"layers\.\d+\.{_MATRIX}",
    "  without the first block": rf"(layers\.(?!0\.)\d+|(noise|context)_refiner\.\d+)\.{_MATRIX}",
    "  without the last block": rf"(layers\.(?!{{last}}\.)\d+|(noise|context)_refiner\.\d+)\.{_MATRIX}",
    "modulation of the blocks (adaLN)": rf"{_BLOCK}\.adaLN_modulation\..+",
    "embedder of the time": r"t_embedder\..+",
    "embedder of the caption": r"cap_embedder\..+",
    "embedder of the picture": r"all_x_embedder\..+",
    "final layer": r"all_final_layer\..+\.linear",
    "modulation of the final layer": r"all_final_layer\..+adaLN_modulation\..+",
    "every linear layer": r".+",
}

Pixels = NDArray[np.float32]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Distance:
    """Of how many pictures from plain ones: mean of |difference| of values, 0 to 255, over the pictures."""

    mean: float
    median: float
    largest: float
    pictures: int


@dataclass(frozen=True, slots=True)
class WayRow:
    """One way: what the denoiser takes, how much quicker it is, None: it is not timed, and how far off."""

    way: str
    denoiser_bytes: int
    picture_seconds: float
    distance: Distance
    picture_speedup: Spread | None = None
    denoise_speedup: Spread | None = None


@dataclass(frozen=True, slots=True)
class PartRow:
    """One part of the denoiser quantised, the rest plain; `saved_bytes` is what that saves."""

    part: str
    layers: int
    saved_bytes: int
    distance: Distance


@dataclass(frozen=True, slots=True)
class Asked:
    """What to draw, with which model, where."""

    model: str | None = None
    synthetic: str | None = None
    layers: int | None = None
    device: str | None = None
    size: tuple[int, int] | None = None
    steps: int = 8
    prompts: int = len(PROMPTS)
    seeds: int = 1
    compiled: bool = False
    tiny: bool = False

    def requests(self) -> list[GenerationRequest]:
        """Every prompt with every seed, in the same order each time."""
        width, height = self.size or (None, None)
        return [
            GenerationRequest(
                prompt=prompt,
                seed=seed,
                width=width,
                height=height,
                num_inference_steps=self.steps,
                enhance=False,
                refine=False,
            )
            for prompt in PROMPTS[: self.prompts]
            for seed in range(self.seeds)
        ]

    def engine(self, memory: MemoryWishes | None = None) -> Engine:
        """A fresh one; of the synthetic model two have the same weights."""
        if self.synthetic is not None:
            from zimage_engine.bench.synthetic import load_synthetic

            return load_synthetic(self.synthetic, self.device, self.layers, self.tiny, memory).engine
        return Engine.load(self.model, self.device, memory=memory, exact=True)


class Drawing:
    """An engine that draws with a clock in its hand."""

    def __init__(self, engine: Engine, asked: Asked) -> None:
        self.engine = engine
        self._family = family_named(engine.description.family)
        self._clock = PictureClock(engine.pipeline, self._family, device_clock(engine.description.device))
        if asked.compiled:
            # All engines share the blocks' code, and each brings kinds of weights that are compiled anew.
            torch._dynamo.config.recompile_limit = 64
            self.denoiser.compile_repeated_blocks(fullgraph=True, dynamic=True)
        # Kernels, threads and compiled code are made in pictures that do not count, one for each length that
        # a prompt can bring.
        for request in asked.requests()[:: asked.seeds]:
            self.drawn(request)

    @property
    def denoiser(self) -> Any:
        return getattr(self.engine.pipeline, self._family.denoiser)

    def drawn(self, request: GenerationRequest) -> tuple[Pixels, PictureTimes]:
        result, times = self._clock.timed(lambda: self.engine.generate(request))
        return np.asarray(result.images[0], np.float32), times

    def all_drawn(self, asked: Asked) -> list[Pixels]:
        return [self.drawn(request)[0] for request in asked.requests()]


def ways(asked: Asked, names: Sequence[str], say: Say) -> Iterator[WayRow]:
    """The plain way, what float32 arithmetic does, and each of `names` beside the plain one."""
    plain = Drawing(asked.engine(), asked)
    found = [plain.drawn(request) for request in asked.requests()]
    wanted = [pixels for pixels, _ in found]
    seconds = statistics.median(times.picture for _, times in found)
    plain_bytes = bytes_of(plain.denoiser)
    dtype = str(plain.denoiser.dtype).removeprefix("torch.")
    compiled = ", compiled blocks" if asked.compiled else ""
    yield WayRow(dtype + compiled, plain_bytes, seconds, distance(wanted, wanted))
    if not asked.compiled and asked.synthetic is None:
        with _wide(plain.denoiser):
            began = [plain.drawn(request) for request in asked.requests()]
        middle = statistics.median(times.picture for _, times in began)
        yield WayRow("float32 arithmetic", plain_bytes, middle, distance([one for one, _ in began], wanted))
    for name in names:
        say(f"{name} ...")
        other = Drawing(asked.engine(WISHES[name]), asked)
        yield _beside(name, plain, other, asked)
        del other


def _beside(name: str, plain: Drawing, other: Drawing, asked: Asked) -> WayRow:
    drawn: dict[bool, list[tuple[Pixels, PictureTimes]]] = {True: [], False: []}
    for number, request in enumerate(asked.requests()):
        for is_plain in (True, False) if number % 2 == 0 else (False, True):
            drawn[is_plain].append((plain if is_plain else other).drawn(request))
    slow, fast = ([times for _, times in drawn[is_plain]] for is_plain in (True, False))
    return WayRow(
        name,
        bytes_of(other.denoiser),
        statistics.median(times.picture for times in fast),
        distance([pixels for pixels, _ in drawn[False]], [pixels for pixels, _ in drawn[True]]),
        ratios([times.picture for times in slow], [times.picture for times in fast]),
        ratios([times.denoise for times in slow], [times.denoise for times in fast]),
    )


def parts(asked: Asked, word: str, say: Say, wished: Mapping[str, str] = PARTS) -> Iterator[PartRow]:
    """Each part quantised by `word`, the rest plain, on one engine."""
    plain = Drawing(asked.engine(), asked)
    wanted = plain.all_drawn(asked)
    whole, device = bytes_of(plain.denoiser), torch.device(plain.engine.description.device)
    last = len(plain.denoiser.layers) - 1
    for part, pattern in wished.items():
        say(f"{word}: {part.strip()} ...")
        quantised = QuantisedLayers(plain.denoiser, pattern.replace("{last}", str(last)), word, device)
        try:
            found = distance(plain.all_drawn(asked), wanted)
            small = [each for each in plain.denoiser.modules() if _is_quantised(each)]
            yield PartRow(part, len(small), whole - bytes_of(plain.denoiser), found)
        finally:
            quantised.remove()


def _is_quantised(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and hasattr(module.weight, "qdata")


@contextmanager
def _wide(denoiser: torch.nn.Module) -> Iterator[None]:
    remove = during_forward(denoiser, wide)
    try:
        yield
    finally:
        remove()


def distance(found: Sequence[Pixels], wanted: Sequence[Pixels]) -> Distance:
    each = [float(np.abs(one - other).mean()) for one, other in zip(found, wanted, strict=True)]
    return Distance(statistics.mean(each), statistics.median(each), max(each), len(each))


def bytes_of(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in tensors_of((module,)))


def way_line(row: WayRow) -> str:
    found = row.distance
    return (
        f"{row.way:<28}{row.denoiser_bytes / 1e6:>10.2f}{row.picture_seconds:>10.3f}"
        f"{_ratio(row.picture_speedup):>22}{_ratio(row.denoise_speedup):>22}"
        f"{found.mean:>8.3f}{found.median:>8.3f}{found.largest:>9.3f}"
    )


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.2f} ({spread.lower_quartile:.2f} to {spread.upper_quartile:.2f})"


WAY_HEADING = (
    f"{'denoiser':<28}{'MB':>10}{'seconds':>10}{'picture, times':>22}{'denoising, times':>22}"
    f"{'mean':>8}{'median':>8}{'largest':>9}"
)
PART_HEADING = f"{'quantised':<44}{'layers':>7}{'MB saved':>10}{'mean':>8}{'median':>8}{'largest':>9}"


def part_line(row: PartRow) -> str:
    found = row.distance
    return (
        f"{row.part:<44}{row.layers:>7}{row.saved_bytes / 1e6:>10.2f}"
        f"{found.mean:>8.3f}{found.median:>8.3f}{found.largest:>9.3f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, a row as soon as it is there, and write what `--json` names."""
    chosen = _options().parse_args(arguments)
    quiet_torchao()
    names = [name for name in chosen.ways.split(",") if name]
    unknown = [name for name in names if name not in WISHES]
    if unknown:
        sys.exit(f"--ways must be of {', '.join(WISHES)}, got {', '.join(unknown)}")
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    asked = Asked(
        chosen.model,
        chosen.synthetic,
        chosen.layers,
        chosen.device,
        None if chosen.size is None else _size(chosen.size),
        chosen.steps,
        chosen.prompts,
        chosen.seeds,
        chosen.compile,
        chosen.tiny,
    )
    report: dict[str, Any] = {"asked": asdict(asked), "torch": torch.__version__}
    if chosen.parts:
        for name in names:
            _print(f"{name}\n{PART_HEADING}")
            rows = report.setdefault("parts", {}).setdefault(name, [])
            for part in parts(asked, name, _progress):
                _print(part_line(part))
                rows.append(asdict(part))
    else:
        _print(WAY_HEADING)
        report["ways"] = []
        for way in ways(asked, names, _progress):
            _print(way_line(way))
            report["ways"].append(asdict(way))
    _print(f"{len(asked.requests())} pictures a row, torch {torch.__version__}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--ways", default=",".join(WISHES), help="which, by comma (default: all)")
    options.add_argument("--parts", action="store_true", help="which layers are sensitive")
    options.add_argument("--model", help="folder, file or id (default: the demo model)")
    options.add_argument("--synthetic", help="zimage-turbo: random weights of the published shape")
    options.add_argument("--layers", type=int, help="of the synthetic model (default: all)")
    options.add_argument("--tiny", action="store_true", help="the synthetic model as narrow as can be")
    options.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    options.add_argument("--size", metavar="WxH")
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--prompts", type=int, default=len(PROMPTS), help="the first so many of eight")
    options.add_argument("--seeds", type=int, default=1, help="pictures a prompt")
    options.add_argument("--threads", type=int, help="that a CPU computes with")
    options.add_argument("--compile", action="store_true", help="compile the repeated blocks of both")
    options.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    return options


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(line + "\n")


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
