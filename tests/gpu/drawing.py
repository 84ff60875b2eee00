"""Draws with our guarded pipeline and with stock diffusers, and says what it took."""

from __future__ import annotations

import hashlib
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from tests.gpu.card import Card
from tests.gpu.random_model import RandomModel
from zimage_engine.loading.describe import describe, max_tokens
from zimage_engine.memory.snapshot import device_clock
from zimage_engine.sampling.pipeline import GuardedPipeline, PromptEmbeddings
from zimage_engine.sampling.plan import SamplingPlan, resolve
from zimage_engine.types import GenerationRequest

#: One token a byte: long enough to fill all the places that the denoiser has for a caption.
PROMPT = "a red circle on a white ground, " * 20
SEED = 7


@dataclass(frozen=True)
class Asked:
    """A picture to draw. `guidance_scale` 1.0 is off."""

    width_px: int
    height_px: int
    guidance_scale: float
    steps: int

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def size(self) -> tuple[int, int]:
        return (self.width_px, self.height_px)


@dataclass(frozen=True)
class Drawn:
    """`digest` is of the picture's bytes. `step_seconds` is the median of all steps but the first, which
    waits for what was not yet there. `trips`: how often the guard had to step in; times are then not fair."""

    digest: str
    seconds: float
    encode_seconds: float
    denoise_seconds: float
    decode_seconds: float
    step_seconds: float
    trips: int


class Painter:
    """Draws with our pipeline what a plan in force lets it."""

    def __init__(self, model: RandomModel, card: Card) -> None:
        self._pipeline = model.pipeline
        self._clock = device_clock(card.device)
        self._guarded = GuardedPipeline(model.pipeline, model.family, self._clock)
        self._description = describe(model.pipeline, model.family, "random", card.device)
        self.max_tokens = max_tokens(model.pipeline, model.family)
        self.steps_done = 0

    def plan(self, asked: Asked) -> SamplingPlan:
        return resolve(
            GenerationRequest(
                # The chat template takes the rest.
                prompt=PROMPT[: self._description.token_limit],
                seed=SEED,
                width=asked.width_px,
                height=asked.height_px,
                num_inference_steps=asked.steps,
                guidance_scale=asked.guidance_scale,
                enhance=False,
            ),
            self._description,
        )

    def encode(self, plan: SamplingPlan) -> PromptEmbeddings:
        return self._guarded.encode(plan, self.max_tokens)

    def draw(
        self, asked: Asked, after_encoding: Callable[[], None] = lambda: None, started: float | None = None
    ) -> Drawn:
        """The whole way from the prompt to the picture."""
        plan = self.plan(asked)
        began = self._clock() if started is None else started
        embeddings = self.encode(plan)
        after_encoding()
        return self.draw_encoded(plan, embeddings, began)

    def draw_encoded(self, plan: SamplingPlan, embeddings: PromptEmbeddings, began: float) -> Drawn:
        """From the embeddings to the picture; `steps_done` tells how far it came."""
        moments = [self._clock()]
        self.steps_done = 0

        def stepped(step: int, _: torch.Tensor) -> None:
            self.steps_done = step
            moments.append(self._clock())

        picture = self._guarded.draw(plan, embeddings, SEED, lambda: None, stepped)
        return Drawn(
            digest=digest(picture.image),
            seconds=self._clock() - began,
            encode_seconds=embeddings.encode_seconds,
            denoise_seconds=picture.denoise_seconds,
            decode_seconds=picture.decode_seconds,
            step_seconds=_step_seconds(moments),
            trips=len(embeddings.trips) + len(picture.trace.trips),
        )

    def now(self) -> float:
        return self._clock()


def draw_stock(model: RandomModel, asked: Asked, prompt: str, tokens: int, card: Card) -> Drawn:
    """The same picture as stock diffusers draws it, whatever its pipeline was told about memory."""
    clock = device_clock(card.device)
    began = clock()
    moments = [began]

    def stepped(_pipeline: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        moments.append(clock())
        return values

    with torch.no_grad():
        image = model.pipeline(
            prompt=prompt,
            negative_prompt="",
            width=asked.width_px,
            height=asked.height_px,
            num_inference_steps=asked.steps,
            guidance_scale=model.family.to_pipeline_guidance(asked.guidance_scale),
            generator=torch.Generator("cpu").manual_seed(SEED),
            max_sequence_length=tokens,
            callback_on_step_end=stepped,
        ).images[0]
    ended = clock()
    step_seconds = _step_seconds(moments)
    # Encoding and the first step are one to whoever calls; the first step is taken to be like the others.
    return Drawn(
        digest=digest(image),
        seconds=ended - began,
        encode_seconds=max(0.0, moments[1] - began - step_seconds),
        denoise_seconds=moments[-1] - moments[1] + step_seconds,
        decode_seconds=ended - moments[-1],
        step_seconds=step_seconds,
        trips=0,
    )


def digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def _step_seconds(moments: list[float]) -> float:
    each = [later - earlier for earlier, later in itertools.pairwise(moments)]
    return statistics.median(each[1:] or each or [0.0])
