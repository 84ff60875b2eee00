"""The service between the routes and the workers, where workers die, fill up and stay away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from serve_app.error_mapping import ModelNotReady, RequestKillsWorkers, WorkerLost
from serve_app.image_codec import ImageEncoding
from serve_app.ingress import build_asgi_app
from serve_app.lost_workers import DEVICE_FAILURES
from serve_app.metrics import ServerMetrics
from serve_app.queueing import CallerLimited, Place, QueueFull
from serve_app.routes.answers import asked_by
from serve_app.service import ImageService, work_of
from serve_app.settings import load_settings
from serve_app.worker_reply import DrawingBegan, WorkerReply, WorkerUnfit
from tests.serve_app.conftest import client_of
from tests.serve_app.test_openai_schema import MODEL
from zimage_engine.errors import (
    DeadlineExceeded,
    DeviceFailed,
    GenerationCancelled,
    InvalidRequest,
    InvalidSize,
)
from zimage_engine.prompts.enhancer import unchanged
from zimage_engine.sampling.plan import resolve
from zimage_engine.types import GenerationReport, GenerationRequest, PictureReport, StepProgress

REQUEST = GenerationRequest(prompt="a red circle")
PNG = ImageEncoding("png")


def reply_to(request: GenerationRequest) -> WorkerReply:
    assert request.seed is not None and not request.enhance
    report = GenerationReport(
        model=MODEL.id,
        family=MODEL.family,
        device="cpu",
        dtype="bfloat16",
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or "",
        enhancement=unchanged(request.prompt, request.negative_prompt),
        width=256,
        height=256,
        num_inference_steps=8,
        guidance_scale=1.8,
        scheduler="FlowMatchEulerDiscreteScheduler",
        seconds=1.0,
        pictures=(PictureReport(request.seed, 1.0, 0.1, 0.8, 0.1),),
    )
    return WorkerReply((b"picture",), report)


@dataclass
class ScriptedWorkers:
    """Stands where the handle does. Each request meets the next of `fates`: None draws, an error is raised.

    `alive` says how many workers answer a broadcast.
    """

    fates: list[BaseException | None] = field(default_factory=list)
    alive: int = 1
    seen: list[GenerationRequest] = field(default_factory=list)
    #: The name of who answers a broadcast: the worker that drew, where that is still alive.
    answers_to: str = "one that is asked"

    def options(self, stream: bool) -> ScriptedWorkers:
        return self

    @property
    def generate(self) -> Any:
        return _Remote(self._draw)

    @property
    def generate_streaming(self) -> Any:
        return _Remote(self._stream)

    async def _draw(
        self, request: GenerationRequest, encoding: ImageEncoding, trace_id: str = ""
    ) -> WorkerReply:
        self.seen.append(request)
        fate = self.fates.pop(0) if self.fates else None
        if fate is not None:
            raise fate
        return reply_to(request)

    async def _stream(
        self,
        request: GenerationRequest,
        encoding: ImageEncoding,
        previews: int,
        trace_id: str = "",
        tell_first: bool = False,
    ) -> AsyncIterator[DrawingBegan | StepProgress | WorkerReply]:
        yield DrawingBegan("one that is asked")
        yield StepProgress(1, 1, 1, 2)
        yield await self._draw(request, encoding)

    def broadcast(self, method: str) -> Any:
        answers = {"describe": MODEL, "name": self.answers_to}
        return _Answers([answers.get(method, "# no metrics\n")] * self.alive)


@dataclass
class _Remote:
    remote: Callable[..., Any]


@dataclass
class _Answers:
    answers: list[Any]

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> list[Any]:
        if not self.answers:
            raise DeploymentUnavailableError(DeploymentID("ImageWorker"))
        return self.answers


def service_over(workers: ScriptedWorkers, **chosen: Any) -> ImageService:
    handle = cast(serve.handle.DeploymentHandle, workers)
    return ImageService(handle, ServerMetrics("test"), load_settings(ui=False, **chosen))


def died() -> ActorDiedError:
    return ActorDiedError()


async def test_a_request_whose_worker_dies_is_drawn_by_another_with_the_same_seed() -> None:
    workers = ScriptedWorkers([died(), None])
    reply = await service_over(workers).generate(REQUEST, PNG)
    assert reply.pictures == (b"picture",)
    first, second = workers.seen
    assert first == second
    assert reply.report.pictures[0].seed == first.seed


AWAY = ActorUnavailableError("the connection was lost", None)


async def test_a_worker_that_is_out_of_reach_for_a_moment_is_no_death() -> None:
    # Of the first nothing is known, for there is no stream that would tell who it was.
    workers = ScriptedWorkers([AWAY, AWAY, AWAY, None])
    service = service_over(workers)
    assert (await service.generate(REQUEST, PNG)).pictures == (b"picture",)
    await service.generate(REQUEST, PNG)


async def test_a_worker_that_is_out_of_reach_for_good_is_one() -> None:
    """So Ray tells of a process that ends at once: that its actor is unavailable."""
    workers = ScriptedWorkers([AWAY, AWAY, None], answers_to="another that was started")
    with pytest.raises(RequestKillsWorkers):
        await service_over(workers).generate(REQUEST, PNG)
    assert len(workers.seen) == 2


async def test_a_stream_whose_worker_dies_starts_over() -> None:
    workers, steps = ScriptedWorkers([died(), None]), list[StepProgress]()
    await service_over(workers).generate(REQUEST, PNG, steps.append)
    assert len(workers.seen) == len(steps) == 2


async def test_progress_may_be_awaited() -> None:
    steps: list[StepProgress] = []

    async def slowly(progress: StepProgress) -> None:
        await asyncio.sleep(0)
        steps.append(progress)

    await service_over(ScriptedWorkers()).generate(REQUEST, PNG, slowly)
    assert steps == [StepProgress(1, 1, 1, 2)]


async def test_a_request_that_kills_two_workers_is_refused_and_named() -> None:
    workers = ScriptedWorkers([died(), died(), None])
    service = service_over(workers)
    with pytest.raises(RequestKillsWorkers, match=r"Two workers died .* \(256x256, 8 steps, n 1\)"):
        await service.generate(REQUEST, PNG)
    assert len(workers.seen) == 2
    with pytest.raises(RequestKillsWorkers, match="within the last hour"):
        await service.generate(replace(REQUEST, seed=5), PNG)
    assert len(workers.seen) == 2, "no third worker is risked"
    await service.generate(replace(REQUEST, num_inference_steps=7), PNG)
    assert 'zimage_requests_total{outcome="request_kills_workers",replica="local"} 2.0' in (
        await service.metrics_text()
    )


@dataclass
class BusyWorkers(ScriptedWorkers):
    """Whoever is streamed meets its fate before anything was drawn for it: the worker drew something else."""

    async def _stream(
        self,
        request: GenerationRequest,
        encoding: ImageEncoding,
        previews: int,
        trace_id: str = "",
        tell_first: bool = False,
    ) -> AsyncIterator[DrawingBegan | StepProgress | WorkerReply]:
        reply = await self._draw(request, encoding)
        yield DrawingBegan()
        yield reply


async def test_who_waits_behind_a_killer_is_drawn_however_often_that_kills() -> None:
    workers = BusyWorkers([died(), died(), WorkerUnfit("its device failed"), died(), None])
    service = service_over(workers)
    assert (await service.generate(REQUEST, PNG)).pictures == (b"picture",)
    assert len(workers.seen) == 5 and len({request.seed for request in workers.seen}) == 1
    await service.generate(REQUEST, PNG)


async def test_a_failed_device_costs_no_picture() -> None:
    failed = DeviceFailed("cuda:0 failed")
    workers = ScriptedWorkers([failed, RayTaskError("generate", "", failed), None])
    service = service_over(workers)
    await service.generate(REQUEST, PNG)
    assert len({request.seed for request in workers.seen}) == 1
    metrics = await service.metrics_text()
    assert 'zimage_device_failures_total{replica="local"} 2.0' in metrics
    assert 'zimage_worker_retries_total{replica="local"} 2.0' in metrics


async def test_where_every_device_fails_the_request_ends_and_may_come_again() -> None:
    workers = ScriptedWorkers([DeviceFailed("cuda:0 failed")] * DEVICE_FAILURES)
    service = service_over(workers)
    with pytest.raises(DeviceFailed):
        await service.generate(REQUEST, PNG)
    assert len(workers.seen) == DEVICE_FAILURES
    await service.generate(REQUEST, PNG)


async def test_a_request_that_comes_before_the_first_worker_waits_for_it() -> None:
    workers = ScriptedWorkers(alive=0)
    drawing = asyncio.create_task(service_over(workers).generate(REQUEST, PNG))
    await asyncio.sleep(0.2)
    assert not drawing.done() and not workers.seen
    workers.alive = 1
    await drawing
    assert len(workers.seen) == 1


async def test_where_no_worker_comes_back_the_wait_ends() -> None:
    workers = ScriptedWorkers([died(), None])
    service = service_over(workers, worker_restart_seconds=0.2)
    await service.description()
    workers.alive = 0
    with pytest.raises(WorkerLost, match=r"no other came up within 0\.2 seconds"):
        await service.generate(REQUEST, PNG)
    assert len(workers.seen) == 1


async def test_before_a_worker_is_there_a_request_is_refused_and_says_why() -> None:
    workers = ScriptedWorkers(alive=0)
    service = service_over(workers, worker_restart_seconds=0.2)
    assert await service.description() is None
    assert (await service.readiness()).reason.startswith("No worker has its model yet")
    with pytest.raises(ModelNotReady, match="still being loaded"):
        await service.generate(REQUEST, PNG)
    workers.alive = 1
    assert (await service.readiness()).ready
    await service.generate(REQUEST, PNG)


async def test_readiness_ends_when_no_worker_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.service.READY_CACHE_SECONDS", 0)
    workers = ScriptedWorkers()
    service = service_over(workers)
    assert (await service.readiness()).ready
    workers.alive = 0
    gone = await service.readiness()
    assert not gone.ready and "a new one is being started" in gone.reason


async def test_what_cannot_be_drawn_is_refused_before_a_worker_is_asked() -> None:
    workers = ScriptedWorkers()
    with pytest.raises(InvalidSize, match="multiple of 32"):
        await service_over(workers).generate(GenerationRequest("a red circle", width=100), PNG)
    assert workers.seen == []


async def test_the_report_tells_the_enhancement_made_here() -> None:
    workers = ScriptedWorkers()
    reply = await service_over(workers).generate(REQUEST, PNG)
    assert reply.report.enhancement.added
    assert reply.report.prompt == reply.report.enhancement.prompt == workers.seen[0].prompt
    assert not workers.seen[0].enhance


async def test_what_ray_wraps_comes_out_as_it_was_raised() -> None:
    wrapped = RayTaskError("generate", "Traceback ...", InvalidRequest("n is odd", "n")).as_instanceof_cause()
    with pytest.raises(InvalidRequest) as raised:
        await service_over(ScriptedWorkers([wrapped])).generate(REQUEST, PNG)
    assert (str(raised.value), raised.value.parameter) == ("n is odd", "n")


@dataclass(frozen=True)
class Failure:
    error: Exception
    status: int
    code: str
    retry_after: bool


FAILURES = (
    Failure(InvalidRequest("seed is odd", "seed"), 400, "invalid_value", False),
    Failure(QueueFull("full", {"Retry-After": "3"}), 429, "queue_full", True),
    Failure(CallerLimited("too many", {"Retry-After": "3"}), 429, "rate_limit_exceeded", True),
    Failure(GenerationCancelled("stopped"), 503, "cancelled", True),
    Failure(RequestKillsWorkers("twice"), 422, "request_kills_workers", False),
    Failure(RuntimeError("secret path /srv/model"), 500, "internal_error", False),
)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.code)
async def test_failures_have_their_status_and_are_counted(failure: Failure) -> None:
    app = build_asgi_app(service_over(ScriptedWorkers([failure.error])), load_settings(ui=False))
    async with client_of(app) as client:
        response = await client.post("/v1/images/generations", json={"prompt": "a red circle"})
        assert (response.status_code, response.json()["error"]["code"]) == (failure.status, failure.code)
        assert ("retry-after" in response.headers) is failure.retry_after
        metrics = (await client.get("/metrics")).text
    assert f'zimage_requests_total{{outcome="{failure.code}",replica="local"}} 1.0' in metrics
    assert 'zimage_requests_total{outcome="ok",replica="local"} 0.0' in metrics


async def test_a_fault_of_the_server_is_logged_once_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    app = build_asgi_app(
        service_over(ScriptedWorkers([RuntimeError("secret /srv")])), load_settings(ui=False)
    )
    with caplog.at_level(logging.WARNING):
        async with client_of(app) as client:
            response = await client.post("/v1/images/generations", json={"prompt": "a red circle"})
    message = response.json()["error"]["message"]
    assert "secret" not in response.text and "Traceback" not in response.text
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.exc_info is not None and "secret /srv" in str(record.exc_info[1])
    incident = message.rsplit(" ", 1)[1].rstrip(".")
    assert incident in record.getMessage()


async def test_while_no_worker_is_there_clients_are_told_to_come_back() -> None:
    service = service_over(ScriptedWorkers(alive=0), worker_restart_seconds=0)
    app = build_asgi_app(service, load_settings(ui=False))
    async with client_of(app) as client:
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "not ready")
        assert "still being loaded" in ready.json()["reason"]
        assert (await client.get("/healthz")).status_code == 200
        for response in (
            await client.post("/v1/images/generations", json={"prompt": "a red circle"}),
            await client.get("/v1/models"),
        ):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "model_not_ready")
            assert int(response.headers["retry-after"]) > 0


async def test_a_caller_that_goes_away_is_counted_and_stops_the_worker() -> None:
    stopped = asyncio.Event()

    class Endless(ScriptedWorkers):
        async def _draw(self, request: GenerationRequest, encoding: ImageEncoding) -> WorkerReply:
            raise AssertionError("not reached")

        @property
        def generate(self) -> Any:
            return _Remote(lambda *_: _Pending(stopped))

    service = service_over(Endless())
    drawing = asyncio.ensure_future(service.generate(REQUEST, PNG))
    await asyncio.sleep(0.05)
    drawing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await drawing
    assert stopped.is_set()
    assert 'zimage_requests_total{outcome="cancelled",replica="local"} 1.0' in await service.metrics_text()


@dataclass
class _Pending:
    """A response that never comes and that tells when it is cancelled, as Serve's does."""

    stopped: asyncio.Event

    def __await__(self) -> Any:
        return asyncio.Event().wait().__await__()

    def cancel(self) -> None:
        self.stopped.set()


