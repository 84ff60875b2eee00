"""What goes on when something else fails: clocks, databases, places for results, callers' limits, the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve
from ray.serve.exceptions import RequestCancelledError

from serve_app.draining import Draining
from serve_app.ingress import build_asgi_app
from serve_app.jobs import courier as courier_module
from serve_app.jobs import desk as desk_module
from serve_app.jobs import runner as runner_module
from serve_app.jobs.courier import Courier
from serve_app.jobs.runner import JobRunner
from serve_app.jobs.store import Job, JobStore, Limits, NewJob
from serve_app.jobs.tables import open_database
from serve_app.metrics import ServerMetrics
from serve_app.results import ResultNotKept, ResultStore
from serve_app.service import ImageService
from serve_app.settings import Settings
from tests.serve_app.conftest import client_of
from tests.serve_app.jobs.conftest import SMALL, file_of
from tests.serve_app.jobs.test_runner import until
from tests.serve_app.jobs.test_webhook import Receiver, finished, receiver
from tests.serve_app.jobs.test_webhook import until as until_so

__all__ = ["receiver"]

LONG: dict[str, Any] = {"num_inference_steps": 100, "n": 10}
URL = "/v1/images/generations"


class Clock:
    """Real time, until it jumps."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


async def accepted(store: JobStore, service: ImageService, caller: str = "ann", **more: object) -> Job:
    model = (await service.description_when_ready()).id
    body = json.dumps(SMALL | {"seed": 5} | more)
    return store.accept(NewJob("", caller, model, body, 1.0), Limits(10, 10))[0]


@contextlib.asynccontextmanager
async def drawing(
    service: ImageService, store: JobStore, folder: Path, **more: Any
) -> AsyncIterator[JobRunner]:
    results = ResultStore(folder / "results", 3600, 2**30)
    runner = JobRunner(service, store, results, asyncio.to_thread, "one", lambda: None, **more)
    running = asyncio.create_task(runner.run())
    try:
        yield runner
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_a_clock_that_jumps_takes_no_job_from_the_one_that_draws_it(
    jobs_service: ImageService, tmp_path: Path
) -> None:
    clock = Clock()
    store = JobStore(open_database(file_of(tmp_path)), clock)
    job = await accepted(store, jobs_service, **LONG)
    async with drawing(jobs_service, store, tmp_path, clock=clock):
        await until(store, job.id, ("running",))
        clock.ahead = 3600.0
        await asyncio.sleep(2.5)
        now = store.get(job.id)
        assert now is not None and (now.status, now.attempt, now.deaths) == ("running", 1, 0)
        assert store.claim("another", job.model, 1, {}) == [], "its lease was renewed"
    store.close()


async def test_a_job_that_comes_back_to_who_still_draws_it_is_drawn_once_at_a_time(
    jobs_service: ImageService, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "BEAT_SECONDS", 60.0)
    job = await accepted(store, jobs_service, **LONG)
    async with drawing(jobs_service, store, tmp_path):
        await until(store, job.id, ("running",))
        await until_so(lambda: jobs_service._queue.admitted == 1)
        assert store.let_go(job.id, 1)
        await until_so(lambda: (store.get(job.id) or job).attempt == 2)
        await asyncio.sleep(1.0)
        assert jobs_service._queue.admitted + jobs_service._queue.waiting == 1
        now = store.get(job.id)
        assert now is not None and now.status == "running", now


async def test_who_has_had_its_part_holds_nobody_up_and_is_left_alone(
    worker_handle: serve.handle.DeploymentHandle,
    jobs_settings: Settings,
    store: JobStore,
    tmp_path: Path,
) -> None:
    settings = jobs_settings.model_copy(update={"requests_a_minute": 1})
    service = ImageService(worker_handle, ServerMetrics("test"), settings)
    anns = [await accepted(store, service, "ann") for _ in range(4)]
    async with drawing(service, store, tmp_path):
        await until(store, anns[0].id, ("done",))
        await asyncio.sleep(2.0)
        bens = await accepted(store, service, "ben")
        await until(store, bens.id, ("done",))
        left = [store.get(job.id) for job in anns[1:]]
    assert [job.status for job in left if job is not None] == ["queued"] * 3
    # Once for each ticket that was free, and then not for a minute.
    assert sum(job.attempt for job in left if job is not None) <= 2
    for job in anns[1:]:
        assert [event.type for event in store.events_after(job.id, 0)] == ["job.queued"]


