"""What a command shows on stderr while it works: bars on a terminal, plain lines in a log.

Knows nothing of models or pictures but how far they are.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

import typer

from zimage_engine.types import StepProgress

if TYPE_CHECKING:
    from tqdm import tqdm

    from zimage_engine.loading.hub import DownloadProgress

STAGE_TITLES = {"checking": "Checking what is there", "fetching": "Fetching"}

#: Where no terminal can redraw a bar, a line says how far it is, this often.
SECONDS_BETWEEN_LINES = 10.0


class StepBar:
    """Shows the steps of one picture on a terminal; elsewhere nothing, the line of the picture is enough."""

    def __init__(self, number: int, of: int) -> None:
        self.title = "Drawing" if of == 1 else f"Drawing {number} of {of}"
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> StepBar:
        return self

    def on_step(self, progress: StepProgress) -> None:
        if self.bar is None:
            self.bar = _new_bar(self.title, total=progress.steps, unit="step", mininterval=0)
        self.bar.update(progress.step - self.bar.n)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


class DownloadBar:
    """Shows bytes on a terminal as a bar, elsewhere as a line every ten seconds."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.shown: tuple[str, int] | None = None
        self.next_line_seconds = time.monotonic() + SECONDS_BETWEEN_LINES

    def __enter__(self) -> DownloadBar:
        return self

    def on_progress(self, progress: DownloadProgress) -> None:
        title = STAGE_TITLES[progress.stage]
        if self.shown != (title, progress.total_bytes):
            self.__exit__()
            self.bar = _new_bar(title, total=progress.total_bytes, unit="B", unit_scale=True)
            # The rate should tell of this run, not of what an earlier one had brought.
            self.bar.initial = self.bar.n = progress.done_bytes
            self.shown = (title, progress.total_bytes)
        if self.bar is not None:
            self.bar.update(progress.done_bytes - self.bar.n)
        if not sys.stderr.isatty() and time.monotonic() >= self.next_line_seconds:
            from zimage_engine.loading.hub import gigabytes

            self.next_line_seconds = time.monotonic() + SECONDS_BETWEEN_LINES
            say(f"{title}: {gigabytes(progress.done_bytes)} of {gigabytes(progress.total_bytes)}")

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _new_bar(title: str, **options: Any) -> tqdm[Any]:
    """A bar on stderr; without a terminal a silent one, whose carriage returns would only litter a log."""
    from tqdm import tqdm

    on_a_terminal = sys.stderr.isatty()
    if on_a_terminal and not os.get_terminal_size(sys.stderr.fileno()).columns:
        # A terminal that was never told its size (in containers) would get no bar at all.
        options = {**options, "ncols": 80, "nrows": 24}
    return tqdm(desc=title, file=sys.stderr, disable=not on_a_terminal, leave=False, **options)


def say(text: str, only_on_a_terminal: bool = False) -> None:
    if not only_on_a_terminal or sys.stderr.isatty():
        typer.echo(text, err=True)
