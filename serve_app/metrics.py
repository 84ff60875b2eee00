"""What Prometheus is told: one row a metric, and the two places where values come in.

`ServerMetrics` lives in each ingress and turns reports and failures into numbers; `WorkerMetrics` lives in
each image worker. Every series carries the name of the process that counted it in the label `replica`. So a
replica that is started anew starts series of its own from 0, nothing is counted twice, and the series of one
that is gone end. `merged` joins the texts of all of them, so that a scrape of any ingress sees everything,
whichever node it runs on: scrape one ingress, never each. A scraper that reads OpenMetrics is told, beside
the buckets of what a request took, the id of a request that fell into each. Knows nothing of HTTP and of Ray.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from zimage_engine.speed.levers import LEVER_NAMES
from zimage_engine.types import (
    DeviceStatus,
    GenerationReport,
    GuardTrip,
    ModelDescription,
    Rewrite,
    RewriteOutcome,
)

#: Fine around the 0.8 s of a GPU and the 30 s of a laptop; the ends are a stage of a tiny model and ten
#: large pictures on a CPU. The latency objective in monitoring/ is one of these bounds.
SECONDS_BUCKETS = (
    0.01,
    0.025,
    0.05,
    0.1,
    0.2,
    0.4,
    0.6,
    0.8,
    1,
    1.5,
    2.5,
    4,
    8,
    15,
    20,
    30,
    45,
    60,
    120,
    600,
)
#: An eighth of those: a picture takes eight steps.
STEP_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 3, 4, 6, 10, 30)

#: The label that every series carries beside those of its row.
REPLICA = "replica"
#: What stands for a value that is in no closed set.
OTHER = "other"
#: Instead of a closed set: the label has one value for as long as the process lives.
ONE_VALUE: tuple[str, ...] = ()

OUTCOMES = (
    "ok",
    "cancelled",
    "queue_full",
    "rate_limit_exceeded",
    "invalid_value",
    "missing_required_parameter",
    "unknown_parameter",
    "string_above_max_length",
    "invalid_json",
    "invalid_multipart",
    "invalid_image",
    "unsupported_media_type",
    "unsupported_value",
    "model_not_found",
    "client_closed_request",
    "model_not_ready",
    "model_load_failed",
    "worker_lost",
    "request_kills_workers",
    "deadline_exceeded",
    "guard_exhausted",
    "schedule_invalid",
    "does_not_fit",
    "out_of_memory",
    "device_unavailable",
    "device_failed",
    "signing_failed",
    "engine_error",
    "files_unavailable",
    "internal_error",
)
STAGES = ("enhance", "encode", "denoise", "decode", "refine", "encode_file", "total")
WARNINGS = (
    "size_outside_range",
    "source_scaled",
    "source_cut",
    "strength_raised",
    "num_inference_steps_outside_range",
    "guidance_scale_outside_range",
    "prompt_truncated",
    "negative_prompt_truncated",
    "guard_recovered",
    "picture_redrawn",
    "guidance_lowered",
    "values_clipped",
    "picture_black",
    "picture_flat",
    "picture_black_borders",
    "picture_blocks",
    "picture_noise",
    "result_not_kept",
    "watermark_unreadable",
    "prompt_not_rewritten",
    "history_not_kept",
)
#: How a language model's rewriting of a prompt ended.
REWRITES = get_args(RewriteOutcome)
GUARDED = ("encode", "source", "denoise", "decode", "picture")
RUNGS = ("same_inputs", "lower_guidance", "plain_attention", "float32", "rest_float32", "tiled")
ATTEMPTS = ("recovered", "failed", "skipped")
VRAM_KINDS = ("used", "free", "total", "allocated", "reserved", "peak")
DEFRAGS = ("empty_cache", "deep")
OOM_STAGES = ("encode", "denoise", "decode")
OOM_OUTCOMES = ("freed", "leaner", "tiled", "refused")
PROMPT_LOOKUPS = ("hit", "miss")
JOB_STATUSES = ("queued", "running", "done", "failed", "cancelled")
#: What moves a picture's last bits to draw it quicker, by the engine's names.
LEVERS = LEVER_NAMES
DELIVERIES = ("delivered", "again", "given_up")
OFFLOAD_MODES = ("none", "model", "stream", "sequential", "disk")
MODEL_LOADS = ("ok", "failed")


@dataclass(frozen=True)
class MetricRow:
    """One metric: its name without the suffix that the client library appends, its labels' values, its unit.

    `labels` gives for each label the closed set of its values, or ONE_VALUE; anything else is counted under
    OTHER. `starts_at_zero`: every combination is there from the first scrape on, so that a rate over it has
    a start. Labels of one value are never filled so.
    """

    name: str
    kind: type[Counter] | type[Gauge] | type[Histogram]
    unit: str
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = SECONDS_BUCKETS
    starts_at_zero: bool = False

    @property
    def exposed_name(self) -> str:
        """The name that queries use; of a histogram the part before `_bucket`, `_sum` and `_count`."""
        return f"{self.name}_total" if self.kind is Counter else self.name

    @property
    def most_series(self) -> int:
        """How many series one replica can have of it, whatever happens."""
        combinations = math.prod(len(values) + 1 if values else 1 for values in self.labels.values())
        return combinations * (len(self.buckets) + 3 if self.kind is Histogram else 1)


SERVER_ROWS = (
    MetricRow(
        "zimage_requests",
        Counter,
        "requests",
        "Requests for pictures by outcome: ok, cancelled, or the error's code. What is turned away before, "
        "for its key or its size, is no request for a picture.",
        {"outcome": OUTCOMES},
        starts_at_zero=True,
    ),
    MetricRow(
        "zimage_requests_in_flight",
        Gauge,
        "requests",
        "Requests that were checked and have no answer yet: those that wait and those that are drawn.",
    ),
    MetricRow("zimage_pictures", Counter, "pictures", "Pictures drawn and handed over."),
    MetricRow(
        "zimage_pictures_accelerated",
        Counter,
        "pictures",
        "Pictures that were drawn quicker at the price of other last bits, by what acted; one is counted for "
        "each that acted on it, and those of the plain path for none.",
        {"lever": LEVERS},
        starts_at_zero=True,
    ),
    MetricRow("zimage_pixels", Counter, "pixels", "Pixels of the pictures that were handed over."),
    MetricRow(
        "zimage_request_seconds",
        Histogram,
        "seconds",
        "Seconds from a checked request to its finished reply, the waiting for a worker included.",
    ),
    MetricRow(
        "zimage_queue_wait_seconds",
        Histogram,
        "seconds",
        "Seconds of a served request in which nothing was done for it: waiting for a worker, and the way to "
        "it and back.",
    ),
    MetricRow(
        "zimage_generation_seconds",
        Histogram,
        "seconds",
        "Seconds by stage. Of a picture: encode, denoise, decode, refine where it was refined, and total; "
        "of a request: enhance, encode_file.",
        {"stage": STAGES},
    ),
    MetricRow(
        "zimage_prompt_cache",
        Counter,
        "prompts",
        "Prompts that were looked for among those encoded before, negative ones too: hit, or miss, where the "
        "text encoder had to read them. Nothing is counted where encoded prompts are not kept.",
        {"outcome": PROMPT_LOOKUPS},
        starts_at_zero=True,
    ),
    MetricRow(
        "zimage_prompt_rewrites",
        Counter,
        "prompts",
        "Prompts that a language model was asked to rewrite, by outcome: used, what was wrong with its text, "
        "or why there was none (unfinished, timeout, unavailable, failed). With all but used the rules were "
        "used.",
        {"outcome": REWRITES},
        starts_at_zero=True,
    ),
    MetricRow(
        "zimage_warnings", Counter, "warnings", "Warnings in reports by their code.", {"code": WARNINGS}
    ),
    MetricRow(
        "zimage_guard_trips",
        Counter,
        "trips",
        "Values that were not finite or absurdly large, by where: encode, denoise, decode; source: "
        "a picture to draw from; picture: one that "
        "looked wrong though nothing was found.",
        {"stage": GUARDED},
        starts_at_zero=True,
    ),
    MetricRow(
        "zimage_guard_retries",
        Counter,
        "attempts",
        "What was tried against them, by rung and outcome: recovered, failed, skipped.",
        {"stage": GUARDED, "rung": RUNGS, "outcome": ATTEMPTS},
    ),
    MetricRow(
        "zimage_guard_clipped_values",
        Counter,
        "values",
        "Values of the denoiser's output that were clipped into the family's range.",
    ),
    MetricRow(
        "zimage_worker_retries",
        Counter,
        "requests",
        "Requests sent to another worker because theirs had died, or its device had failed.",
    ),
    MetricRow(
        "zimage_device_failures",
        Counter,
        "failures",
        "Workers whose device failed while it drew: a kernel's fault, memory that cannot be corrected, a "
        "driver that is gone. Each is replaced.",
    ),
    MetricRow(
        "zimage_jobs",
        Gauge,
        "jobs",
        "Jobs that are kept, by status; of the database, so that each ingress on it tells the same. Absent "
        "until it was asked.",
        {"status": JOB_STATUSES},
    ),
    MetricRow(
        "zimage_jobs_oldest_queued_seconds",
        Gauge,
        "seconds",
        "How long the job that has waited longest has waited, 0 where none waits. Of the database too.",
    ),
    MetricRow(
        "zimage_webhook_deliveries",
        Counter,
        "tries",
        "Tries to tell of a job's end by webhook: delivered, again where it failed and is tried later, "
        "given_up where it was the last.",
        {"outcome": DELIVERIES},
        starts_at_zero=True,
    ),
    MetricRow("zimage_workers_wanted", Gauge, "workers", "Image workers that the settings ask for."),
    MetricRow(
        "zimage_build_info", Gauge, "1", "Always 1; the version is in the label.", {"version": ONE_VALUE}
    ),
)

WORKER_ROWS = (
    MetricRow(
        "zimage_worker_up", Gauge, "1", "1 for each worker that has its model and answered this scrape."
    ),
    MetricRow("zimage_worker_busy", Gauge, "1", "1 while the worker draws."),
    MetricRow(
        "zimage_worker_model_info",
        Gauge,
        "1",
        "Always 1; what the worker has in memory is in the labels, one series a model.",
        {"model": ONE_VALUE, "family": ONE_VALUE, "device": ONE_VALUE, "dtype": ONE_VALUE},
    ),
    MetricRow(
        "zimage_model_load_seconds",
        Gauge,
        "seconds",
        "Seconds that loading the last model took, a download and repairs included.",
    ),
    MetricRow(
        "zimage_models_in_memory", Gauge, "models", "Models that the worker has in memory at the moment."
    ),
    MetricRow(
        "zimage_model_loads",
        Counter,
        "loads",
        "Models of the list that were loaded on demand, by outcome: ok, or failed.",
        {"outcome": MODEL_LOADS},
        starts_at_zero=True,
    ),
    MetricRow(
        "zimage_model_unloads", Counter, "unloads", "Models that went so that another had their place."
    ),
    MetricRow("zimage_model_repairs", Gauge, "repairs", "Repairs that the checkpoint needed to be loaded."),
    MetricRow(
        "zimage_denoiser_passes",
        Counter,
        "passes",
        "Forward passes of the denoiser, each a step of one or more pictures.",
    ),
    MetricRow(
        "zimage_denoiser_pass_pictures",
        Counter,
        "pictures",
        "Pictures that had a step in a forward pass, summed over the passes.",
    ),
    MetricRow(
        "zimage_step_seconds",
        Histogram,
        "seconds",
        "Seconds from the end of one denoising step to the end of the next of the same picture.",
        buckets=STEP_BUCKETS,
    ),
    MetricRow(
        "zimage_vram_bytes",
        Gauge,
        "bytes",
        "Memory of the worker's device by kind: used (by anyone), free, total; allocated, reserved and peak "
        "(the most allocated so far) of this worker. Absent where the device does not tell, as a CPU.",
        {"kind": VRAM_KINDS},
    ),
    MetricRow(
        "zimage_vram_fragmentation_ratio",
        Gauge,
        "ratio",
        "The part of the reserved memory that lies free between pieces in use. Absent as above.",
    ),
    MetricRow(
        "zimage_defrag",
        Counter,
        "runs",
        "Defragmentations by kind: the cache emptied, or the deep form that moves the weights.",
        {"kind": DEFRAGS},
        starts_at_zero=True,
    ),
    MetricRow("zimage_defrag_seconds", Counter, "seconds", "Seconds that defragmenting has taken."),
    MetricRow(
        "zimage_oom",
        Counter,
        "events",
        "Out-of-memory errors of the device, by stage and by what was done: memory freed, a leaner plan, "
        "smaller pieces, or the request refused.",
        {"stage": OOM_STAGES, "outcome": OOM_OUTCOMES},
        starts_at_zero=True,
    ),
    MetricRow(
        "zimage_offload_mode",
        Gauge,
        "1",
        "1 for the way in which the weights are kept now, 0 for the others.",
        {"mode": OFFLOAD_MODES},
    ),
    MetricRow(
        "zimage_store_bytes",
        Gauge,
        "bytes",
        "The disk on which downloaded models and repaired views lie: free, total.",
        {"kind": ("free", "total")},
    ),
)

#: What only the scrape itself knows; without the label `replica`.
SCRAPE_ROWS = (
    MetricRow(
        "zimage_model_loaded",
        Gauge,
        "1",
        "1 where at least one worker has its model and answered this scrape, else 0.",
    ),
)

ROWS = SERVER_ROWS + WORKER_ROWS + SCRAPE_ROWS


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """What a worker tells of its device's memory; counts and seconds are totals since it started.

    `bytes_by_kind` has keys of VRAM_KINDS, those that are known. `ooms` counts by (stage, outcome).
    """

    bytes_by_kind: Mapping[str, int] = field(default_factory=dict)
    fragmentation_ratio: float | None = None
    offload_mode: str | None = None
    defrags: Mapping[str, int] = field(default_factory=dict)
    defrag_seconds: float = 0.0
    ooms: Mapping[tuple[str, str], int] = field(default_factory=dict)
    model_loads: Mapping[str, int] = field(default_factory=dict)
    model_unloads: int = 0


class _Table:
    """The metrics of some rows on a registry of their own, all with one replica's name."""

    def __init__(self, rows: tuple[MetricRow, ...], replica: str) -> None:
        # A second series for each counter that tells when it began; nobody asks for it here.
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.replica = replica
        self._rows = {row.name: row for row in rows}
        self._metrics = {row.name: self._make(row) for row in rows}
        self._totals: dict[tuple[str, ...], float] = {}
        for row in rows:
            if row.starts_at_zero or (row.kind is Counter and not row.labels):
                for values in _combinations(row):
                    self.count(row.name, *values, by=0)

    def _make(self, row: MetricRow) -> Counter | Gauge | Histogram:
        labels = (*row.labels, REPLICA)
        if row.kind is Histogram:
            return Histogram(row.name, row.help, labels, registry=self.registry, buckets=row.buckets)
        return row.kind(row.name, row.help, labels, registry=self.registry)

    def _of(self, name: str, labels: tuple[str, ...]) -> Counter | Gauge | Histogram:
        sets = self._rows[name].labels.values()
        bounded = [
            value if not known or value in known else OTHER for value, known in zip(labels, sets, strict=True)
        ]
        return self._metrics[name].labels(*bounded, self.replica)

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        metric = self._of(name, labels)
        assert isinstance(metric, Counter)
        metric.inc(by)

    def count_up_to(self, name: str, total: float, *labels: str) -> None:
        """Bring a counter to a total that somebody else counts."""
        before = self._totals.get((name, *labels), 0.0)
        self.count(name, *labels, by=max(0.0, total - before))
        self._totals[name, *labels] = max(before, total)

    def observe(
        self, name: str, seconds: float, *labels: str, exemplar: Mapping[str, str] | None = None
    ) -> None:
        metric = self._of(name, labels)
        assert isinstance(metric, Histogram)
        metric.observe(max(0.0, seconds), dict(exemplar) if exemplar else None)

    def set(self, name: str, value: float, *labels: str) -> None:
        metric = self._of(name, labels)
        assert isinstance(metric, Gauge)
        metric.set(value)

    def forget(self, name: str) -> None:
        """No series of it until it is set again."""
        self._metrics[name].clear()

    def add(self, name: str, value: float) -> None:
        metric = self._of(name, ())
        assert isinstance(metric, Gauge)
        metric.inc(value)

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def text_with_exemplars(self) -> str:
        return openmetrics.generate_latest(self.registry).decode()


