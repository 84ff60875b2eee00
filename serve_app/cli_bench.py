"""`zimage-turbo bench`: how fast this machine draws, where the time goes, and how near its limit that is."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve_app.cli_names import with_option_names
from serve_app.terminal import say
from zimage_engine.errors import EngineError, InvalidRequest

if TYPE_CHECKING:
    from zimage_engine import Engine
    from zimage_engine.bench.measuring import BenchWishes, Loaded
    from zimage_engine.types import GenerationResult

EXIT_FAILED = 1
EXIT_INVALID_INPUT = 2
EXIT_INTERRUPTED = 130

#: What `--tiny` draws, where nothing else is said.
TINY_SIDE_PX, TINY_STEPS = 64, 2

#: Of requests at once, how many share a forward pass at most: `max_batch_size` of the worker that draws them.
SHARING_A_PASS = 8


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="PATH_OR_ID",
            help="A model's folder or file, or its id on the hub. Without it: the demo model.",
            show_default=False,
        ),
    ] = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Random weights of a published shape, zimage-turbo, instead of a model: nothing is fetched.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            metavar="COUNT",
            help="Keep so many layers of the synthetic model, for a machine that is too small for all.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WxH",
            help="Width and height in pixels; may be given several times (default: the model's own).",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="COUNT", help="Steps (default: the model's own).", show_default=False),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="Guidance; 1 is off (default: the model's own). Where it is on, drawing without is measured"
            " beside it.",
            show_default=False,
        ),
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=1, max=1000, metavar="COUNT", help="Pictures of each size that count.")
    ] = 5,
    compare_stock: Annotated[
        bool,
        typer.Option(
            "--compare-stock",
            help="Draw every picture with stock diffusers too, by turns, with the same weights.",
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="cuda, cuda:1, mps or cpu (default: the best that is there).",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What to compute in: bfloat16, float32 or float16 (default: the model's own).",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            metavar="COUNT",
            help="Threads that a CPU computes with (default: every core that the process may use).",
            show_default=False,
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Draw by the plain path, whatever `zimage-turbo tune` found to be quicker."
        ),
    ] = False,
    to_json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all figures as JSON.", show_default=False),
    ] = None,
    to_markdown: Annotated[
        Path | None,
        typer.Option(
            "--markdown",
            metavar="FILE",
            help="Write the report as Markdown, with a plot beside it as PNG where matplotlib is installed.",
            show_default=False,
        ),
    ] = None,
    tiny: Annotated[
        bool,
        typer.Option(
            "--tiny", help="Only see that all of it runs: small pictures, few of them, no sound figure."
        ),
    ] = False,
) -> None:
    """Measure how fast this machine draws, and how near its limit that is.

    Draws pictures one after another and several at once, without a server, and tells the seconds of every
    stage, pictures a minute, memory, and what share is reached of the rate at which this machine multiplies
    matrices. Figures are worth what the machine had else to do: run it alone.
    """
    _prepare_libraries()
    try:
        files = [_writable(path) for path in (to_json, to_markdown) if path is not None]
        report = _measured(
            _wishes(size, steps, guidance, repeat, compare_stock, tiny),
            lambda: _loaded(model, synthetic, layers, device, dtype, threads, tiny, exact),
        )
    except EngineError as failed:
        say(f"zimage-turbo: {with_option_names(str(failed))}")
        raise typer.Exit(
            EXIT_INVALID_INPUT if isinstance(failed, InvalidRequest) else EXIT_FAILED
        ) from failed
    except KeyboardInterrupt:
        say("interrupted; nothing was written")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    from zimage_engine.bench.report import markdown, plot, text

    typer.echo(text(report))
    if to_json is not None:
        _write(to_json, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if to_markdown is not None:
        picture = plot(report, to_markdown.with_suffix(".png"))
        if picture is None:
            say("no plot: matplotlib is not installed; `pip install 'zimage-turbo[bench]'` brings it")
        _write(to_markdown, markdown(report, picture))
    for file in files:
        say(f"written: {file}")


def _prepare_libraries() -> None:
    """What a worker of the server is started with; torch and OpenMP read it once, when they are loaded."""
    from serve_app.settings import allocator_environment

    os.environ.update(allocator_environment())
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from zimage_engine.memory.quantize import quiet_torchao

    quiet_torchao()


def _wishes(
    sizes: list[str] | None,
    steps: int | None,
    guidance: float | None,
    repeat: int,
    compare_stock: bool,
    tiny: bool,
) -> BenchWishes:
    """Raises InvalidRequest for a size that is none."""
    from serve_app.cli import parse_size
    from zimage_engine.bench.measuring import BenchWishes

    pairs = [parse_size(each) for text in sizes or () for each in text.split(",")]
    chosen = tuple((width, height) for width, height in pairs if width is not None and height is not None)
    if tiny:
        sizes_px = chosen or ((TINY_SIDE_PX, TINY_SIDE_PX),)
        few = TINY_STEPS if steps is None else steps
        return BenchWishes(sizes_px, few, guidance, min(repeat, 2), compare_stock, (1, 2), tiny)
    return BenchWishes(chosen, steps, guidance, repeat, compare_stock)


def _loaded(
    model: str | None,
    synthetic: str | None,
    layers: int | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    tiny: bool,
    exact: bool,
) -> Loaded:
    """The engine to measure, fresh. Raises as `Engine.load`."""
    if synthetic is not None and model is not None:
        raise InvalidRequest("--synthetic stands for a model; leave out --model or --synthetic", "synthetic")
    if layers is not None and synthetic is None:
        raise InvalidRequest("--layers cuts the synthetic model alone; give --synthetic too", "layers")
    if synthetic is not None:
        from zimage_engine import cpu
        from zimage_engine.bench.synthetic import load_synthetic

        cpu.use_cores(threads)
        return load_synthetic(synthetic, device, layers, tiny, dtype=dtype)
    from zimage_engine import Engine
    from zimage_engine.bench.measuring import Loaded

    began = time.perf_counter()
    engine = Engine.load(model, device, dtype=dtype, threads=threads, exact=exact)
    return Loaded(engine, time.perf_counter() - began)


def _measured(wishes: BenchWishes, load: Any) -> dict[str, Any]:
    say("loading ...", only_on_a_terminal=True)
    from serve_app.settings import Settings
    from serve_app.worker_load import LoadedWorker
    from zimage_engine.bench.measuring import measure

    # As it is without any setting: limits in the environment are the server's, and nothing of this machine.
    found: list[Loaded] = []

    def engine() -> Engine:
        found.append(load())
        return found[0].engine

    with LoadedWorker(engine, Settings.model_construct(max_batch_size=SHARING_A_PASS)) as worker:
        return measure(
            found[0],
            wishes,
            _packed,
            worker.draw_at_once,
            lambda line: say(f"{line} ...", only_on_a_terminal=True),
            worker.in_thread,
        )


def _packed(result: GenerationResult) -> bytes:
    from serve_app.image_codec import ImageEncoding, encode, facts_of

    return encode(result.images[0], ImageEncoding("png"), facts_of(result.report, 0))


def _writable(path: Path) -> Path:
    """Raises InvalidRequest at once where the report could not be written after all the measuring."""
    if path.is_dir():
        raise InvalidRequest(f"{path} is a folder; name a file, such as {path / 'bench.json'}")
    folder = next((each for each in path.absolute().parents if each.exists()), path.absolute().parent)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InvalidRequest(f"{path} cannot be written: {folder} takes no files; name another place")
    return path


def _write(path: Path, content: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