class SlowStore(JobStore):
    """Has claimed a while before it tells."""

    def claim(self, *arguments: Any, **more: Any) -> list[Job]:
        claimed = super().claim(*arguments, **more)
        if claimed:
            time.sleep(1.0)
        return claimed


async def test_what_is_claimed_in_the_moment_of_the_end_goes_back(
    jobs_service: ImageService, store: JobStore, tmp_path: Path
) -> None:
    job = await accepted(store, jobs_service)
    slow = SlowStore(open_database(file_of(tmp_path)))
    async with drawing(jobs_service, slow, tmp_path):
        await until(store, job.id, ("running",))
    slow.close()
    now = store.get(job.id)
    assert now is not None and (now.status, now.deaths) == ("queued", 0)


async def test_a_drawing_that_serve_gives_up_is_drawn_again(
    jobs_service: ImageService, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "AGAIN_SECONDS", 0.1)
    generate = jobs_service.generate
    failures = [RequestCancelledError("given up")]

    async def generated(*arguments: Any, **more: Any) -> Any:
        if failures:
            raise failures.pop()
        return await generate(*arguments, **more)

    monkeypatch.setattr(jobs_service, "generate", generated)
    job = await accepted(store, jobs_service)
    async with drawing(jobs_service, store, tmp_path):
        async with asyncio.timeout(15):  # the lease alone is longer
            done = await until(store, job.id, ("done",))
    assert (done.attempt, done.deaths) == (2, 0)


async def test_a_failure_of_any_kind_does_not_end_the_drawing_of_jobs(
    jobs_service: ImageService, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "AGAIN_SECONDS", 0.1)
    job = await accepted(store, jobs_service)
    long = await accepted(store, jobs_service, **LONG)
    failures: list[Exception] = [RuntimeError("no loop is to end of it"), ValueError("nor of this")]
    description, renew = jobs_service.description, store.renew

    async def described() -> Any:
        if failures:
            raise failures.pop()
        return await description()

    renewals: list[int] = []

    def renewed(*arguments: Any) -> Any:
        renewals.append(1)
        if len(renewals) == 1:
            raise RuntimeError("once")
        return renew(*arguments)

    monkeypatch.setattr(jobs_service, "description", described)
    monkeypatch.setattr(store, "renew", renewed)
    async with drawing(jobs_service, store, tmp_path):
        await until(store, job.id, ("done",))
        await until_so(lambda: (store.get(long.id) or long).step > 0)
    assert not failures and len(renewals) > 1


async def test_a_failure_of_any_kind_does_not_end_the_sending_of_webhooks(
    store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier_module, "AGAIN_SECONDS", 0.1)
    finished(store, f"http://127.0.0.1:{receiver.port}")
    failures: list[Exception] = [RuntimeError("one for each that sends")] * courier_module.AT_ONCE
    due = store.due_delivery

    def due_delivery() -> Any:
        if failures:
            raise failures.pop()
        return due()

    monkeypatch.setattr(store, "due_delivery", due_delivery)
    running = asyncio.create_task(Courier(store, asyncio.to_thread, private_allowed=True).run())
    await until_so(lambda: receiver.came)
    running.cancel()
    await asyncio.wait([running])


async def test_a_picture_that_cannot_be_kept_is_not_drawn_for_ever(
    jobs_service: ImageService, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "KEEP_AGAIN_SECONDS", (0.0, 0.0))
    tries: list[str] = []

    async def put(results: ResultStore, data: bytes, media_type: str) -> str:
        tries.append(media_type)
        raise ResultNotKept("no room")

    monkeypatch.setattr(ResultStore, "put", put)
    job = await accepted(store, jobs_service)
    async with drawing(jobs_service, store, tmp_path):
        failed = await until(store, job.id, ("done", "failed"))
    assert failed.error is not None and json.loads(failed.error)["code"] == "result_not_kept"
    assert (failed.attempt, len(tries)) == (1, 3)