def _combinations(row: MetricRow) -> Iterable[tuple[str, ...]]:
    return itertools.product(*row.labels.values())


class ServerMetrics:
    """The numbers of one ingress."""

    def __init__(self, version: str, replica: str = "local", workers_wanted: int = 1) -> None:
        self._table = _Table(SERVER_ROWS, replica)
        self._table.set("zimage_build_info", 1, version)
        self._table.set("zimage_workers_wanted", workers_wanted)
        self._table.set("zimage_requests_in_flight", 0)
        #: The same number, for whoever must know it within this process.
        self.in_flight = 0

    def named_text(self) -> tuple[str, str]:
        """This ingress' name and its metrics as text of OpenMetrics, which has a place for exemplars."""
        return self._table.replica, self._table.text_with_exemplars()

    def started(self) -> None:
        """A request came in; each is followed by one `record` or one `record_failure`, and one `ended`."""
        self.in_flight += 1
        self._table.add("zimage_requests_in_flight", 1)

    def ended(self) -> None:
        """A request that had `started` has its answer, or nobody waits for it any more."""
        self.in_flight -= 1
        self._table.add("zimage_requests_in_flight", -1)

    def record(
        self,
        report: GenerationReport,
        seconds: float,
        enhance_seconds: float = 0.0,
        encode_file_seconds: float = 0.0,
        exemplar: Mapping[str, str] | None = None,
    ) -> None:
        """A request was served in `seconds`, waiting included.

        `exemplar` names it beside the buckets that it falls into: at most 128 characters, names included.
        """
        table = self._table
        observe = partial(table.observe, exemplar=exemplar)
        table.count("zimage_requests", "ok")
        table.count("zimage_pictures", by=len(report.pictures))
        table.count("zimage_pixels", by=len(report.pictures) * report.width * report.height)
        for lever in report.accelerated_by:
            table.count("zimage_pictures_accelerated", lever, by=len(report.pictures))
        observe("zimage_request_seconds", seconds)
        worked = enhance_seconds + report.seconds + encode_file_seconds
        observe("zimage_queue_wait_seconds", seconds - worked)
        observe("zimage_generation_seconds", enhance_seconds, "enhance")
        observe("zimage_generation_seconds", encode_file_seconds, "encode_file")
        for picture in report.pictures:
            observe("zimage_generation_seconds", picture.encode_seconds, "encode")
            observe("zimage_generation_seconds", picture.denoise_seconds, "denoise")
            observe("zimage_generation_seconds", picture.decode_seconds, "decode")
            if picture.refine_seconds > 0:
                observe("zimage_generation_seconds", picture.refine_seconds, "refine")
            observe("zimage_generation_seconds", picture.seconds, "total")
            self._record_guard(picture.guard.trips)
            table.count("zimage_guard_clipped_values", by=picture.guard.clipped_values)
        if report.prompt_cache is not None:
            table.count("zimage_prompt_cache", "hit", by=report.prompt_cache.hits)
            table.count("zimage_prompt_cache", "miss", by=report.prompt_cache.misses)
        for notice in report.warnings + tuple(w for picture in report.pictures for w in picture.warnings):
            table.count("zimage_warnings", notice.code)

    def record_rewrite(self, rewrite: Rewrite) -> None:
        """A language model was asked to rewrite a prompt."""
        self._table.count("zimage_prompt_rewrites", rewrite.outcome)

    def record_result_not_kept(self) -> None:
        """A picture that was asked for as url could not be kept, and was answered itself."""
        self._table.count("zimage_warnings", "result_not_kept")

    def record_history_not_kept(self) -> None:
        """A picture that was drawn on the page could not be kept in the history."""
        self._table.count("zimage_warnings", "history_not_kept")

    def record_failure(self, outcome: str, trips: Iterable[GuardTrip] = ()) -> None:
        """A request ended without pictures; `outcome` is one of OUTCOMES."""
        self._table.count("zimage_requests", outcome)
        self._record_guard(trips)

    def _record_guard(self, trips: Iterable[GuardTrip]) -> None:
        for trip in trips:
            self._table.count("zimage_guard_trips", trip.stage)
            for attempt in trip.attempts:
                self._table.count("zimage_guard_retries", trip.stage, attempt.rung, attempt.outcome)

    def record_retry(self) -> None:
        """A worker died under a request, or its device failed; it is sent to another."""
        self._table.count("zimage_worker_retries")

    def record_device_failure(self) -> None:
        """A worker's device failed under a request."""
        self._table.count("zimage_device_failures")

    def show_jobs(self, by_status: Mapping[str, int], oldest_queued_seconds: float) -> None:
        """What is in the database of jobs; a status that is not there has none."""
        for status in JOB_STATUSES:
            self._table.set("zimage_jobs", by_status.get(status, 0), status)
        self._table.set("zimage_jobs_oldest_queued_seconds", oldest_queued_seconds)

    def record_delivery(self, outcome: str) -> None:
        """A webhook was sent, or it was tried; `outcome` is one of DELIVERIES."""
        self._table.count("zimage_webhook_deliveries", outcome)


