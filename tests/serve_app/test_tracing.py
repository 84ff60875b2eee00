"""Traces as a collector receives them from the real exporter; and where they are off, nothing of them."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from serve_app.image_codec import ImageEncoding
from serve_app.ingress import build_asgi_app
from serve_app.logs import REQUESTS
from serve_app.metrics import ServerMetrics
from serve_app.service import ImageService
from serve_app.settings import Settings, SettingsError, load_settings
from serve_app.tracing import Tracing, current, tracing_of
from serve_app.worker_reply import WorkerReply, WorkerTimes
from tests.otlp_collector import Collector, ReceivedSpan, collector
from tests.running_server import running_server
from tests.serve_app.conftest import client_of
from tests.serve_app.test_logs import Written, written
from tests.serve_app.test_service import ScriptedWorkers, _Pending, _Remote, died, reply_to
from tests.zimage_engine.sampling.overflowing_models import BFLOAT16, write_overflowing
from zimage_engine.errors import GuardExhausted
from zimage_engine.types import (
    GenerationRequest,
    GuardAttempt,
    GuardTrace,
    GuardTrip,
    MemoryUse,
    Notice,
    PictureReport,
    StepProgress,
)

__all__ = ["written"]

URL = "/v1/images/generations"
ROOT_NAME = f"POST {URL}"
PNG = ImageEncoding("png")
#: Words that stand nowhere else.
BODY = {
    "prompt": "an orangutan at dusk",
    "negative_prompt": "xylophones",
    "size": "64x64",
    "num_inference_steps": 3,
    "guidance_scale": 2,
}
SECRETS = (b"orangutan", b"xylophone", b"dusk")
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
FROM_A_CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
SERVER, INTERNAL = 2, 1
UNSET, ERROR = 0, 2


@dataclass
class Traced:
    """A server whose spans go to `collector`; they are there after `sent`."""

    collector: Collector
    tracing: Tracing
    settings: Settings = field(default_factory=lambda: load_settings(ui=False))

    def service(self, workers: Any) -> ImageService:
        return ImageService(workers, ServerMetrics("test"), self.settings, tracing=self.tracing)

    def client(self, workers: Any) -> httpx.AsyncClient:
        return client_of(build_asgi_app(self.service(workers), self.settings, self.tracing))

    def sent(self) -> Collector:
        self.tracing.close()
        return self.collector


@pytest.fixture
def traced() -> Iterator[Traced]:
    with collector() as received:
        tracing = tracing_of(load_settings(otlp_endpoint=received.endpoint), "1.2.3", "ingress-1")
        assert tracing is not None
        yield Traced(received, tracing)
        tracing.close()


# --- what a trace shows ----------------------------------------------------------------------------------


async def test_a_request_is_a_span_of_its_callers_trace_and_each_stage_one_below_it(
    traced: Traced, worker_handle: serve.handle.DeploymentHandle
) -> None:
    began = time.time()
    async with traced.client(worker_handle) as client:
        answer = await client.post(URL, json=BODY | {"n": 2, "refine": True}, headers=FROM_A_CALLER)
    ended = time.time()
    assert answer.status_code == 200, answer.text
    spans = traced.sent()
    root, stages = spans.root(), spans.stages()
    assert (root.name, root.kind, root.trace_id, root.parent_id) == (ROOT_NAME, SERVER, TRACE, PARENT)
    assert (root.status, root.attributes["http.response.status_code"]) == (UNSET, 200)
    told = {name: root.attributes[f"zimage.{name}"] for name in ("outcome", "width", "pictures", "steps")}
    assert told == {"outcome": "ok", "width": 64, "pictures": 2, "steps": 3}
    assert Counter(span.name for span in stages) == {
        "enhance": 1,
        "wait": 1,
        "encode": 1,
        "denoise": 2,
        "decode": 2,
        "refine": 2,
        "encode_file": 1,
    }
    assert {(span.trace_id, span.parent_id) for span in stages} == {(TRACE, root.id)}
    assert began <= root.began_at <= root.ended_at <= ended
    # What is measured by another clock of the same machine may be off by microseconds.
    for earlier, later in pairwise(stages):
        assert later.began_at >= earlier.ended_at - 1e-3, (earlier, later)
    assert root.began_at <= stages[0].began_at and stages[-1].ended_at <= root.ended_at + 1e-3
    for span in stages:
        if span.name == "denoise":
            assert [event.attributes for event in span.events] == [{"zimage.step": n} for n in (1, 2, 3)]
            assert all(span.began_at <= each.at <= span.ended_at + 1e-3 for each in span.events)
    assert (
        spans.resources[0]
        | {
            "service.name": "zimage-turbo",
            "service.version": "1.2.3",
            "service.instance.id": "ingress-1",
        }
        == spans.resources[0]
    )


async def test_no_words_of_a_caller_leave_with_a_trace(
    traced: Traced, worker_handle: serve.handle.DeploymentHandle
) -> None:
    async with traced.client(worker_handle) as client:
        assert (await client.post(URL, json=BODY)).status_code == 200
        refused = BODY | {"orangutan": "dusk"}
        assert (await client.post(URL, json=refused)).status_code == 400
        assert (await client.post(URL, content=b"{an orangutan at dusk")).status_code == 415
    raw = traced.sent().raw
    assert raw.count(ROOT_NAME.encode()) == 3
    assert not [word for word in SECRETS if word in raw]


TRIP = GuardTrip(
    "denoise",
    2,
    "inf",
    (GuardAttempt("same_inputs", "failed", 0.1), GuardAttempt("float32", "recovered", 0.2)),
)
LOOKED_WRONG = GuardTrip("picture", None, "picture_black", (GuardAttempt("float32", "failed", 0.2),))
ENCODED_WRONG = GuardTrip("encode", None, "nan", (GuardAttempt("float32", "recovered", 0.2),))
T = 1_800_000_000.0


def after(at: float) -> float:
    """Seconds after T, as exact as seconds since 1970 can be."""
    return round(at - T, 5)


class AtOnce(ScriptedWorkers):
    """Draws two pictures beside each other."""

    async def _draw(self, request: GenerationRequest, encoding: ImageEncoding, **_: Any) -> WorkerReply:
        reply = reply_to(request)
        first, second = PictureReport(1, 3.0, 0.5, 2.0, 0.5), PictureReport(2, 3.0, 0.0, 2.5, 0.5)
        steps = ((1, 1, T + 1.5), (2, 1, T + 1.75), (1, 2, T + 2.5), (2, 2, T + 3))
        report = replace(reply.report, pictures=(first, second))
        times = WorkerTimes("worker-1", T, steps, T + 6)
        return replace(reply, report=report, encode_file_seconds=0.5, times=times)


async def test_pictures_that_were_drawn_at_once_lie_beside_each_other(traced: Traced) -> None:
    await traced.service(AtOnce()).generate(GenerationRequest("two orangutans"), PNG)
    drawn = [span for span in traced.sent().stages() if span.began_at >= T]
    seen = [(s.name, s.attributes.get("zimage.picture"), after(s.began_at), after(s.ended_at)) for s in drawn]
    assert sorted(seen[:-1]) == [
        ("decode", 1, 2.5, 3.0),
        ("decode", 2, 3.0, 3.5),
        ("denoise", 1, 0.5, 2.5),
        ("denoise", 2, 0.5, 3.0),
        ("encode", 1, 0.0, 0.5),
    ]


class Eventful(ScriptedWorkers):
    """Draws two pictures with everything that can happen on the way."""

    async def _draw(self, request: GenerationRequest, encoding: ImageEncoding, **_: Any) -> WorkerReply:
        reply = reply_to(request)
        first = PictureReport(
            1, 3.0, 0.5, 2.0, 0.5, (Notice("guard_recovered", "x"),), 0.25, GuardTrace((ENCODED_WRONG, TRIP))
        )
        second = PictureReport(2, 1.0, 0.0, 0.75, 0.25, guard=GuardTrace((LOOKED_WRONG,)))
        memory = MemoryUse("model", "plan", oom_recoveries=("freed", "tiled"))
        report = replace(reply.report, pictures=(first, second), memory=memory)
        steps = ((1, 1, T + 1.5), (1, 2, T + 2.5), (2, 1, T + 4), (2, 2, T + 4.25))
        times = WorkerTimes("worker-1", T, steps, T + 6)
        return replace(reply, report=report, encode_file_seconds=0.5, times=times)


async def test_stages_lie_where_the_worker_says_they_were_and_tell_what_happened(traced: Traced) -> None:
    await traced.service(Eventful()).generate(GenerationRequest("an orangutan"), PNG)
    spans = traced.sent()
    drawn = [span for span in spans.stages() if span.began_at >= T]
    seen = [(s.name, s.attributes.get("zimage.picture"), after(s.began_at), after(s.ended_at)) for s in drawn]
    assert seen == [
        ("encode", 1, 0.0, 0.5),
        ("denoise", 1, 0.5, 2.5),
        ("decode", 1, 2.5, 3.0),
        ("refine", 1, 3.0, 3.25),
        # The denoiser's last step ended at 4.25; what was between is a gap.
        ("denoise", 2, 3.5, 4.25),
        ("decode", 2, 4.25, 4.5),
        ("encode_file", None, 5.5, 6.0),
    ]
    trip = {
        "zimage.stage": "denoise",
        "zimage.finding": "inf",
        "zimage.attempts": ["same_inputs: failed", "float32: recovered"],
        "zimage.step": 2,
    }
    encode, denoise = drawn[0], drawn[1]
    assert [(e.name, after(e.at), e.attributes) for e in denoise.events if e.name != "step"] == [
        ("guard trip", 2.5, trip)
    ]
    assert [(e.name, e.attributes["zimage.finding"]) for e in encode.events] == [("guard trip", "nan")]
    root = spans.root()
    assert [
        (e.name, e.attributes.get("zimage.recovery", e.attributes.get("zimage.finding"))) for e in root.events
    ] == [
        ("out of memory", "freed"),
        ("out of memory", "tiled"),
        ("guard trip", "picture_black"),
    ]
    assert (root.name, root.kind, root.attributes["zimage.worker"]) == ("generate", INTERNAL, "worker-1")
    assert root.attributes["zimage.warnings"] == ["guard_recovered"]


async def test_a_stream_is_traced_as_one_that_waits(
    traced: Traced, worker_handle: serve.handle.DeploymentHandle
) -> None:
    steps: list[StepProgress] = []
    request = GenerationRequest("a", width=64, height=64, num_inference_steps=2, enhance=False)
    reply = await traced.service(worker_handle).generate(request, PNG, steps.append)
    assert len(steps) == 2 and reply.times is not None
    spans = traced.sent()
    assert [span.name for span in spans.stages()] == ["wait", "encode", "denoise", "decode", "encode_file"]
    (denoise,) = (span for span in spans.spans if span.name == "denoise")
    assert denoise.seconds == pytest.approx(reply.report.pictures[0].denoise_seconds, abs=1e-4)


# --- failures --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    error: Exception
    code: str
    status: int
    trips: int = 0


FAILURES = (
    Failure(RuntimeError("secret /srv"), "internal_error", ERROR),
    Failure(GuardExhausted("secret orangutan", (TRIP,)), "guard_exhausted", ERROR, 1),
    # A refusal is no error of the server's span.
    Failure(ValueError(), "invalid_value", UNSET),
)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.code)
async def test_a_failure_is_told_by_its_code_and_no_more(traced: Traced, failure: Failure) -> None:
    body = BODY | ({"size": "100x100"} if failure.status == UNSET else {})
    async with traced.client(ScriptedWorkers([failure.error])) as client:
        answer = await client.post(URL, json=body)
    spans = traced.sent()
    root = spans.root()
    assert (root.attributes["error.type"], root.status) == (failure.code, failure.status)
    assert root.attributes["http.response.status_code"] == answer.status_code
    assert [event.name for event in root.events] == ["guard trip"] * failure.trips
    assert {span.name for span in spans.stages()} <= {"enhance"}
    for word in (*SECRETS, b"secret", b"Traceback"):
        assert word not in spans.raw, word


async def test_an_event_stream_ends_its_span_with_its_last_byte(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it has begun, with 200, before the drawing fails."""
    monkeypatch.setattr("serve_app.streaming.OPEN_AFTER_SECONDS", 0.05)
    last_byte_at = 0.0

    class Slow(ScriptedWorkers):
        async def _draw(self, *asked: Any, **told: Any) -> WorkerReply:
            await asyncio.sleep(0.3)
            return await super()._draw(*asked, **told)

    async with traced.client(Slow([None, RuntimeError("secret")])) as client:
        for outcome in ("ok", "internal_error"):
            answer = await client.post(URL, json=BODY | {"stream": True})
            assert answer.status_code == 200 and ("event: error" in answer.text) is (outcome != "ok")
            last_byte_at = time.time()
    roots = [span for span in traced.sent().spans if span.name == ROOT_NAME]
    assert [span.attributes["zimage.outcome"] for span in roots] == ["ok", "internal_error"]
    assert [span.status for span in roots] == [UNSET, ERROR]
    assert all(span.seconds >= 0.3 and span.ended_at <= last_byte_at for span in roots)