async def test_jobs_are_drawn_as_soon_as_their_database_can_be_opened(
    jobs_service: ImageService, jobs_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk_module, "REOPEN_SECONDS", 0.2)
    elsewhere, place = tmp_path / "elsewhere", tmp_path / "data"
    store = JobStore(open_database(file_of(elsewhere)))
    job = await accepted(store, jobs_service)
    store.close()
    place.touch()
    app = build_asgi_app(jobs_service, jobs_settings.model_copy(update={"data_dir": place}))
    async with app.router.lifespan_context(app):
        place.unlink()
        elsewhere.rename(place)
        store = JobStore(open_database(file_of(place)))
        await until(store, job.id, ("done",))
        store.close()


async def test_old_jobs_go_after_a_failure_of_any_kind(
    jobs_service: ImageService, jobs_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk_module, "FORGET_SECONDS", 0.05)
    calls: list[float] = []

    def forget(store: JobStore, keep_seconds: float) -> list[str]:
        calls.append(keep_seconds)
        raise RuntimeError("no loop is to end of it")

    monkeypatch.setattr(JobStore, "forget", forget)
    app = build_asgi_app(jobs_service, jobs_settings)
    async with app.router.lifespan_context(app):
        await until_so(lambda: len(calls) > 1)


async def test_a_server_that_ends_begins_with_no_job_and_loses_none(
    worker_handle: serve.handle.DeploymentHandle, jobs_settings: Settings, store: JobStore
) -> None:
    draining = Draining(lambda: 0)
    settings = jobs_settings.model_copy(update={"max_batch_size": 1})
    jobs_service = ImageService(worker_handle, ServerMetrics("test"), settings)
    app = build_asgi_app(jobs_service, settings, draining=draining)
    async with app.router.lifespan_context(app), client_of(app) as client:
        running = await accepted(store, jobs_service, **LONG)
        await until(store, running.id, ("running",))
        fill = [await accepted(store, jobs_service, **LONG) for _ in range(3)]
        # Only then is there no room for one of another caller, whose turn would be next.
        await until_so(lambda: store.census()[0] == {"running": 3, "queued": 1})
        asked = asyncio.create_task(client.post(URL, json=SMALL, headers={"Idempotency-Key": "one"}))
        await until_so(lambda: store.census()[0].get("queued") == 2)
        ended = asyncio.create_task(draining.drain(0.5))
        answer = await asked
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_ending")
        store.cancel(fill[0].id)  # there is room for the next
        await ended
        left = [store.get(job.id) for job in (running, *fill[1:])]
        assert [(job.status, job.deaths) for job in left if job is not None] == [("queued", 0)] * 3
        assert left[-1] is not None and left[-1].attempt == 0
        await client.get("/v1/images/jobs")  # opens the database again
        await asyncio.sleep(1.5)
        assert store.census()[0] == {"queued": 4, "cancelled": 1}


