"""The engine: loads a model once, then draws whatever is asked of it; knows no HTTP, Ray or Gradio.

engine = Engine.load()
result = engine.generate(GenerationRequest(prompt="a red circle on a white background", seed=7))
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from zimage_engine import quality
from zimage_engine.families import ModelFamily
from zimage_engine.loading.adapter import ModelLoaderAdapter
from zimage_engine.loading.describe import describe, max_tokens
from zimage_engine.memory.snapshot import available_devices, choose_device, device_clock, device_status
from zimage_engine.prompts import enhancer
from zimage_engine.prompts.tokens import token_counter
from zimage_engine.sampling.pipeline import DrawnPicture, PromptEmbeddings, draw, encode_prompts
from zimage_engine.sampling.plan import SamplingPlan, resolve
from zimage_engine.types import (
    DeviceStatus,
    EnhancedPrompt,
    GenerationReport,
    GenerationRequest,
    GenerationResult,
    ModelDescription,
    OnStep,
    PictureReport,
    StepProgress,
)

#: The model that comes with the package, and what it is called.
DEMO_MODEL_PATH = Path(__file__).parent / "demo" / "model"
DEMO_MODEL_ID = "z-image-demo"


class Engine:
    """One model on one device.

    It has no lock: call `generate` from one thread at a time. The pipeline and its scheduler have a state.
    """

    def __init__(self, pipeline: Any, family: ModelFamily, model_id: str, device: str) -> None:
        """Take over a verified pipeline that is on `device`; `Engine.load` is the usual way here."""
        self.pipeline = pipeline
        self.description: ModelDescription = describe(pipeline, family, model_id, device)
        self._max_tokens = max_tokens(pipeline, family)
        self._clock = device_clock(device)
        tokenizer_json = self.description.tokenizer_json
        self._count_tokens = token_counter(tokenizer_json) if tokenizer_json else None

    @classmethod
    def load(
        cls,
        path_or_id: str | Path | None = None,
        device: str | None = None,
        *,
        family: str | None = None,
        base: str | Path | None = None,
    ) -> Engine:
        """Load a model folder, single file or hub id; None is the demo model that comes with the package.

        `family` says what kind of model it is where the files do not; `base` is a folder or hub id that
        supplies what a single file lacks.

        `device` is "cuda", "cuda:1", "mps" or "cpu"; None takes the best there is, in that order.
        Raises DeviceUnavailable, CheckpointNotFound, UnknownFamily or CheckpointDamaged.
        """
        chosen = choose_device(device, available_devices())
        adapter = ModelLoaderAdapter(DEMO_MODEL_PATH if path_or_id is None else path_or_id, family, base=base)
        pipeline = adapter.load().to(chosen)
        return cls(pipeline, adapter.family, _model_id(path_or_id), chosen)

    def device_status(self) -> DeviceStatus:
        """What the device is called and how much of its memory is used now."""
        return device_status(self.description.device)

    def generate(self, request: GenerationRequest, on_step: OnStep | None = None) -> GenerationResult:
        """Draw the pictures of `request`, one after another.

        Picture i is bit for bit the one that `seed + i` draws alone. `on_step` is called after each step, in
        this thread; what it raises ends the drawing and comes out here, and the engine stays usable.
        Raises InvalidRequest or InvalidSize before anything is drawn.
        """
        started = time.perf_counter()
        plan = resolve(request, self.description)
        enhancement = self._enhance(plan, request.enhance)
        plan = plan.with_prompts(enhancement)
        embeddings = encode_prompts(self.pipeline, plan, self._max_tokens, self._clock)
        pictures = [self._draw(plan, embeddings, index, on_step) for index in range(len(plan.seeds))]
        images = [picture.image for picture in pictures]
        return GenerationResult(images, self._report(plan, enhancement, embeddings, pictures, started))

    def _enhance(self, plan: SamplingPlan, wanted: bool) -> EnhancedPrompt:
        if not wanted:
            return enhancer.unchanged(plan.prompt, plan.negative_prompt)
        return enhancer.enhance(
            plan.prompt,
            plan.negative_prompt,
            count_tokens=self._count_tokens,
            token_limit=self.description.token_limit,
        )

    def _draw(
        self, plan: SamplingPlan, embeddings: PromptEmbeddings, index: int, on_step: OnStep | None
    ) -> DrawnPicture:
        def step_ended(step: int) -> None:
            if on_step is not None:
                on_step(StepProgress(index + 1, len(plan.seeds), step, plan.steps))

        return draw(self.pipeline, plan, embeddings, plan.seeds[index], self._clock, step_ended)

    def _report(
        self,
        plan: SamplingPlan,
        enhancement: EnhancedPrompt,
        embeddings: PromptEmbeddings,
        pictures: list[DrawnPicture],
        started: float,
    ) -> GenerationReport:
        """What happened. The prompts are encoded once, so the first picture's report carries that time."""
        model = self.description
        encode_seconds = [embeddings.encode_seconds, *[0.0] * (len(pictures) - 1)]
        reports = tuple(
            PictureReport(
                seed=seed,
                seconds=encoding + picture.denoise_seconds + picture.decode_seconds,
                encode_seconds=encoding,
                denoise_seconds=picture.denoise_seconds,
                decode_seconds=picture.decode_seconds,
                warnings=quality.notices(quality.measure(picture.image)),
            )
            for seed, picture, encoding in zip(plan.seeds, pictures, encode_seconds, strict=True)
        )
        return GenerationReport(
            model=model.id,
            family=model.family,
            device=model.device,
            dtype=model.dtype,
            prompt=plan.prompt,
            negative_prompt=plan.negative_prompt,
            enhancement=enhancement,
            width=plan.width_px,
            height=plan.height_px,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance_scale,
            scheduler=type(self.pipeline.scheduler).__name__,
            seconds=time.perf_counter() - started,
            pictures=reports,
            warnings=plan.warnings + embeddings.warnings,
        )


def _model_id(path_or_id: str | Path | None) -> str:
    """What callers know the model by: a hub id as it is, a path by its last name alone."""
    if path_or_id is None:
        return DEMO_MODEL_ID
    path = Path(path_or_id).expanduser()
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else str(path_or_id)
