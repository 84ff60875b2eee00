"""Reports become numbers, and the numbers of several processes one text."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from serve_app import error_mapping, openai_schema
from serve_app.logs import LONGEST_ID
from serve_app.metrics import (
    ATTEMPTS,
    DEFRAGS,
    GUARDED,
    LEVERS,
    OFFLOAD_MODES,
    OOM_OUTCOMES,
    OOM_STAGES,
    OUTCOMES,
    ROWS,
    RUNGS,
    SERVER_ROWS,
    VRAM_KINDS,
    WARNINGS,
    WORKER_ROWS,
    MemoryFigures,
    ServerMetrics,
    WorkerMetrics,
    merged,
)
from serve_app.ui.texts import NOTICES_IN_CHINESE
from tests.serve_app.test_openai_schema import MODEL
from tests.serve_app.wrong_inputs import WRONG_INPUTS
from zimage_engine import quality
from zimage_engine.families import FAMILIES
from zimage_engine.memory import defrag, oom
from zimage_engine.memory.residency import Residency
from zimage_engine.prompts.enhancer import unchanged
from zimage_engine.sampling import recovery
from zimage_engine.speed import levers
from zimage_engine.types import (
    DeviceStatus,
    GenerationReport,
    GuardAttempt,
    GuardTrip,
    Notice,
    PictureReport,
    PromptCacheUse,
)

CUDA = DeviceStatus("cuda", "A card", total_bytes=12_000, used_bytes=5_000)
CPU = DeviceStatus("cpu", "A processor", total_bytes=None, used_bytes=None)

REPORT = GenerationReport(
    model="tiny",
    family="z-image-turbo",
    device="cpu",
    dtype="bfloat16",
    prompt="a",
    negative_prompt="",
    enhancement=unchanged("a", None),
    width=64,
    height=64,
    num_inference_steps=2,
    guidance_scale=1.0,
    scheduler="S",
    seconds=3.0,
    pictures=(
        PictureReport(1, 1.5, 0.2, 1.0, 0.3),
        PictureReport(2, 1.25, 0.0, 1.0, 0.25, warnings=(Notice("picture_flat", "flat"),)),
    ),
    warnings=(Notice("num_inference_steps_outside_range", "few"),),
)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


ME = ("replica", "local")


def test_a_report_is_counted_by_picture_and_by_stage() -> None:
    metrics = ServerMetrics("1.2.3", workers_wanted=3)
    metrics.record(REPORT, seconds=4.0, enhance_seconds=0.25, encode_file_seconds=0.5)
    metrics.record_failure("queue_full")
    metrics.record_retry()
    seen = samples(merged([metrics.named_text()], []))
    assert seen["zimage_requests_total", (("outcome", "ok"), ME)] == 1
    assert seen["zimage_requests_total", (("outcome", "queue_full"), ME)] == 1
    assert seen["zimage_pictures_total", (ME,)] == 2
    assert seen["zimage_pixels_total", (ME,)] == 2 * 64 * 64
    assert seen["zimage_request_seconds_sum", (ME,)] == 4.0
    assert seen["zimage_queue_wait_seconds_sum", (ME,)] == 4.0 - 3.0 - 0.25 - 0.5
    assert seen["zimage_generation_seconds_sum", (ME, ("stage", "total"))] == 2.75
    assert seen["zimage_generation_seconds_count", (ME, ("stage", "decode"))] == 2
    assert seen["zimage_generation_seconds_sum", (ME, ("stage", "enhance"))] == 0.25
    assert seen["zimage_generation_seconds_sum", (ME, ("stage", "encode_file"))] == 0.5
    assert ("zimage_generation_seconds_count", (ME, ("stage", "refine"))) not in seen, "nothing was refined"
    assert seen["zimage_warnings_total", (("code", "picture_flat"), ME)] == 1
    assert seen["zimage_warnings_total", (("code", "num_inference_steps_outside_range"), ME)] == 1
    assert seen["zimage_worker_retries_total", (ME,)] == 1
    assert seen["zimage_workers_wanted", (ME,)] == 3
    assert seen["zimage_build_info", (ME, ("version", "1.2.3"))] == 1
    assert seen["zimage_model_loaded", ()] == 0


def test_prompts_are_counted_by_whether_they_were_encoded_before() -> None:
    metrics = ServerMetrics("1")
    name = "zimage_prompt_cache_total"
    assert samples(metrics.named_text()[1])[name, (("outcome", "hit"), ME)] == 0
    for use in (PromptCacheUse(1, 1), PromptCacheUse(2, 0), None):
        metrics.record(replace(REPORT, prompt_cache=use), 4.0)
    seen = samples(metrics.named_text()[1])
    assert seen[name, (("outcome", "hit"), ME)] == 3
    assert seen[name, (("outcome", "miss"), ME)] == 1


def test_pictures_are_counted_by_what_made_them_quicker() -> None:
    metrics = ServerMetrics("1")
    name = "zimage_pictures_accelerated_total"
    before = samples(metrics.named_text()[1])
    assert {labels[0][1]: value for (of, labels), value in before.items() if of == name} == dict.fromkeys(
        LEVERS, 0
    )
    for acted in (("channels_last_vae", "compiled"), ("compiled",), ()):
        metrics.record(replace(REPORT, accelerated_by=acted), 4.0)
    seen = samples(metrics.named_text()[1])
    assert seen[name, (("lever", "compiled"), ME)] == 4
    assert seen[name, (("lever", "channels_last_vae"), ME)] == 2
    assert seen[name, (("lever", "cuda_graphs"), ME)] == 0
    assert seen["zimage_pictures_total", (ME,)] == 6


def test_what_is_under_way_is_told_until_it_ends() -> None:
    metrics = ServerMetrics("1")
    metrics.started()
    metrics.started()
    metrics.ended()
    assert samples(metrics.named_text()[1])["zimage_requests_in_flight", (ME,)] == 1


def test_the_texts_of_all_replicas_are_joined_under_one_heading_each() -> None:
    texts = [WorkerMetrics("one", MODEL).text(CUDA), WorkerMetrics("two", MODEL).text(CPU)]
    ingresses = [ServerMetrics("1", name).named_text() for name in ("left", "right")]
    text = merged(ingresses, texts)
    assert text.count("# HELP zimage_worker_up ") == text.count("# HELP zimage_requests_total ") == 1
    seen = samples(text)
    assert seen["zimage_worker_up", (("replica", "one"),)] == 1
    assert seen["zimage_worker_up", (("replica", "two"),)] == 1
    assert seen["zimage_pictures_total", (("replica", "left"),)] == 0
    assert seen["zimage_pictures_total", (("replica", "right"),)] == 0
    assert seen["zimage_vram_bytes", (("kind", "used"), ("replica", "one"))] == 5_000
    assert ("zimage_vram_bytes", (("kind", "used"), ("replica", "two"))) not in seen
    assert seen["zimage_model_loaded", ()] == 1


def test_an_ingress_that_is_there_twice_has_one_series() -> None:
    metrics = ServerMetrics("1", "left")
    before = metrics.named_text()
    metrics.record(REPORT, 4.0)
    text = merged([before, metrics.named_text()], [])
    assert [line for line in text.splitlines() if line.startswith("zimage_pictures_total")] == [
        'zimage_pictures_total{replica="left"} 2.0'
    ]


EXEMPLAR = {"request_id": 'a "quoted" \\ id', "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736"}


def served(replica: str, exemplar: dict[str, str] | None) -> ServerMetrics:
    metrics = ServerMetrics("1", replica)
    metrics.record(REPORT, 4.0, 0.25, 0.5, exemplar)
    return metrics


def test_exemplars_survive_the_joining_of_all_texts() -> None:
    """Also those of an ingress that is asked by another one; the bucket that 4 s fall into has them."""
    ingresses = [
        served("left", EXEMPLAR).named_text(),
        served("right", EXEMPLAR | {"request_id": "r"}).named_text(),
        served("bare", None).named_text(),
    ]
    text = merged(ingresses, [WorkerMetrics("one", MODEL).text(CUDA)], with_exemplars=True)
    found = {
        (sample.name, sample.labels["replica"], sample.labels["le"], *sample.exemplar.labels.items())
        for family in openmetrics_families(text)
        for sample in family.samples
        if sample.exemplar and family.name == "zimage_request_seconds"
    }
    assert found == {
        ("zimage_request_seconds_bucket", "left", "4.0", *EXEMPLAR.items()),
        (
            "zimage_request_seconds_bucket",
            "right",
            "4.0",
            ("request_id", "r"),
            ("trace_id", EXEMPLAR["trace_id"]),
        ),
    }
    assert text.endswith("# EOF\n") and text.count("# EOF") == 1


def test_without_exemplars_the_text_is_as_if_there_were_none() -> None:
    """A scraper that reads Prometheus' text gets it byte for byte as the client library writes it."""
    one, other = served("left", EXEMPLAR), served("left", None)
    text = merged([one.named_text()], [])
    assert text == merged([other.named_text()], [])
    written = generate_latest(one._table.registry).decode()
    assert text.startswith(written) and "#  {" not in text and "# EOF" not in text