# --- the queue -------------------------------------------------------------------------------------------


@dataclass
class HeldWorkers(ScriptedWorkers):
    """Workers that finish a picture for each `leave`; `at_work` counts the requests handed to them."""

    leave: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    at_work: int = 0

    @property
    def generate(self) -> Any:
        return _Remote(lambda *given, **named: asyncio.ensure_future(self._draw(*given, **named)))

    async def _draw(
        self, request: GenerationRequest, encoding: ImageEncoding, trace_id: str = ""
    ) -> WorkerReply:
        self.at_work += 1
        try:
            await self.leave.acquire()
            return await super()._draw(request, encoding, trace_id)
        finally:
            self.at_work -= 1

    async def finish(self, pictures: int = 1) -> None:
        for _ in range(pictures):
            self.leave.release()
            await asyncio.sleep(0.01)


#: What one worker is handed at once.
IN_HAND = 3


async def ask(service: ImageService, name: str, seed: int, **named: Any) -> asyncio.Task[WorkerReply]:
    request = GenerationRequest("a red circle", seed=seed)
    task = asyncio.create_task(service.generate(request, PNG, asked_by=name, **named))
    await asyncio.sleep(0.01)
    return task


async def test_workers_are_handed_what_they_can_have_at_hand_and_no_more() -> None:
    workers = HeldWorkers()
    service = service_over(workers)
    asked = [await ask(service, "ann", seed) for seed in range(8)]
    assert workers.at_work == IN_HAND
    await workers.finish()
    assert workers.at_work == IN_HAND and len(workers.seen) == 1
    await workers.finish(7)
    await asyncio.gather(*asked)
    assert [request.seed for request in workers.seen] == list(range(8))


