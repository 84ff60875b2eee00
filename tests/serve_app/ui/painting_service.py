"""A service without workers: it plans, enhances and encodes as the real one does, and paints a disc.

What it leaves out is Ray and the model, so the page can be tried in milliseconds.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field, replace

from PIL import Image, ImageDraw

from serve_app.image_codec import ImageEncoding, PictureFacts, encode, encode_preview
from serve_app.live_settings import LiveSettings, at_start
from serve_app.model_list import ModelState
from serve_app.queueing import OnPlace, Place
from serve_app.receipt import receipt_of
from serve_app.service import OnPreview, OnProgress, Readiness
from serve_app.settings import load_settings
from serve_app.worker_reply import Preview, PreviewsWanted, WorkerReply
from zimage_engine.prompts.enhancer import enhance, unchanged
from zimage_engine.prompts.tokens import PromptTokens
from zimage_engine.sampling.plan import resolve
from zimage_engine.types import (
    DeviceStatus,
    Enhancer,
    GenerationReport,
    GenerationRequest,
    LoraOffer,
    ModelDescription,
    PictureReport,
    StepProgress,
)

MODEL = ModelDescription(
    id="disc-painter",
    family="z-image-turbo",
    device="cuda:0",
    dtype="bfloat16",
    native_width=256,
    native_height=256,
    size_multiple=32,
    default_steps=8,
    default_guidance_scale=1.8,
    token_limit=512,
)
CARD = DeviceStatus("cuda:0", "A card of 12 GB", 12 * 2**30, round(5.2 * 2**30))


@dataclass
class PaintingService:
    """`loaded` tells whether a model is there; `fails_with` is raised after the second step.

    `place` is told before the first step; `callers` are those who asked. `others` are models beside its own,
    `loras` those that it offers.
    """

    step_seconds: float = 0.0
    loaded: bool = True
    fails_with: Exception | None = None
    status: DeviceStatus | None = CARD
    place: Place | None = None
    callers: list[str] = field(default_factory=list)
    requests: list[GenerationRequest] = field(default_factory=list)
    replies: list[WorkerReply] = field(default_factory=list)
    cancelled: int = 0
    steps: int = 0
    live: LiveSettings = field(default_factory=lambda: at_start(load_settings()))
    model: ModelDescription = MODEL
    workers: int = 1
    drawing: int = 0
    waiting: int = 0
    others: tuple[ModelState, ...] = ()
    loras: tuple[LoraOffer, ...] = ()
    tokens: PromptTokens | None = None
    #: What is told of the files that are read while nothing is loaded.
    loading_part: float | None = None

    async def readiness(self) -> Readiness:
        return Readiness(self.loaded, "ready" if self.loaded else "No worker has its model yet.")

    async def model_states(self) -> list[ModelState]:
        own = ModelState(self.model.id, (), "ready", "a", description=self.model)
        return [own, *self.others] if self.loaded else []

    @property
    def names_of_models(self) -> tuple[str, ...]:
        return tuple(state.id for state in self.others)

    def with_live_defaults(self, description: ModelDescription | None) -> ModelDescription | None:
        return description

    def enhancer_for(self, wanted: Enhancer | None) -> Enhancer:
        return "rules"

    async def loras_offered(self, model: str | None = None) -> tuple[LoraOffer, ...] | None:
        return self.loras

    async def description_for(self, name: str | None) -> ModelDescription:
        return self.model

    async def description(self) -> ModelDescription | None:
        return self.model if self.loaded else None

    async def device_status(self) -> DeviceStatus | None:
        return self.status

    async def generate(
        self,
        request: GenerationRequest,
        encoding: ImageEncoding,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        previews: PreviewsWanted = 0,
        *,
        asked_by: str = "",
        on_place: OnPlace | None = None,
    ) -> WorkerReply:
        self.requests.append(request)
        self.callers.append(asked_by)
        make = enhance if request.enhance else unchanged
        enhanced = make(request.prompt, request.negative_prompt)
        plan = resolve(request, self.model).with_prompts(enhanced)
        if on_place is not None and self.place is not None:
            on_place(self.place)
        try:
            of = len(plan.seeds)
            for picture, step in itertools.product(range(1, of + 1), range(1, plan.steps + 1)):
                await asyncio.sleep(self.step_seconds)
                self.steps += 1
                if step > 2 and self.fails_with is not None:
                    raise self.fails_with
                progress = StepProgress(picture, of, step, plan.steps)
                if on_progress is not None and (called := on_progress(progress)):
                    await called
                if on_preview is not None and previews and step < plan.steps:
                    on_preview(_forming(progress, plan.width_px, plan.height_px))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        seconds = self.step_seconds * plan.steps
        report = GenerationReport(
            model=MODEL.id,
            family=MODEL.family,
            device=MODEL.device,
            dtype=MODEL.dtype,
            prompt=plan.prompt,
            negative_prompt=plan.negative_prompt,
            enhancement=enhanced,
            width=plan.width_px,
            height=plan.height_px,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance_scale,
            scheduler="none",
            seconds=seconds,
            pictures=tuple(PictureReport(seed, seconds, 0.0, seconds, 0.0) for seed in plan.seeds),
            warnings=plan.warnings,
        )
        facts = PictureFacts(
            prompt=plan.prompt,
            negative_prompt=plan.negative_prompt,
            seed=plan.seeds[0],
            steps=plan.steps,
            guidance_scale=plan.guidance_scale,
            width=plan.width_px,
            height=plan.height_px,
            model=MODEL.id,
            scheduler="none",
        )
        disc = _disc(plan.width_px, plan.height_px)
        files = tuple(
            encode(disc, encoding, replace(facts, seed=seed, receipt=receipt_of(report, index)))
            for index, seed in enumerate(plan.seeds)
        )
        reply = WorkerReply(files, report)
        self.replies.append(reply)
        return reply


def _forming(progress: StepProgress, width: int, height: int) -> Preview:
    """The disc out of a fog that lifts from step to step."""
    fog = Image.new("RGB", (width, height), "gray")
    image = Image.blend(fog, _disc(width, height), progress.step / progress.steps).resize((64, 64))
    return Preview(progress, encode_preview(image, ImageEncoding("jpeg", 80)), 64, 64)


def _disc(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    middle_x, middle_y, radius = width / 2, height / 2, min(width, height) / 4
    ImageDraw.Draw(image).ellipse(
        (middle_x - radius, middle_y - radius, middle_x + radius, middle_y + radius), fill="red"
    )
    return image
