"""`POST /v1/images/parameters`: what it tells draws the identical picture; wrong requests are refused."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import pytest
from PIL import Image

from serve_app.image_codec import read_receipt

DRAW, READ = "/v1/images/generations", "/v1/images/parameters"
SMALL = {"prompt": "a red circle", "size": "64x32", "num_inference_steps": 2}
WEBUI = "a fox <lora:never_here:1>\nSteps: 8, CFG scale: 2, Seed: 1, Size: 70x60, Model: v1-5"


def pixels(picture: bytes) -> bytes:
    with Image.open(io.BytesIO(picture)) as image:
        return image.tobytes()


async def drawn(client: httpx.AsyncClient, **fields: Any) -> list[bytes]:
    answer = await client.post(DRAW, json={**SMALL, **fields})
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(each["b64_json"]) for each in answer.json()["data"]]


def png_with(text: str) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    info.add_text("parameters", text)
    Image.new("RGB", (16, 16)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"enhance": True, "guidance_scale": 1.8}, id="enhanced"),
        pytest.param({"enhance": True, "refine": False, "n": 2, "seed": 5}, id="the second of two"),
        pytest.param({"enhance": False, "refine": True, "negative_prompt": "blurry"}, id="refined"),
        pytest.param({"guidance_scale": 3, "guidance_until": 0.4}, id="guided at first"),
        pytest.param({"prompt": "雪中的红色圆形", "guidance_scale": 1}, id="in Chinese, without guidance"),
    ],
)
async def test_what_is_told_draws_the_identical_picture(
    client: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    picture = (await drawn(client, **fields))[-1]
    answer = await client.post(READ, files={"image": picture})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["source"], told["ignored"]) == ("zimage-turbo", [])
    assert told["parameters"]["enhance"] is False and "model" not in told["parameters"]
    receipt = read_receipt(picture)
    assert receipt is not None and told["parameters"]["prompt"] == receipt["prompt"]
    (again,) = await drawn(client, **told["parameters"])
    assert pixels(again) == pixels(picture)
    # What is told of that one is the same again, and nothing was added to its prompt.
    assert (await client.post(READ, files={"image": again})).json() == told


@pytest.mark.parametrize("file_format", ["jpeg", "webp"])
async def test_other_formats_tell_the_same_as_a_body_of_their_own(
    client: httpx.AsyncClient, file_format: str
) -> None:
    (picture,) = await drawn(client, seed=3)
    (other,) = await drawn(client, seed=3, output_format=file_format, output_compression=60)
    answer = await client.post(READ, content=other, headers={"content-type": f"image/{file_format}"})
    assert answer.json() == (await client.post(READ, files={"image": picture})).json()


async def test_a_model_and_a_lora_that_are_not_here_are_left_out_and_named(client: httpx.AsyncClient) -> None:
    answer = await client.post(READ, content=png_with(WEBUI), headers={"content-type": "image/png"})
    told = answer.json()
    assert told["source"] == "automatic1111" and told["parameters"]["prompt"] == "a fox"
    assert "model" not in told["parameters"] and told["parameters"]["loras"] == []
    assert told["parameters"]["size"] == "64x64"
    assert [(each["field"], each["value"]) for each in told["ignored"]] == [
        ("size", "70x60"),
        ("model", "v1-5"),
        ("loras", "never_here"),
    ]
    assert await drawn(client, **told["parameters"])


PICTURE = png_with(WEBUI)


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        ({"files": {"image": png_with("")}}, 400, "no_parameters"),
        ({"files": {"image": b"no picture"}}, 400, "invalid_image"),
        ({"files": {"image": b""}}, 400, "invalid_image"),
        ({"files": {"picture": PICTURE}}, 400, "invalid_value"),
        ({"files": [("image", PICTURE), ("image", PICTURE)]}, 400, "invalid_value"),
        ({"files": {"image": PICTURE}, "data": {"seed": "1"}}, 400, "invalid_value"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, None),
        ({"json": {"image": "x"}}, 415, "unsupported_media_type"),
        ({"content": PICTURE, "headers": {"content-type": "image/gif"}}, 415, "unsupported_media_type"),
    ],
    ids=[
        "nothing told",
        "no picture",
        "empty",
        "other field",
        "two files",
        "a text too",
        "cut form",
        "json",
        "gif",
    ],
)
async def test_a_wrong_request_is_refused_with_a_sentence(
    client: httpx.AsyncClient, sent: dict[str, Any], status: int, code: str | None
) -> None:
    answer = await client.post(READ, **sent)
    error = answer.json()["error"]
    assert answer.status_code == status and error["message"].endswith(".")
    assert code is None or error["code"] == code
