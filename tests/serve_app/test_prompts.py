"""`/v1/prompts/enhance` and `/v1/prompts/analyze` through HTTP: what they answer, what they refuse."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from ray import serve

from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.service import ImageService
from serve_app.settings import Settings, load_settings
from tests.serve_app.conftest import client_of
from tests.serve_app.test_openai_schema import assert_readable

ENHANCE, ANALYZE = "/v1/prompts/enhance", "/v1/prompts/analyze"


class Absent:
    """Workers that have not come up: they are asked, and in the end none has answered."""

    def __init__(self) -> None:
        self.is_given_up = False

    def options(self, **_: object) -> Absent:
        return self

    def broadcast(self, *_: object) -> Absent:
        return self

    async def results_async(self, **_: object) -> list[object]:
        await asyncio.sleep(1)
        self.is_given_up = True
        raise TimeoutError


async def post(client: httpx.AsyncClient, path: str, **fields: object) -> Any:
    response = await client.post(path, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


async def test_the_enhancement_is_the_one_that_is_drawn(client: httpx.AsyncClient) -> None:
    for prompt, negative in (("a minimalist fox.", "text"), ("夜景，浅景深的小巷", None)):
        asked = {"prompt": prompt, "negative_prompt": negative}
        told = await post(client, ENHANCE, **asked)
        quick = {"num_inference_steps": 1, "guidance_scale": 1, "size": "64x64"}
        (drawn,) = (await post(client, "/v1/images/generations", **asked, **quick))["data"]
        assert drawn["revised_prompt"] == told["prompt"]


async def test_each_phrase_is_explained(client: httpx.AsyncClient) -> None:
    told = await post(client, ENHANCE, prompt="a minimalist fox", negative_prompt="text")
    assert told["object"] == "prompt.enhancement"
    assert told["prompt"] == "a minimalist fox, masterpiece, best quality, cinematic lighting, sharp focus"
    assert str(told["negative_prompt"]).startswith("text, deformed, ")
    assert len(told["additions"]) == 9
    (left_out,) = told["left_out"]
    assert left_out == {
        "phrase": "ultra-detailed",
        "field": "prompt",
        "kind": "quality",
        "reason": "against",
        "about": "minimalist",
        "because": "it would work against minimalist",
    }
    for phrase in told["additions"]:
        assert phrase["reason"] == "missing" and phrase["because"] and phrase["kind"]
    assert 0 < told["tokens"] <= told["token_limit"]
    assert told["warnings"] == []


async def test_enhancement_can_be_off_and_follows_the_servers_default(
    client: httpx.AsyncClient, worker_handle: serve.handle.DeploymentHandle, settings: Settings
) -> None:
    told = await post(client, ENHANCE, prompt=" a fox. ", enhance=False)
    assert (told["prompt"], told["additions"], told["left_out"]) == ("a fox.", [], [])
    plain = settings.model_copy(update={"default_enhance": False})
    app = build_asgi_app(ImageService(worker_handle, ServerMetrics("test"), plain), plain)
    async with client_of(app) as other:
        assert (await post(other, ENHANCE, prompt="a fox"))["additions"] == []
        assert len((await post(other, ENHANCE, prompt="a fox", enhance=True))["additions"]) == 10


async def test_what_would_be_cut_off_is_told_before_anything_is_drawn(client: httpx.AsyncClient) -> None:
    limit = (await post(client, ENHANCE, prompt="a"))["token_limit"]
    prompt = "x" * (limit - 1) + " 灯塔，大海"
    for path in (ENHANCE, ANALYZE):
        told = await post(client, path, prompt=prompt)
        assert told["tokens"] > limit
        (warning,) = told["warnings"]
        assert warning["code"] == "prompt_truncated"
        assert f"room for {limit}" in warning["message"] and "'灯塔，大海'" in warning["message"]
    assert told["cut_at"] == prompt.index("灯塔")
    told = await post(client, ENHANCE, prompt="a fox", negative_prompt=prompt)
    assert [warning["code"] for warning in told["warnings"]] == ["negative_prompt_truncated"]


async def test_the_spans_of_a_prompt(client: httpx.AsyncClient) -> None:
    prompt = "夜景，(neon lights:1.3)，“春风”招牌，不要模糊"
    told = await post(client, ANALYZE, prompt=prompt)
    assert (told["object"], told["language"]) == ("prompt.analysis", "zh")
    spans = told["spans"]
    assert [(span["kind"], span["text"], span["weight"], span["negated"]) for span in spans] == [
        ("scene", "夜景", 1.0, False),
        ("light", "neon lights", 1.3, False),
        ("quoted", "“春风”", 1.0, False),
        ("subject", "招牌", 1.0, False),
        ("quality", "模糊", 1.0, True),
    ]
    assert all(prompt[span["start"] : span["end"]] == span["text"] for span in spans)
    assert (await post(client, ANALYZE, prompt=""))["spans"] == []


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "phrase"),
    [
        (ENHANCE, {}, 400, "prompt", "prompt is required"),
        (ENHANCE, {"prompt": ""}, 400, "prompt", "prompt is empty"),
        (ENHANCE, {"prompt": " \n"}, 400, "prompt", "nothing but white space"),
        (ENHANCE, {"prompt": 7}, 400, "prompt", "must be text"),
        (ENHANCE, {"prompt": "a\0b"}, 400, "prompt", "null character at position 1"),
        (ENHANCE, {"prompt": "a" * 32_001}, 400, "prompt", "at most 32,000 characters, got 32,001"),
        (ENHANCE, {"prompt": "a", "negative_prompt": "b\0"}, 400, "negative_prompt", "null character"),
        (ENHANCE, {"prompt": "a", "enhance": "yes"}, 400, "enhance", "'endpoint', got 'yes'"),
        (
            ENHANCE,
            {"prompt": "a", "negativ_prompt": "b"},
            400,
            "negativ_prompt",
            "did you mean 'negative_prompt'?",
        ),
        (
            ENHANCE,
            {"prompt": "a", "seed": 1},
            400,
            "seed",
            "known fields are prompt, negative_prompt, enhance",
        ),
        (ANALYZE, {}, 400, "prompt", "prompt is required"),
        (ANALYZE, {"prompt": None}, 400, "prompt", "must be text"),
        (ANALYZE, {"prompt": "a" * 32_001}, 400, "prompt", "at most 32,000"),
        (ANALYZE, {"prompt": "a", "enhance": True}, 400, "enhance", "known fields are prompt"),
        (ANALYZE, ["a"], 400, None, "must be a JSON object, got an array"),
    ],
)
async def test_wrong_input_is_refused_in_a_sentence(
    client: httpx.AsyncClient, path: str, body: object, status: int, param: str | None, phrase: str
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert phrase in error["message"] and error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert_readable(error["message"])


@pytest.mark.parametrize("path", [ENHANCE, ANALYZE])
async def test_other_bodies_and_methods_are_refused(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, content=b"prompt=a", headers={"content-type": "text/plain"})
    assert response.status_code == 415
    response = await client.post(path, content=b"{", headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    response = await client.get(path)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


async def test_without_a_worker_prompts_are_analysed_at_once_and_not_enhanced(settings: Settings) -> None:
    absent: Any = Absent()
    app = build_asgi_app(ImageService(absent, ServerMetrics("test"), settings), settings)
    async with client_of(app) as client:
        told = await post(client, ANALYZE, prompt="夜景")
        assert not absent.is_given_up
        assert (told["tokens"], told["token_limit"], told["warnings"]) == (None, None, [])
        assert len(told["spans"]) == 1
        response = await client.post(ENHANCE, json={"prompt": "夜景"})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "model_not_ready"


async def test_a_key_is_needed_where_the_server_has_one(service: ImageService, tiny_model: object) -> None:
    guarded = load_settings(model=str(tiny_model), device="cpu", ui=False, api_key="s" * 32)
    app = build_asgi_app(service, guarded)
    async with client_of(app) as client:
        for path in (ENHANCE, ANALYZE):
            assert (await client.post(path, json={"prompt": "a"})).status_code == 401
            headers = {"Authorization": "Bearer " + "s" * 32}
            assert (await client.post(path, json={"prompt": "a"}, headers=headers)).status_code == 200


def test_the_document_tells_of_both_with_examples(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    for path in (ENHANCE, ANALYZE):
        operation = paths[path]["post"]
        content = operation["requestBody"]["content"]["application/json"]
        assert content["example"]["prompt"]
        assert content["schema"]["additionalProperties"] is False
        assert {"200", "400", "401", "413", "415"} <= set(operation["responses"])
