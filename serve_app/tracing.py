"""OpenTelemetry traces: one span a request, below it one for each stage; off unless a collector is named.

The ingress makes all of them. A worker sends plain times of its clock and needs nothing of OpenTelemetry,
which is imported here alone, and only where traces are on. No span carries a prompt, and an error is
told by its code. Where traces are off, `current()` is a trace that takes everything and tells nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal

from serve_app.logs import in_trace, request_id
from zimage_engine.types import GenerationReport, GuardTrip

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

    from serve_app.settings import Settings
    from serve_app.worker_reply import WorkerReply, WorkerTimes

SERVICE_NAME = "zimage-turbo"
#: What the OTLP protocol puts behind a collector's address.
TRACES_PATH = "/v1/traces"

#: The spans below a request's. `wait` ends when the worker begins; the first is there once a request, those
#: of a picture once for each picture, `refine` and `enhance` only where that was done.
Stage = Literal["enhance", "wait", "encode", "denoise", "decode", "refine", "encode_file"]

Attributes = Mapping[str, str | int | float | tuple[str, ...]]


class Trace:
    """What is told of one request; this one is of a request that is not traced."""

    #: 32 hexadecimal digits; "" where nothing is traced.
    id = ""
    #: Whether a collector gets it: a caller, or OTEL_TRACES_SAMPLER, can leave a trace out.
    is_sampled = False

    def tell(self, **attributes: Any) -> None:
        """Put attributes on the request's span."""

    def failed(self, code: str, trips: Iterable[GuardTrip] = (), is_error: bool = False) -> None:
        """The request ended without pictures; an error it is where the caller could do nothing about it."""

    def answered(self, status: int) -> None:
        """An HTTP answer went out."""

    def happened(self, event: str, **attributes: Any) -> None:
        """Something that has no length happened now."""

    def passed(self, stage: Stage, began_at: float, ended_at: float) -> None:
        """A stage went from one time to another, in seconds since 1970."""

    def drawn(self, reply: WorkerReply, report: GenerationReport, asked_at: float) -> None:
        """A worker, asked at this time, made the pictures of the report."""


_NOT_TRACED = Trace()
_current: ContextVar[Trace] = ContextVar("trace", default=_NOT_TRACED)


def current() -> Trace:
    """The trace of the request that this code works for."""
    return _current.get()


def tracing_of(settings: Settings, version: str, replica: str) -> Tracing | None:
    """Traces as the settings want them; None where they are off."""
    if settings.otlp_endpoint is None:
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Tracing(OTLPSpanExporter(settings.otlp_endpoint + TRACES_PATH), version, replica)


class Tracing:
    """Hands spans to an exporter, in a thread of its own; a collector that is away holds up no request.

    Headers, certificates, sampling and the like come from OpenTelemetry's own variables, such as
    OTEL_EXPORTER_OTLP_HEADERS and OTEL_TRACES_SAMPLER, which its packages read by themselves.
    """

    def __init__(self, exporter: SpanExporter, version: str, replica: str) -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        ours = Resource(
            {"service.name": SERVICE_NAME, "service.version": version, "service.instance.id": replica}
        )
        # A provider of our own, not the process' one: Ray has spans too, which nobody asked for here.
        self._provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(SERVICE_NAME, version)

    def close(self) -> None:
        """Send what is left; nothing is traced afterwards."""
        self._provider.shutdown()

    @contextmanager
    def request(self, name: str, headers: Mapping[str, str] | None = None) -> Iterator[Trace]:
        """The span of a request, continuing its caller's where the headers name one (W3C trace context).

        With headers it is the span of an HTTP server.
        """
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({} if headers is None else dict(headers.items()))
        kind = SpanKind.INTERNAL if headers is None else SpanKind.SERVER
        span = self._tracer.start_span(name, context, kind)
        trace = _OpenTelemetryTrace(self._tracer, span)
        if asked := request_id():
            trace.tell(request_id=asked)
        token = _current.set(trace)
        try:
            with in_trace(trace.id):
                yield trace
        finally:
            _current.reset(token)
            span.end()


