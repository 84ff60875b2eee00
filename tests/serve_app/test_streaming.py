"""The stream that OpenAI's clients read: previews, progress in comments, failures, clients that go away."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import AsyncIterator, Callable, MutableMapping
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

from serve_app import streaming
from serve_app.image_codec import ImageEncoding
from serve_app.ingress import build_asgi_app
from serve_app.queueing import QueueFull
from serve_app.settings import load_settings
from serve_app.streaming import CompletedEvent, ErrorEvent, PartialImageEvent
from serve_app.worker_reply import Preview, WorkerReply
from tests.serve_app.conftest import client_of
from tests.serve_app.test_service import FAILURES, Failure, ScriptedWorkers, died, service_over
from zimage_engine.errors import GuardExhausted
from zimage_engine.types import GenerationRequest, StepProgress

URL = "/v1/images/generations"
ASKED = {"prompt": "a red circle", "seed": 5, "num_inference_steps": 4, "size": "64x64"}


def data_of(answer: str) -> list[dict[str, Any]]:
    """The events of a stream, in order; each is named by its type."""
    found = re.findall(r"^event: (.+)\ndata: (.+)\n\n", answer, re.MULTILINE)
    events = [json.loads(data) for _, data in found]
    assert [name for name, _ in found] == [event["type"] for event in events]
    return events


def comments_of(answer: str) -> list[str]:
    return re.findall(r"^: (.+)\n\n", answer, re.MULTILINE)


def image_of(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


async def metric(client: httpx.AsyncClient, name: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("partial_images", [None, 0, 1, 3])
async def test_openais_client_reads_previews_and_the_picture(
    client: httpx.AsyncClient, partial_images: int | None
) -> None:
    plain = (await client.post(URL, json=ASKED)).json()["data"][0]
    async with openai.AsyncOpenAI(
        api_key="none", base_url="http://localhost/v1", http_client=client, max_retries=0
    ) as openai_client:
        stream = await openai_client.images.generate(
            prompt="a red circle",
            stream=True,
            partial_images=partial_images,
            size="64x64",  # type: ignore[call-overload]
            extra_body={"seed": 5, "num_inference_steps": 4},
        )
        *previews, last = [event async for event in stream]
    assert [preview.partial_image_index for preview in previews] == list(range(partial_images or 0))
    for preview in previews:
        assert isinstance(preview, ImageGenPartialImageEvent)
        assert image_of(preview.b64_json).size == (64, 64)
        assert (preview.size, preview.quality, preview.background) == ("64x64", "high", "opaque")
        assert (preview.output_format, abs(preview.created_at - time.time()) < 60) == ("png", True)
    assert len({preview.b64_json for preview in previews}) == len(previews)
    assert isinstance(last, ImageGenCompletedEvent)
    assert last.b64_json == plain["b64_json"]
    assert last.usage.output_tokens == 16
    assert last.usage.input_tokens == last.usage.input_tokens_details.text_tokens > 3
    assert last.usage.total_tokens == last.usage.input_tokens + 16


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_previews_have_the_format_of_the_picture(client: httpx.AsyncClient, output_format: str) -> None:
    asked = ASKED | {"stream": True, "partial_images": 1, "output_format": output_format}
    events = data_of((await client.post(URL, json=asked)).text)
    assert [image_of(event["b64_json"]).format for event in events] == [output_format.upper()] * 2
    assert [event["output_format"] for event in events] == [output_format] * 2


async def test_events_are_what_the_document_says_and_tell_how_the_picture_was_made(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post(URL, json=ASKED | {"stream": True, "partial_images": 1, "quality": "low"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    preview, last = data_of(response.text)
    assert PartialImageEvent.model_validate(preview).model_dump() == preview
    assert CompletedEvent.model_validate(last).model_dump(exclude_unset=True) == last
    assert (last["seed"], last["steps"], last["quality"], last["guidance"]) == (5, 4, "low", 1.0)


async def test_progress_rides_along_in_comments(client: httpx.AsyncClient) -> None:
    answer = (await client.post(URL, json=ASKED | {"stream": True})).text
    told = comments_of(answer)
    assert [text.partition(",")[0] for text in told] == [f"step {step}/4" for step in (1, 2, 3, 4)]
    assert all(re.fullmatch(r"step \d/4, \d+\.\d seconds left", text) for text in told[1:])
    assert told[-1].endswith(" 0.0 seconds left")


async def test_a_streamed_request_is_counted_as_a_plain_one(client: httpx.AsyncClient) -> None:
    await client.post(URL, json=ASKED | {"stream": True})
    assert await metric(client, 'zimage_requests_total{outcome="ok"') == 1
    assert await metric(client, "zimage_requests_total") == await metric(client, "zimage_pictures_total") == 1
    assert await metric(client, "zimage_requests_in_flight") == 0


class FailsAtOnce(ScriptedWorkers):
    async def _stream(
        self, request: GenerationRequest, encoding: ImageEncoding, previews: int, tell_first: bool = False
    ) -> AsyncIterator[StepProgress | WorkerReply]:
        yield await self._draw(request, encoding)


def app_over(workers: ScriptedWorkers) -> FastAPI:
    return build_asgi_app(service_over(workers), load_settings(ui=False))


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.code)
async def test_a_failure_before_the_first_byte_is_a_plain_answer(failure: Failure) -> None:
    async with client_of(app_over(FailsAtOnce([failure.error]))) as client:
        response = await client.post(URL, json=ASKED | {"stream": True})
        assert (response.status_code, response.json()["error"]["code"]) == (failure.status, failure.code)
        assert ("retry-after" in response.headers) is failure.retry_after
        assert await metric(client, f'zimage_requests_total{{outcome="{failure.code}"') == 1
        assert await metric(client, "zimage_requests_total") == 1


async def test_a_failure_after_it_is_an_event_that_openais_client_raises() -> None:
    app = app_over(ScriptedWorkers([GuardExhausted("every value was NaN", ())]))
    async with openai.AsyncOpenAI(
        api_key="none", base_url="http://localhost/v1", http_client=client_of(app), max_retries=0
    ) as openai_client:
        stream = await openai_client.images.generate(prompt="a red circle", stream=True)
        with pytest.raises(openai.APIError, match="every value was NaN") as raised:
            [_ async for _ in stream]
    assert (raised.value.code, raised.value.type) == ("guard_exhausted", "server_error")
    async with client_of(app) as client:
        assert await metric(client, 'zimage_requests_total{outcome="guard_exhausted"') == 1


async def test_the_event_of_a_failure_has_the_body_of_the_plain_answer() -> None:
    async with client_of(app_over(ScriptedWorkers([QueueFull("The queue is full.", {})]))) as client:
        response = await client.post(URL, json=ASKED | {"stream": True})
    (last,) = data_of(response.text)
    assert response.status_code == 200
    assert ErrorEvent.model_validate(last).error.code == "queue_full"
    assert comments_of(response.text) == ["step 1/2"]


class Previewing(ScriptedWorkers):
    """Previews after steps 1 and 2; `fates` are met after both."""

    async def _stream(
        self, request: GenerationRequest, encoding: ImageEncoding, previews: int, tell_first: bool = False
    ) -> AsyncIterator[StepProgress | Preview | WorkerReply]:
        for step in (1, 2):
            yield StepProgress(1, 1, step, 3)
            yield Preview(StepProgress(1, 1, step, 3), b"file %d" % step, 8, 8)
        yield await self._draw(request, encoding)


async def test_a_worker_that_dies_meanwhile_is_not_noticed_by_the_client() -> None:
    workers = Previewing([died(), None])
    async with client_of(app_over(workers)) as client:
        response = await client.post(URL, json=ASKED | {"stream": True, "partial_images": 2})
    *previews, last = data_of(response.text)
    assert [event["partial_image_index"] for event in previews] == [0, 1]
    assert last["type"] == "image_generation.completed" and len(workers.seen) == 2


async def test_a_long_wait_shows_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "OPEN_AFTER_SECONDS", 0.05)
    monkeypatch.setattr(streaming, "BEAT_SECONDS", 0.05)

    class Slow(FailsAtOnce):
        async def _draw(self, request: GenerationRequest, encoding: ImageEncoding) -> WorkerReply:
            await asyncio.sleep(0.5)
            return await super()._draw(request, encoding)

    async with client_of(app_over(Slow([RuntimeError("secret /srv/model")]))) as client:
        response = await client.post(URL, json=ASKED | {"stream": True})
    assert comments_of(response.text).count("waiting") >= 2
    (last,) = data_of(response.text)
    assert last["error"]["code"] == "internal_error" and "secret" not in response.text


class Caller:
    """A client on the app itself, which can hang up at any time."""

    def __init__(self, app: FastAPI, asked: dict[str, Any], leave_after: bytes) -> None:
        self._app = app
        self._body: bytes | None = json.dumps(asked).encode()
        self._leave_after = leave_after
        self._gone = asyncio.Event()
        self.received = b""
        self.left_at = 0.0

    async def call(self) -> None:
        headers = [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(self._body or b"")),
        ]
        scope = {"type": "http", "method": "POST", "path": URL, "headers": headers, "query_string": b""}
        await self._app(scope | {"http_version": "1.1", "scheme": "http"}, self._receive, self._send)

    async def _receive(self) -> MutableMapping[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        self.received += message.get("body", b"")
        if self._leave_after in self.received and not self._gone.is_set():
            self.left_at = time.monotonic()
            self._gone.set()


@pytest.mark.parametrize("leave_after", [b"step 1/100", b"step 7/100", b"image_generation.partial_image"])
async def test_a_client_that_goes_away_frees_the_worker_within_a_step(
    app: FastAPI, client: httpx.AsyncClient, leave_after: bytes
) -> None:
    asked = {"prompt": "a red circle", "num_inference_steps": 100, "stream": True, "partial_images": 3}
    caller = Caller(app, asked, leave_after)
    await asyncio.wait_for(caller.call(), 60)
    await until(client, lambda busy: busy == 0)
    assert b"step 90/100" not in caller.received
    assert await metric(client, 'zimage_requests_total{outcome="cancelled"') == 1
    assert await metric(client, "zimage_requests_total") == 1
    assert await metric(client, "zimage_requests_in_flight") == 0
    drawn = (await client.post(URL, json=ASKED)).json()["data"][0]
    assert drawn["seed"] == 5


async def until(client: httpx.AsyncClient, condition: Callable[[float], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition(await metric(client, "zimage_worker_busy")):
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.01)


async def test_a_connection_that_breaks_in_the_middle_ends_the_drawing(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    class Broken(Caller):
        async def _send(self, message: MutableMapping[str, Any]) -> None:
            if b"step 3/100" in message.get("body", b""):
                raise BrokenPipeError("the other side is gone")

    asked = {"prompt": "a red circle", "num_inference_steps": 100, "stream": True}
    await asyncio.wait_for(Broken(app, asked, b"never").call(), 60)
    await until(client, lambda busy: busy == 0)
    assert await metric(client, 'zimage_requests_total{outcome="cancelled"') == 1


async def test_the_document_tells_of_the_stream(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    content = document["paths"][URL]["post"]["responses"]["200"]["content"]
    assert content["application/json"]["schema"]
    told = content["text/event-stream"]
    partial, completed, error = (
        event["properties"]["data"]["contentSchema"] for event in told["schema"]["anyOf"]
    )
    assert [schema["title"] for schema in (partial, completed, error)] == [
        "PartialImageEvent",
        "CompletedEvent",
        "ErrorEvent",
    ]
    assert "$ref" not in json.dumps(told)
    assert PartialImageEvent.model_validate(partial["examples"][0])
    assert CompletedEvent.model_validate(completed["examples"][0])
    assert [event["type"] for event in data_of(told["example"])] == [
        "image_generation.partial_image",
        "image_generation.completed",
    ]


@pytest.mark.server
async def test_the_running_server_streams_to_openais_clients(server: str) -> None:
    asked: dict[str, Any] = {"prompt": "a red circle on a white background", "extra_body": {"seed": 7}}
    chosen = {"api_key": "none", "base_url": f"{server}/v1", "max_retries": 0, "timeout": 300}

    def with_threads() -> tuple[str, list[Any]]:
        with openai.OpenAI(**chosen) as client:
            plain = client.images.generate(**asked)
            assert plain.data is not None
            arrived = []
            for event in client.images.generate(**asked, stream=True, partial_images=3):
                arrived.append((time.monotonic(), event))
            return plain.data[0].b64_json or "", arrived

    plain, arrived = await asyncio.to_thread(with_threads)
    assert [event.type.rpartition(".")[2] for _, event in arrived] == ["partial_image"] * 3 + ["completed"]
    assert arrived[-1][1].b64_json == plain
    assert arrived[-1][0] - arrived[0][0] > 0.05, "everything came at once, so something held it back"
    async with openai.AsyncOpenAI(**chosen) as client:
        events = [event async for event in await client.images.generate(**asked, stream=True)]
    assert [event.b64_json for event in events] == [plain]


@pytest.mark.server
def test_a_stream_that_is_closed_frees_the_running_servers_worker(server: str) -> None:
    endless = {"prompt": "a red circle", "num_inference_steps": 100, "guidance_scale": 2, "stream": True}

    def now(name: str) -> float:
        lines = httpx.get(f"{server}/metrics", timeout=60).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    cancelled = now('zimage_requests_total{outcome="cancelled"')
    steps = now("zimage_step_seconds_count")
    with httpx.stream("POST", f"{server}{URL}", json=endless, timeout=300) as response:
        for line in response.iter_lines():
            if line.startswith(": step 3/"):
                break
    left_at = time.monotonic()
    while now('zimage_requests_total{outcome="cancelled"') == cancelled or now("zimage_worker_busy"):
        assert time.monotonic() - left_at < 10, "the worker still draws for nobody"
        time.sleep(0.02)
    # The first step of a picture has no step before it to count from.
    assert now("zimage_step_seconds_count") - steps + 1 <= 3 + 2, "it went on for more than a step"
