"""A service without workers: it plans, enhances and encodes as the real one does, and paints a disc.

What it leaves out is Ray and the model, so the page can be tried in milliseconds.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from serve_app.image_codec import ImageEncoding, PictureFacts, encode
from serve_app.live_settings import LiveSettings, at_start
from serve_app.queueing import OnPlace, Place
from serve_app.service import OnProgress
from serve_app.settings import load_settings
from serve_app.worker_reply import WorkerReply
from zimage_engine.prompts.enhancer import enhance, unchanged
from zimage_engine.sampling.plan import resolve
from zimage_engine.types import (
    DeviceStatus,
    GenerationReport,
    GenerationRequest,
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

    `place` is told before the first step; `callers` are those who asked.
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
    live: LiveSettings = field(default_factory=lambda: at_start(load_settings()))

    async def description(self) -> ModelDescription | None:
        return MODEL if self.loaded else None

    async def device_status(self) -> DeviceStatus | None:
        return self.status

    async def generate(
        self,
        request: GenerationRequest,
        encoding: ImageEncoding,
        on_progress: OnProgress | None = None,
        *,
        asked_by: str = "",
        on_place: OnPlace | None = None,
    ) -> WorkerReply:
        self.requests.append(request)
        self.callers.append(asked_by)
        make = enhance if request.enhance else unchanged
        enhanced = make(request.prompt, request.negative_prompt)
        plan = resolve(request, MODEL).with_prompts(enhanced)
        if on_place is not None and self.place is not None:
            on_place(self.place)
        try:
            for step in range(1, plan.steps + 1):
                await asyncio.sleep(self.step_seconds)
                if step > 2 and self.fails_with is not None:
                    raise self.fails_with
                if on_progress is not None and (called := on_progress(StepProgress(1, 1, step, plan.steps))):
                    await called
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
            pictures=(PictureReport(plan.seeds[0], seconds, 0.0, seconds, 0.0),),
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
        reply = WorkerReply((encode(_disc(plan.width_px, plan.height_px), encoding, facts),), report)
        self.replies.append(reply)
        return reply


def _disc(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    middle_x, middle_y, radius = width / 2, height / 2, min(width, height) / 4
    ImageDraw.Draw(image).ellipse(
        (middle_x - radius, middle_y - radius, middle_x + radius, middle_y + radius), fill="red"
    )
    return image