async def test_a_worker_that_dies_is_an_event_of_its_request(traced: Traced) -> None:
    await traced.service(ScriptedWorkers([died(), None])).generate(GenerationRequest("a"), PNG)
    root = traced.sent().root()
    assert [event.name for event in root.events] == ["worker died"]
    assert root.attributes["zimage.outcome"] == "ok"


async def test_a_caller_that_goes_away_is_no_error(traced: Traced) -> None:
    class Endless(ScriptedWorkers):
        @property
        def generate(self) -> Any:
            return _Remote(lambda *_, **__: _Pending(asyncio.Event()))

    drawing = asyncio.ensure_future(traced.service(Endless()).generate(GenerationRequest("a"), PNG))
    await asyncio.sleep(0.05)
    drawing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await drawing
    root = traced.sent().root()
    assert (root.attributes["zimage.outcome"], root.status) == ("cancelled", UNSET)


async def test_a_collector_that_is_away_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with collector() as gone:
        endpoint = gone.endpoint
    tracing = tracing_of(load_settings(otlp_endpoint=endpoint), "1", "ingress-1")
    assert tracing is not None
    service = Traced(gone, tracing).service(ScriptedWorkers())
    began = time.monotonic()
    for _ in range(20):
        await service.generate(GenerationRequest("a"), PNG)
    assert time.monotonic() - began < 1
    tracing.close()
    assert time.monotonic() - began < 10


