"""The stock pipeline beside ours: the same weights, in the same memory, without anything of ours.

Its modules are new ones around the same tensors, so that nothing that is done to ours acts in it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from zimage_engine.errors import InvalidRequest
from zimage_engine.memory.residency import Residency
from zimage_engine.sampling.prompt_encoders import encoder_for

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimage_engine.engine import Engine
    from zimage_engine.sampling.plan import SamplingPlan


class StockPipeline:
    """Draws what a plan says as diffusers does by itself."""

    def __init__(self, engine: Engine, max_tokens: int) -> None:
        """Raises InvalidRequest where the weights do not all lie on the device: stock diffusers could not
        draw with them there."""
        plan = engine.memory_report().plan
        if plan is not None and plan.residency is not Residency.NONE:
            raise InvalidRequest(
                f"--compare-stock needs the whole model on the device, and the plan here is "
                f"{plan.residency.value}; leave it out, or give the model more memory",
                "compare_stock",
            )
        ours = engine.pipeline
        engine.levers.lay_out(())  # the same tensors, as they were loaded
        parts = {name: _twin(part) for name, part in ours.components.items()}
        self.pipeline = type(ours)(**parts, **_own_settings(ours))
        self.pipeline.set_progress_bar_config(disable=True)
        self._max_tokens = max_tokens
        self._encoder = encoder_for(self.pipeline)

    def draw(self, plan: SamplingPlan, seed: int) -> Image:
        """The picture of the plan's prompts, read anew."""
        guided = plan.guidance_scale > 1.0
        with torch.no_grad():
            read = self._encoder.encode(
                self.pipeline, plan.prompt, plan.negative_prompt, guided, self._max_tokens, {}
            )
            answer = self.pipeline(
                **self._encoder.call_arguments(read),
                width=plan.width_px,
                height=plan.height_px,
                num_inference_steps=plan.steps,
                guidance_scale=plan.pipeline_guidance,
                generator=torch.Generator("cpu").manual_seed(seed),
            )
        image: Image = answer.images[0]
        return image


def _own_settings(pipeline: Any) -> Mapping[str, Any]:
    """What the pipeline was made with beside its parts, such as whether an empty prompt is zeros."""
    parts = pipeline.components
    return {
        name: value
        for name, value in pipeline.config.items()
        if name not in parts and not name.startswith("_")
    }


def _twin(part: Any) -> Any:
    """A module of its own around the same tensors; what is no module is copied."""
    if not isinstance(part, torch.nn.Module):
        return copy.deepcopy(part)
    shared: dict[int, Any] = {}
    for parameter in part.parameters():
        shared[id(parameter)] = torch.nn.Parameter(parameter.detach(), requires_grad=False)
    shared |= {id(buffer): buffer for buffer in part.buffers()}
    return copy.deepcopy(part, shared)
