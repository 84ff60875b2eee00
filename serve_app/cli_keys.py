"""`zimage-turbo keys`: make, list, change and remove the keys of a server that others reach.

Imports no torch, Ray or Gradio; what a file of keys looks like is `serve_app.keys`' business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from serve_app.keys import (
    DRAW,
    READ,
    SCOPES,
    Allowance,
    KeyFileWrong,
    add_key,
    change_key,
    read_keys,
    remove_key,
)
from serve_app.queueing import WEIGHTS, Priority
from serve_app.terminal import say

EXIT_INVALID_INPUT = 2

keys_app = typer.Typer(
    help="Make, list, change and remove the keys that callers of the server carry.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Whose key it is; the log names callers so.")
]
FileOption = Annotated[
    Path | None,
    typer.Option(
        "--file",
        metavar="FILE",
        help="The file of keys. Without it: the setting api_keys_file (ZIMAGE_API_KEYS_FILE).",
        show_default=False,
    ),
]
PriorityOption = Annotated[
    Priority | None,
    typer.Option(
        "--priority",
        help="The share of the workers beside others that wait: "
        + ", ".join(f"{name} {weight:g}" for name, weight in WEIGHTS.items())
        + " (default: normal).",
        show_default=False,
    ),
]
PicturesOption = Annotated[
    int | None,
    typer.Option(
        "--pictures-at-once",
        min=0,
        max=999_999_999,
        metavar="NUMBER",
        help="Pictures that this caller may have waiting or being drawn at an ingress; 0: no limit. Without "
        "it: the setting pictures_at_once.",
        show_default=False,
    ),
]
RequestsOption = Annotated[
    int | None,
    typer.Option(
        "--requests-a-minute",
        min=0,
        max=999_999_999,
        metavar="NUMBER",
        help="Requests for pictures that an ingress takes from this caller a minute; 0: no limit. Without "
        "it: the setting requests_a_minute.",
        show_default=False,
    ),
]


@keys_app.command("add")
def add(
    name: NameArgument,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            metavar="SCOPE",
            help="; ".join(f"{scope}: {meaning}" for scope, meaning in SCOPES.items())
            + ". May be given several times (default: draw and read).",
            show_default=False,
        ),
    ] = None,
    priority: PriorityOption = None,
    pictures_at_once: PicturesOption = None,
    requests_a_minute: RequestsOption = None,
    file: FileOption = None,
) -> None:
    """Make a key and print it, this once: the file gets its hash alone. A running server takes it at once."""
    with _errors_as_sentences():
        allowance = Allowance(priority, pictures_at_once, requests_a_minute)
        typer.echo(add_key(_file(file), name, scope or [DRAW, READ], allowance))


@keys_app.command("set")
def change(
    name: NameArgument,
    priority: PriorityOption = None,
    pictures_at_once: PicturesOption = None,
    requests_a_minute: RequestsOption = None,
    file: FileOption = None,
) -> None:
    """Change a key's priority and limits; what is not named stays, the key too. A running server follows."""
    with _errors_as_sentences():
        allowance = Allowance(priority, pictures_at_once, requests_a_minute)
        if not allowance.said():
            raise KeyFileWrong(
                "what is to change? Give --priority, --pictures-at-once or --requests-a-minute"
            )
        change_key(_file(file), name, allowance)


@keys_app.command("ls")
def list_keys(file: FileOption = None) -> None:
    """List the names, the scopes and what is said of priority and limits; the keys are kept nowhere."""
    with _errors_as_sentences():
        for key in read_keys(_file(file)):
            told = (key.name, ",".join(sorted(key.scopes)), str(key.allowance).replace(",", " "))
            typer.echo("  ".join(filter(None, told)))


@keys_app.command("remove")
def remove(name: NameArgument, file: FileOption = None) -> None:
    """Revoke a key; a running server refuses it within a second or two."""
    with _errors_as_sentences():
        remove_key(_file(file), name)


def _file(given: Path | None) -> Path:
    from serve_app.settings import SettingsError, load_settings

    if given is not None:
        return given
    try:
        named = load_settings().api_keys_file
    except SettingsError as wrong:
        raise KeyFileWrong(str(wrong)) from wrong
    if named is None:
        raise KeyFileWrong("which file of keys? Give --file FILE, or set ZIMAGE_API_KEYS_FILE")
    return named


@contextmanager
def _errors_as_sentences() -> Iterator[None]:
    try:
        yield
    except (KeyFileWrong, OSError) as wrong:
        say(f"zimage-turbo: {wrong}")
        raise typer.Exit(EXIT_INVALID_INPUT) from wrong
