"""What can be tried after a bad value, one small class for each measure; families list which, in order.

Decides only: a rung says what to change, whoever draws does it. Knows no torch and no pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from zimage_engine.errors import GuardExhausted
from zimage_engine.types import GuardAttempt, GuardTrip

#: Guidance is lowered to these shares of what it is above 1; the last is off.
GUIDANCE_SHARES = (2 / 3, 1 / 3, 0.0)


@dataclass(frozen=True, slots=True)
class Measures:
    """How a part of the drawing is done; guidance is the conventional w.

    `lasting`: to the end of the picture, not for the step alone that went wrong. `tiled`: the VAE decodes
    the picture in pieces.
    """

    guidance_scale: float = 1.0
    plain_attention: bool = False
    float32: bool = False
    tiled: bool = False
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What a rung may know: how it went wrong, and what has been tried.

    `is_float32`: the weights are stored so. `failed` are rungs that did not help at an earlier step of this
    picture, `helped` those that did, each with that step (from 1); `failed_here` those of this very trip.
    `can_tile` is whether the picture is large enough for the VAE to be given it in pieces.
    """

    current: Measures
    is_float32: bool = False
    can_tile: bool = False
    failed: Mapping[str, int] = field(default_factory=dict)
    helped: Mapping[str, int] = field(default_factory=dict)
    failed_here: frozenset[str] = frozenset()


class Rung(Protocol):
    """One measure. Its name is a metric label."""

    name: str

    def measures(self, facts: Facts) -> tuple[Measures, ...] | str:
        """What to try, one after the other; or in words why it cannot help."""


class SameInputs:
    """The same once more: a transient fault does not come back, and the picture is as if undisturbed."""

    name = "same_inputs"

    def measures(self, facts: Facts) -> tuple[Measures, ...] | str:
        return (facts.current,)


class LowerGuidance:
    """Towards off in stages, and from there on: guidance multiplies what the two halves differ by."""

    name = "lower_guidance"

    def measures(self, facts: Facts) -> tuple[Measures, ...] | str:
        above_off = facts.current.guidance_scale - 1.0
        if above_off <= 0:
            return "guidance is off"
        return tuple(
            replace(facts.current, guidance_scale=1.0 + above_off * share) for share in GUIDANCE_SHARES
        )


class PlainAttention:
    """Attention without a fused kernel; to the picture's end where that has helped once already."""

    name = "plain_attention"

    def measures(self, facts: Facts) -> tuple[Measures, ...] | str:
        if facts.current.plain_attention or facts.current.float32:
            return "attention is plain already"
        return (replace(facts.current, plain_attention=True, lasting=self.name in facts.helped),)


class Float32:
    """Float32 arithmetic, for the step that went wrong or for what has only one."""

    name = "float32"

    def measures(self, facts: Facts) -> tuple[Measures, ...] | str:
        if facts.is_float32 or facts.current.float32:
            return "it is float32 already"
        if self.name in facts.helped:
            return f"it helped at step {facts.helped[self.name]}: the rest is drawn so at once"
        return (replace(facts.current, float32=True),)


class RestFloat32:
    """Float32 arithmetic from the step that went wrong to the picture's end."""

    name = "rest_float32"

    def measures(self, facts: Facts) -> tuple[Measures, ...] | str:
        if facts.is_float32 or facts.current.float32:
            return "it is float32 already"
        if Float32.name in facts.failed_here:
            return "this step in float32 has just failed"
        return (replace(facts.current, float32=True, lasting=True),)


class Tiled:
    """The VAE in float32 and in pieces: its normalisation sees one piece at a time."""

    name = "tiled"

    def measures(self, facts: Facts) -> tuple[Measures, ...] | str:
        if not facts.can_tile:
            return "the picture is too small for pieces"
        return (replace(facts.current, float32=not facts.is_float32, tiled=True),)


RUNGS: Mapping[str, Rung] = {
    rung.name: rung
    for rung in (SameInputs(), LowerGuidance(), PlainAttention(), Float32(), RestFloat32(), Tiled())
}


class Trip:
    """One bad value and the way up the ladder from it, as it goes.

    Ask `next_measures` after each failure, tell `recovered` when the bad value is gone.
    """

    def __init__(
        self, stage: str, step: int | None, finding: str, rungs: Sequence[str], clock: Callable[[], float]
    ) -> None:
        self.stage = stage
        self.step = step
        self.finding = finding
        self._clock = clock
        self._attempts: list[GuardAttempt] = []
        self._pending: tuple[str, float] | None = None
        self._rungs = [RUNGS[name] for name in rungs]
        self._ladder: Iterator[tuple[str, Measures]] | None = None
        self._facts: Facts | None = None

    def next_measures(self, facts: Facts, finding: str) -> Measures:
        """What to try now; what was tried before has ended with `finding`.

        `facts` of the first call hold for the whole trip. Raises GuardExhausted when nothing is left.
        """
        self._end_attempt("failed", finding)
        if self._ladder is None:
            self._facts = facts
            self._ladder = self._climb(facts)
        try:
            rung, measures = next(self._ladder)
        except StopIteration:
            raise GuardExhausted(
                _exhausted_message(self.stage, self.step, self.finding, self._attempts), (self.report,)
            ) from None
        self._pending = (rung, self._clock())
        return measures

    def recovered(self) -> None:
        self._end_attempt("recovered", "")

    @property
    def tried(self) -> str | None:
        """The rung that is being tried."""
        return self._pending[0] if self._pending else None

    @property
    def report(self) -> GuardTrip:
        return GuardTrip(self.stage, self.step, self.finding, tuple(self._attempts))

    def _climb(self, facts: Facts) -> Iterator[tuple[str, Measures]]:
        for rung in self._rungs:
            failed_here = frozenset(attempt.rung for attempt in self._attempts if attempt.outcome == "failed")
            choice = rung.measures(replace(facts, failed_here=failed_here))
            if rung.name in facts.failed and not isinstance(rung, SameInputs):
                choice = f"it did not help at step {facts.failed[rung.name]}"
            if isinstance(choice, str):
                self._attempts.append(GuardAttempt(rung.name, "skipped", 0.0, choice))
                continue
            for measures in choice:
                yield rung.name, measures

    def _end_attempt(self, outcome: str, because: str) -> None:
        if self._pending is None:
            return
        rung, started = self._pending
        self._pending = None
        self._attempts.append(GuardAttempt(rung, outcome, self._clock() - started, because))


STAGES_IN_WORDS: Mapping[str, str] = {
    "encode": "the text encoder's answer",
    "source": "the encoded picture to draw from",
    "denoise": "the denoiser's output",
    "decode": "the decoded picture",
}


def _exhausted_message(stage: str, step: int | None, finding: str, attempts: Sequence[GuardAttempt]) -> str:
    where = STAGES_IN_WORDS[stage] + (f" at step {step}" if step is not None else "")
    tried = list(dict.fromkeys(each.rung for each in attempts if each.outcome == "failed"))
    return (
        f"{where} held {finding}, and nothing helped (tried: {', '.join(tried) or 'nothing could be'}); no "
        "picture was made. The checkpoint may be damaged, or the device faulty: draw again, with another "
        "prompt or seed, and look at `zimage-turbo inspect` for the checkpoint"
    )
