"""Profiles: named settings of steps, guidance and fine detail, made of what a model's defaults are.

Requests over HTTP have `quality` for the same; on the page a profile moves the controls, which stay free.
"""

from __future__ import annotations

from dataclasses import dataclass

from zimage_engine.types import ModelDescription

#: Guidance at 1 is off: each step is computed once and not twice.
GUIDANCE_OFF = 1.0


@dataclass(frozen=True, slots=True)
class Profile:
    """What a profile sets the controls to. `guidance_scale` is the conventional w."""

    name: str
    steps: int
    guidance_scale: float
    refine: bool


def profiles_of(model: ModelDescription) -> tuple[Profile, ...]:
    """The model's profiles, the quickest first; one that would be the same as another is left out.

    balanced: the model's defaults, fine detail strengthened. fast: the same steps without guidance, half the
    work. draft: half of these steps, a quarter of the work, as it comes.
    """
    steps, guidance = model.default_steps, model.default_guidance_scale
    off = min(guidance, GUIDANCE_OFF)
    balanced = Profile("balanced", steps, guidance, True)
    fast = Profile("fast", steps, off, True)
    draft = Profile("draft", max(1, steps // 2), off, False)
    return (draft, balanced) if guidance <= GUIDANCE_OFF else (draft, fast, balanced)
