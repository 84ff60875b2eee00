"""`zimage-turbo cache`: see and remove the repaired copies of checkpoints that the engine keeps.

Imports no torch; what is kept where is the engine's business.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve_app.terminal import say

if TYPE_CHECKING:
    from zimage_engine.loading.view import View

EXIT_FAILED = 1
EXIT_INVALID_INPUT = 2

_UNITS = {"": 1, **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}}
_UNITS |= {"B": 1, **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}}
#: Said of an age that is at least this many seconds.
_AGES = ((86_400, "days"), (3600, "hours"), (60, "minutes"))

cache_app = typer.Typer(
    help="See and remove the repaired copies of models that were made for loading.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--folder",
        metavar="FOLDER",
        help="Where the copies are kept. Without it: the user's cache directory.",
        show_default=False,
    ),
]


@cache_app.command("ls")
def list_cache(
    folder: FolderOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """List the copies: what each was made from, its size, when it was last used, and its key.

    Sizes are those of what was rewritten; files that were healthy are only linked to and take no room.
    """
    from zimage_engine.loading.view import default_cache_folder, list_views

    views = list_views(folder)
    if as_json:
        rows = [{**asdict(view), "path": str(view.path)} for view in views]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    if not views:
        typer.echo(f"no repaired copies in {folder or default_cache_folder()}")
        return
    _print_table(views)


@cache_app.command("prune")
def prune_cache(
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY]...",
            help="The copies to remove: their keys, or how these begin.",
            show_default=False,
        ),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Remove those longest not used until the rest hold at most this, such as 20GB.",
            show_default=False,
        ),
    ] = None,
    remove_all: Annotated[bool, typer.Option("--all", help="Remove every copy.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    folder: FolderOption = None,
) -> None:
    """Remove copies, and what an interrupted program left. The models themselves are never touched.

    A copy that is needed again is made again when its model is loaded. --all also forgets which models were
    found sound, so that each is looked through anew.
    """
    from zimage_engine.loading.known_loads import KnownLoads
    from zimage_engine.loading.view import (
        DEFAULT_MAX_BYTES,
        default_cache_folder,
        list_views,
        remove_leftovers,
        remove_views,
        views_to_prune,
    )

    if (bool(keys) + (max_size is not None) + remove_all) > 1:
        raise _wrong("give keys, --max-size or --all, not several of them")
    views = list_views(folder)
    if keys:
        chosen = _views_named(keys, views)
    elif remove_all:
        chosen = views
    else:
        chosen = views_to_prune(views, DEFAULT_MAX_BYTES if max_size is None else parse_bytes(max_size))
    if chosen and not yes:
        _print_table(chosen)
        typer.confirm(f"Remove {len(chosen)} of {len(views)} copies?", abort=True)
    remove_leftovers(folder)
    removed = remove_views(chosen)
    if remove_all:
        KnownLoads(folder or default_cache_folder()).forget()
    typer.echo(f"removed {len(removed)} of {len(views)} copies, {_size(sum(v.size_bytes for v in removed))}")
    if len(removed) < len(chosen):
        busy = ", ".join(view.key for view in chosen if view not in removed)
        say(f"zimage-turbo: in use just now and kept: {busy}")
        raise typer.Exit(EXIT_FAILED)


def parse_bytes(text: str) -> int:
    """ "20GB" as 20,000,000,000, "1.5 GiB" as 1,610,612,736, a bare number as bytes."""
    size = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]{0,3})", text.strip())
    if size is None or size[2].upper() not in _UNITS:
        raise _wrong(f"--max-size must be a size such as 20GB or 500MB, got {text!r}")
    return int(float(size[1]) * _UNITS[size[2].upper()])


def _views_named(keys: list[str], views: tuple[View, ...]) -> tuple[View, ...]:
    chosen: dict[str, View] = {}
    for key in keys:
        meant = [view for view in views if key and view.key.startswith(key)]
        if len(meant) != 1:
            raise _wrong(
                f"each KEY must be that of one copy, and {len(meant)} begin with {key!r};"
                " see `zimage-turbo cache ls`"
            )
        chosen[meant[0].key] = meant[0]
    return tuple(chosen.values())


def _print_table(views: tuple[View, ...]) -> None:
    rows = [("MODEL", "SIZE", "LAST USED", "KEY")]
    for view in views:
        title = view.title if view.is_whole else f"{view.title} (no longer whole)"
        rows.append((title, _size(view.size_bytes), _age(time.time() - view.last_used_at), view.key))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for title, size, age, key in rows:
        typer.echo(f"{title:<{widths[0]}}  {size:>{widths[1]}}  {age:<{widths[2]}}  {key}")


def _size(count_bytes: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count_bytes >= unit:
            return f"{count_bytes / unit:.1f} {name}"
    return f"{count_bytes} bytes"


def _age(seconds: float) -> str:
    for unit, name in _AGES:
        if seconds >= 2 * unit:
            return f"{seconds // unit:.0f} {name} ago"
    return "just now"


def _wrong(message: str) -> typer.Exit:
    say(f"zimage-turbo: {message}")
    return typer.Exit(EXIT_INVALID_INPUT)
