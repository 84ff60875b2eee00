"""`zimage-turbo batch`: draws a file of prompts into a folder, and goes on from where it was ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from serve_app.terminal import say
from zimage_engine.errors import EngineError, InvalidRequest

if TYPE_CHECKING:
    from serve_app.batch import Draw, Manifest, Progress, Task
    from serve_app.openai_schema import ImageGenerationRequest as Wire
    from zimage_engine import Engine
    from zimage_engine.types import ModelDescription

EXIT_FAILED = 1
EXIT_INVALID_INPUT = 2
EXIT_INTERRUPTED = 130

#: Requests that a server has of us at once unless told otherwise: it draws one, and knows what comes next.
AT_ONCE = 4
_LOCK = ".batch.lock"


def batch(
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS",
            help='JSON Lines: each line is an object in the API\'s own fields, such as {"prompt": "a circle",'
            ' "seed": 7, "size": "256x256"}; an "id" or "name" of its own comes back in the manifest.',
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where the pictures go.", show_default=False),
    ],
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A server that draws, such as http://127.0.0.1:7860. Without it: this process.",
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(envvar="ZIMAGE_API_KEY", metavar="KEY", help="The server's key.", show_default=False),
    ] = None,
    at_once: Annotated[
        int, typer.Option(min=1, max=64, metavar="COUNT", help="Requests that the server has at once.")
    ] = AT_ONCE,
    on_error: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="What to do where a picture cannot be drawn; it is tried again by the next run."),
    ] = "stop",
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="PATH_OR_ID", help="Without a server: the model.", show_default=False
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", metavar="PATH[=WEIGHT]", help="Without a server: LoRA files.", show_default=False
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="Without a server: cuda, mps or cpu.", show_default=False),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, metavar="COUNT", help="Without a server: a CPU's threads.", show_default=False
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Without a server: draw by the plain path, whatever `tune` found to be quicker."
        ),
    ] = False,
) -> None:
    """Draw a file of prompts, each line a picture of its own.

    Ended at any moment, even by kill -9, the same command goes on where it was, and draws what it would have
    drawn: seeds are noted in manifest.jsonl before they are used. Lines may be added at the file's end. Wrong
    lines are told before anything is drawn. Further settings are read as by `launch` (ZIMAGE_DTYPE ...).
    """
    from serve_app.batch import BatchStopped
    from serve_app.settings import SettingsError

    try:
        _batch(prompts, output, server, key, at_once, on_error == "skip", model, lora, device, threads, exact)
    except (InvalidRequest, SettingsError) as wrong:
        say(f"zimage-turbo: {wrong}")
        raise typer.Exit(EXIT_INVALID_INPUT) from wrong
    except (EngineError, BatchStopped) as failed:
        say(f"zimage-turbo: {failed}")
        raise typer.Exit(EXIT_FAILED) from failed
    except OSError as failed:
        say(f"zimage-turbo: {failed.filename or output}: {failed.strerror or failed}; run it again to go on")
        raise typer.Exit(EXIT_FAILED) from failed
    except KeyboardInterrupt:
        say("interrupted: what is drawn is kept; run the same command again to go on")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _batch(
    prompts: Path,
    output: Path,
    server: str | None,
    key: str | None,
    at_once: int,
    skip_errors: bool,
    model: str | None,
    loras: Sequence[str] | None,
    device: str | None,
    threads: int | None,
    exact: bool,
) -> None:
    from filelock import FileLock, Timeout

    from serve_app.batch import Manifest, plan_tasks, read_lines, run

    lines = read_lines(_text_of(prompts))
    if output.exists() and not output.is_dir():
        raise InvalidRequest(f"-o must name a folder, and {output} is a file", "output")
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / _LOCK, timeout=0):
            manifest = Manifest(output)
            tasks = plan_tasks(lines, manifest)
            left = [task for task in tasks if not (output / task.file).exists()]
            draw: Draw = _nobody
            if left and server is not None:
                draw = _by_server(left, server, key, manifest)
            elif left:
                draw = _by_this_process(left, model, loras, device, threads, exact)
            outcome = run(
                tasks,
                output,
                manifest,
                draw,
                at_once=1 if server is None else at_once,
                skip_errors=skip_errors,
                on_progress=_tell,
            )
    except Timeout as busy:
        raise InvalidRequest(
            f"another batch is at work in {output}; wait for it, or choose another folder", "output"
        ) from busy
    typer.echo(f"{output}: {outcome.drawn} drawn, {outcome.found} were there, {outcome.failed} failed")
    if outcome.failed:
        raise typer.Exit(EXIT_FAILED)


def _text_of(prompts: Path) -> str:
    try:
        return prompts.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as wrong:
        raise InvalidRequest(
            f"{prompts} is not UTF-8 at byte {wrong.start}; save it as UTF-8", "prompts"
        ) from wrong
    except OSError as wrong:
        raise InvalidRequest(f"{prompts} cannot be read: {wrong.strerror}", "prompts") from wrong


def _nobody(task: Task) -> bytes:
    raise AssertionError(f"{task.file} was said to be there")


def _by_server(tasks: Sequence[Task], url: str, key: str | None, manifest: Manifest) -> Draw:
    """Asks the server for each. Raises InvalidRequest where its models, as it tells of them, refuse one."""
    from serve_app.batch import BatchStopped
    from serve_app.remote_drawing import RemoteServer, ServerGivenUp

    server = RemoteServer(url, key)
    cards = server.models()
    if cards:
        _check(tasks, lambda wire: _described(wire, cards))
    batch = manifest.batch_id()

    def draw(task: Task) -> bytes:
        try:
            return server.draw(task.fields, f"{batch}/{task.file}")
        except ServerGivenUp as given_up:
            raise BatchStopped(f"{given_up}; run the same command again to go on") from given_up

    return draw


def _by_this_process(
    tasks: Sequence[Task],
    model: str | None,
    loras: Sequence[str] | None,
    device: str | None,
    threads: int | None,
    exact: bool,
) -> Draw:
    """Draws with an engine of its own. Raises InvalidRequest where its model cannot draw one of the tasks."""
    from serve_app.finishing import UNREADABLE, Finisher
    from serve_app.local_engine import load_engine
    from serve_app.openai_schema import to_encoding, to_engine
    from serve_app.settings import load_settings

    settings = load_settings(
        model=model,
        loras=list(loras) if loras else None,
        device=device,
        cpu_threads=threads,
        exact=exact or None,
    )
    finisher = Finisher.of(settings)
    say(f"Loading {settings.model or 'the demo model'} ...", only_on_a_terminal=True)
    engine = load_engine(settings)
    _check(tasks, lambda wire: _loaded(wire, engine))

    def draw(task: Task) -> bytes:
        (file,), report = finisher.finished(engine.generate(to_engine(task.wire)), to_encoding(task.wire))
        for notice in report.pictures[0].warnings:
            if notice.code == UNREADABLE:
                say(f"{task.file}: {notice.message}")
        return file

    return draw


def _check(tasks: Sequence[Task], model_of: Callable[[Wire], ModelDescription | None]) -> None:
    from serve_app.batch import told_by_line
    from serve_app.error_mapping import RequestRefused
    from serve_app.openai_schema import to_engine
    from zimage_engine.sampling.plan import resolve

    wrong: dict[int, str] = {}
    for task in tasks:
        try:
            model = model_of(task.wire)
            if model is not None:
                resolve(to_engine(task.wire), model)
        except (InvalidRequest, RequestRefused) as error:
            wrong.setdefault(task.line.number, str(error))
    if wrong:
        raise InvalidRequest(told_by_line(list(wrong.items())))


def _loaded(wire: Wire, engine: Engine) -> ModelDescription:
    from serve_app.openai_schema import check_model

    check_model(wire, engine.description)
    return engine.description


def _described(wire: Wire, cards: Sequence[Mapping[str, Any]]) -> ModelDescription | None:
    """The model that draws it, as the server tells of it, the default one first; None where it tells too
    little."""
    from serve_app.openai_schema import MODEL_ALIASES
    from zimage_engine.types import ModelDescription

    names = {name: card for card in cards for name in (card.get("id"), *(card.get("aliases") or ()))}
    default = dict.fromkeys((None, *MODEL_ALIASES), cards[0])
    card = {**default, **names}.get(wire.model)
    if card is None:
        known = ", ".join(repr(each.get("id")) for each in cards)
        raise InvalidRequest(f"There is no model {wire.model!r} on the server; it has {known}.", "model")
    try:
        width, _, height = card["native_size"].partition("x")
        return ModelDescription(
            id=card["id"],
            family=card["family"],
            device="",
            dtype=card["dtype"],
            native_width=int(width),
            native_height=int(height),
            size_multiple=card["size_multiple"],
            default_steps=card["default_steps"],
            default_guidance_scale=card["default_guidance"],
            token_limit=0,
            max_side=card["max_side"],
            max_steps=card["max_steps"],
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _tell(progress: Progress) -> None:
    told = f"[{progress.done}/{progress.total}] {progress.task.file}  seed {progress.task.seed}"
    if progress.error is None:
        typer.echo(f"{told}  {progress.seconds:.1f} s")
    else:
        say(f"{told}  line {progress.task.line.number} failed: {progress.error}")
