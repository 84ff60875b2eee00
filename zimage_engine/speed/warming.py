"""The pictures that are drawn at a start so that none of a person's waits for a compiler; times none."""

from __future__ import annotations

from collections.abc import Iterator

from zimage_engine.speed.levers import Choices, compiles
from zimage_engine.types import GenerationRequest, ModelDescription

#: Hardly more than the empty negative prompt, and much more: calls of the denoiser whose prompts differ in
#: length bring a mask along.
_SHORT = "a"
_LONG = ", ".join(["soft evening light over the hills and the sea, with much room around it"] * 5)
#: What some schedulers cannot do with one.
_STEPS = 2


def pictures_to_compile(choices: Choices, model: ModelDescription) -> Iterator[GenerationRequest]:
    """One request for each kind of call that the compiled code of `choices` is made for.

    Compiled code is one for all sizes, so the smallest does; graphs of a device are recorded for each.
    """
    sides = sorted(side for side, names in choices.items() if compiles(names) is not None)
    if not any(compiles(names) == "cuda_graphs" for names in choices.values()):
        sides = sides[:1]
    for side in sides:
        side_px = max(1, round(side / model.size_multiple)) * model.size_multiple
        for guidance_scale, prompt in ((1.8, _SHORT), (1.0, _SHORT), (1.8, _LONG)):
            yield GenerationRequest(
                prompt=prompt,
                negative_prompt="",
                width=side_px,
                height=side_px,
                num_inference_steps=_STEPS,
                guidance_scale=guidance_scale,
                seed=0,
                enhance=False,
                refine=False,
            )
