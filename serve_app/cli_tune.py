"""`zimage-turbo tune`: measures what makes drawing quicker on this machine, and remembers it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve_app.cli_names import with_launch_options, with_option_names
from serve_app.terminal import say
from zimage_engine.errors import EngineError, InvalidRequest

if TYPE_CHECKING:
    from zimage_engine.tuning import Tuning

EXIT_FAILED = 1
EXIT_INVALID_INPUT = 2
EXIT_INTERRUPTED = 130

#: Of `zimage_engine.tuning`, which is not imported for a help text.
TOLERANCE = 1.0
REPEAT = 9

Facts = Mapping[str, Any]


def tune(
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
    family: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What kind of model it is, where its files do not tell.", show_default=False
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_ID",
            help="A whole model of the same kind, for what a single file lacks.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What to compute in: bfloat16, float32, float16 or auto (default: the model's own).",
            show_default=False,
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="WAY", help="As `launch` will be told (default: not at all).", show_default=False
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="cuda, cuda:1, mps or cpu (default: the best that is there).",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            metavar="COUNT",
            help="Threads of a CPU, as the worker will have (default: every core that the process may use).",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WxH",
            help="Width and height in pixels; may be given several times (default: the model's own). What is"
            " found holds for all sizes of about that area.",
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
            metavar="NUMBER", help="Guidance; 1 is off (default: the model's own).", show_default=False
        ),
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=1, max=1000, metavar="COUNT", help="Pictures each way that count.")
    ] = REPEAT,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0,
            max=255,
            metavar="LEVELS",
            help="The most that a picture may differ from the plain path's, as the mean over its values, of"
            " 255 levels.",
        ),
    ] = TOLERANCE,
    show: Annotated[
        bool, typer.Option("--show", help="Measure nothing: tell what is remembered, of all models.")
    ] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Measure nothing: forget what is remembered, of all models.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure what makes drawing quicker on this machine, and remember it.

    Compiled blocks, other attention kernels and other layouts move the last bits of a picture; which of them
    are quicker, a machine has to say itself. Each is tried beside the best found so far, by turns, and is
    taken where it is clearly quicker and its pictures are near enough those of the plain path. `launch`,
    `generate` and `batch` draw so from their next start on; `--exact` draws without. Run it alone: figures
    are worth what the machine had else to do. Further settings are read as by `launch` (ZIMAGE_OFFLOAD,
    ZIMAGE_VRAM ...).
    """
    from serve_app.settings import SettingsError

    chosen = {
        "model": model,
        "family": family,
        "base": base,
        "dtype": dtype,
        "quantize": quantize,
        "device": device,
        "cpu_threads": threads,
    }
    try:
        if show and forget:
            raise InvalidRequest("--show tells what --forget forgets; choose one of them", "show")
        if forget:
            _forget(as_json)
        elif show:
            _show(as_json)
        else:
            _tell(_tuned(chosen, size, repeat, tolerance, steps, guidance), as_json)
    except SettingsError as wrong:
        typed = {name for name, value in chosen.items() if value is not None}
        say(f"zimage-turbo: {with_launch_options(str(wrong), typed)}")
        raise typer.Exit(EXIT_INVALID_INPUT) from wrong
    except EngineError as failed:
        say(f"zimage-turbo: {with_option_names(str(failed))}")
        raise typer.Exit(
            EXIT_INVALID_INPUT if isinstance(failed, InvalidRequest) else EXIT_FAILED
        ) from failed
    except OSError as failed:
        say(f"zimage-turbo: {failed.filename}: {failed.strerror}")
        raise typer.Exit(EXIT_FAILED) from failed
    except KeyboardInterrupt:
        say("interrupted; what was found for the sizes before is kept")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _tuned(
    chosen: Mapping[str, Any],
    sizes: Sequence[str] | None,
    repeat: int,
    tolerance: float,
    steps: int | None,
    guidance: float | None,
) -> Tuning:
    """Raises SettingsError, InvalidRequest, and whatever loading and drawing raise."""
    from serve_app.cli import parse_size
    from serve_app.local_engine import load_engine
    from serve_app.settings import load_settings

    pairs = [parse_size(each) for text in sizes or () for each in text.split(",")]
    # Nothing is put on that is measured anew in a moment.
    settings = load_settings(**chosen, exact=True)
    # As in a worker; OpenMP reads it once, when it is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from zimage_engine.memory.quantize import quiet_torchao

    quiet_torchao()
    say(f"Loading {settings.model or 'the demo model'} ...", only_on_a_terminal=True)
    engine = load_engine(settings)
    from zimage_engine.tuning import TuneWishes, tune

    native = (engine.description.native_width, engine.description.native_height)
    wanted = [native if width is None or height is None else (width, height) for width, height in pairs]
    wishes = TuneWishes(repeat, tolerance, steps, guidance)
    return tune(engine, wanted, wishes, lambda line: say(f"{line} ...", only_on_a_terminal=True))


