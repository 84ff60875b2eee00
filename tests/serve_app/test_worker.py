"""The image worker by itself: one drawing at a time, ears open meanwhile, and it stops when told."""

from __future__ import annotations

import asyncio
import io
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from serve_app.image_codec import ImageEncoding, read_parameters
from serve_app.settings import Settings
from serve_app.worker import ImageWorker
from serve_app.worker_reply import EVERY_STEP, DrawingBegan, Preview, WorkerReply
from tests.serve_app.conftest import loaded_worker
from tests.zimage_engine.tiny_models.lora import write_lora
from zimage_engine.errors import InvalidSize
from zimage_engine.loading.lora_weight import LoraWeight
from zimage_engine.sampling import sketch
from zimage_engine.sampling.control import DrawingControl
from zimage_engine.types import GenerationRequest, GenerationResult, StepProgress

PNG = ImageEncoding("png")
REQUEST = GenerationRequest(
    "a red circle", width=64, height=64, num_inference_steps=3, guidance_scale=1.0, seed=1, enhance=False
)
LONG = replace(REQUEST, num_inference_steps=100)


@pytest.fixture(scope="module")
def worker(settings: Settings) -> ImageWorker:
    return asyncio.run(_loaded_for_any_loop(settings))


async def _loaded_for_any_loop(settings: Settings) -> ImageWorker:
    return await loaded_worker(settings)