async def test_who_waits_for_a_key_is_held_to_the_bounds_of_the_queue(
    worker_handle: serve.handle.DeploymentHandle,
    jobs_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = jobs_settings.model_copy(update={"pictures_at_once": 2, "request_seconds": 3.0})
    service = ImageService(worker_handle, ServerMetrics("test"), settings)
    app = build_asgi_app(service, settings)
    looked: list[str] = []
    get = JobStore.get

    def counted(store: JobStore, id: str) -> Job | None:
        looked.append(id)
        return get(store, id)

    monkeypatch.setattr(JobStore, "get", counted)
    async with app.router.lifespan_context(app), client_of(app) as client:
        app.state.jobs._runner.hold()  # so that they wait

        def ask(key: str, **more: object) -> asyncio.Task[httpx.Response]:
            headers = {"Idempotency-Key": key}
            return asyncio.create_task(client.post(URL, json=SMALL | more, headers=headers))

        waiting = [ask("one") for _ in range(8)]
        await until_so(lambda: len(app.state.jobs._ends) == 1)
        refused = await ask("two", n=2)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        service.use(service.in_force.after({"max_queued_requests": 1}, settings, "PromptEnhancer"))
        for answer in await asyncio.gather(*waiting):
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert len(looked) < 4, "one looks for all"


async def test_in_a_full_queue_a_newcomer_with_a_key_takes_the_place_of_who_has_most(
    worker_handle: serve.handle.DeploymentHandle, jobs_settings: Settings, store: JobStore
) -> None:
    settings = jobs_settings.model_copy(update={"max_queued_requests": 1})
    app = build_asgi_app(ImageService(worker_handle, ServerMetrics("test"), settings), settings)

    def ask(address: str, key: str) -> asyncio.Task[httpx.Response]:
        transport = httpx.ASGITransport(app, client=(address, 1))

        async def asked() -> httpx.Response:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.post(URL, json=SMALL, headers={"Idempotency-Key": key})

        return asyncio.create_task(asked())

    async with app.router.lifespan_context(app):
        await app.state.jobs._opened()
        app.state.jobs._runner._is_holding = True  # so that they wait
        anns = []
        for number in range(4):  # three for the worker, and one place
            anns.append(ask("10.0.0.1", f"ann-{number}"))
            await until_so(lambda number=number: store.census()[0].get("queued") == number + 1)
        assert (await ask("10.0.0.1", "ann-4")).status_code == 429
        bob = ask("10.0.0.2", "bob")
        refused = await anns.pop()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert "others, who have fewer" in refused.json()["error"]["message"]
        assert int(refused.headers["Retry-After"]) >= 1
        assert store.census()[0] == {"queued": 4, "cancelled": 1}
        # Who asks again under a key that is there takes nobody's place.
        bobs = [bob, ask("10.0.0.2", "bob")]
        app.state.jobs._runner._is_holding = False
        for answer in await asyncio.gather(*anns, *bobs):
            assert answer.status_code == 200, answer.text
        again = await ask("10.0.0.1", "ann-3")
        assert (again.status_code, "idempotent-replayed" in again.headers) == (200, False)


async def test_the_operators_webhook_is_told_of_each_job_and_to_no_caller(
    worker_handle: serve.handle.DeploymentHandle, jobs_settings: Settings, receiver: Receiver
) -> None:
    url = f"http://127.0.0.1:{receiver.port}/secret"
    more = {"webhook_url": url, "webhook_private_addresses": False}
    settings = jobs_settings.model_copy(update=more)
    app = build_asgi_app(ImageService(worker_handle, ServerMetrics("test"), settings), settings)
    async with app.router.lifespan_context(app), client_of(app) as client:
        refused = await client.post("/v1/images/jobs", json=SMALL | {"webhook": {"url": url}})
        assert refused.status_code == 400
        accepted = await client.post("/v1/images/jobs", json=SMALL)
        assert (accepted.status_code, accepted.json()["webhook"]) == (202, None)
        keyed = await client.post(URL, json=SMALL, headers={"Idempotency-Key": "one"})
        assert keyed.status_code == 200
        await until_so(lambda: receiver.came)
        await asyncio.sleep(1.2)
    told = [json.loads(body)["data"]["id"] for _, body in receiver.came]
    assert told == [accepted.json()["id"]], "of what stands behind a key nobody is told"


async def test_a_key_of_a_plain_request_can_be_asked_for_as_a_job(jobs_client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "one"}
    plain = await jobs_client.post(URL, json=SMALL, headers=headers)
    job = await jobs_client.post(URL, json=SMALL, headers=headers | {"Prefer": "respond-async"})
    assert (job.status_code, job.headers["idempotent-replayed"]) == (202, "true")
    told = await jobs_client.get(job.headers["location"])
    assert told.json()["result"]["data"] == plain.json()["data"]


async def test_what_was_thrown_away_is_drawn_anew_under_its_key(
    jobs_client: httpx.AsyncClient, jobs_app: Any
) -> None:
    headers = {"Idempotency-Key": "one"}
    first = await jobs_client.post(URL, json=SMALL | {"seed": 1}, headers=headers)
    for file in await jobs_app.state.results._place.entries():
        await jobs_app.state.results.remove(file.name)
    again = await jobs_client.post(URL, json=SMALL | {"seed": 1}, headers=headers)
    assert (again.status_code, "idempotent-replayed" in again.headers) == (200, False)
    drawn = [answer.json()["data"][0]["revised_prompt"] for answer in (first, again)]
    assert drawn[0] == drawn[1] and again.json()["data"][0]["b64_json"]