# --- where else its id stands ----------------------------------------------------------------------------


async def test_log_lines_tell_the_trace(traced: Traced, written: Written) -> None:
    machine = written("json")
    async with traced.client(ScriptedWorkers([RuntimeError("odd"), None])) as client:
        await client.post(URL, json=BODY, headers=FROM_A_CALLER)
        await client.post(URL, json=BODY)
    logging.getLogger("serve_app").warning("of no request")
    failed, incident, other, none = map(json.loads, machine.getvalue().splitlines())
    assert failed["logger"] == REQUESTS and "incident" in incident["message"]
    assert failed["trace_id"] == incident["trace_id"] == TRACE
    assert len(other["trace_id"]) == 32 and other["trace_id"] != TRACE
    assert "trace_id" not in none


async def test_a_person_reads_the_trace_too(traced: Traced, written: Written) -> None:
    plain = written("plain")
    async with traced.client(ScriptedWorkers([RuntimeError("odd")])) as client:
        await client.post(URL, json=BODY, headers=FROM_A_CALLER)
    assert f" ERROR serve_app.error_mapping: [trace {TRACE}] request failed" in plain.getvalue()


@pytest.mark.parametrize("flag", ["01", "00"])
async def test_exemplars_name_traces_that_a_collector_has(traced: Traced, flag: str) -> None:
    """The caller's flag says whether it records its own part; then there is none of ours either."""
    async with traced.client(ScriptedWorkers()) as client:
        await client.post(URL, json=BODY, headers={"traceparent": f"00-{TRACE}-{PARENT}-{flag}"})
        text = (await client.get("/metrics", headers={"accept": "application/openmetrics-text"})).text
    lines = [line for line in text.splitlines() if line.startswith("zimage_request_seconds") and "#" in line]
    assert [f'# {{trace_id="{TRACE}"}} ' in line for line in lines] == ([True] if flag == "01" else [])
    assert len(traced.sent().spans) == (2 if flag == "01" else 0)