@pytest.fixture
def drawings(worker: ImageWorker, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """When each drawing of the engine began and ended; the lock belongs to this test's event loop."""
    spans: list[tuple[float, float]] = []
    generate: Callable[..., GenerationResult] = worker._pool.engines[0].generate

    def timed(request: GenerationRequest, control: DrawingControl) -> GenerationResult:
        began = time.monotonic()
        try:
            return generate(request, control=control)
        finally:
            spans.append((began, time.monotonic()))

    monkeypatch.setattr(worker._pool.engines[0], "generate", timed)
    monkeypatch.setattr(worker._turn, "_lock", asyncio.Lock())
    return spans


async def test_pictures_come_as_files_with_what_was_asked(
    worker: ImageWorker, drawings: list[tuple[float, float]]
) -> None:
    reply = await worker.generate(replace(REQUEST, n=2), PNG)
    assert [picture.seed for picture in reply.report.pictures] == [1, 2]
    for file, seed in zip(reply.pictures, (1, 2), strict=True):
        assert Image.open(io.BytesIO(file)).size == (64, 64)
        parameters = read_parameters(file)
        assert parameters is not None and f"Seed: {seed}" in parameters


async def test_loras_of_the_settings_act_and_are_told(
    worker: ImageWorker, settings: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    file = write_lora(tiny_model, tmp_path / "style.safetensors")
    chosen = settings.model_copy(update={"loras": (LoraWeight(file, 0.5),), "vae": str(tiny_model / "vae")})
    styled = await loaded_worker(chosen)
    reply = await styled.generate(REQUEST, PNG)
    (use,) = reply.report.loras
    assert (use.name, use.weight) == ("style.safetensors", 0.5)
    parameters = read_parameters(reply.pictures[0])
    assert parameters is not None
    assert f'Lora 1: "<lora:style:0.5>, {use.adapted_modules} modules"' in parameters
    plain = worker._pool.engines[0].generate(REQUEST).images[0]
    assert Image.open(io.BytesIO(reply.pictures[0])).tobytes() != plain.tobytes()


async def test_steps_are_told_as_they_end(worker: ImageWorker, drawings: list[tuple[float, float]]) -> None:
    items = [item async for item in worker.generate_streaming(replace(REQUEST, n=2), PNG)]
    assert items[:-1] == [
        DrawingBegan("local"),
        *(StepProgress(p, 2, s, 3) for p in (1, 2) for s in (1, 2, 3)),
    ]
    assert isinstance(items[-1], WorkerReply)


async def test_pictures_of_one_request_are_drawn_at_once_where_passes_are_shared(
    worker: ImageWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker._turn, "_lock", asyncio.Lock())
    monkeypatch.setattr(sketch, "DECODING_SHARE", 1.0)
    steps: list[float] = []
    monkeypatch.setattr(worker._metrics, "record_step", steps.append)
    wanted = replace(REQUEST, n=3, num_inference_steps=4)
    one_by_one = await worker.generate(wanted, PNG)
    monkeypatch.setattr(worker._turns, "_most", 4)
    items = [item async for item in worker.generate_streaming(wanted, PNG, EVERY_STEP)]
    told = [item for item in items if isinstance(item, StepProgress)]
    assert [(each.step, each.picture) for each in told] == [(s, p) for s in range(1, 5) for p in (1, 2, 3)]
    assert [each.steps_ended for each in told] == list(range(1, 13))
    # Nobody can follow three pictures that change at once.
    assert {item.progress.picture for item in items if isinstance(item, Preview)} == {1}
    reply = items[-1]
    assert isinstance(reply, WorkerReply)
    drawn, alone = (
        [Image.open(io.BytesIO(each)).tobytes() for each in pictures]
        for pictures in (reply.pictures, one_by_one.pictures)
    )
    assert drawn == alone
    assert reply.report.device_seconds is not None
    # Of each picture the steps after its first, whether it was drawn alone or beside others.
    assert len(steps) == 2 * 3 * 3
    assert min(steps) >= 0


async def test_two_requests_never_draw_at_once(
    worker: ImageWorker, drawings: list[tuple[float, float]]
) -> None:
    await asyncio.gather(*(worker.generate(REQUEST, PNG) for _ in range(3)))
    assert len(drawings) == 3
    for (_, ended), (began, _) in itertools.pairwise(drawings):
        assert ended <= began


async def test_health_is_answered_while_a_picture_is_drawn(
    worker: ImageWorker, drawings: list[tuple[float, float]]
) -> None:
    drawing = asyncio.ensure_future(worker.generate(LONG, PNG))
    await asyncio.sleep(0.05)
    await worker.check_health()
    assert 'zimage_worker_busy{replica="local"} 1.0' in await worker.metrics_text()
    assert (await worker.describe()).id == "tiny-z-image"
    assert (await worker.device_status()).device == "cpu"
    assert not drawing.done()
    drawing.cancel()
    await asyncio.wait({drawing})
    assert 'zimage_worker_busy{replica="local"} 0.0' in await worker.metrics_text()


async def test_the_engines_memory_is_told(worker: ImageWorker, drawings: list[tuple[float, float]]) -> None:
    await worker.generate(REQUEST, PNG)
    text = await worker.metrics_text()
    assert 'zimage_offload_mode{mode="none",replica="local"} 1.0' in text
    assert 'zimage_oom_total{outcome="freed",replica="local",stage="decode"} 0.0' in text
    assert 'zimage_store_bytes{kind="free",replica="local"}' in text


async def test_cancelling_stops_the_drawing_before_the_next_begins(
    worker: ImageWorker, drawings: list[tuple[float, float]]
) -> None:
    first = asyncio.ensure_future(worker.generate(replace(LONG, n=10), PNG))
    await asyncio.sleep(0.2)
    second = asyncio.ensure_future(worker.generate(REQUEST, PNG))
    first.cancel()
    first.cancel()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    (_, stopped), (began, _) = drawings
    assert stopped <= began


async def test_a_reader_that_leaves_the_stream_stops_the_drawing(
    worker: ImageWorker, drawings: list[tuple[float, float]]
) -> None:
    stream = worker.generate_streaming(replace(LONG, n=10), PNG)
    assert await anext(stream) == DrawingBegan("local")
    assert isinstance(await anext(stream), StepProgress)
    await stream.aclose()  # type: ignore[attr-defined]
    assert len(drawings) == 1, "the stream was closed, and the engine still draws"
    await worker.generate(REQUEST, PNG)


async def test_a_waiting_request_that_is_cancelled_is_never_drawn(
    worker: ImageWorker, drawings: list[tuple[float, float]]
) -> None:
    first = asyncio.ensure_future(worker.generate(REQUEST, PNG))
    second = asyncio.ensure_future(worker.generate(REQUEST, PNG))
    await asyncio.sleep(0)
    second.cancel()
    await first
    with pytest.raises(asyncio.CancelledError):
        await second
    assert len(drawings) == 1


async def test_the_engines_refusal_comes_through_and_the_worker_goes_on(
    worker: ImageWorker, drawings: list[tuple[float, float]]
) -> None:
    with pytest.raises(InvalidSize):
        await worker.generate(replace(REQUEST, width=100), PNG)
    await worker.generate(REQUEST, PNG)


async def test_the_engine_has_one_thread_of_its_own(
    worker: ImageWorker, drawings: list[tuple[float, float]]
) -> None:
    threads: set[str] = set()

    async for _ in worker.generate_streaming(REQUEST, PNG):
        threads |= {thread.name for thread in threading.enumerate() if thread.name.startswith("device")}
    assert len(threads) == 1


async def test_every_step_but_the_last_is_shown_small_and_the_picture_is_the_same(
    worker: ImageWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker._turn, "_lock", asyncio.Lock())
    # So that none is left out for the time that it takes.
    monkeypatch.setattr(sketch, "DECODING_SHARE", 1.0)
    plain = await worker.generate(REQUEST, PNG)
    items = [item async for item in worker.generate_streaming(REQUEST, PNG, EVERY_STEP)]
    previews = [item for item in items if isinstance(item, Preview)]
    assert {preview.progress.step for preview in previews} <= {1, 2} and previews
    for preview in previews:
        image = Image.open(io.BytesIO(preview.file))
        assert image.format == "JPEG" and image.size == (preview.width, preview.height)
        assert max(image.size) <= sketch.LARGEST_SIDE
    assert isinstance(items[-1], WorkerReply)
    drawn, without = (Image.open(io.BytesIO(each.pictures[0])) for each in (items[-1], plain))
    assert drawn.tobytes() == without.tobytes()
