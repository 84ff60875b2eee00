"""Edits and variations over HTTP, with the embedded model: OpenAI's client, odd forms, limits."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from fastapi import FastAPI
from openai.types import ImageEditCompletedEvent, ImageEditPartialImageEvent
from PIL import Image, ImageDraw
from ray import serve

from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.service import ImageService
from serve_app.settings import Settings, load_settings
from serve_app.streaming import EditCompletedEvent
from serve_app.worker import ImageWorker
from tests.serve_app.conftest import client_of
from zimage_engine.demo.detector import detect

EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"
SIZE = (256, 256)


@pytest.fixture(scope="module")
def demo_settings() -> Settings:
    return load_settings(device="cpu", cpu_threads=1, ui=False, max_image_bytes=200_000)


@pytest.fixture(scope="module")
def demo_worker(demo_settings: Settings) -> Iterator[serve.handle.DeploymentHandle]:
    deployment = serve.deployment(ImageWorker, name="DemoWorker").bind(demo_settings)
    yield serve.run(deployment, name="demo", route_prefix="/demo", _local_testing_mode=True)


@pytest.fixture
def app(demo_worker: serve.handle.DeploymentHandle, demo_settings: Settings) -> FastAPI:
    return build_asgi_app(ImageService(demo_worker, ServerMetrics("test"), demo_settings), demo_settings)


def red_circle() -> Image.Image:
    picture = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(picture).ellipse([78, 78, 178, 178], fill=(220, 30, 30))
    return picture


def mask_of_the_middle() -> Image.Image:
    mask = Image.new("RGBA", SIZE, (0, 0, 0, 255))
    ImageDraw.Draw(mask).rectangle([60, 60, 199, 199], fill=(0, 0, 0, 0))
    return mask


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def drawn(b64_json: str | None) -> Image.Image:
    assert b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB")


def seen(picture: Image.Image) -> tuple[str, list[tuple[str, str]]]:
    scene = detect(picture)
    return scene.background, [(thing.colour, thing.shape) for thing in scene.things]


def difference(one: Image.Image, other: Image.Image) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.abs(np.asarray(one).astype(np.int64) - np.asarray(other).astype(np.int64)).max(axis=-1)


def async_openai(app: FastAPI) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=client_of(app)
    )


async def test_openais_client_edits_a_whole_picture(app: FastAPI) -> None:
    asked = {
        "image": png(red_circle()),
        "prompt": "a blue circle on a white background",
        "n": 2,
        "extra_body": {"seed": 3},
    }
    async with async_openai(app) as client:
        first = await client.images.edit(**asked)
        again = await client.images.edit(**{**asked, "image": [png(red_circle())]})
    assert first.data is not None and again.data is not None
    for picture in first.data:
        assert seen(drawn(picture.b64_json)) == ("white", [("blue", "circle")])
    assert [each.b64_json for each in first.data] == [each.b64_json for each in again.data]
    assert first.size == "256x256"
    told = first.data[0].model_dump()
    assert (told["strength"], told["steps_run"], told["steps"], told["seed"]) == (0.65, 5, 8, 3)


async def test_openais_client_edits_what_a_mask_marks_and_nothing_else(app: FastAPI) -> None:
    source, mask = red_circle(), mask_of_the_middle()
    async with async_openai(app) as client:
        answer = await client.images.edit(
            image=("anything.exe", png(source), "application/octet-stream"),
            mask=png(mask),
            prompt="a blue circle on a white background",
            extra_body={"seed": 3},
        )
    assert answer.data is not None
    picture = drawn(answer.data[0].b64_json)
    assert seen(picture) == ("white", [("blue", "circle")])
    changed = difference(picture, source)
    assert changed[np.asarray(mask.getchannel("A")) == 255].max() == 0


async def test_a_pictures_own_transparency_is_its_mask(app: FastAPI) -> None:
    source = red_circle().convert("RGBA")
    source.putalpha(mask_of_the_middle().getchannel("A"))
    async with async_openai(app) as client:
        answer = await client.images.edit(
            image=png(source), prompt="a blue circle on a white background", extra_body={"seed": 3}
        )
    assert answer.data is not None
    picture = drawn(answer.data[0].b64_json)
    assert seen(picture) == ("white", [("blue", "circle")])
    assert difference(picture, red_circle())[np.asarray(source.getchannel("A")) == 255].max() == 0


async def test_openais_client_asks_for_variations(app: FastAPI) -> None:
    asked = {"image": png(red_circle()), "n": 2, "extra_body": {"seed": 11}}
    async with async_openai(app) as client:
        answer, again = [await client.images.create_variation(**asked) for _ in range(2)]
    assert answer.data is not None and again.data is not None
    pictures = [drawn(each.b64_json) for each in answer.data]
    assert [each.b64_json for each in answer.data] == [each.b64_json for each in again.data]
    assert difference(*pictures).max() > 0
    for picture in pictures:
        assert seen(picture) == ("white", [("red", "circle")])
        assert difference(picture, red_circle()).max() > 0


def test_openais_client_without_async_edits_and_varies(app: FastAPI) -> None:
    from starlette.testclient import TestClient

    with TestClient(app, base_url="http://localhost") as http:
        client = openai.OpenAI(
            base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=http
        )
        edited = client.images.edit(
            image=png(red_circle()),
            prompt="a blue circle on a white background",
            output_format="webp",
            extra_body={"seed": 3},
        )
        varied = client.images.create_variation(image=png(red_circle()), extra_body={"seed": 11})
        stream = client.images.edit(
            image=png(red_circle()),
            prompt="a blue circle on a white background",
            stream=True,
            partial_images=1,
            extra_body={"seed": 3},
        )
        preview, last = list(stream)
    assert isinstance(preview, ImageEditPartialImageEvent) and isinstance(last, ImageEditCompletedEvent)
    assert seen(drawn(last.b64_json)) == ("white", [("blue", "circle")])
    assert edited.data is not None and varied.data is not None
    assert seen(drawn(edited.data[0].b64_json)) == ("white", [("blue", "circle")])
    assert seen(drawn(varied.data[0].b64_json)) == ("white", [("red", "circle")])


@pytest.mark.parametrize("with_mask", [False, True])
async def test_openais_client_reads_an_edits_previews_and_its_picture(app: FastAPI, with_mask: bool) -> None:
    asked: dict[str, Any] = {
        "image": png(red_circle()),
        "prompt": "a blue circle on a white background",
        "extra_body": {"seed": 3},
        **({"mask": png(mask_of_the_middle())} if with_mask else {}),
    }
    async with async_openai(app) as client:
        plain = await client.images.edit(**asked)
        stream = await client.images.edit(**asked, stream=True, partial_images=2)
        *previews, last = [event async for event in stream]
    assert [preview.partial_image_index for preview in previews] == [0, 1]
    for preview in previews:
        assert isinstance(preview, ImageEditPartialImageEvent)
        assert drawn(preview.b64_json).size == tuple(map(int, preview.size.split("x")))
    assert isinstance(last, ImageEditCompletedEvent)
    # Nearer each time to what it becomes.
    off = [difference(drawn(preview.b64_json), drawn(last.b64_json)).mean() for preview in previews]
    assert off[1] < off[0] < 7
    assert plain.data is not None and plain.usage is not None
    assert last.b64_json == plain.data[0].b64_json
    assert last.usage.model_dump() == plain.usage.model_dump(exclude={"output_tokens_details"})
    assert (
        EditCompletedEvent.model_validate(last.model_dump(exclude_none=True)).steps_run
        == plain.data[0].steps_run
    )  # type: ignore[attr-defined]


async def test_usage_counts_the_picture_that_was_read(app: FastAPI) -> None:
    form = {"prompt": "a blue circle", "n": "2", "num_inference_steps": "2", "size": "256x128"}
    async with client_of(app) as client:
        edited = await client.post(EDITS, files={"image": png(red_circle())}, data=form)
        plain = await client.post(
            "/v1/images/generations",
            json={"prompt": "a blue circle", "n": 2, "num_inference_steps": 2, "size": "256x128"},
        )
    usage, without = edited.json()["usage"], plain.json()["usage"]
    assert (usage["input_tokens_details"]["image_tokens"], usage["output_tokens"]) == (128, 256)
    assert usage["input_tokens"] == usage["input_tokens_details"]["text_tokens"] + 128
    assert usage["total_tokens"] == usage["input_tokens"] + 256
    assert without["input_tokens_details"]["image_tokens"] == 0


async def test_a_large_picture_is_drawn_in_the_models_own_area_and_told(app: FastAPI) -> None:
    large = red_circle().resize((1024, 512))
    async with client_of(app) as client:
        answer = await client.post(
            EDITS,
            files={"image": png(large)},
            data={"prompt": "a blue circle", "num_inference_steps": "2", "seed": "1"},
        )
    body = answer.json()
    assert (answer.status_code, body["size"]) == (200, "352x192")
    (told,) = (each for each in body["data"][0]["warnings"] if each["code"] == "source_scaled")
    assert "1024x512" in told["message"] and "352x192" in told["message"]


#: Path, texts, files, status, code, parameter, and a part of the sentence.
WRONG_FORMS: tuple[tuple[str, dict[str, str], Any, int, str, str | None, str], ...] = (
    (EDITS, {"prompt": "a"}, {}, 415, "unsupported_media_type", None, "multipart/form-data"),
    (EDITS, {"prompt": "a"}, {"mask": b""}, 400, "missing_required_parameter", "image", "image is required"),
    (EDITS, {}, {"image": b"x"}, 400, "missing_required_parameter", "prompt", "prompt is required"),
    (EDITS, {"prompt": " "}, {"image": b"x"}, 400, "invalid_value", "prompt", "white space"),
    (EDITS, {"prompt": "a", "promt": "b"}, {"image": b"x"}, 400, "unknown_parameter", "promt", "'prompt'?"),
    (EDITS, {"prompt": "a"}, {"picture": b"x"}, 400, "unknown_parameter", "picture", "There is no field"),
    (EDITS, {"prompt": "a"}, {"image": b"x", "n": b"1"}, 400, "invalid_value", "n", "must be a text"),
    (EDITS, {"prompt": "a", "mask": "x"}, {"image": b"x"}, 400, "invalid_image", "mask", "must be a file"),
    (EDITS, {"prompt": "a", "n": "two"}, {"image": b"x"}, 400, "invalid_value", "n", "a whole number"),
    (EDITS, {"prompt": "a", "n": "11"}, {"image": b"x"}, 400, "invalid_value", "n", "at most 10"),
    (EDITS, {"prompt": "a", "strength": "0"}, {"image": b"x"}, 400, "invalid_value", "strength", "above 0"),
    (
        EDITS,
        {"prompt": "a", "strength": "1.5"},
        {"image": b"x"},
        400,
        "invalid_value",
        "strength",
        "at most 1",
    ),
    (
        EDITS,
        {"prompt": "a", "strength": "nan"},
        {"image": b"x"},
        400,
        "invalid_value",
        "strength",
        "a number",
    ),
    (
        EDITS,
        {"prompt": "a", "stream": "true", "n": "2"},
        {"image": b"x"},
        400,
        "invalid_value",
        "n",
        "of one",
    ),
    (EDITS, {"prompt": "a", "stream": "true"}, {"image": b"x"}, 400, "invalid_image", "image", "image must"),
    (
        EDITS,
        {"prompt": "a", "model": "dall-e-2"},
        {"image": b"x"},
        404,
        "model_not_found",
        "model",
        "dall-e-2",
    ),
    (EDITS, {"prompt": "a", "size": "big"}, {"image": b"x"}, 400, "invalid_value", "size", "WIDTHxHEIGHT"),
    (
        EDITS,
        {"prompt": "a"},
        [("image[]", b"x"), ("image[]", b"y")],
        400,
        "invalid_value",
        "image",
        "must be one file, got 2",
    ),
    (
        EDITS,
        {"prompt": "a"},
        [(f"image{number}", b"x") for number in range(30)],
        400,
        "invalid_multipart",
        None,
        "more than 20 files",
    ),
    (
        EDITS,
        {"prompt": "a" * 140_000},
        {"image": b"x"},
        400,
        "invalid_multipart",
        None,
        "longer than 128 KiB",
    ),
    (EDITS, {"prompt": "a"}, {"image": b"x" * 250_000}, 413, "body_too_large", None, "200,000 bytes"),
    (VARIATIONS, {"prompt": "a"}, {"image": b"x"}, 400, "unknown_parameter", "prompt", "There is no field"),
    (VARIATIONS, {}, {"image": b"x", "mask": b"x"}, 400, "unknown_parameter", "mask", "There is no field"),
    (VARIATIONS, {"n": "0"}, {"image": b"x"}, 400, "invalid_value", "n", "at least 1"),
)


@pytest.mark.parametrize(
    ("path", "texts", "files", "status", "code", "parameter", "said"),
    WRONG_FORMS,
    ids=[f"{row[4]}-{row[6]}" for row in WRONG_FORMS],
)
async def test_a_form_that_cannot_be_used_is_refused_in_a_sentence(
    app: FastAPI,
    path: str,
    texts: dict[str, str],
    files: Any,
    status: int,
    code: str,
    parameter: str | None,
    said: str,
) -> None:
    async with client_of(app) as client:
        answer = await client.post(path, data=texts, files=files)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, parameter)
    assert said in error["message"]


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"--x\r\n", 400),
        ("multipart/form-data; boundary=x", b"nothing of it", 400),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n",
            400,
        ),
        ("multipart/form-data; boundary=x", b"", 400),
        *(
            (
                f"multipart/form-data; boundary=x; charset={charset}",
                b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--x--\r\n',
                400,
            )
            for charset in ("undefined", "punycode", "utf-16")
        ),
    ],
)
async def test_a_body_that_is_no_form_is_refused(
    app: FastAPI, content_type: str, body: bytes, status: int
) -> None:
    async with client_of(app) as client:
        answer = await client.post(EDITS, content=body, headers={"content-type": content_type})
    assert answer.status_code == status
    assert answer.json()["error"]["message"].endswith(".")
    assert ("charset" in content_type) == ("send its texts in utf-8" in answer.json()["error"]["message"])


async def test_a_form_may_say_that_it_is_in_utf_8(app: FastAPI) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--x--\r\n'
    async with client_of(app) as client:
        headers = {"content-type": 'multipart/form-data; boundary=x; charset="UTF-8"'}
        answer = await client.post(EDITS, content=body, headers=headers)
    assert answer.json()["error"]["param"] == "image", "the form was read, and lacks its picture"


async def test_the_document_and_its_page_tell_of_both_routes(app: FastAPI) -> None:
    async with client_of(app) as client:
        document = (await client.get("/openapi.json")).json()
        page = (await client.get("/docs")).text
        wrong_method = await client.get(EDITS)
    for path in (EDITS, VARIATIONS):
        operation = document["paths"][path]["post"]
        form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert form["properties"]["image"]["format"] == "binary" and "image" in form["required"]
        assert {"200", "400", "413", "415", "429", "503"} <= set(operation["responses"])
        assert path in page
    assert wrong_method.status_code == 405


async def test_edits_are_counted_as_requests(app: FastAPI) -> None:
    async with client_of(app) as client:
        await client.post(EDITS, data={"prompt": "a"}, files={"image": b"no picture"})
        text: str = (await client.get("/metrics")).text
    (counted,) = (
        line
        for line in text.splitlines()
        if line.startswith("zimage_requests_total{") and 'outcome="invalid_image"' in line
    )
    assert counted.endswith(" 1.0")
