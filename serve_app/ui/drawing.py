"""One picture as the page sees it: the controls are read, the service draws, moments come back.

Knows nothing of Gradio or HTML; `page` shows the moments, `markup` words them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serve_app.image_codec import ImageEncoding
from serve_app.logs import context_of_request
from serve_app.ui.sizes import read_size
from serve_app.ui.texts import Language, refusal_in_chinese, say
from serve_app.worker_reply import EVERY_STEP, Preview
from zimage_engine.types import GenerationReport, GenerationRequest, ModelDescription, StepProgress

if TYPE_CHECKING:
    from serve_app.openai_schema import ImageGenerationRequest
    from serve_app.service import ImageService

#: The fields of a request that the page's scripts hold.
MORE = ("n", "loras", "model", "exact")
#: How often a request that waits for the model looks whether it is there.
READY_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Asked:
    """The controls as they stand. `size` and `seed` are as typed; "" is the model's size, a new seed.

    `more` is what the page's scripts hold: a JSON object with the fields `n`, `loras` and `model` of
    POST /v1/images/generations; "" is none of them.
    """

    prompt: str
    negative_prompt: str
    enhance: bool
    refine: bool
    size: str
    steps: float
    guidance_scale: float
    seed: str
    language: Language
    more: str = ""


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
class Stepped:
    """A step has ended. `seconds_left` until the last one, None while nobody can know."""

    progress: StepProgress
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """The pictures, as the worker encoded them, and how they were made."""

    pictures: tuple[bytes, ...] = field(repr=False)
    report: GenerationReport


@dataclass(frozen=True, slots=True)
class Refused:
    """No picture; the sentences say why to the person at the page, `theirs` that they can mend it."""

    sentences: tuple[str, ...]
    theirs: bool


Moment = WaitingForModel | Waiting | Started | Stepped | Preview | Drawn | Refused


class ControlUnreadable(ValueError):
    """What was typed is not what the control is for; the message is in the page's language."""


async def draw(
    service: ImageService, asked: Asked, asked_by: str = "", request_id: str = ""
) -> AsyncGenerator[Moment, None]:
    """Draw one picture; yields its moments in order and ends with exactly one `Drawn` or `Refused`.

    `asked_by` has one line in the queue, whatever pages it opens. The log tells `request_id`. Who listens
    slowly hears of the newest preview alone.
    Whoever stops listening early cancels the request.
    """
    try:
        description = await service.description()
        if description is None:
            yield WaitingForModel()
            description = await _until_ready(service)
        request = request_from(asked, description)
        yield Started()
        told: asyncio.Queue[Stepped | Preview | Waiting | None] = asyncio.Queue()
        pace = _Pace()
        newest: Preview | None = None

        def previewed(preview: Preview) -> None:
            nonlocal newest
            newest = preview
            told.put_nowait(preview)

        drawing = asyncio.create_task(
            service.generate(
                request,
                ImageEncoding("png"),
                lambda progress: told.put_nowait(Stepped(progress, pace.seconds_left(progress))),
                previewed,
                EVERY_STEP,
                asked_by=asked_by,
                on_place=lambda place: told.put_nowait(Waiting(place.position, place.seconds)),
            ),
            context=context_of_request(request_id),
        )
        drawing.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (moment := await told.get()) is not None:
                if not isinstance(moment, Preview) or moment is newest:
                    yield moment
            reply = await drawing
        finally:
            drawing.cancel()
        yield Drawn(tuple(reply.pictures), reply.report)
    except ControlUnreadable as error:
        yield Refused((str(error),), theirs=True)
    except Exception as error:
        yield refused(error, asked.language)


class _Pace:
    """How long a drawing still takes, by the steps that it has made."""

    def __init__(self) -> None:
        self._first_at: float | None = None
        self._first_step = 0

    def seconds_left(self, progress: StepProgress) -> float | None:
        """Until the last step of the last picture; None after the first step that is told."""
        now = time.monotonic()
        step = progress.steps_ended
        if self._first_at is None or step <= self._first_step:
            self._first_at, self._first_step = now, step
            return None
        seconds_a_step = (now - self._first_at) / (step - self._first_step)
        return seconds_a_step * (progress.pictures * progress.steps - step)


def request_from(asked: Asked, description: ModelDescription) -> GenerationRequest:
    """The controls as a request; raises ControlUnreadable where one cannot be read."""
    if not asked.prompt.strip():
        raise ControlUnreadable(say("prompt_empty", asked.language))
    from serve_app.openai_schema import to_choices  # imports Ray, which only a running server needs

    width, height = _size(asked, description)
    more = _more(asked)
    return GenerationRequest(
        prompt=asked.prompt.strip(),
        negative_prompt=asked.negative_prompt.strip() or None,
        width=width,
        height=height,
        num_inference_steps=round(asked.steps),
        guidance_scale=round(asked.guidance_scale, 2),
        seed=_seed(asked),
        enhance=asked.enhance,
        refine=asked.refine,
        n=more.n or 1,
        loras=to_choices(more),
        model=more.model,
        exact=bool(more.exact),
    )


def parameters_of(asked: Asked, report: GenerationReport, seed: int) -> dict[str, Any]:
    """The fields of POST /v1/images/generations that draw one picture of the report again, as asked for."""
    from serve_app.openai_schema import to_choices

    loras = to_choices(_more(asked))
    fields = {
        "prompt": asked.prompt.strip(),
        "negative_prompt": asked.negative_prompt.strip() or None,
        "size": f"{report.width}x{report.height}",
        "num_inference_steps": report.num_inference_steps,
        "guidance_scale": report.guidance_scale,
        "seed": seed,
        "enhance": asked.enhance,
        "refine": asked.refine,
        "loras": None if loras is None else [{"name": each.name, "weight": each.weight} for each in loras],
        "model": _more(asked).model,
        "exact": _more(asked).exact or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _more(asked: Asked) -> ImageGenerationRequest:
    """What the page's scripts hold, checked as a request's fields are; raises RequestRefused."""
    from serve_app.openai_schema import parse, read_json

    fields = read_json(asked.more.encode()) if asked.more else {}
    return parse({"prompt": "-", **{name: fields.get(name) for name in MORE}})


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