async def test_more_workers_are_handed_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.service.COUNT_CACHE_SECONDS", 0)
    workers = HeldWorkers()
    service = service_over(workers)
    asked = [await ask(service, "ann", seed) for seed in range(8)]
    workers.alive = 2
    await workers.finish()
    assert workers.at_work == 5
    workers.leave = asyncio.Semaphore(0)
    for task in asked:
        task.cancel()
    await asyncio.wait(asked)
    assert workers.at_work == 0


async def test_one_pictures_turn_comes_before_anothers_many_on_every_path() -> None:
    """Plain and with steps, as the stream and the page ask."""
    workers = HeldWorkers()
    service = service_over(workers)
    many = [await ask(service, "ann", seed) for seed in range(20)]
    places: list[Place] = []
    plain = await ask(service, "bob", 100)
    streamed = await ask(service, "cem", 200, on_progress=lambda step: None, on_place=places.append)
    assert places == [Place(2, None)], "bob came before, and ann has had her part"
    await workers.finish(22)
    await asyncio.gather(*many, plain, streamed)
    order = [request.seed for request in workers.seen]
    assert order[:IN_HAND] == [0, 1, 2] and order[IN_HAND : IN_HAND + 2] == [100, 200]


async def test_who_goes_away_while_waiting_costs_the_others_nothing() -> None:
    workers = HeldWorkers()
    service = service_over(workers)
    asked = [await ask(service, "ann", seed) for seed in range(6)]
    asked[4].cancel()
    await asyncio.wait({asked[4]}, timeout=1)
    assert asked[4].cancelled() and workers.at_work == IN_HAND
    await workers.finish(5)
    await asyncio.gather(*(task for task in asked if task is not asked[4]))
    assert [request.seed for request in workers.seen] == [0, 1, 2, 3, 5]
    assert 'zimage_requests_total{outcome="cancelled",replica="local"} 1.0' in await service.metrics_text()