def test_both_forms_have_the_same_names_labels_and_values() -> None:
    ingress, worker = served("left", EXEMPLAR).named_text(), WorkerMetrics("one", MODEL).text(CUDA)
    plain = samples(merged([ingress], [worker]))
    with_exemplars = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in openmetrics_families(merged([ingress], [worker], with_exemplars=True))
        for sample in family.samples
    }
    assert with_exemplars == plain and ("zimage_pictures_total", (("replica", "left"),)) in plain


def test_the_longest_name_of_a_request_fits_into_an_exemplar() -> None:
    served("left", {"request_id": "x" * LONGEST_ID, "trace_id": "0" * 32})
    with pytest.raises(ValueError, match="128"):
        served("left", {"request_id": "x" * (LONGEST_ID + 15), "trace_id": "0" * 32})


def test_steps_and_forward_passes_are_counted() -> None:
    metrics = WorkerMetrics("one", MODEL)
    for pictures in (1, 3):
        metrics.record_step(0.25)
        metrics.record_pass(pictures)
    found = samples(metrics.text(CPU))
    of_the_worker = (("replica", "one"),)
    assert found["zimage_step_seconds_count", of_the_worker] == 2
    assert found["zimage_step_seconds_sum", of_the_worker] == 0.5
    assert found["zimage_denoiser_passes_total", of_the_worker] == 2
    assert found["zimage_denoiser_pass_pictures_total", of_the_worker] == 4


