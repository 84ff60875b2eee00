"""What Prometheus is told: one row a metric, and the two places where values come in.

`ServerMetrics` lives in the ingress and turns reports and failures into numbers; `WorkerMetrics`
lives in each image worker. `merged` joins the ingress' registry with the texts of the workers, so
that one scrape sees all, whichever node a worker runs on. Knows nothing of HTTP and of Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from zimage_engine.types import DeviceStatus, GenerationReport, GuardTrip, ModelDescription

#: From a tiny model's step on a GPU to ten large pictures on a CPU.
SECONDS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)


@dataclass(frozen=True)
class MetricRow:
    """One metric: its name without the unit-bearing suffix that the client library appends."""

    name: str
    kind: type[Counter] | type[Gauge] | type[Histogram]
    help: str
    labels: tuple[str, ...] = ()


SERVER_ROWS = (
    MetricRow(
        "zimage_requests",
        Counter,
        "Requests for pictures by outcome: ok, cancelled, or the error's code.",
        ("outcome",),
    ),
    MetricRow("zimage_pictures", Counter, "Pictures drawn and handed over."),
    MetricRow(
        "zimage_request_seconds",
        Histogram,
        "Seconds from a checked request to its finished reply, the waiting for a worker included.",
    ),
    MetricRow(
        "zimage_generation_seconds",
        Histogram,
        "Seconds of one picture by stage: encode, denoise, decode, total.",
        ("stage",),
    ),
    MetricRow("zimage_warnings", Counter, "Warnings in reports by their code.", ("code",)),
    MetricRow(
        "zimage_guard_trips",
        Counter,
        "Values that were not finite or absurdly large, by where: encode, denoise, decode; picture: one that "
        "looked wrong though nothing was found.",
        ("stage",),
    ),
    MetricRow(
        "zimage_guard_retries",
        Counter,
        "What was tried against them, by rung and outcome: recovered, failed, skipped.",
        ("stage", "rung", "outcome"),
    ),
    MetricRow(
        "zimage_guard_clipped_values",
        Counter,
        "Values of the denoiser's output that were clipped into the family's range.",
    ),
    MetricRow("zimage_worker_retries", Counter, "Requests sent to another worker because theirs had died."),
    MetricRow("zimage_build_info", Gauge, "Always 1; the version is in the label.", ("version",)),
)

WORKER_ROWS = (
    MetricRow("zimage_worker_up", Gauge, "1 for each worker that has its model.", ("replica",)),
    MetricRow(
        "zimage_worker_model_info",
        Gauge,
        "Always 1; what the worker loaded is in the labels.",
        ("replica", "model", "family", "device", "dtype"),
    ),
    MetricRow(
        "zimage_device_memory_bytes",
        Gauge,
        "Memory of the worker's device by kind: used, total. Absent where the device does not tell.",
        ("replica", "kind"),
    ),
    MetricRow("zimage_worker_busy", Gauge, "1 while the worker draws.", ("replica",)),
)


class _Table:
    """The metrics of some rows on a registry of their own."""

    def __init__(self, rows: tuple[MetricRow, ...]) -> None:
        # A second series for each counter that tells when it began; nobody asks for it here.
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._metrics = {row.name: self._make(row) for row in rows}

    def _make(self, row: MetricRow) -> Counter | Gauge | Histogram:
        if row.kind is Histogram:
            return Histogram(row.name, row.help, row.labels, registry=self.registry, buckets=SECONDS_BUCKETS)
        return row.kind(row.name, row.help, row.labels, registry=self.registry)

    def _of(self, name: str, labels: tuple[str, ...]) -> Counter | Gauge | Histogram:
        metric = self._metrics[name]
        return metric.labels(*labels) if labels else metric

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        metric = self._of(name, labels)
        assert isinstance(metric, Counter)
        metric.inc(by)

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        metric = self._of(name, labels)
        assert isinstance(metric, Histogram)
        metric.observe(seconds)

    def set(self, name: str, value: float, *labels: str) -> None:
        metric = self._of(name, labels)
        assert isinstance(metric, Gauge)
        metric.set(value)


class ServerMetrics:
    """The ingress' numbers."""

    def __init__(self, version: str) -> None:
        self._table = _Table(SERVER_ROWS)
        self._table.set("zimage_build_info", 1, version)
        # Present from the first scrape, so that a rate over them has a start.
        self._table.count("zimage_requests", "ok", by=0)
        for stage in ("encode", "denoise", "decode", "picture"):
            self._table.count("zimage_guard_trips", stage, by=0)

    @property
    def registry(self) -> CollectorRegistry:
        return self._table.registry

    def record(self, report: GenerationReport, seconds: float) -> None:
        """A request was served in `seconds`, waiting included."""
        self._table.count("zimage_requests", "ok")
        self._table.count("zimage_pictures", by=len(report.pictures))
        self._table.observe("zimage_request_seconds", seconds)
        for picture in report.pictures:
            self._table.observe("zimage_generation_seconds", picture.encode_seconds, "encode")
            self._table.observe("zimage_generation_seconds", picture.denoise_seconds, "denoise")
            self._table.observe("zimage_generation_seconds", picture.decode_seconds, "decode")
            self._table.observe("zimage_generation_seconds", picture.seconds, "total")
            self._record_guard(picture.guard.trips)
            self._table.count("zimage_guard_clipped_values", by=picture.guard.clipped_values)
        for notice in report.warnings + tuple(w for picture in report.pictures for w in picture.warnings):
            self._table.count("zimage_warnings", notice.code)

    def record_failure(self, outcome: str, trips: Iterable[GuardTrip] = ()) -> None:
        """A request ended without pictures; `outcome` is from the closed set of error codes."""
        self._table.count("zimage_requests", outcome)
        self._record_guard(trips)

    def _record_guard(self, trips: Iterable[GuardTrip]) -> None:
        for trip in trips:
            self._table.count("zimage_guard_trips", trip.stage)
            for attempt in trip.attempts:
                self._table.count("zimage_guard_retries", trip.stage, attempt.rung, attempt.outcome)

    def record_retry(self) -> None:
        """A worker died under a request, which is sent to another."""
        self._table.count("zimage_worker_retries")