async def test_a_worker_that_dies_keeps_the_turn_of_its_request() -> None:
    workers = ScriptedWorkers([died(), None, None])
    await service_over(workers, max_queued_requests=1).generate(REQUEST, PNG)
    service = service_over(ScriptedWorkers([died(), died(), *[None] * 9]), max_queued_requests=1)
    with pytest.raises(RequestKillsWorkers):
        await service.generate(REQUEST, PNG)
    for seed in range(2 * IN_HAND):
        await service.generate(replace(REQUEST, prompt=f"circle {seed}"), PNG)


async def test_the_time_of_a_request_counts_while_it_waits_and_while_it_is_drawn() -> None:
    workers = HeldWorkers()
    service = service_over(workers, request_seconds=0.2)
    asked = [await ask(service, "ann", seed) for seed in range(5)]
    ended = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(each) for each in ended] == [DeadlineExceeded] * 5
    assert "within 0.2 seconds" in str(ended[0]) and workers.at_work == 0
    text = await service.metrics_text()
    assert 'zimage_requests_total{outcome="deadline_exceeded",replica="local"} 5.0' in text


async def test_seconds_are_estimated_from_the_pictures_drawn() -> None:
    """Those of the scripted workers tell 1 s each."""
    workers = HeldWorkers(alive=1)
    service, places = service_over(workers), list[Place]()
    asked = [await ask(service, "ann", seed) for seed in range(IN_HAND + 2)]
    await workers.finish()
    asked.append(await ask(service, "ann", 9, on_place=places.append))
    (place,) = places
    assert place.position == 2 and place.seconds == pytest.approx(4.0, abs=0.5)
    await workers.finish(len(asked))
    await asyncio.gather(*asked)


