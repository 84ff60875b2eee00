"""Stands where an OpenTelemetry collector does: takes what the real exporter sends, on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue


@dataclass(frozen=True)
class Event:
    """Something within a span; `at` is in seconds since 1970."""

    name: str
    at: float
    attributes: dict[str, Any]


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it was sent; ids are hexadecimal, times seconds since 1970. `status`: 0 unset, 2 an error."""

    name: str
    kind: int
    trace_id: str
    id: str
    parent_id: str
    began_at: float
    ended_at: float
    attributes: dict[str, Any]
    events: tuple[Event, ...]
    status: int

    @property
    def seconds(self) -> float:
        return self.ended_at - self.began_at


@dataclass
class Collector:
    """What came in: the spans, what they say of their sender, and the bytes as they were sent."""

    endpoint: str = ""
    spans: list[ReceivedSpan] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    raw: bytes = b""

    def take(self, body: bytes) -> None:
        self.raw += body
        sent = ExportTraceServiceRequest.FromString(body)
        for of_resource in sent.resource_spans:
            self.resources.append(_plain(of_resource.resource.attributes))
            self.spans += [_read(span) for scope in of_resource.scope_spans for span in scope.spans]

    def root(self) -> ReceivedSpan:
        """The one span that is no stage of another one here."""
        (root,) = (span for span in self.spans if span.parent_id not in {each.id for each in self.spans})
        return root

    def stages(self) -> list[ReceivedSpan]:
        """Those below it, in the order of their begins."""
        root = self.root()
        return sorted((span for span in self.spans if span is not root), key=lambda span: span.began_at)

    def until_a_root_came(self, name: str, seconds: float = 60) -> ReceivedSpan:
        """A request's span comes last: its stages are there then."""
        deadline = time.monotonic() + seconds
        while not (found := [span for span in self.spans if span.name == name]):
            assert time.monotonic() < deadline, f"no span {name} among {[s.name for s in self.spans]}"
            time.sleep(0.1)
        return found[-1]


@contextmanager
def collector() -> Iterator[Collector]:
    """One that listens on a port of its own."""
    received = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces", self.path
            received.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    received.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _read(span: Any) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        kind=span.kind,
        trace_id=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        began_at=span.start_time_unix_nano / 1e9,
        ended_at=span.end_time_unix_nano / 1e9,
        attributes=_plain(span.attributes),
        events=tuple(
            Event(each.name, each.time_unix_nano / 1e9, _plain(each.attributes)) for each in span.events
        ),
        status=span.status.code,
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)
