"""Reports become numbers, and the numbers of several processes one text."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from serve_app.metrics import SERVER_ROWS, WORKER_ROWS, ServerMetrics, WorkerMetrics, merged
from tests.serve_app.test_openai_schema import MODEL
from zimage_engine.prompts.enhancer import unchanged
from zimage_engine.types import DeviceStatus, GenerationReport, Notice, PictureReport

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
        PictureReport(2, 1.25, 0.0, 1.0, 0.25, warnings=(Notice("flat", "flat"),)),
    ),
    warnings=(Notice("few_steps", "few"),),
)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_report_is_counted_by_picture_and_by_stage() -> None:
    metrics = ServerMetrics("1.2.3")
    metrics.record(REPORT, seconds=4.0)
    metrics.record_failure("queue_full")
    metrics.record_retry()
    seen = samples(merged(metrics.registry, []))
    assert seen["zimage_requests_total", (("outcome", "ok"),)] == 1
    assert seen["zimage_requests_total", (("outcome", "queue_full"),)] == 1
    assert seen["zimage_pictures_total", ()] == 2
    assert seen["zimage_request_seconds_sum", ()] == 4.0
    assert seen["zimage_generation_seconds_sum", (("stage", "total"),)] == 2.75
    assert seen["zimage_generation_seconds_count", (("stage", "decode"),)] == 2
    assert seen["zimage_warnings_total", (("code", "flat"),)] == 1
    assert seen["zimage_warnings_total", (("code", "few_steps"),)] == 1
    assert seen["zimage_worker_retries_total", ()] == 1
    assert seen["zimage_build_info", (("version", "1.2.3"),)] == 1


def test_the_workers_texts_are_joined_under_one_heading_each() -> None:
    texts = [WorkerMetrics("one", MODEL).text(CUDA), WorkerMetrics("two", MODEL).text(CPU)]
    text = merged(ServerMetrics("1").registry, texts)
    assert text.count("# HELP zimage_worker_up ") == 1
    seen = samples(text)
    assert seen["zimage_worker_up", (("replica", "one"),)] == 1
    assert seen["zimage_worker_up", (("replica", "two"),)] == 1
    assert seen["zimage_device_memory_bytes", (("kind", "used"), ("replica", "one"))] == 5_000
    assert ("zimage_device_memory_bytes", (("kind", "used"), ("replica", "two"))) not in seen


def test_names_end_in_their_unit_and_are_told_once() -> None:
    rows = SERVER_ROWS + WORKER_ROWS
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.name.startswith("zimage_") and row.help.endswith(".") for row in rows)