def test_work_is_pixels_times_steps_and_twice_that_with_guidance() -> None:
    request = GenerationRequest("a", width=512, height=256, num_inference_steps=4, guidance_scale=1.0, n=3)
    work = work_of(resolve(request, MODEL))
    assert work == pytest.approx(512 * 256 / 1e6 * 4 * 3)
    assert work_of(resolve(replace(request, guidance_scale=1.8), MODEL)) == pytest.approx(2 * work)


URL = "/v1/images/generations"


async def test_over_the_bound_the_answer_says_when_to_come_again() -> None:
    workers = HeldWorkers()
    service = service_over(workers, max_queued_requests=1)
    asked = [await ask(service, "127.0.0.1", seed) for seed in range(IN_HAND + 1)]
    async with client_of(build_asgi_app(service, load_settings(ui=False))) as client:
        for more in ({}, {"stream": True}):
            answer = await client.post(URL, json={"prompt": "a red circle"} | more)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert (answer.headers["retry-after"], answer.headers["x-queue-position"]) == ("5", "2")
    await workers.finish(len(asked))
    await asyncio.gather(*asked)


async def test_a_stream_tells_its_place_in_comments() -> None:
    workers = HeldWorkers()
    service = service_over(workers)
    await service.description()
    asked = [await ask(service, "ann", seed) for seed in range(IN_HAND)]
    async with client_of(build_asgi_app(service, load_settings(ui=False))) as client:
        streamed = asyncio.create_task(client.post(URL, json={"prompt": "a red circle", "stream": True}))
        await asyncio.sleep(0.1)
        await workers.finish(IN_HAND + 1)
        text = (await streamed).text
    assert text.startswith(": queue position 1\n\n: step 1/2") and "image_generation.completed" in text
    await asyncio.gather(*asked)


