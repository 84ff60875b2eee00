"""What becomes of jobs when whoever draws them is gone, and who may see them."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import httpx
import pytest
from ray import serve

from serve_app.ingress import build_asgi_app
from serve_app.jobs.runner import JobRunner
from serve_app.jobs.store import Job, JobStore, Limits, NewJob
from serve_app.keys import ADMIN, DRAW, READ, add_key
from serve_app.metrics import ServerMetrics
from serve_app.results import ResultStore
from serve_app.service import ImageService
from serve_app.settings import Settings
from tests.serve_app.conftest import client_of
from tests.serve_app.jobs.conftest import SMALL


async def accepted(store: JobStore, service: ImageService, **more: object) -> Job:
    model = (await service.description_when_ready()).id
    body = json.dumps(SMALL | {"seed": 5} | more)
    return store.accept(NewJob("", "ann", model, body, 1.0), Limits(10, 10))[0]


def runner_of(service: ImageService, store: JobStore, folder: Path, owner: str, lease: float) -> JobRunner:
    results = ResultStore(folder / "results", 3600, 2**30)
    return JobRunner(service, store, results, asyncio.to_thread, owner, lambda: None, lease)


async def until(store: JobStore, id: str, statuses: tuple[str, ...]) -> Job:
    async with asyncio.timeout(60):
        while (job := store.get(id)) is None or job.status not in statuses:
            await asyncio.sleep(0.05)
    return job


async def test_what_a_dead_runner_had_claimed_is_drawn_once_by_another(
    jobs_service: ImageService, store: JobStore, tmp_path: Path
) -> None:
    job = await accepted(store, jobs_service)
    (claimed,) = store.claim("dead", job.model, 1, {}, 0.5)  # and is never heard of again
    running = asyncio.create_task(runner_of(jobs_service, store, tmp_path, "second", 5.0).run())
    done = await until(store, job.id, ("done", "failed"))
    running.cancel()
    await asyncio.wait([running])
    assert (done.status, done.attempt, done.deaths) == ("done", 2, 1)
    assert not store.finish(job.id, claimed.attempt, "{}")
    types = [event.type for event in store.events_after(job.id, 0)]
    assert types.count("job.done") == 1
    assert len(list((tmp_path / "results").iterdir())) == 1


async def test_what_a_runner_draws_while_it_ends_goes_back_at_once(
    jobs_service: ImageService, store: JobStore, tmp_path: Path
) -> None:
    job = await accepted(store, jobs_service, num_inference_steps=100, n=10)
    running = asyncio.create_task(runner_of(jobs_service, store, tmp_path, "first", 20.0).run())
    await until(store, job.id, ("running",))
    running.cancel()
    await asyncio.wait([running])
    freed = store.get(job.id)
    assert freed is not None and (freed.status, freed.deaths) == ("queued", 0)


async def test_who_has_lost_the_lease_stops_and_leaves_no_file(
    jobs_service: ImageService, store: JobStore, tmp_path: Path
) -> None:
    job = await accepted(store, jobs_service, num_inference_steps=100, n=10)
    running = asyncio.create_task(runner_of(jobs_service, store, tmp_path, "first", 20.0).run())
    await until(store, job.id, ("running",))
    store.cancel(job.id)  # by way of another ingress
    async with asyncio.timeout(20):
        while jobs_service._queue.admitted:
            await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.wait([running])
    cancelled = store.get(job.id)
    assert cancelled is not None and cancelled.status == "cancelled"
    assert not (tmp_path / "results").exists()


async def test_a_job_that_cannot_be_drawn_fails_with_the_reason(
    jobs_service: ImageService, store: JobStore, tmp_path: Path
) -> None:
    job = await accepted(store, jobs_service, size="63x64")
    running = asyncio.create_task(runner_of(jobs_service, store, tmp_path, "first", 20.0).run())
    failed = await until(store, job.id, ("done", "failed"))
    running.cancel()
    await asyncio.wait([running])
    assert failed.status == "failed" and failed.error is not None
    error = json.loads(failed.error)
    assert (error["status"], error["param"]) == (400, "size")


async def test_a_job_belongs_to_its_key(
    worker_handle: serve.handle.DeploymentHandle, jobs_settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    keys = {name: add_key(file, name, scopes) for name, scopes in KEYS.items()}
    settings = jobs_settings.model_copy(update={"api_keys_file": file})
    app = build_asgi_app(ImageService(worker_handle, ServerMetrics("test"), settings), settings)
    async with app.router.lifespan_context(app), client_of(app) as client:

        async def ask(name: str, method: str, path: str = "", **more: object) -> httpx.Response:
            headers = {"Authorization": f"Bearer {keys[name]}", "Idempotency-Key": "one"}
            return await client.request(method, f"/v1/images/jobs{path}", headers=headers, **more)  # type: ignore[arg-type]

        anns = (await ask("ann", "POST", json=SMALL)).json()["id"]
        bens = (await ask("ben", "POST", json=SMALL | {"seed": 1})).json()["id"]
        for name, seen in (("ann", [anns]), ("ben", [bens]), ("root", [bens, anns])):
            assert [each["id"] for each in (await ask(name, "GET")).json()["data"]] == seen
        for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
            assert (await ask("ben", method, f"/{anns}{path}")).status_code == 404
        assert (await ask("root", "DELETE", f"/{anns}")).status_code == 200
        assert (await ask("ben", "GET", f"?after={anns}")).status_code == 404


KEYS = {"ann": {DRAW}, "ben": {DRAW}, "root": {DRAW, READ, ADMIN}}


async def test_without_a_place_for_them_jobs_alone_are_refused(
    worker_handle: serve.handle.DeploymentHandle,
    jobs_settings: Settings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    settings = jobs_settings.model_copy(update={"data_dir": tmp_path / "file" / "below"})
    app = build_asgi_app(ImageService(worker_handle, ServerMetrics("test"), settings), settings)
    with caplog.at_level(logging.ERROR, "serve_app"):
        async with app.router.lifespan_context(app), client_of(app) as client:
            for _ in range(3):
                refused = await client.post("/v1/images/jobs", json=SMALL)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "jobs_unavailable")
                assert str(tmp_path) not in refused.text
            assert (await client.post("/v1/images/generations", json=SMALL)).status_code == 200
    assert len([record for record in caplog.records if record.name == "serve_app.jobs.desk"]) == 1
