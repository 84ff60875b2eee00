"""The enhancer's endpoint: a server of our own that answers well, wrongly, slowly, or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from serve_app.prompt_endpoint import (
    FAILURES_TO_REST,
    MOST_BYTES,
    REST_SECONDS,
    CircuitBreaker,
    PromptEndpoint,
)
from zimage_engine.types import NotWritten, RewriteBudget, Written

BUDGET = RewriteBudget(seconds=10, tokens=64)
CHAT = [{"role": "user", "content": "一只猫"}]
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"


def event(piece: str | None = None, reason: str | None = None) -> bytes:
    delta = {} if piece is None else {"content": piece}
    return b"data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": reason}]}).encode() + b"\n\n"


GOOD = STREAM + event("一只") + b": a comment\n\n" + event("猫") + event(None, "stop") + b"data: [DONE]\n\n"


class Endpoint:
    """What it was asked, and what it answers: bytes, after which it closes the connection, or never."""

    def __init__(self, answer: bytes, then_waits: bool = False) -> None:
        self.answer = answer
        self.then_waits = then_waits
        self.asked: list[tuple[str, dict[str, str], dict[str, object]]] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers["content-length"]))
        self.asked.append((first, headers, json.loads(body)))
        try:
            writer.write(self.answer)
            await writer.drain()
            if self.then_waits:
                await reader.read()
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def standing(endpoint: Endpoint) -> AsyncIterator[Endpoint]:
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0)
    endpoint.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    async with server:
        yield endpoint
        server.close()


async def test_what_it_writes_is_told_as_it_comes() -> None:
    async with standing(Endpoint(GOOD)) as endpoint:
        pieces: list[str] = []
        answer = await PromptEndpoint(endpoint.url + "/", "some-model", "secret").write(
            CHAT, BUDGET, pieces.append
        )
    assert isinstance(answer, Written)
    assert (answer.text, answer.ended, pieces) == ("一只猫", "done", ["一只", "猫"])
    ((first, headers, body),) = endpoint.asked
    assert first == "POST /v1/chat/completions HTTP/1.1"
    assert headers["authorization"] == "Bearer secret" and headers["accept-encoding"] == "identity"
    assert body == {
        "model": "some-model",
        "messages": CHAT,
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
    }


@pytest.mark.parametrize(
    ("answer", "text", "ended"),
    [
        (STREAM + event("a cat", "length") + b"data: [DONE]\n\n", "a cat", "tokens"),
        (STREAM + b'data: {"choices": []}\n\n' + event("a", "stop"), "a", "done"),
        (
            JSON + b'{"choices": [{"message": {"content": "a cat"}, "finish_reason": "stop"}]}',
            "a cat",
            "done",
        ),
        (
            JSON + b'{"choices": [{"message": {"content": "a cat"}, "finish_reason": "length"}]}',
            "a cat",
            "tokens",
        ),
    ],
)
async def test_the_ways_in_which_it_may_answer(answer: bytes, text: str, ended: str) -> None:
    async with standing(Endpoint(answer)) as endpoint:
        written = await PromptEndpoint(endpoint.url, "m").write(CHAT, BUDGET)
    assert isinstance(written, Written) and (written.text, written.ended) == (text, ended)
    assert "authorization" not in endpoint.asked[0][1]


@pytest.mark.parametrize(
    ("answer", "because"),
    [
        (b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", "status 500"),
        (b"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", "status 307"),
        (STREAM + event("a cat"), "broke off"),
        (STREAM + b"data: {\n\n", "something else"),
        (STREAM + b'data: {"choices": 5}\n\n', "something else"),
        (JSON + b"<html>", "something else"),
        (JSON + b'{"choices": [{"message": {"content": ["a"]}}]}', "something else"),
        (JSON + b'{"error": {"message": "secret things"}}', "something else"),
        (JSON + b"[" * 100_000, "something else"),
        (JSON.replace(b"Conn", b"Content-Encoding: gzip\r\nConn") + b"x", "compressed"),
        (JSON + b" " * (MOST_BYTES + 1), "more than"),
        (b"nonsense\r\n\r\n", "could not be reached"),
        (b"", "could not be reached"),
    ],
)
async def test_what_is_no_answer_is_told_without_what_it_said(answer: bytes, because: str) -> None:
    async with standing(Endpoint(answer)) as endpoint:
        answer_told = await PromptEndpoint(endpoint.url, "m").write(CHAT, BUDGET)
    assert isinstance(answer_told, NotWritten) and answer_told.outcome == "failed"
    assert because in answer_told.because and "secret" not in answer_told.because
    assert len(endpoint.asked) == 1


async def test_a_slow_one_is_given_up_in_time() -> None:
    async with standing(Endpoint(STREAM + event("a"), then_waits=True)) as endpoint:
        answer = await PromptEndpoint(endpoint.url, "m").write(CHAT, RewriteBudget(seconds=0.2))
    assert isinstance(answer, NotWritten) and answer.outcome == "timeout"
    assert answer.seconds < 5


async def test_a_dead_one_is_left_alone_for_a_while_and_then_tried_once() -> None:
    now = 0.0
    endpoint = PromptEndpoint("http://127.0.0.1:1/v1", "m", breaker=CircuitBreaker(lambda: now))
    for _ in range(FAILURES_TO_REST):
        answer = await endpoint.write(CHAT, BUDGET)
        assert isinstance(answer, NotWritten) and answer.outcome == "failed"
    resting = await endpoint.write(CHAT, BUDGET)
    assert isinstance(resting, NotWritten) and (resting.outcome, resting.seconds) == ("unavailable", 0.0)
    now = REST_SECONDS
    answer = await endpoint.write(CHAT, BUDGET)
    assert isinstance(answer, NotWritten) and answer.outcome == "failed"
    answer = await endpoint.write(CHAT, BUDGET)
    assert isinstance(answer, NotWritten) and answer.outcome == "unavailable"


@pytest.mark.parametrize(
    ("steps", "allowed"),
    [
        ("F F", True),
        ("F F F", False),
        ("F F W F F", True),
        ("F F F wait", True),
        ("F F F wait ask", False),
        ("F F F wait W", True),
        ("F F F wait F", False),
        ("F F F wait gone", True),
        ("gone gone gone gone", True),
    ],
)
def test_the_circuit_breaker(steps: str, allowed: bool) -> None:
    now = 0.0
    breaker = CircuitBreaker(lambda: now)
    is_asked = False

    def ask(well: bool | None) -> None:
        assert is_asked or breaker.may_try()
        breaker.ended(well)

    ways: dict[str, Callable[[], object]] = {
        "F": lambda: ask(False),
        "W": lambda: ask(True),
        "gone": lambda: ask(None),
        "ask": breaker.may_try,
    }
    for step in steps.split():
        if step == "wait":
            now += REST_SECONDS
        else:
            ways[step]()
    assert breaker.may_try() == allowed


async def test_who_goes_away_ends_it_and_counts_for_nothing() -> None:
    async with standing(Endpoint(STREAM, then_waits=True)) as endpoint:
        asked = PromptEndpoint(endpoint.url, "m")
        for _ in range(FAILURES_TO_REST + 1):
            task = asyncio.create_task(asked.write(CHAT, BUDGET))
            while not endpoint.asked:
                await asyncio.sleep(0.01)
            endpoint.asked.clear()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
