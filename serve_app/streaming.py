"""One picture as a stream of server-sent events, as OpenAI's clients read them.

Before the first byte a failure is a plain HTTP answer; after it, an `error` event with the same body. What
those events do not know (how far the drawing is) goes into comments, which every reader skips.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from serve_app.error_mapping import answer_for
from serve_app.image_codec import ImageEncoding
from serve_app.openai_schema import (
    EditedPicture,
    ErrorResponse,
    ImageGenerationRequest,
    Picture,
    Usage,
    quality_told,
    to_response,
)
from serve_app.queueing import Place
from serve_app.service import ImageService
from serve_app.worker_reply import Preview, WorkerReply
from zimage_engine.errors import GenerationCancelled
from zimage_engine.types import GenerationRequest, StepProgress

#: How long a failure may still be answered as plain HTTP. Later the stream is open, so that nobody between
#: client and server takes a long wait for a dead connection.
OPEN_AFTER_SECONDS = 5.0
#: Between two signs of life on a stream that has nothing to tell.
BEAT_SECONDS = 10.0

#: Takes the bytes of one event or comment.
Tell = Callable[[bytes], None]


class _PartialImage(BaseModel):
    """A preview: the picture that the drawing pointed to after a step. `size` is that of the preview."""

    partial_image_index: int
    b64_json: str
    created_at: int
    size: str
    quality: str
    background: Literal["opaque"]
    output_format: str


class PartialImageEvent(_PartialImage):
    """A preview of a picture drawn from a prompt."""

    type: Literal["image_generation.partial_image"]


class EditPartialImageEvent(_PartialImage):
    """A preview of a picture drawn from another one."""

    type: Literal["image_edit.partial_image"]


class _Completed(BaseModel):
    """What the last event says of the whole answer."""

    created_at: int
    size: str
    quality: str
    background: Literal["opaque"]
    output_format: str
    model: str
    usage: Usage


class CompletedEvent(_Completed, Picture):
    """The finished picture: OpenAI's fields, then those of a picture in a plain answer."""

    type: Literal["image_generation.completed"]


class EditCompletedEvent(_Completed, EditedPicture):
    """The same of a picture drawn from another one."""

    type: Literal["image_edit.completed"]


class ErrorEvent(ErrorResponse):
    """The end of a stream whose picture could not be drawn."""

    type: Literal["error"]


@dataclass(frozen=True, slots=True)
class EventKind:
    """OpenAI's word for what is streamed, before a dot in each event's type, and what the events hold."""

    name: str
    partial: type[BaseModel]
    completed: type[BaseModel]


GENERATION = EventKind("image_generation", PartialImageEvent, CompletedEvent)
EDIT = EventKind("image_edit", EditPartialImageEvent, EditCompletedEvent)


def event(payload: dict[str, Any]) -> bytes:
    """One server-sent event, named by the payload's type."""
    return f"event: {payload['type']}\ndata: {json.dumps(payload)}\n\n".encode()


def comment(text: str) -> bytes:
    """A line that clients skip."""
    return f": {text}\n\n".encode()