class WorkerMetrics:
    """One worker's numbers."""

    def __init__(
        self, replica: str, description: ModelDescription, load_seconds: float = 0.0, repairs: int = 0
    ) -> None:
        self._table = _Table(WORKER_ROWS, replica)
        table = self._table
        table.set("zimage_worker_up", 1)
        table.set("zimage_worker_busy", 0)
        table.set("zimage_model_repairs", repairs)
        self.set_models([description], load_seconds)

    def set_models(self, models: Iterable[ModelDescription], load_seconds: float) -> None:
        """Those that are in memory now, and what loading the last of them took."""
        there = list(models)
        table = self._table
        table.set("zimage_model_load_seconds", load_seconds)
        table.set("zimage_models_in_memory", len(there))
        table.forget("zimage_worker_model_info")
        for model in there:
            table.set("zimage_worker_model_info", 1, model.id, model.family, model.device, model.dtype)

    def set_busy(self, busy: bool) -> None:
        self._table.set("zimage_worker_busy", float(busy))

    def record_step(self, seconds: float) -> None:
        """A step has ended, so long after the one before of the same picture."""
        self._table.observe("zimage_step_seconds", seconds)

    def record_pass(self, pictures: int) -> None:
        """A forward pass of the denoiser in which so many pictures had a step."""
        self._table.count("zimage_denoiser_passes")
        self._table.count("zimage_denoiser_pass_pictures", by=pictures)

    def text(
        self,
        status: DeviceStatus,
        memory: MemoryFigures | None = None,
        store_bytes: tuple[int, int] | None = None,
    ) -> str:
        """The worker's metrics as text, with the memory and the disk (free, total) as they are now."""
        table, figures = self._table, memory or MemoryFigures()
        sizes = {"used": status.used_bytes, "total": status.total_bytes, **figures.bytes_by_kind}
        for kind, size in sizes.items():
            if size is not None:
                table.set("zimage_vram_bytes", size, kind)
        if figures.fragmentation_ratio is not None:
            table.set("zimage_vram_fragmentation_ratio", figures.fragmentation_ratio)
        if figures.offload_mode is not None:
            for mode in OFFLOAD_MODES:
                table.set("zimage_offload_mode", float(mode == figures.offload_mode), mode)
        for kind, runs in figures.defrags.items():
            table.count_up_to("zimage_defrag", runs, kind)
        table.count_up_to("zimage_defrag_seconds", figures.defrag_seconds)
        for (stage, outcome), events in figures.ooms.items():
            table.count_up_to("zimage_oom", events, stage, outcome)
        for outcome, loads in figures.model_loads.items():
            table.count_up_to("zimage_model_loads", loads, outcome)
        table.count_up_to("zimage_model_unloads", figures.model_unloads)
        for kind, size in zip(("free", "total"), store_bytes or (), strict=False):
            table.set("zimage_store_bytes", size, kind)
        return table.text()


class _Merged(Collector):
    """Families of several sources under one heading each."""

    def __init__(self, texts: Iterable[str], is_model_loaded: bool) -> None:
        self._texts = tuple(texts)
        self._is_model_loaded = is_model_loaded

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for text in self._texts:
            for family in _families(text):
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples.extend(family.samples)
        yield from families.values()
        (row,) = SCRAPE_ROWS
        yield GaugeMetricFamily(row.name, row.help, float(self._is_model_loaded))


def _families(text: str) -> Iterator[Metric]:
    """Those of a text of either form; OpenMetrics says its end."""
    read = openmetrics_families if text.endswith("# EOF\n") else text_string_to_metric_families
    yield from read(text)


def merged(ingresses: Iterable[tuple[str, str]], workers: Iterable[str], with_exemplars: bool = False) -> str:
    """One exposition text of the named texts of ingresses and of every worker's text.

    Of one ingress that is there twice the last text counts: two would be the same series with two values.
    With exemplars the text is of OpenMetrics; names, labels and values are the same in both forms.
    """
    worker_texts = tuple(workers)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged((*dict(ingresses).values(), *worker_texts), bool(worker_texts)))
    write = openmetrics.generate_latest if with_exemplars else generate_latest
    return write(registry).decode()