def _tell(tuning: Tuning, as_json: bool) -> None:
    told = tuning.to_dict()
    if as_json:
        typer.echo(json.dumps(told, ensure_ascii=False, indent=2))
        return
    typer.echo(_heading(tuning.facts))
    for each in told["sizes"]:
        for line in _size_lines(each):
            typer.echo(line)
    if not tuning.remembered:
        say("it cannot be remembered: the cache folder takes no files, so the next start draws as before")
    elif any(each.levers for each in tuning.sizes):
        typer.echo("\nremembered: the next start draws so, and one with --exact does not")
    else:
        typer.echo("\nremembered: the next start draws by the plain path")


def _show(as_json: bool) -> None:
    from zimage_engine.speed.remembered import remembered_choices

    known = remembered_choices().known()
    if as_json:
        typer.echo(json.dumps(known, ensure_ascii=False, indent=2))
        return
    if not known:
        typer.echo("nothing is remembered; `zimage-turbo tune` measures what is quicker here")
    for number, note in enumerate(known):
        if number:
            typer.echo("")
        typer.echo(_heading(note.get("facts", {})))
        for said in note.get("sizes", {}).values():
            for line in _size_lines(said["measured"]):
                typer.echo(line)


def _forget(as_json: bool) -> None:
    from zimage_engine.speed.remembered import remembered_choices

    count = remembered_choices().forget()
    if as_json:
        typer.echo(json.dumps({"forgotten": count}))
    elif count:
        typer.echo(f"forgot what was measured of {count} model{'' if count == 1 else 's'}")
    else:
        typer.echo("nothing was remembered")


def _heading(facts: Facts) -> str:
    versions, threads = dict(facts.get("versions", ())), facts.get("threads")
    parts = (
        facts.get("family"),
        facts.get("dtype"),
        facts.get("quantize"),
        "float8" if facts.get("float8") else None,
        facts.get("device_name"),
        f"{threads} thread{'' if threads == 1 else 's'}" if threads else None,
        f"torch {versions['torch']}" if "torch" in versions else None,
    )
    return ", ".join(str(part) for part in parts if part)


def _size_lines(size: Facts) -> Iterator[str]:
    """What came of one size, after an empty line."""
    tried = [trial for trial in size["trials"] if trial["seconds"]]
    count = max((trial["seconds"]["count"] for trial in tried), default=0)
    measured_at = f", measured on {size['at'][:10]}" if "at" in size else ""
    yield ""
    yield f"{size['width']}x{size['height']}, {count} pictures each way{measured_at}"
    yield ""
    if tried:
        yield from _columns([["", "without", "with", "times as fast", "differs", ""], *map(_row, tried)])
    refusals: dict[str, list[str]] = {}
    for trial in size["trials"]:
        if not trial["seconds"]:
            refusals.setdefault(trial["because"], []).append(_title(trial["lever"]))
    for because, titles in refusals.items():
        yield f"  left out: {', '.join(titles)} ({because})"
    yield ""
    if size["levers"]:
        acting = ", ".join(_title(name) for name in size["levers"])
        yield (
            f"  {acting}: {_ratio(size['speedup'])} times as fast as the plain path; pictures differ by "
            f"{size['mean_difference']:.2f} of 255 levels"
        )
    else:
        yield "  nothing acts: the plain path is the quickest here"


def _row(trial: Facts) -> list[str]:
    ready = f", ready after {trial['prepare_seconds']:.0f} s" if trial["prepare_seconds"] >= 1 else ""
    return [
        _title(trial["lever"]),
        f"{trial['without']['median']:.3f} s",
        f"{trial['seconds']['median']:.3f} s",
        _ratio(trial["speedup"]),
        f"{trial['mean_difference']:.2f}",
        f"taken{ready}" if trial["taken"] else f"not taken: {trial['because']}",
    ]


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The rows with words on the left of their column and figures on its right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *figures, last = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join((first.strip().ljust(widths[0]), *figures, last.strip()))}".rstrip()


def _ratio(spread: Facts) -> str:
    return f"{spread['median']:.2f} ({spread['lower_quartile']:.2f} to {spread['upper_quartile']:.2f})"


def _title(name: str) -> str:
    from zimage_engine.speed.levers import lever_named

    try:
        return lever_named(name).title
    except KeyError:  # remembered by another version
        return name