class WorkerMetrics:
    """One worker's numbers, each with the worker's name in the label `replica`."""

    def __init__(self, replica: str, description: ModelDescription) -> None:
        self._replica = replica
        self._table = _Table(WORKER_ROWS)
        self._table.set("zimage_worker_up", 1, replica)
        self._table.set("zimage_worker_busy", 0, replica)
        self._table.set(
            "zimage_worker_model_info",
            1,
            replica,
            description.id,
            description.family,
            description.device,
            description.dtype,
        )

    def set_busy(self, busy: bool) -> None:
        self._table.set("zimage_worker_busy", float(busy), self._replica)

    def text(self, status: DeviceStatus) -> str:
        """The worker's metrics as text, with the device's memory as it is now."""
        for kind, size in (("used", status.used_bytes), ("total", status.total_bytes)):
            if size is not None:
                self._table.set("zimage_device_memory_bytes", size, self._replica, kind)
        return generate_latest(self._table.registry).decode()


class _Merged(Collector):
    """Families of several sources under one heading each."""

    def __init__(self, own: CollectorRegistry, texts: Iterable[str]) -> None:
        self._own = own
        self._texts = tuple(texts)

    def collect(self) -> Iterator[Metric]:
        yield from self._own.collect()
        families: dict[str, Metric] = {}
        for text in self._texts:
            for family in text_string_to_metric_families(text):
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples.extend(family.samples)
        yield from families.values()


def merged(own: CollectorRegistry, worker_texts: Iterable[str]) -> str:
    """One exposition text of the ingress' registry and of every worker's text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(own, worker_texts))
    return generate_latest(registry).decode()