# --- off -------------------------------------------------------------------------------------------------

#: Serve imports a part of OpenTelemetry by itself.
NOTHING = """
    import sys, ray.serve
    of = lambda name: {module for module in sys.modules if module.startswith(name)}
    before = of("opentelemetry")
    from typing import Any, cast
    from serve_app.ingress import build_asgi_app
    from serve_app.worker import ImageWorker
    from serve_app.settings import load_settings
    from serve_app.tracing import current, tracing_of
    settings = load_settings(ui=False)
    tracing = tracing_of(settings, "1", "ingress-1")
    assert tracing is None
    build_asgi_app(cast(Any, None), settings, tracing)
    current().failed("internal_error")
    assert of("opentelemetry") == before, of("opentelemetry") - before
    assert not of("opentelemetry.exporter.otlp") and not of("torch")
"""


def test_by_default_nothing_is_imported() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(NOTHING)], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


async def test_by_default_a_caller_who_traces_changes_nothing() -> None:
    settings, workers = load_settings(ui=False), ScriptedWorkers()
    service = ImageService(workers, ServerMetrics("test"), settings)  # type: ignore[arg-type]
    async with client_of(build_asgi_app(service, settings)) as client:
        answer = await client.post(URL, json=BODY, headers=FROM_A_CALLER)
    assert answer.status_code == 200 and current().id == ""


