"""Clients of all sorts: plain, streaming, those that go away, and those that ask wrongly; two libraries.

Each request gets a line in the ledger, and each answer is looked at: whose it is, and its pixels.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx
import openai

from tests.chaos.serving.ledger import Entry, Ledger
from tests.chaos.serving.pictures import Drawing, digest_of_file

URL = "/v1/images/generations"
#: Who has no answer by then has none.
PATIENCE_SECONDS = 100.0
#: What a caller that tries again does: how often, and after what pause.
ATTEMPTS = 60
PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class BadInput:
    """What is sent, and the status that must come."""

    status: int
    body: bytes
    headers: Mapping[str, str]


def _bad(status: int, fields: object, **headers: str) -> BadInput:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return BadInput(status, body, {"content-type": "application/json", **headers})


BAD_INPUTS = (
    _bad(400, {"prompt": "a circle", "size": "banana"}),
    _bad(400, {"prompt": "a circle", "size": "100x100"}),
    _bad(400, {"prompt": "a circle", "n": 0}),
    _bad(400, {"prompt": "a circle", "stream": True, "n": 2}),
    _bad(400, {"prompt": "a circle", "num_inference_steps": 1000}),
    _bad(400, {"size": "64x64"}),
    _bad(400, b"{"),
    _bad(400, b"\xff\xfe"),
    _bad(401, {"prompt": "a circle"}, authorization="Bearer zit_wrong"),
    _bad(404, {"prompt": "a circle", "model": "dall-e-3"}),
    _bad(413, b" " * (1024 * 1024 + 1)),
    _bad(415, b"prompt=a circle", **{"content-type": "text/plain"}),
)


class Caller:
    """One key's clients on one server; an async context."""

    def __init__(self, base_url: str, name: str, key: str, ledger: Ledger, chance: random.Random) -> None:
        self.name = name
        self.ledger = ledger
        self._chance = chance
        #: About how long an answer takes; who goes away does so within it.
        self._usual_seconds = 0.5
        self.http = httpx.AsyncClient(
            base_url=base_url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=PATIENCE_SECONDS,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
        )
        self._openai = openai.AsyncOpenAI(
            api_key=key or "none", base_url=f"{base_url}/v1", http_client=self.http, max_retries=0
        )

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.aclose()

    async def ask(self, kind: str, drawing: Drawing, again: Entry | None = None) -> Entry:
        """One request of this kind, to its end."""
        entry = self.ledger.sent(self.name, kind, None if kind == BAD else drawing, again)
        asking = asyncio.ensure_future(KINDS[kind].ask(self, entry, drawing))
        if KINDS[kind].goes_away:
            await asyncio.wait({asking}, timeout=self._chance.uniform(0, 1.3 * self._usual_seconds))
            if not asking.done():
                asking.cancel()
                await asyncio.wait({asking})
                if entry.ending is None:
                    entry.end("cut off")
                return entry
        await self._kept(entry, asking)
        if entry.ending == "answered" and entry.drawing is not None:
            self._usual_seconds += 0.1 * (entry.seconds - self._usual_seconds)
        return entry

    async def ask_until_answered(self, kind: str, drawing: Drawing) -> None:
        """As a program does that wants its picture: after a failure of the server it asks again."""
        entry = await self.ask(kind, drawing)
        for _ in range(ATTEMPTS):
            if entry.is_final or entry.kind == BAD:
                return
            await asyncio.sleep(self._chance.uniform(0.5, 1.5) * PAUSE_SECONDS)
            entry = await self.ask(kind, drawing, entry)

    async def _kept(self, entry: Entry, asking: Awaitable[None]) -> None:
        """How the library tells what came, as the ledger's endings."""
        try:
            await asyncio.wait_for(asking, PATIENCE_SECONDS)
        except openai.APIStatusError as error:
            entry.end("failed", f"{error.status_code} {error.code}")
        except openai.APIConnectionError as error:
            _end_without_answer(entry, error.__cause__ or error)
        except openai.APIError as error:
            entry.end("failed", f"event {error.code}")
        except (httpx.TransportError, TimeoutError) as error:
            _end_without_answer(entry, error)

    # --- kinds -------------------------------------------------------------------------------------------

    async def plain(self, entry: Entry, drawing: Drawing) -> None:
        response = await self.http.post(URL, json=drawing.fields(), headers={"x-request-id": entry.id})
        if response.status_code != 200:
            entry.end("failed", told_by(response.status_code, response.content))
            return
        _check_id(entry, response.headers)
        _check_answer(entry, drawing, response.json()["data"])
        entry.end("answered")

    async def plain_by_openai(self, entry: Entry, drawing: Drawing) -> None:
        raw = await self._openai.images.with_raw_response.generate(
            **_openai_fields(drawing), extra_headers={"x-request-id": entry.id}
        )
        _check_id(entry, raw.headers)
        _check_answer(entry, drawing, [each.model_dump() for each in raw.parse().data or []])
        entry.end("answered")

    async def stream(self, entry: Entry, drawing: Drawing) -> None:
        previews = self._chance.randint(0, 3)
        fields = drawing.fields() | {"stream": True, "partial_images": previews}
        headers = {"x-request-id": entry.id}
        async with self.http.stream("POST", URL, json=fields, headers=headers) as response:
            if response.status_code != 200:
                entry.end("failed", told_by(response.status_code, await response.aread()))
                return
            _check_id(entry, response.headers)
            events = (
                json.loads(line[6:]) async for line in response.aiter_lines() if line.startswith("data: ")
            )
            await _read_events(entry, drawing, previews, events)

    async def stream_by_openai(self, entry: Entry, drawing: Drawing) -> None:
        previews = self._chance.randint(0, 3)
        stream = await self._openai.images.generate(
            **_openai_fields(drawing),
            stream=True,
            partial_images=previews,
            extra_headers={"x-request-id": entry.id},
        )
        async with stream:
            _check_id(entry, stream.response.headers)
            events = (each.model_dump() async for each in stream)
            await _read_events(entry, drawing, previews, events)

    async def bad_input(self, entry: Entry, drawing: Drawing) -> None:
        bad = self._chance.choice(BAD_INPUTS)
        headers = {"x-request-id": entry.id, **bad.headers}
        response = await self.http.post(URL, content=bad.body, headers=headers)
        if response.status_code not in (bad.status, 502, 503):
            entry.wrong.append(
                f"bad input got {response.status_code}, expected {bad.status}: {bad.body[:80]!r}"
            )
        entry.end("failed", told_by(response.status_code, response.content))


