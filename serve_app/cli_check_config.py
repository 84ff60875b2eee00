"""`zimage-turbo check-config`: what a Serve configuration says wrongly, before it is deployed.

Prints what `serve_app.serve_config` finds; reaches no cluster and imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve_app.terminal import say

EXIT_WRONG = 1
EXIT_INVALID_INPUT = 2


def check_config(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A file for `serve deploy`, a RayService manifest, or a patch of one.",
            show_default=False,
        ),
    ],
    key_in_environment: Annotated[
        bool,
        typer.Option(
            "--key-in-environment",
            help="The Ray nodes have ZIMAGE_API_KEY or ZIMAGE_API_KEYS_FILE in their environment, which the"
            " file does not show.",
        ),
    ] = False,
) -> None:
    """Name what Serve would pass over in silence: unknown keys, wrong settings, an address open to all."""
    from serve_app.serve_config import ServeConfigUnreadable, problems_in

    try:
        problems = problems_in(file.read_text(encoding="utf-8"), key_in_environment)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        say(f"zimage-turbo: cannot read {file}: {reason}")
        raise typer.Exit(EXIT_INVALID_INPUT) from None
    except ServeConfigUnreadable as unreadable:
        say(f"zimage-turbo: {file}: {unreadable}")
        raise typer.Exit(EXIT_INVALID_INPUT) from None
    for problem in problems:
        say(f"{file}: {problem}")
    if problems:
        raise typer.Exit(EXIT_WRONG)
    typer.echo(f"{file}: nothing is wrong")