@pytest.mark.parametrize(
    "wrong", ["collector:4318", "ftp://collector", "http://", "http://a:b", "http://a/?b"]
)
def test_an_address_that_is_none_is_refused_with_an_example(wrong: str) -> None:
    with pytest.raises(SettingsError, match=r"such as http://127\.0\.0\.1:4318, got"):
        load_settings(otlp_endpoint=wrong)


@pytest.mark.parametrize("given", ["http://c:4318", "http://c:4318/", "http://c:4318/v1/traces"])
def test_the_path_may_stand_there_or_not(given: str) -> None:
    assert load_settings(otlp_endpoint=given).otlp_endpoint == "http://c:4318"


def test_an_empty_address_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_OTLP_ENDPOINT", "")
    assert load_settings().otlp_endpoint is None


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter.otlp.proto.http")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Without("opentelemetry.exporter.otlp"), *sys.meta_path])
    with pytest.raises(SettingsError, match=r"pip install 'zimage-turbo\[tracing\]'"):
        load_settings(otlp_endpoint="http://127.0.0.1:4318")


# --- the real server -------------------------------------------------------------------------------------


@pytest.mark.server
def test_a_real_server_sends_traces_and_its_workers_log_their_ids(tmp_path: Path) -> None:
    model = write_overflowing(BFLOAT16, tmp_path / "overflowing")
    quick = {"prompt": "an orangutan", "num_inference_steps": 3, "size": "64x64", "seed": 1}
    options = ("--model", str(model), "--device", "cpu", "--no-ui")
    with (
        collector() as received,
        running_server(
            *options, "--otlp-endpoint", received.endpoint, environment={"ZIMAGE_LOG_FORMAT": "json"}
        ) as server,
        httpx.Client(base_url=server.base_url, timeout=300) as client,
    ):
        headers = FROM_A_CALLER | {"x-request-id": "a-client-chose-this"}
        assert client.post(URL, json=quick, headers=headers).status_code == 200
        root = received.until_a_root_came(ROOT_NAME)
        stages = [span for span in received.spans if span.parent_id == root.id]
        text = client.get("/metrics", headers={"accept": "application/openmetrics-text"}).text
        # What has not been sent yet is sent when the server ends.
        assert client.post(URL, json=quick).status_code == 200
        assert server.stop() == 0
        assert len({span.trace_id for span in received.spans}) == 2
    assert (root.trace_id, root.parent_id) == (TRACE, PARENT)
    assert root.attributes["zimage.request_id"] == "a-client-chose-this"
    names = {"enhance", "wait", "encode", "denoise", "decode", "refine", "encode_file"}
    assert {span.name for span in stages} == names
    assert _events(stages, "denoise").count("guard trip") >= 1
    assert f'# {{request_id="a-client-chose-this",trace_id="{TRACE}"}} ' in text
    assert b"orangutan" not in received.raw
    lines = [json.loads(line[line.index("{") :]) for line in server.output if TRACE in line]
    assert {line["logger"] for line in lines} >= {REQUESTS, "zimage_engine.engine"}
    assert {(line["request_id"], line["trace_id"]) for line in lines} == {("a-client-chose-this", TRACE)}


def _events(spans: list[ReceivedSpan], name: str) -> list[str]:
    return [event.name for span in spans if span.name == name for event in span.events]


class _Without:
    """Finds none of the modules below a name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.startswith(self._name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
