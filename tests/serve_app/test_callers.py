"""Each key has its own part: what its line in the file says holds for its requests, also when it changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.gates import keys_of
from serve_app.ingress import build_asgi_app
from serve_app.keys import DRAW, RECHECK_SECONDS, Allowance, add_key, change_key
from serve_app.metrics import ServerMetrics
from serve_app.service import ImageService
from serve_app.settings import load_settings
from tests.serve_app.conftest import client_of
from tests.serve_app.test_keys import bearer
from tests.serve_app.test_service import IN_HAND, URL, HeldWorkers, ScriptedWorkers, ask

ASKED = {"prompt": "a red circle"}


async def test_a_key_has_its_own_limits_and_others_those_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    ann = bearer(add_key(file, "ann", [DRAW], Allowance(requests_a_minute=1)))
    bob = bearer(add_key(file, "bob", [DRAW]))
    settings = load_settings(ui=False, api_keys_file=file, requests_a_minute=3)
    keys = keys_of(settings)
    service = ImageService(ScriptedWorkers(), ServerMetrics("test"), settings, keys=keys)
    async with client_of(build_asgi_app(service, settings, keys=keys)) as client:
        first, second = [await client.post(URL, json=ASKED, headers=ann) for _ in range(2)]
        assert (first.status_code, first.headers["x-ratelimit-limit-requests"]) == (200, "1")
        assert (second.status_code, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        answer = await client.post(URL, json=ASKED, headers=bob)
        assert (answer.status_code, answer.headers["x-ratelimit-limit-requests"]) == (200, "3")
        change_key(file, "ann", Allowance(requests_a_minute=0))
        later = time.monotonic() + RECHECK_SECONDS + 0.1
        monkeypatch.setattr("serve_app.keys.time.monotonic", lambda: later)
        answer = await client.post(URL, json=ASKED, headers=ann)
        assert answer.status_code == 200 and "x-ratelimit-limit-requests" not in answer.headers


async def test_a_keys_priority_is_its_share_of_the_workers(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    add_key(file, "ann", [DRAW], Allowance("low"))
    add_key(file, "bob", [DRAW])
    settings = load_settings(ui=False, api_keys_file=file)
    workers = HeldWorkers(alive=1)
    service = ImageService(workers, ServerMetrics("test"), settings, keys=keys_of(settings))
    asked = [await ask(service, "127.0.0.1", 99) for _ in range(IN_HAND)]
    drawn: list[str] = []

    def noted(name: str) -> Callable[[object], None]:
        return lambda _: drawn.append(name)

    for name in ("ann", "bob"):
        for seed in range(4):
            asked.append(await ask(service, name, seed))
            asked[-1].add_done_callback(noted(name))
    await workers.finish(len(asked))
    await asyncio.gather(*asked)
    assert drawn == ["ann", *["bob"] * 4, *["ann"] * 3]


async def test_a_plain_answer_tells_what_it_waited_for_its_turn() -> None:
    workers = HeldWorkers(alive=1)
    settings = load_settings(ui=False)
    service = ImageService(workers, ServerMetrics("test"), settings)
    asked = [await ask(service, "ann", seed) for seed in range(IN_HAND)]
    async with client_of(build_asgi_app(service, settings)) as client:
        plain = asyncio.create_task(client.post(URL, json=ASKED))
        await asyncio.sleep(0.3)
        await workers.finish(IN_HAND + 1)
        assert 0.1 <= float((await plain).headers["x-queue-wait"]) <= 30
        at_once = asyncio.create_task(client.post(URL, json=ASKED))
        await asyncio.sleep(0.1)
        await workers.finish(1)
        assert float((await at_once).headers["x-queue-wait"]) < 0.05
    await asyncio.gather(*asked)


async def test_the_document_tells_the_headers_that_come() -> None:
    settings = load_settings(ui=False, requests_a_minute=1)
    service = ImageService(ScriptedWorkers(), ServerMetrics("test"), settings)
    app = build_asgi_app(service, settings)
    answers = app.openapi()["paths"][URL]["post"]["responses"]
    async with client_of(app) as client:
        for status in ("200", "429"):
            answer = await client.post(URL, json=ASKED)
            assert str(answer.status_code) == status
            ours = {name for name in answer.headers if name.startswith(("x-", "retry-"))}
            assert ours and ours <= set(answers[status]["headers"])