def test_a_memory_keepers_totals_become_counters() -> None:
    metrics = WorkerMetrics("one", MODEL)
    figures = MemoryFigures(
        bytes_by_kind={"free": 2, "allocated": 3, "reserved": 4, "peak": 5},
        fragmentation_ratio=0.25,
        offload_mode="stream",
        defrags={"deep": 2},
        defrag_seconds=1.5,
        ooms={("decode", "tiled"): 3},
    )
    metrics.text(CUDA, figures)
    seen = samples(metrics.text(CUDA, figures, store_bytes=(7, 8)))
    one = ("replica", "one")
    sizes = {kind: seen["zimage_vram_bytes", (("kind", kind), one)] for kind in VRAM_KINDS}
    assert sizes == {"used": 5_000, "free": 2, "total": 12_000, "allocated": 3, "reserved": 4, "peak": 5}
    assert seen["zimage_vram_fragmentation_ratio", (one,)] == 0.25
    assert seen["zimage_offload_mode", (("mode", "stream"), one)] == 1
    assert seen["zimage_offload_mode", (("mode", "none"), one)] == 0
    assert seen["zimage_defrag_total", (("kind", "deep"), one)] == 2
    assert seen["zimage_defrag_total", (("kind", "empty_cache"), one)] == 0
    assert seen["zimage_defrag_seconds_total", (one,)] == 1.5
    assert seen["zimage_oom_total", (("outcome", "tiled"), one, ("stage", "decode"))] == 3
    assert seen["zimage_store_bytes", (("kind", "free"), one)] == 7


def test_names_and_units_are_told_once() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert all(row.name.startswith("zimage_") and row.help.endswith(".") and row.unit for row in ROWS)
    for row in ROWS:
        for unit in ("seconds", "bytes", "ratio"):
            assert row.name.endswith(f"_{unit}") == (row.unit == unit), row


#: What Prometheus is to keep for one replica at the most.
MOST_SERIES = 520


def test_a_replica_has_a_bounded_number_of_series_whatever_it_is_told() -> None:
    server, worker = ServerMetrics("1"), WorkerMetrics("one", MODEL)
    anything = [f"made up {number}" for number in range(100)]
    for outcome in (*OUTCOMES, *anything):
        attempts = [*ATTEMPTS, outcome]
        trips = [
            GuardTrip(stage, 1, "nan", tuple(GuardAttempt(rung, ended, 0.0) for ended in attempts))
            for stage in (*GUARDED, outcome)
            for rung in (*RUNGS, outcome)
        ]
        server.record_failure(outcome, trips)
        server.record(replace(REPORT, warnings=(Notice(outcome, ""),)), 1.0)
    ooms = dict.fromkeys(product((*OOM_STAGES, *anything), (*OOM_OUTCOMES, *anything)), 1)
    figures = MemoryFigures(dict.fromkeys(VRAM_KINDS, 1), 0.5, "none", dict.fromkeys(anything, 1), 1.0, ooms)
    for rows, text in ((SERVER_ROWS, server.named_text()[1]), (WORKER_ROWS, worker.text(CUDA, figures))):
        series, bound = len(samples(text)), sum(row.most_series for row in rows)
        assert series <= bound <= MOST_SERIES, (series, bound)
        assert 'outcome="other"' in text and "made up" not in text


def test_the_closed_sets_are_those_of_the_code() -> None:
    """A code that is missing here would be counted as `other`, and nobody would find it."""
    answers = {row.code for row in error_mapping.ROWS.values()}
    assert answers <= set(OUTCOMES)
    assert set(RUNGS) == set(recovery.RUNGS)
    assert set(quality.CODES) <= set(WARNINGS) == set(NOTICES_IN_CHINESE)
    assert set(OFFLOAD_MODES) == {residency.value for residency in Residency}
    assert set(OOM_OUTCOMES) == set(get_args(oom.Rung))
    assert set(OOM_STAGES) == set(get_args(oom.Stage))
    assert set(LEVERS) == {lever.name for lever in levers.LEVERS}
    assert set(DEFRAGS) == set(get_args(defrag.Defrag)) - {"none"}
    for family in FAMILIES:
        assert {*family.encode_rungs, *family.denoise_rungs, *family.decode_rungs} <= set(RUNGS)


@pytest.mark.parametrize("row", WRONG_INPUTS, ids=lambda row: row.name)
def test_each_refusal_of_a_body_has_an_outcome(row: Any) -> None:
    try:
        openai_schema.to_engine(openai_schema.parse(openai_schema.read_json(row.body)))
    except error_mapping.RequestRefused as refused:
        assert refused.code in OUTCOMES
