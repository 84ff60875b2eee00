"""How a drawing is stopped from outside and watched; safe to use from any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from zimage_engine.errors import DeadlineExceeded, GenerationCancelled
from zimage_engine.types import OnStep, StepProgress

if TYPE_CHECKING:
    import torch

#: Called in the thread that draws with the latents (1, C, H/8, W/8) that a step has ended with.
OnLatents = Callable[[StepProgress, "torch.Tensor"], None]


class DrawingControl:
    """One request's reins: `cancel` it, give it a time, hear of its steps.

    A stop is obeyed before the next step's result is used, so within one step. What `on_step` or
    `on_latents` raises ends the drawing too and comes out of `Engine.generate`; the latents are not to be
    written to.
    """

    def __init__(
        self,
        deadline_seconds: float | None = None,
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
    ) -> None:
        """`deadline_seconds` counts from now; None is no limit."""
        self.limit(deadline_seconds)
        self._cancelled = threading.Event()
        self._on_step = on_step
        self._on_latents = on_latents

    def limit(self, deadline_seconds: float | None) -> None:
        """Let the time that there is count from now; None is no limit."""
        self._deadline_seconds = deadline_seconds
        self._ends_at = None if deadline_seconds is None else time.monotonic() + deadline_seconds

    def show(self, on_latents: OnLatents) -> None:
        """Hear of the latents from here on; for who learns only then what can show them."""
        self._on_latents = on_latents

    def cancel(self) -> None:
        self._cancelled.set()

    def check(self) -> None:
        """Raise GenerationCancelled or DeadlineExceeded where the drawing shall go no further."""
        if self._cancelled.is_set():
            raise GenerationCancelled("the drawing was cancelled before it was done")
        if self._ends_at is not None and time.monotonic() >= self._ends_at:
            raise DeadlineExceeded(
                f"the drawing was not done within {self._deadline_seconds:g} seconds; ask for fewer steps, a "
                "smaller picture or more time"
            )

    def stepped(self, progress: StepProgress, latents: torch.Tensor) -> None:
        if self._on_step is not None:
            self._on_step(progress)
        if self._on_latents is not None:
            self._on_latents(progress, latents)