@dataclass(frozen=True)
class Kind:
    """One sort of request, and how many of a hundred are of it."""

    ask: Callable[[Caller, Entry, Drawing], Awaitable[None]]
    share: int
    goes_away: bool = False


BAD = "bad input"
KINDS: Mapping[str, Kind] = {
    "plain": Kind(Caller.plain, 33),
    "plain, openai": Kind(Caller.plain_by_openai, 12),
    "stream": Kind(Caller.stream, 18),
    "stream, openai": Kind(Caller.stream_by_openai, 12),
    "plain, goes away": Kind(Caller.plain, 8, goes_away=True),
    "stream, goes away": Kind(Caller.stream, 7, goes_away=True),
    BAD: Kind(Caller.bad_input, 10),
}


def random_kind(chance: random.Random) -> str:
    return chance.choices(list(KINDS), [kind.share for kind in KINDS.values()])[0]


def told_by(status: int, body: bytes) -> str:
    """The status and the code of an error's body; a proxy's own answer has no code."""
    try:
        return f"{status} {json.loads(body)['error']['code']}"
    except (ValueError, KeyError, TypeError):
        return f"{status} {body[:60].decode(errors='replace')!r}"


def _end_without_answer(entry: Entry, error: BaseException) -> None:
    name = type(error).__name__
    if isinstance(error, httpx.ConnectError):
        entry.end("failed", "connection refused")
    elif isinstance(error, (TimeoutError, httpx.TimeoutException)):
        entry.end("lost", f"no answer within {PATIENCE_SECONDS:g} s ({name})")
    else:
        entry.end("broken", name)


def _openai_fields(drawing: Drawing) -> dict[str, Any]:
    ours = drawing.fields()
    return {"prompt": ours.pop("prompt"), "size": ours.pop("size"), "extra_body": ours}


def _check_id(entry: Entry, headers: Mapping[str, str]) -> None:
    if headers.get("x-request-id") != entry.id:
        entry.wrong.append(f"the answer is that of {headers.get('x-request-id')}, expected {entry.id}")


async def _read_events(
    entry: Entry, drawing: Drawing, previews: int, events: AsyncIterator[dict[str, Any]]
) -> None:
    indices: list[int] = []
    async for event in events:
        if event["type"] == "image_generation.partial_image":
            indices.append(event["partial_image_index"])
        elif event["type"] == "image_generation.completed":
            _check_answer(entry, drawing, [event])
            entry.end("answered")
        else:
            entry.end("failed", f"event {event['error']['code']}")
    if indices != list(range(len(indices))) or len(indices) > previews:
        entry.wrong.append(f"previews {indices}, at most {previews} were asked for")
    if entry.ending is None:
        entry.end("broken", "the stream ended without a last event")


def _check_answer(entry: Entry, drawing: Drawing, pictures: list[dict[str, Any]]) -> None:
    if len(pictures) != 1:
        entry.wrong.append(f"{len(pictures)} pictures instead of one")
        return
    (picture,) = pictures
    for name, wanted in (("seed", drawing.seed), ("steps", drawing.steps), ("guidance", drawing.guidance)):
        if picture[name] != wanted:
            entry.wrong.append(f"{name} is {picture[name]}, asked for {wanted}")
    if digest_of_file(picture["b64_json"]) != drawing.digest:
        entry.wrong.append(f"other pixels than a fresh engine draws for {drawing}")