class EventStream(Response):
    """An answer whose bytes come from a drawing, which ends when the client goes away."""

    media_type = "text/event-stream"

    def __init__(
        self,
        draw: Callable[[Tell], Coroutine[Any, Any, bytes]],
        more_headers: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        """`draw` tells what goes out meanwhile and returns what goes out last; cancelling it stops it.

        `more_headers` is asked when the stream opens.
        """
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._draw = draw
        self._more_headers = more_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        told: asyncio.Queue[bytes | None] = asyncio.Queue()
        drawing = asyncio.create_task(self._draw(told.put_nowait))
        drawing.add_done_callback(lambda _: told.put_nowait(None))
        sending = asyncio.create_task(self._send(drawing, told, scope, receive, send))
        gone = asyncio.create_task(_client_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except OSError:  # the connection broke while something was sent
            pass
        finally:
            for task in (gone, sending, drawing):
                task.cancel()
            await asyncio.wait({gone, sending, drawing})
            _failure(drawing)  # seen: of a failure that nobody waits for there is nobody to tell

    async def _send(
        self,
        drawing: asyncio.Task[bytes],
        told: asyncio.Queue[bytes | None],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        chunk = await _next(told, OPEN_AFTER_SECONDS)
        if chunk is None and (error := _failure(drawing)) is not None:
            answer = answer_for(error)
            plain = JSONResponse(answer.body(), status_code=answer.status, headers=dict(answer.headers))
            await plain(scope, receive, send)
            return
        self.headers.update(self._more_headers())
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while chunk is not None:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            chunk = await _next(told, BEAT_SECONDS)
        error = _failure(drawing)
        last = drawing.result() if error is None else event({"type": "error"} | answer_for(error).body())
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def _next(told: asyncio.Queue[bytes | None], seconds: float) -> bytes | None:
    try:
        return await asyncio.wait_for(told.get(), seconds)
    except TimeoutError:
        return comment("waiting")


def _failure(drawing: asyncio.Task[bytes]) -> BaseException | None:
    if drawing.cancelled():
        return GenerationCancelled("the drawing was cancelled before it was done")
    return drawing.exception()


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def picture_stream(
    service: ImageService,
    wire: ImageGenerationRequest,
    asked: GenerationRequest,
    encoding: ImageEncoding,
    asked_by: str,
    kind: EventKind = GENERATION,
) -> EventStream:
    """The answer to a request with `stream` true."""

    async def draw(tell: Tell) -> bytes:
        teller = _Teller(wire, encoding, tell, kind)
        previews = wire.partial_images or 0
        reply = await service.generate(
            asked,
            encoding,
            teller.stepped,
            teller.previewed,
            previews,
            asked_by=asked_by,
            on_place=teller.placed,
        )
        return event(_completed(wire, encoding, reply, service.token_counter(reply.report.model), kind))

    return EventStream(draw, lambda: service.rate_headers(asked_by))


class _Teller:
    """Tells the place in the queue, and a drawing's steps and previews as they come.

    Of a step drawn again there is no second preview.
    """

    def __init__(
        self, wire: ImageGenerationRequest, encoding: ImageEncoding, tell: Tell, kind: EventKind
    ) -> None:
        self._wire = wire
        self._encoding = encoding
        self._tell = tell
        self._kind = kind
        self._first_step_at = 0.0
        self._previews = 0
        self._previewed_step = 0

    def placed(self, place: Place) -> None:
        about = "" if place.seconds is None else f", about {place.seconds:.0f} s"
        self._tell(comment(f"queue position {place.position}{about}"))

    def stepped(self, progress: StepProgress) -> None:
        now = time.monotonic()
        said = f"step {progress.step}/{progress.steps}"
        if progress.step == 1:
            self._first_step_at = now
        else:
            seconds = (now - self._first_step_at) / (progress.step - 1) * (progress.steps - progress.step)
            said += f", {seconds:.1f} seconds left"
        self._tell(comment(said))

    def previewed(self, preview: Preview) -> None:
        if preview.progress.step <= self._previewed_step:
            return
        self._previewed_step = preview.progress.step
        payload = {
            "type": f"{self._kind.name}.partial_image",
            "partial_image_index": self._previews,
            "b64_json": base64.b64encode(preview.file).decode("ascii"),
            "created_at": int(time.time()),
            "size": f"{preview.width}x{preview.height}",
            "quality": quality_told(self._wire),
            "background": "opaque",
            "output_format": self._encoding.format,
        }
        self._previews += 1
        self._tell(event(payload))


def _completed(
    wire: ImageGenerationRequest,
    encoding: ImageEncoding,
    reply: WorkerReply,
    count_tokens: Callable[[str], int],
    kind: EventKind,
) -> dict[str, Any]:
    answer = to_response(wire, encoding, reply.pictures, reply.report, count_tokens=count_tokens)
    (picture,) = answer.pop("data")
    return {
        "type": f"{kind.name}.completed",
        "created_at": answer.pop("created"),
        **answer,
        **picture,
    }


def events_in_docs(kind: EventKind = GENERATION) -> dict[str, Any]:
    """What /openapi.json says of the stream: each event's data, and how a stream looks."""
    common = {"size": "256x256", "quality": "high", "background": "opaque", "output_format": "png"}
    partial = {
        "type": f"{kind.name}.partial_image",
        "partial_image_index": 0,
        "b64_json": "iVBORw0KGgo...",
        "created_at": 1790000000,
        **common,
    }
    read_tokens = 256 if kind is EDIT else 0
    completed = {
        "type": f"{kind.name}.completed",
        "b64_json": "iVBORw0KGgo...",
        "created_at": 1790000000,
        **common,
        "model": "z-image-demo",
        "revised_prompt": "a red circle",
        "seed": 7,
        "steps": 8,
        "guidance": 1.8,
        "seconds": 1.25,
        "refined": False,
        "warnings": [],
        "loras": [],
        "accelerated_by": [],
        **({"strength": 0.65, "steps_run": 5} if kind is EDIT else {}),
        "usage": {
            "input_tokens": 3 + read_tokens,
            "input_tokens_details": {"text_tokens": 3, "image_tokens": read_tokens},
            "output_tokens": 256,
            "total_tokens": 259 + read_tokens,
        },
    }
    said = (comment("step 2/8, 0.9 seconds left"), event(partial), event(completed))
    return stream_in_docs(((kind.partial, partial), (kind.completed, completed), (ErrorEvent, None)), said)


def stream_in_docs(
    rows: Sequence[tuple[type[BaseModel], dict[str, Any] | None]], said: Sequence[bytes]
) -> dict[str, Any]:
    """The same of any stream: what its events hold, each with an example, and how a stream looks."""
    return {
        "schema": {"anyOf": [_event_schema(_schema(model, example)) for model, example in rows]},
        "example": b"".join(said).decode(),
    }


def _event_schema(data: dict[str, Any]) -> dict[str, Any]:
    """An event as OpenAPI 3.2 sees one: an object of its lines, whose data is JSON in a text."""
    as_text = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {"type": "object", "properties": {"data": as_text}, "required": ["data"]}


def _schema(model: type[BaseModel], example: dict[str, Any] | None) -> dict[str, Any]:
    """The model's schema with all that it refers to in its place."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return whole(parts[value["$ref"].rpartition("/")[2]])
        return {name: whole(each) for name, each in value.items()}

    described: dict[str, Any] = whole(schema)
    return described if example is None else described | {"examples": [example]}