class _OpenTelemetryTrace(Trace):
    def __init__(self, tracer: Tracer, span: Span) -> None:
        from opentelemetry.trace import format_trace_id

        self._tracer = tracer
        self._span = span
        context = span.get_span_context()
        # Not valid where OTEL_SDK_DISABLED is set.
        self.id = format_trace_id(context.trace_id) if context.is_valid else ""
        self.is_sampled = context.trace_flags.sampled

    def tell(self, **attributes: Any) -> None:
        self._span.set_attributes({f"zimage.{name}": value for name, value in attributes.items()})

    def failed(self, code: str, trips: Iterable[GuardTrip] = (), is_error: bool = False) -> None:
        from opentelemetry.trace import StatusCode

        # A refusal (4xx) is an error of the caller's span, not of the server's.
        if is_error:
            self._span.set_status(StatusCode.ERROR)
        self.tell(outcome=code)
        self._span.set_attribute("error.type", code)
        for trip in trips:
            self._span.add_event("guard trip", _trip_attributes(trip))

    def happened(self, event: str, **attributes: Any) -> None:
        self._span.add_event(event, {f"zimage.{name}": value for name, value in attributes.items()})

    def answered(self, status: int) -> None:
        self._span.set_attribute("http.response.status_code", status)

    def passed(self, stage: Stage, began_at: float, ended_at: float) -> None:
        self._begun(stage, began_at).end(_nanoseconds(ended_at))

    def drawn(self, reply: WorkerReply, report: GenerationReport, asked_at: float) -> None:
        self.tell(outcome="ok", **_facts(report))
        times = reply.times
        if times is None:
            return
        self.tell(worker=times.worker)
        for recovery in report.memory.oom_recoveries if report.memory else ():
            self.happened("out of memory", recovery=recovery)
        self.passed("wait", asked_at, times.began_at)
        self._tell_pictures(report, times)
        self.passed("encode_file", times.encoded_at - reply.encode_file_seconds, times.encoded_at)

    def _tell_pictures(self, report: GenerationReport, times: WorkerTimes) -> None:
        """One after the other, or beside each other where they were drawn so, each stage as long as it took.

        The denoiser ends with its last step, whose time is known; what was done between the stages, as
        looking at a picture, is a gap.
        """
        at = drawn_from = times.began_at
        for number, picture in enumerate(report.pictures, start=1):
            steps = {step: ended_at for of, step, ended_at in times.steps if of == number}
            trips = picture.guard.trips
            if picture.encode_seconds > 0:
                at = drawn_from = self._stage("encode", number, at, picture.encode_seconds, trips)
            if any(ended_at < at for ended_at in steps.values()):  # drawn beside the one before
                at = drawn_from
            last_step_at = max(steps.values(), default=at)
            began_at = max(at, last_step_at - picture.denoise_seconds)
            at = self._stage("denoise", number, began_at, picture.denoise_seconds, trips, steps)
            at = self._stage("decode", number, at, picture.decode_seconds, trips)
            if picture.refine_seconds > 0:
                at = self._stage("refine", number, at, picture.refine_seconds, ())
            for trip in trips:
                if trip.stage == "picture":
                    self._span.add_event("guard trip", _trip_attributes(trip), _nanoseconds(at))

    def _stage(
        self,
        stage: Stage,
        picture: int,
        began_at: float,
        seconds: float,
        trips: Iterable[GuardTrip],
        steps: Mapping[int, float] | None = None,
    ) -> float:
        """Returns when it ended. A trip is told at the end of its step, or of the stage."""
        ended_at = began_at + seconds
        span = self._begun(stage, began_at)
        span.set_attribute("zimage.picture", picture)
        if steps is not None:
            span.set_attribute("zimage.steps", len(steps))
        for step, at in (steps or {}).items():
            span.add_event("step", {"zimage.step": step}, _nanoseconds(at))
        for trip in trips:
            if trip.stage == stage:
                at = (steps or {}).get(trip.step or 0, ended_at)
                span.add_event("guard trip", _trip_attributes(trip), _nanoseconds(at))
        span.end(_nanoseconds(ended_at))
        return ended_at

    def _begun(self, stage: Stage, began_at: float) -> Span:
        from opentelemetry.trace import set_span_in_context

        return self._tracer.start_span(
            stage, set_span_in_context(self._span), start_time=_nanoseconds(began_at)
        )


def now() -> float:
    """The clock of all spans: seconds since 1970."""
    return time.time()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _facts(report: GenerationReport) -> dict[str, Any]:
    """What is told of a request that was served; none of it is the caller's words."""
    facts = {
        "model": report.model,
        "family": report.family,
        "device": report.device,
        "dtype": report.dtype,
        "width": report.width,
        "height": report.height,
        "pictures": len(report.pictures),
        "steps": report.num_inference_steps,
        "guidance_scale": report.guidance_scale,
        "accelerated_by": report.accelerated_by,
        "warnings": tuple(
            notice.code
            for notice in (*report.warnings, *(each for p in report.pictures for each in p.warnings))
        ),
    }
    return facts if report.memory is None else facts | {"offload": report.memory.offload}


def _trip_attributes(trip: GuardTrip) -> Attributes:
    told: dict[str, str | int | tuple[str, ...]] = {
        "zimage.stage": trip.stage,
        "zimage.finding": trip.finding,
        "zimage.attempts": tuple(f"{each.rung}: {each.outcome}" for each in trip.attempts),
    }
    return told if trip.step is None else told | {"zimage.step": trip.step}
