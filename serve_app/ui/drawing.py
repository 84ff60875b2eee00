"""One picture as the page sees it: the controls are read, the service draws, moments come back.

Knows nothing of Gradio or HTML; `page` shows the moments, `markup` words them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serve_app.image_codec import ImageEncoding
from serve_app.logs import context_of_request
from serve_app.ui.sizes import read_size
from serve_app.ui.texts import Language, refusal_in_chinese, say
from zimage_engine.types import GenerationReport, GenerationRequest, ModelDescription, StepProgress

if TYPE_CHECKING:
    from serve_app.service import ImageService

#: How often a request that waits for the model looks whether it is there.
READY_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Asked:
    """The controls as they stand. `size` and `seed` are as typed; "" is the model's size, a new seed."""

    prompt: str
    negative_prompt: str
    enhance: bool
    refine: bool
    size: str
    steps: float
    guidance_scale: float
    seed: str
    language: Language


@dataclass(frozen=True, slots=True)
class WaitingForModel:
    """No worker has its model yet."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Others are before; `position` 1 is next. `seconds` until the turn, None while nobody can know."""

    position: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Started:
    """The request is on its way; no step has ended."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The picture, as the worker encoded it, and how it was made."""

    png: bytes = field(repr=False)
    report: GenerationReport


@dataclass(frozen=True, slots=True)
class Refused:
    """No picture; the sentences say why to the person at the page, `theirs` that they can mend it."""

    sentences: tuple[str, ...]
    theirs: bool


Moment = WaitingForModel | Waiting | Started | StepProgress | Drawn | Refused


class ControlUnreadable(ValueError):
    """What was typed is not what the control is for; the message is in the page's language."""


async def draw(
    service: ImageService, asked: Asked, asked_by: str = "", request_id: str = ""
) -> AsyncGenerator[Moment, None]:
    """Draw one picture; yields its moments in order and ends with exactly one `Drawn` or `Refused`.

    `asked_by` has one line in the queue, whatever pages it opens. The log tells `request_id`.
    Whoever stops listening early cancels the request.
    """
    try:
        description = await service.description()
        if description is None:
            yield WaitingForModel()
            description = await _until_ready(service)
        request = request_from(asked, description)
        yield Started()
        steps: asyncio.Queue[StepProgress | Waiting | None] = asyncio.Queue()
        drawing = asyncio.create_task(
            service.generate(
                request,
                ImageEncoding("png"),
                steps.put_nowait,
                asked_by=asked_by,
                on_place=lambda place: steps.put_nowait(Waiting(place.position, place.seconds)),
            ),
            context=context_of_request(request_id),
        )
        drawing.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            while (progress := await steps.get()) is not None:
                yield progress
            reply = await drawing
        finally:
            drawing.cancel()
        yield Drawn(reply.pictures[0], reply.report)
    except ControlUnreadable as error:
        yield Refused((str(error),), theirs=True)
    except Exception as error:
        yield refused(error, asked.language)


def request_from(asked: Asked, description: ModelDescription) -> GenerationRequest:
    """The controls as a request; raises ControlUnreadable where one cannot be read."""
    if not asked.prompt.strip():
        raise ControlUnreadable(say("prompt_empty", asked.language))
    width, height = _size(asked, description)
    return GenerationRequest(
        prompt=asked.prompt.strip(),
        negative_prompt=asked.negative_prompt.strip() or None,
        width=width,
        height=height,
        num_inference_steps=round(asked.steps),
        guidance_scale=round(asked.guidance_scale, 2),
        seed=_seed(asked),
        enhance=asked.enhance,
        refine=asked.enhance and asked.refine,
    )


def _size(asked: Asked, description: ModelDescription) -> tuple[int | None, int | None]:
    if not asked.size.strip():
        return None, None
    size = read_size(asked.size)
    if size is None:
        example = f"{description.native_width}x{description.native_height}"
        sentence = say("size_not_readable", asked.language, value=asked.size.strip(), example=example)
        raise ControlUnreadable(sentence)
    return size


def _seed(asked: Asked) -> int | None:
    typed = asked.seed.strip()
    if not typed:
        return None
    try:
        return int(typed)
    except ValueError:
        raise ControlUnreadable(say("seed_not_number", asked.language, value=typed)) from None


async def _until_ready(service: ImageService) -> ModelDescription:
    """The model, as soon as it is there."""
    while (description := await service.description()) is None:
        await asyncio.sleep(READY_POLL_SECONDS)
    return description


def refused(error: Exception, language: Language) -> Refused:
    """What the HTTP API would answer (which also logs what is the server's own fault), in plain words."""
    from serve_app.error_mapping import answer_for  # imports Ray, which only a running server needs

    answer = answer_for(error)
    sentences = (refusal_in_chinese(answer.code), answer.message) if language == "zh" else (answer.message,)
    return Refused(tuple(filter(None, sentences)), theirs=answer.status == 400)
