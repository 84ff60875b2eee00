"""Prompts that a language model rewrites, through HTTP: a real worker's text encoder, and an endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from ray import serve

from serve_app.ingress import build_asgi_app
from serve_app.live_settings import InForce, read_user_config
from serve_app.metrics import ServerMetrics
from serve_app.service import ImageService
from serve_app.settings import Settings, SettingsError, load_settings
from serve_app.worker import ImageWorker
from tests.serve_app.conftest import client_of
from tests.serve_app.test_prompt_endpoint import STREAM, Endpoint, event, standing
from tests.zimage_engine.test_rewriting import PROMPT, REWRITTEN
from tests.zimage_engine.writing_encoder import write_writing_model
from zimage_engine.prompts.enhancer import enhance

REFUSED = "green boat house moon tree"
QUICK = {"num_inference_steps": 4, "guidance_scale": 1, "size": "64x64"}
ENHANCE, GENERATE = "/v1/prompts/enhance", "/v1/images/generations"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    model: Path = write_writing_model(tmp_path_factory.mktemp("models") / "writing")
    return load_settings(
        model=str(model),
        device="cpu",
        cpu_threads=1,
        ui=False,
        offered_enhancers=["model", "endpoint"],
        enhancer_url="http://127.0.0.1:1/v1",
        enhancer_model="m",
        enhancer_tokens=16,
    )


@pytest.fixture(scope="module")
def handle(settings: Settings) -> Iterator[serve.handle.DeploymentHandle]:
    deployment = serve.deployment(ImageWorker, name="WritingWorker").bind(settings)
    yield serve.run(deployment, name="writing", route_prefix="/writing", _local_testing_mode=True)


@pytest.fixture
def writing(handle: serve.handle.DeploymentHandle, settings: Settings) -> ImageService:
    return ImageService(handle, ServerMetrics("test"), settings)


@pytest.fixture
async def client(writing: ImageService, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(build_asgi_app(writing, settings)) as client:
        yield client


async def post(client: httpx.AsyncClient, path: str, **fields: object) -> Any:
    response = await client.post(path, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = answer.text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


async def test_what_the_text_encoder_writes_is_told_and_drawn(
    client: httpx.AsyncClient, writing: ImageService
) -> None:
    told = await post(client, ENHANCE, prompt=PROMPT, enhance="model")
    assert (told["prompt"], told["enhancer"], told["warnings"]) == (REWRITTEN, "model", [])
    assert told["rewrite"]["outcome"] == "used" and told["rewrite"]["tokens"] > 5
    (drawn,) = (await post(client, GENERATE, prompt=PROMPT, enhance="model", **QUICK))["data"]
    assert (drawn["revised_prompt"], drawn["warnings"]) == (REWRITTEN, [])
    assert (
        'zimage_prompt_rewrites_total{outcome="used",replica="local"} 2.0' in writing.metrics.named_text()[1]
    )


async def test_where_it_is_not_used_the_rules_are_and_it_is_said(
    client: httpx.AsyncClient, writing: ImageService
) -> None:
    told = await post(client, ENHANCE, prompt=REFUSED, enhance="model")
    by_rules = await post(client, ENHANCE, prompt=REFUSED, enhance="rules")
    assert told["prompt"] == by_rules["prompt"] == enhance(REFUSED, None).prompt
    assert (told["enhancer"], told["rewrite"]["outcome"]) == ("rules", "quoted")
    assert (by_rules["enhancer"], by_rules["rewrite"], by_rules["warnings"]) == ("rules", None, [])
    (drawn,) = (await post(client, GENERATE, prompt=REFUSED, enhance="model", **QUICK))["data"]
    assert drawn["revised_prompt"] == told["prompt"]
    for answer in (told, drawn):
        (warning,) = answer["warnings"]
        assert warning["code"] == "prompt_not_rewritten" and "quoted text 'star'" in warning["message"]
    assert '{outcome="quoted",replica="local"} 2.0' in writing.metrics.named_text()[1]


async def test_as_a_stream_it_is_heard_while_it_is_written(client: httpx.AsyncClient) -> None:
    for prompt, used in ((PROMPT, "model"), (REFUSED, "rules")):
        answer = await client.post(ENHANCE, json={"prompt": prompt, "enhance": "model", "stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        *deltas, last = events(answer)
        assert {each["type"] for each in deltas} == {"prompt_enhancement.delta"} and len(deltas) > 3
        assert "".join(each["delta"] for each in deltas).startswith(prompt)
        assert (last["type"], last["enhancer"]) == ("prompt_enhancement.completed", used)
        plain = await post(client, ENHANCE, prompt=prompt, enhance="model")
        assert last["prompt"] == plain["prompt"] and set(last) == {*plain, "type"}
    answer = await client.post(ENHANCE, json={"prompt": PROMPT, "stream": True})
    (last,) = events(answer)
    assert (last["enhancer"], last["rewrite"]) == ("rules", None)


async def test_the_operator_says_who_enhances_and_may_change_it_live(
    client: httpx.AsyncClient, writing: ImageService, settings: Settings
) -> None:
    assert (await post(client, ENHANCE, prompt=PROMPT))["enhancer"] == "rules"
    writing.use(InForce(read_user_config({"enhancer": "model"}, settings, "PromptEnhancer")))
    for asked in ({}, {"enhance": True}):
        assert (await post(client, ENHANCE, prompt=PROMPT, **asked))["enhancer"] == "model"
        (drawn,) = (await post(client, GENERATE, prompt=PROMPT, **asked, **QUICK))["data"]
        assert drawn["revised_prompt"] == REWRITTEN
    assert (await post(client, ENHANCE, prompt=PROMPT, enhance=False))["enhancer"] is None
    (drawn,) = (await post(client, GENERATE, prompt=PROMPT, enhance=False, **QUICK))["data"]
    assert drawn["revised_prompt"] == PROMPT
    writing.use(
        InForce(read_user_config({"enhancer": "model", "enhancer_seconds": 1e-6}, settings, "PromptEnhancer"))
    )
    assert (await post(client, ENHANCE, prompt=PROMPT))["rewrite"]["outcome"] == "timeout"


async def test_what_is_not_offered_is_refused(
    handle: serve.handle.DeploymentHandle, settings: Settings
) -> None:
    closed = settings.model_copy(update={"offered_enhancers": ()})
    async with client_of(
        build_asgi_app(ImageService(handle, ServerMetrics("test"), closed), closed)
    ) as client:
        for path, more in ((ENHANCE, {}), (GENERATE, QUICK)):
            for enhancer in ("model", "endpoint"):
                answer = await client.post(path, json={"prompt": PROMPT, "enhance": enhancer, **more})
                assert answer.status_code == 400
                error = answer.json()["error"]
                assert error["param"] == "enhance"
                assert error["message"].endswith("take one of: true, false, rules")
            assert (await client.post(path, json={"prompt": PROMPT, "enhance": "rules", **more})).is_success


async def test_requests_at_once_are_each_drawn_from_their_own(client: httpx.AsyncClient) -> None:
    prompts = [PROMPT, REFUSED, "red tree moon house boat", PROMPT]
    alone = [await post(client, GENERATE, prompt=each, enhance="model", seed=1, **QUICK) for each in prompts]
    at_once = await asyncio.gather(
        *(post(client, GENERATE, prompt=each, enhance="model", seed=1, **QUICK) for each in prompts)
    )
    for one, other in zip(alone, at_once, strict=True):
        for name in ("revised_prompt", "b64_json"):
            assert one["data"][0][name] == other["data"][0][name]
    assert at_once[2]["data"][0]["revised_prompt"] == "red tree moon house boat by day, with mountains"


async def test_an_edit_may_name_it_too(client: httpx.AsyncClient) -> None:
    file = BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    form = {"prompt": PROMPT, "enhance": "model", "num_inference_steps": "2", "guidance_scale": "1"}
    answer = await client.post("/v1/images/edits", data=form, files={"image": ("a.png", file.getvalue())})
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"][0]["revised_prompt"] == REWRITTEN
    for path, body in (
        (GENERATE, {"json": {"prompt": PROMPT, "enhance": "magic"}}),
        (
            "/v1/images/edits",
            {"data": {**form, "enhance": "magic"}, "files": {"image": ("a.png", file.getvalue())}},
        ),
    ):
        error = (await client.post(path, **body)).json()["error"]
        assert (error["param"], error["code"]) == ("enhance", "invalid_value")
        assert "'rules', 'model' or 'endpoint', got 'magic'" in error["message"]


async def test_an_endpoint_is_asked_and_judged_alike(
    handle: serve.handle.DeploymentHandle, settings: Settings
) -> None:
    good, bad = f"{PROMPT} in soft morning mist", f"{PROMPT}, a sign reading “LOL”"
    for written, used in ((good, True), (bad, False)):
        async with standing(Endpoint(STREAM + event(written, "stop") + b"data: [DONE]\n\n")) as endpoint:
            there = settings.model_copy(update={"enhancer_url": endpoint.url, "enhancer": "endpoint"})
            service = ImageService(handle, ServerMetrics("test"), there)
            async with client_of(build_asgi_app(service, there)) as client:
                told = await post(client, ENHANCE, prompt=PROMPT)
                (drawn,) = (await post(client, GENERATE, prompt=PROMPT, **QUICK))["data"]
        assert drawn["revised_prompt"] == told["prompt"] == (good if used else enhance(PROMPT, None).prompt)
        assert told["enhancer"] == ("endpoint" if used else "rules")
        codes = [] if used else ["prompt_not_rewritten"]
        assert [each["code"] for each in told["warnings"]] == codes
        assert [each["code"] for each in drawn["warnings"]] == codes
        (_, _, body) = endpoint.asked[0]
        assert [each["role"] for each in body["messages"]] == ["system", "user"]
        assert body["messages"][1]["content"] == PROMPT and body["max_tokens"] == 16


async def test_an_endpoint_that_is_not_there_costs_the_picture_nothing(client: httpx.AsyncClient) -> None:
    (drawn,) = (await post(client, GENERATE, prompt=PROMPT, enhance="endpoint", **QUICK))["data"]
    assert drawn["revised_prompt"] == enhance(PROMPT, None).prompt
    assert [each["code"] for each in drawn["warnings"]] == ["prompt_not_rewritten"]


@pytest.mark.parametrize("enhancer", ["rules", "model"])
async def test_what_would_be_cut_off_is_told_of_what_would_be_drawn(
    client: httpx.AsyncClient, enhancer: str
) -> None:
    """Before the drawing and after it the same words are named."""
    limit = (await post(client, ENHANCE, prompt="a"))["token_limit"]
    prompt = "red " * limit + "tree"
    told = await post(client, ENHANCE, prompt=prompt, enhance=enhancer)
    analysed = await post(client, "/v1/prompts/analyze", prompt=told["prompt"])
    (cut,) = [each for each in told["warnings"] if each["code"] == "prompt_truncated"]
    assert cut in analysed["warnings"]
    (drawn,) = (await post(client, GENERATE, prompt=prompt, enhance=enhancer, **QUICK))["data"]
    assert drawn["revised_prompt"] == told["prompt"]
    codes = [each["code"] for each in drawn["warnings"]]
    assert "prompt_truncated" in codes
    assert ("prompt_not_rewritten" in codes) == (enhancer == "model")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"enhancer": "endpoint"}, "set enhancer_url and enhancer_model"),
        ({"offered_enhancers": "model,endpoint"}, "set enhancer_url and enhancer_model"),
        ({"enhancer": "magic"}, "enhancer"),
        ({"enhancer_url": "ftp://example.org", "enhancer_model": "m"}, "must be an address"),
        ({"enhancer_url": "http://me:secret@example.org", "enhancer_model": "m"}, "must be an address"),
        ({"enhancer_seconds": 0}, "enhancer_seconds"),
        ({"enhancer_tokens": 1}, "enhancer_tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], found: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings(**given)
    assert found in str(refused.value) and "secret" not in str(refused.value)


def test_a_live_endpoint_needs_an_address_from_the_start() -> None:
    with pytest.raises(SettingsError, match="enhancer_url"):
        read_user_config({"enhancer": "endpoint"}, load_settings(), "PromptEnhancer")
    settings = load_settings(
        enhancer_url="http://127.0.0.1:8000/v1", enhancer_model="m", enhancer_api_key="k"
    )
    assert read_user_config({"enhancer": "endpoint"}, settings, "PromptEnhancer").enhancer == "endpoint"
    assert "'k'" not in repr(settings)
