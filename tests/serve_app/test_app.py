"""The whole app over a real worker on a tiny model, through HTTP but without sockets."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from PIL import Image

from serve_app.gates import DRAINED_BYTES
from serve_app.image_codec import read_parameters
from tests.serve_app.test_openai_schema import assert_readable
from tests.serve_app.wrong_inputs import WRONG_INPUTS, WrongInput

URL = "/v1/images/generations"
QUICK = {"num_inference_steps": 1, "guidance_scale": 1, "size": "64x64"}


@pytest.fixture
async def openai_client(client: httpx.AsyncClient) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        api_key="none", base_url="http://localhost/v1", http_client=client, max_retries=0
    ) as openai_client:
        yield openai_client


async def draw(client: httpx.AsyncClient, **fields: object) -> dict[str, object]:
    response = await client.post(URL, json={"prompt": "a red circle"} | QUICK | fields)
    assert response.status_code == 200, response.text
    body: dict[str, object] = response.json()
    return body


def image_of(b64_json: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json or "")))


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_openais_client_gets_a_picture_in_each_format(
    openai_client: openai.AsyncOpenAI, output_format: str
) -> None:
    answer = await openai_client.images.generate(
        prompt="a red circle",
        model="zimage-turbo",
        n=2,
        size="96x64",  # type: ignore[call-overload]
        quality="low",
        output_format=output_format,
        extra_body={"seed": 5, "num_inference_steps": 2},
    )
    assert answer.data is not None and len(answer.data) == 2
    assert (answer.size, answer.quality, answer.background) == ("96x64", "low", "opaque")
    assert answer.output_format == output_format and answer.usage is not None
    assert answer.usage.output_tokens == 2 * 6 * 4
    assert answer.usage.input_tokens == answer.usage.input_tokens_details.text_tokens > 3
    assert answer.usage.total_tokens == answer.usage.input_tokens + 2 * 6 * 4
    for picture, seed in zip(answer.data, (5, 6), strict=True):
        image = image_of(picture.b64_json)
        assert (image.format, image.size) == (output_format.upper(), (96, 64))
        assert picture.revised_prompt is not None and picture.revised_prompt.startswith("a red circle, ")
        parameters = read_parameters(base64.b64decode(picture.b64_json or ""))
        assert parameters is not None and f"Seed: {seed}" in parameters and "Steps: 2" in parameters


async def test_a_seed_draws_the_same_picture_again_and_each_of_n_on_its_own(
    client: httpx.AsyncClient,
) -> None:
    pair = await draw(client, seed=11, n=2)
    alone = await draw(client, seed=12)
    assert pair["data"][1]["b64_json"] == alone["data"][0]["b64_json"]  # type: ignore[index]
    assert pair["data"][0]["b64_json"] != alone["data"][0]["b64_json"]  # type: ignore[index]


async def test_a_seed_is_always_told(client: httpx.AsyncClient) -> None:
    first, second = (await draw(client))["data"][0], (await draw(client))["data"][0]  # type: ignore[index]
    assert first["seed"] != second["seed"]
    again = (await draw(client, seed=first["seed"]))["data"][0]  # type: ignore[index]
    assert again["b64_json"] == first["b64_json"]


async def test_the_enhancer_can_be_turned_off(client: httpx.AsyncClient) -> None:
    (picture,) = (await draw(client, enhance=False))["data"]  # type: ignore[misc]
    assert picture["revised_prompt"] == "a red circle"


async def test_steps_outside_the_good_range_are_warned_of(client: httpx.AsyncClient) -> None:
    (picture,) = (await draw(client, num_inference_steps=2))["data"]  # type: ignore[misc]
    assert [warning["code"] for warning in picture["warnings"]]
    assert picture["steps"] == 2


@pytest.mark.parametrize("row", WRONG_INPUTS, ids=lambda row: row.name)
async def test_wrong_input_is_refused_in_a_sentence(client: httpx.AsyncClient, row: WrongInput) -> None:
    response = await client.post(URL, content=row.body, headers=row.headers)
    assert response.status_code == row.status, response.text
    error = response.json()["error"]
    assert row.phrase in error["message"]
    assert (error["param"], error["type"]) == (row.param, "invalid_request_error")
    assert error["code"]
    assert_readable(error["message"])


async def test_openais_client_raises_its_own_errors(openai_client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="n must be at most 10, got 11") as refused:
        await openai_client.images.generate(prompt="a red circle", n=11)
    assert (refused.value.param, refused.value.code) == ("n", "invalid_value")
    with pytest.raises(openai.NotFoundError, match="no model 'dall-e-2'"):
        await openai_client.images.generate(prompt="a red circle", model="dall-e-2")


async def test_a_body_without_announced_length_is_cut_off(client: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'{"prompt": "'
        while True:
            sent += 2**20
            yield b"a" * 2**20

    response = await client.post(URL, content=endless(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert response.headers["connection"] == "close"
    assert sent <= DRAINED_BYTES + 2 * 2**20


async def test_the_loaded_model_is_listed(openai_client: openai.AsyncOpenAI) -> None:
    (model,) = [model async for model in openai_client.models.list()]
    assert model.id == "tiny-z-image"
    assert (await openai_client.models.retrieve("tiny-z-image")).id == model.id
    assert (await openai_client.models.retrieve("default")).id == model.id
    with pytest.raises(openai.NotFoundError, match="the loaded one is 'tiny-z-image'"):
        await openai_client.models.retrieve("someone/else")


async def test_status_routes(client: httpx.AsyncClient) -> None:
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    ready = await client.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})


async def test_metrics_tell_of_requests_and_of_the_worker(client: httpx.AsyncClient) -> None:
    await draw(client, n=2, num_inference_steps=2)
    await client.post(URL, json={"prompt": "a red circle", "size": "100x100"})
    text = (await client.get("/metrics")).text
    assert 'zimage_requests_total{outcome="ok",replica="local"} 1.0' in text
    assert 'zimage_requests_total{outcome="invalid_value",replica="local"} 1.0' in text
    assert 'zimage_pictures_total{replica="local"} 2.0' in text
    assert 'zimage_generation_seconds_count{replica="local",stage="denoise"} 2.0' in text
    assert 'zimage_step_seconds_count{replica="local"}' in text
    assert 'zimage_worker_up{replica="local"} 1.0' in text
    assert 'model="tiny-z-image"' in text
    assert "zimage_warnings_total{code=" in text


@pytest.mark.parametrize(
    ("method", "path", "status", "phrase"),
    [
        ("GET", URL, 405, "takes POST, got GET"),
        ("DELETE", URL, 405, "takes POST, got DELETE"),
        ("POST", "/v1/models", 405, "takes GET, got POST"),
        ("POST", "/v1/images/wishes", 404, "no POST /v1/images/wishes here"),
        ("POST", "/v1/chat/completions", 404, "/docs lists"),
        ("GET", "/v1/", 404, "no GET /v1/ here"),
    ],
)
async def test_what_is_not_there_is_told_with_openais_body(
    client: httpx.AsyncClient, method: str, path: str, status: int, phrase: str
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert phrase in response.json()["error"]["message"]


async def test_the_docs_tell_of_the_routes_and_the_fields_and_ask_no_other_host(
    client: httpx.AsyncClient,
) -> None:
    docs = (await client.get("/docs")).text
    for told in (f"POST {URL}", "GET /v1/models", "/readyz", "guidance_scale", "Conventional w", "429"):
        assert told in docs, told
    assert set(re.findall(r"https?://[^/\s\"']+", docs)) == {"http://localhost"}
    assert "<script" not in docs and "<link" not in docs
    described = (await client.get("/openapi.json")).json()
    assert {"/healthz", "/metrics", "/readyz", URL, "/v1/models"} <= set(described["paths"])
