"""Asks a language model behind an OpenAI-compatible endpoint, within bounds, and not while it is down.

Knows no prompts and judges nothing: what is asked and what the answer is worth is the caller's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence

import httpx

from zimage_engine.types import NotWritten, RewriteBudget, Written

logger = logging.getLogger(__name__)

#: Called with each piece of text as it comes.
OnText = Callable[[str], None]

#: A prompt has a few thousand; what is longer is no answer to what was asked.
MOST_BYTES = 1024 * 1024
#: So many failures in a row, and it is left alone for so long.
FAILURES_TO_REST = 3
REST_SECONDS = 30.0


class CircuitBreaker:
    """Tells whether to try: after some failures in a row not for a while, and then one at a time.

    For one thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._rests_until = float("-inf")
        self._is_tried = False

    def may_try(self) -> bool:
        """Whether to ask now; who is told so tells how it went by `ended`."""
        if self._failures < FAILURES_TO_REST:
            return True
        if self._is_tried or self._clock() < self._rests_until:
            return False
        self._is_tried = True
        return True

    def ended(self, well: bool | None) -> None:
        """How a try went; None where nobody waited for its end."""
        self._is_tried = False
        if well is None:
            return
        self._failures = 0 if well else self._failures + 1
        if self._failures >= FAILURES_TO_REST:
            self._rests_until = self._clock() + REST_SECONDS


class _Refused(Exception):
    """The endpoint answered with something else than text; `because` is a clause."""

    def __init__(self, because: str) -> None:
        super().__init__(because)
        self.because = because


class PromptEndpoint:
    """A model of an OpenAI-compatible endpoint. For one event loop."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        breaker: CircuitBreaker | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`url` is the API's base, such as http://127.0.0.1:8000/v1. `transport` None: the network."""
        base = url.rstrip("/").removesuffix("/chat/completions")
        self._url = f"{base}/chat/completions"
        self._model = model
        # Compressed answers could be longer than they look.
        self._headers = {"Accept-Encoding": "identity", "Accept": "text/event-stream"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._breaker = breaker or CircuitBreaker()
        self._transport = transport

    async def write(
        self, messages: Sequence[dict[str, str]], budget: RewriteBudget, on_text: OnText | None = None
    ) -> Written | NotWritten:
        """The model's answer to a chat, within the budget's time. Raises nothing but cancellation."""
        if not self._breaker.may_try():
            return NotWritten(
                "unavailable", f"it failed lately, and is tried again after {REST_SECONDS:.0f} seconds"
            )
        began = time.monotonic()
        well: bool | None = None
        try:
            async with asyncio.timeout(budget.seconds):
                text, is_cut = await self._asked(messages, budget, on_text or (lambda _: None))
            well = True
            return Written(text, "tokens" if is_cut else "done", time.monotonic() - began)
        except TimeoutError:
            well = False
            because = f"it was not done within {budget.seconds:g} seconds"
            return NotWritten("timeout", because, time.monotonic() - began)
        except (_Refused, httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            well = False
            logger.warning("the enhancer's endpoint: %s: %s", type(error).__name__, error)
            because = error.because if isinstance(error, _Refused) else "it could not be reached"
            return NotWritten("failed", because, time.monotonic() - began)
        finally:
            self._breaker.ended(well)

    async def _asked(
        self, messages: Sequence[dict[str, str]], budget: RewriteBudget, on_text: OnText
    ) -> tuple[str, bool]:
        """The text, and whether it ends for want of tokens."""
        payload = {
            "model": self._model,
            "messages": list(messages),
            "max_tokens": budget.tokens,
            "temperature": 0,
            "stream": True,
        }
        pieces: list[str] = []
        ended = ""
        # A redirect could carry the key elsewhere.
        client = httpx.AsyncClient(transport=self._transport, timeout=None, follow_redirects=False)
        async with client, client.stream("POST", self._url, json=payload, headers=self._headers) as answer:
            if answer.status_code != 200:
                raise _Refused(f"it answered with status {answer.status_code}")
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise _Refused("it answered with something compressed, which was not asked for")
            is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
            async for event in _events(answer) if is_stream else _whole(answer):
                piece, reason = _read(event)
                ended = reason or ended
                if piece:
                    pieces.append(piece)
                    on_text(piece)
        if is_stream and not ended:
            raise _Refused("its answer broke off")
        return "".join(pieces), ended == "length"


async def _events(answer: httpx.Response) -> AsyncIterator[str]:
    """The data of each server-sent event, up to [DONE]."""
    rest = b""
    async for chunk in _bounded(answer):
        rest += chunk
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield data.decode("utf-8")


async def _whole(answer: httpx.Response) -> AsyncIterator[str]:
    """An answer of a server that does not stream."""
    yield b"".join([chunk async for chunk in _bounded(answer)]).decode("utf-8")


async def _bounded(answer: httpx.Response) -> AsyncIterator[bytes]:
    taken = 0
    async for chunk in answer.aiter_raw():
        taken += len(chunk)
        if taken > MOST_BYTES:
            raise _Refused(f"it answered with more than {MOST_BYTES} bytes")
        yield chunk


def _read(event: str) -> tuple[str, str]:
    """The text of one chunk or whole answer, and why it ended there, if it did."""
    try:
        choices = json.loads(event)["choices"]
        if not choices:  # a stream's account of tokens
            return "", ""
        choice = choices[0]
        said = choice.get("delta") or choice.get("message") or {}
        piece, reason = said.get("content") or "", choice.get("finish_reason") or ""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _Refused("it answered with something else than a chat completion") from None
    if not isinstance(piece, str) or not isinstance(reason, str):
        raise _Refused("it answered with something else than a chat completion")
    return piece, reason