async def test_requests_a_minute_are_told_by_openais_headers() -> None:
    service = service_over(ScriptedWorkers(), requests_a_minute=2)
    async with client_of(build_asgi_app(service, load_settings(ui=False))) as client:
        plain = await client.post(URL, json={"prompt": "a red circle"})
        streamed = await client.post(URL, json={"prompt": "a red circle", "stream": True})
        refused = await client.post(URL, json={"prompt": "a red circle"})
    left = [answer.headers["x-ratelimit-remaining-requests"] for answer in (plain, streamed, refused)]
    assert (plain.status_code, streamed.status_code, refused.status_code) == (200, 200, 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert left == ["1", "0", "0"] and plain.headers["x-ratelimit-limit-requests"] == "2"
    assert plain.headers["x-ratelimit-reset-requests"].endswith("s")
    assert int(refused.headers["retry-after"]) <= 30


async def test_without_a_limit_there_are_no_such_headers() -> None:
    app = build_asgi_app(service_over(ScriptedWorkers()), load_settings(ui=False))
    async with client_of(app) as client:
        answer = await client.post(URL, json={"prompt": "a red circle"})
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


async def test_keys_have_a_line_each_and_addresses_where_there_are_none() -> None:
    assert asked_by({"client": ("10.0.0.1", 5), "state": {"caller": "ann"}}) == "ann"
    assert asked_by({"client": ("10.0.0.1", 5), "state": {}}) == asked_by({"client": ("10.0.0.1", 9)})
    assert asked_by({"client": None}) == "unknown"
