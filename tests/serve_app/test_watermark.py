"""The watermark in pixels: read back after JPEG and WebP, not seen, and told where it is not there."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from ray import serve
from typer.testing import CliRunner

from serve_app import cli, watermark
from serve_app.finishing import UNREADABLE, Finisher
from serve_app.image_codec import ImageEncoding, read_receipt
from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.reproduction import compare, read_given
from serve_app.service import ImageService
from serve_app.settings import SettingsError, load_settings
from serve_app.worker import ImageWorker
from tests.serve_app.conftest import client_of
from zimage_engine import Engine
from zimage_engine.types import GenerationRequest, GenerationResult

TEXT = "studio example 2026"
REQUEST = GenerationRequest(
    prompt="a red house and a tree by day with mountains",
    width=256,
    height=256,
    num_inference_steps=2,
    seed=5,
)


def clouds(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft forms of every size with a little grain: as photographs have them."""
    noise = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for power in range(2, 9):
        cells = noise.integers(0, 256, (height * 2**power // 512 + 2, width * 2**power // 512 + 2, 3))
        layer = Image.fromarray(cells.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(layer, dtype=float) - 128) * 1.5 / power**1.2
    return Image.fromarray(np.clip(128 + total, 0, 255).astype(np.uint8))


def drawing(width: int, height: int) -> Image.Image:
    """Plain forms on white, as of a children's book."""
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((width // 4, height // 4, width * 3 // 4, height * 3 // 4), fill=(200, 40, 30))
    pen.polygon([(0, height), (width // 2, height // 2), (width, height)], fill=(60, 120, 60))
    return picture.filter(ImageFilter.SMOOTH)


def saved(picture: Image.Image, file_format: str, **options: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return Image.open(file)


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal to noise in decibels."""
    off = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    return 10 * math.log10(255**2 / float((off**2).mean()))


@pytest.mark.parametrize("text", ["a", TEXT + "!", "工作室 2026", "é"])
def test_every_text_is_read_back(text: str) -> None:
    text = watermark.check_text(text)
    assert watermark.read(watermark.marked(clouds(256, 256), text)) == text


@pytest.mark.parametrize(
    "make",
    [
        lambda: clouds(512, 512),
        lambda: clouds(768, 512, 1),
        lambda: clouds(600, 712, 2),
        lambda: drawing(768, 768),
    ],
    ids=["512x512", "768x512", "600x712", "a drawing of 768x768"],
)
def test_it_survives_jpeg_and_webp_of_quality_75_and_is_not_seen(make: Callable[[], Image.Image]) -> None:
    plain = make()
    picture = watermark.marked(plain, TEXT)
    assert psnr(plain, picture) > 46
    for file_format in ("png", "jpeg", "webp"):
        for quality in (75, 90):
            assert watermark.read(saved(picture, file_format, quality=quality)) == TEXT, (
                file_format,
                quality,
            )
    # Twice compressed, and in shades of grey.
    assert (
        watermark.read(saved(saved(picture, "webp", quality=85).convert("RGB"), "jpeg", quality=75)) == TEXT
    )
    assert watermark.read(picture.convert("L")) == TEXT


def test_nothing_is_read_from_a_picture_without_one_and_none_of_one_that_was_scaled() -> None:
    assert [watermark.read(clouds(512, 512, seed)) for seed in range(10)] == [None] * 10
    assert watermark.read(Image.new("RGB", (512, 512))) is None
    assert watermark.read(Image.new("RGB", (16, 16))) is None
    scaled = watermark.marked(clouds(512, 512), TEXT).resize((500, 500))
    assert watermark.read(scaled) is None


def test_the_same_picture_is_marked_the_same_and_its_source_is_not_touched() -> None:
    plain = drawing(512, 512)
    before = plain.tobytes()
    first, second = watermark.marked(plain, TEXT), watermark.marked(plain, TEXT)
    assert first.tobytes() == second.tobytes() != before == plain.tobytes()


@pytest.mark.parametrize("size", [(64, 64), (1008, 31), (15, 15)])
def test_a_picture_without_room_is_refused_with_what_is_needed(size: tuple[int, int]) -> None:
    with pytest.raises(
        watermark.NotMarkable, match=r"too small for a watermark: it has .* and 64 are needed"
    ):
        watermark.marked(Image.new("RGB", size, "grey"), TEXT)


@pytest.mark.parametrize("text", ["", "a\nb", "x" * 21, "七个汉字太多了", "a\0"])
def test_a_text_that_cannot_be_put_in_is_refused_at_the_start(text: str) -> None:
    with pytest.raises(ValueError, match="at most 20 bytes"):
        watermark.check_text(text)
    if text:
        with pytest.raises(SettingsError, match="setting watermark must be printable text"):
            load_settings(watermark=text)
    else:
        assert load_settings(watermark=text).watermark is None


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(None, "cpu", threads=1)


@pytest.fixture(scope="module")
def result(engine: Engine) -> GenerationResult:
    return engine.generate(REQUEST)


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_report_receipt_and_file_tell_it(result: GenerationResult, file_format: Any) -> None:
    (file,), report = Finisher(text="studio").finished(result, ImageEncoding(file_format, 95))
    assert report.pictures[0].watermark == "studio"
    assert report.pictures[0].warnings == result.report.pictures[0].warnings
    receipt = read_receipt(file)
    assert receipt is not None and receipt["watermark"] == "studio"
    assert watermark.read(Image.open(io.BytesIO(file))) == "studio"
    # What the engine told is as it was.
    assert result.report.pictures[0].watermark == ""


def test_a_file_that_does_not_keep_it_and_a_picture_without_room_are_told(result: GenerationResult) -> None:
    _, report = Finisher(text="studio").finished(result, ImageEncoding("jpeg", 1))
    (notice,) = report.pictures[0].warnings
    assert notice.code == UNREADABLE and "compressed too much" in notice.message
    assert report.pictures[0].watermark == "studio"
    small = replace(result, images=[result.images[0].resize((64, 64))])
    (file,), report = Finisher(text="studio").finished(small, ImageEncoding("png"))
    (notice,) = report.pictures[0].warnings
    assert notice.code == UNREADABLE and "64x64 is too small" in notice.message
    assert report.pictures[0].watermark == "" and "watermark" not in (read_receipt(file) or {})


def test_a_picture_without_a_watermark_has_no_word_of_it(result: GenerationResult) -> None:
    (file,), report = Finisher().finished(result, ImageEncoding("png"))
    assert Image.open(io.BytesIO(file)).tobytes() == result.images[0].tobytes()
    assert "watermark" not in (read_receipt(file) or {}) and report == result.report


def test_drawn_again_with_the_same_watermark_it_is_identical_and_else_the_watermark_is_named(
    engine: Engine, result: GenerationResult
) -> None:
    (file,), _ = Finisher(text="studio").finished(result, ImageEncoding("png"))
    given = read_given(file)
    again = engine.generate(given.request())
    for text, told in (("studio", []), ("other", ["watermark"]), (None, ["watermark"])):
        (drawn,), _ = Finisher(text=text).finished(again, ImageEncoding("png"))
        came_of_it = compare(given, drawn)
        assert [each.name for each in came_of_it.differences] == told
        assert came_of_it.identical == (not told), came_of_it.sentence
    assert "watermark: 'studio' then, nothing now" in came_of_it.sentence


async def _drawn(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    wire = {"prompt": REQUEST.prompt, "size": "256x256", "num_inference_steps": 2, "seed": 5, **fields}
    answer = await client.post("/v1/images/generations", json=wire)
    assert answer.status_code == 200, answer.text
    picture: dict[str, Any] = answer.json()["data"][0]
    return picture


async def test_a_server_puts_it_into_every_picture_and_tells_it(tmp_path: Path) -> None:
    chosen = load_settings(
        device="cpu", cpu_threads=1, ui=False, watermark="studio", data_dir=str(tmp_path / "data")
    )
    deployment = serve.deployment(ImageWorker, name="Worker-watermark").bind(chosen)
    handle = serve.run(deployment, name="watermark", route_prefix="/watermark", _local_testing_mode=True)
    app = build_asgi_app(ImageService(handle, ServerMetrics("test"), chosen), chosen)
    async with client_of(app) as client:
        told = await _drawn(client, receipt=True)
        small = await _drawn(client, size="64x64")
        again = await client.post("/v1/images/reproduce", json={"image": told["b64_json"]})
    assert told["watermark"] == told["receipt"]["watermark"] == "studio"
    assert UNREADABLE not in [each["code"] for each in told["warnings"]]
    assert again.json()["identical"] is True and again.json()["differences"] == [], again.text
    assert "watermark" not in small
    assert UNREADABLE in [each["code"] for each in small["warnings"]]
    file = tmp_path / "picture.png"
    file.write_bytes(base64.b64decode(told["b64_json"]))
    shown = CliRunner().invoke(cli.app, ["inspect", str(file)])
    assert "watermark: 'studio'" in shown.output
    facts = json.loads(CliRunner().invoke(cli.app, ["inspect", str(file), "--json"]).output)
    assert (facts["watermark"], facts["kind"], facts["width"]) == ("studio", "picture", 256)
