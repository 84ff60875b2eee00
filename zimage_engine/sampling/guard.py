"""A scheduler that looks before it steps: judges, clips, remembers the last good latents, stops when told.

Made of the stock class and its config, fresh for each call of the pipeline, so nothing that happens to it
outlives the picture. Knows no rungs: on a bad value it raises StepFault and keeps what is needed to go on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from zimage_engine.errors import ScheduleInvalid
from zimage_engine.families import ValueRange
from zimage_engine.sampling import tripwire


class StepFault(Exception):
    """The denoiser's output at step `step` (from 0) cannot be used; it never leaves the sampling room."""

    def __init__(self, step: int, finding: str) -> None:
        super().__init__(step, finding)
        self.step = step
        self.finding = finding


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that step `step` (from 0) starts from: latents, the scheduler's state, the generator's."""

    step: int
    latents: torch.Tensor
    scheduler_state: dict[str, Any] = field(repr=False)
    generator_state: torch.Tensor = field(repr=False)


@dataclass(slots=True)
class StepWatch:
    """What the guarded scheduler tells and asks; one for each picture.

    `residual` is the range of the denoiser's output. `before_step` is called with the step's index (from 0)
    before it is judged, and ends the drawing by raising; `passed` after a step whose value was good.
    """

    residual: ValueRange
    generator: torch.Generator
    before_step: Callable[[int], None]
    passed: Callable[[int, torch.Tensor], None]
    #: How many of the scheduler's steps the pipeline leaves out at first, having a picture to start from.
    left_out: int = 0
    resume_from: Checkpoint | None = None
    last_good: Checkpoint | None = None
    #: The denoiser's output, as it was used, in the step from `last_good`.
    used: torch.Tensor | None = field(default=None, repr=False)
    step: int = 0
    clipped_values: int = 0
    _hidden_timesteps: torch.Tensor | None = field(default=None, repr=False)

    def scheduled(self, scheduler: Any) -> None:
        """After `set_timesteps`: check them, and on resuming show the pipeline only those still to do."""
        check_timesteps(scheduler.timesteps, scheduler.config.num_train_timesteps)
        start = self.resume_from
        if start is None:
            self.step = 0
            return
        vars(scheduler).update(copied_state(start.scheduler_state))
        self.step = start.step
        self._hidden_timesteps = scheduler.timesteps
        # The pipeline itself cuts off those that it leaves out.
        cut = self.left_out * scheduler.order
        shown = (scheduler.timesteps[:cut], scheduler.timesteps[cut + start.step :])
        scheduler.timesteps = torch.cat(shown)
        if "init_noise_sigma" in vars(scheduler):  # these latents are no fresh noise
            scheduler.init_noise_sigma = 1.0

    def show_all_timesteps(self, scheduler: Any) -> None:
        """Schedulers count their timesteps, so once the pipeline has read the tail they get all back."""
        if self._hidden_timesteps is not None:
            scheduler.timesteps = self._hidden_timesteps
            self._hidden_timesteps = None

    def judged(self, scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The denoiser's output, clipped where it must be; raises StepFault where it cannot be used."""
        self.last_good = Checkpoint(
            self.step, sample, copied_state(vars(scheduler)), self.generator.get_state()
        )
        self.before_step(self.step)
        magnitude = tripwire.largest(model_output)
        found = tripwire.finding(magnitude, self.residual.trip)
        if found is not None:
            raise StepFault(self.step, found)
        if magnitude > self.residual.clip:
            beyond = model_output.abs() > self.residual.clip
            self.clipped_values += int(beyond.sum())
            model_output = model_output.clamp(-self.residual.clip, self.residual.clip)
        self.used = model_output
        return model_output

    def stepped(self, latents: torch.Tensor) -> None:
        done = self.step
        self.step += 1
        self.passed(done, latents)


def copied_state(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's attributes without what is the guard's; lists are what schedulers write into in place."""
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in state.items()
        if name != "watch"
    }


@functools.cache
def guarded_class(stock: Any) -> Any:
    """`stock` with a guard before its step; pipelines look at the signatures, which stay those of `stock`."""

    class Guarded(stock):
        watch: StepWatch

        @functools.wraps(stock.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.watch.scheduled(self)

        @functools.wraps(stock.scale_model_input if hasattr(stock, "scale_model_input") else lambda: None)
        def scale_model_input(self, *args: Any, **kwargs: Any) -> Any:
            self.watch.show_all_timesteps(self)
            return super().scale_model_input(*args, **kwargs)

        @functools.wraps(stock.step)
        def step(
            self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            self.watch.show_all_timesteps(self)
            model_output = self.watch.judged(self, model_output, sample)
            stepped = super().step(model_output, timestep, sample, *args, **kwargs)
            self.watch.stepped(stepped[0])
            # PixArt's pipeline takes the second value of a drawing in one step: the picture that is meant,
            # which those schedulers do not give that have arrived there after it.
            return (*stepped, stepped[0]) if isinstance(stepped, tuple) and len(stepped) == 1 else stepped

    if not hasattr(stock, "scale_model_input"):
        del Guarded.scale_model_input
    if isinstance(whole := getattr(stock, "init_noise_sigma", None), property):

        def init_noise_sigma(self: Any) -> Any:
            return 1.0 if self.watch.resume_from is not None else whole.__get__(self)

        Guarded.init_noise_sigma = property(init_noise_sigma)
    Guarded.__name__ = stock.__name__
    Guarded.__qualname__ = stock.__qualname__
    return Guarded


def guarded_scheduler(stock: Any, watch: StepWatch) -> Any:
    """A fresh scheduler of the same config as `stock`, watched by `watch`; `stock` is not touched."""
    scheduler = guarded_class(stock.__class__).from_config(stock.config)
    scheduler.watch = watch
    return scheduler


def check_timesteps(timesteps: torch.Tensor, trained: int) -> None:
    """Raise ScheduleInvalid unless they are finite, never rise, and lie within 0 to `trained`."""
    values = timesteps.detach().to("cpu", torch.float64)
    if not len(values):
        raise ScheduleInvalid("the scheduler gave no timesteps at all; ask for another number of steps")
    if not bool(torch.isfinite(values).all()):
        wrong = "are not all finite"
    elif bool((values[1:] > values[:-1]).any()):
        wrong = "do not fall from one to the next"
    elif bool((values < 0).any() | (values > trained).any()):
        wrong = f"leave the range from 0 to {trained} that the model was trained on"
    else:
        return
    shown = ", ".join(f"{value:g}" for value in values[:12].tolist())
    raise ScheduleInvalid(
        f"the scheduler's timesteps {wrong}: {shown}{', ...' if len(values) > 12 else ''}; its config in the "
        "checkpoint is wrong, or another number of steps is needed"
    )
