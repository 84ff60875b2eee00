"""Live settings: what a `user_config` may say, and what holds after one that cannot be used."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from ray import serve

from serve_app.image_codec import ImageEncoding
from serve_app.ingress import build_asgi_app
from serve_app.live_settings import READ_BY, InForce, LiveSettings, at_start, read_user_config
from serve_app.metrics import ServerMetrics
from serve_app.queueing import FairQueue, QueueFull
from serve_app.service import ImageService
from serve_app.settings import Settings, SettingsError, load_settings
from serve_app.worker import ImageWorker
from tests.serve_app.conftest import client_of, loaded_worker
from zimage_engine.errors import DeadlineExceeded
from zimage_engine.types import GenerationRequest

FIELDS = {"prompt": "a red circle", "size": "64x64", "seed": 1}


def test_what_is_not_given_is_as_at_the_start() -> None:
    settings = load_settings(max_queued_requests=9, request_seconds=30.0)
    assert read_user_config(None, settings, "PromptEnhancer") == at_start(settings)
    live = read_user_config({"request_seconds": None, "default_steps": 4}, settings, "PromptEnhancer")
    assert (live.max_queued_requests, live.request_seconds, live.default_steps) == (9, None, 4)


@pytest.mark.parametrize(
    ("user_config", "phrase"),
    [
        (
            {"default_stps": 4},
            "there is no live setting of PromptEnhancer default_stps; did you mean default_steps?",
        ),
        ({"colour": "red"}, "there is no live setting of PromptEnhancer colour; known are default_steps,"),
        ({7: 4}, "there is no live setting of PromptEnhancer 7"),
        ({"drawing_seconds": 5}, "drawing_seconds is a live setting of ImageWorker, not of PromptEnhancer"),
        ({"num_replicas": 5}, "num_replicas is no live setting: it belongs into args"),
        (
            {"default_steps": 0},
            "live setting default_steps: input should be greater than or equal to 1, got 0",
        ),
        ({"default_steps": 101}, "live setting default_steps"),
        ({"default_guidance_scale": float("nan")}, "live setting default_guidance_scale"),
        ({"max_queue_seconds": -1}, "live setting max_queue_seconds"),
        ({"requests_a_minute": "many"}, "live setting requests_a_minute"),
        ({"default_enhance": "perhaps", "pictures_at_once": -1}, "live setting pictures_at_once"),
        ([1], "the user_config of PromptEnhancer must be a mapping of live settings, got list"),
    ],
)
def test_a_wrong_user_config_is_refused_in_a_sentence(user_config: Any, phrase: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read_user_config(user_config, load_settings(), "PromptEnhancer")
    assert phrase in str(refused.value)


@pytest.mark.parametrize("name", LiveSettings.model_fields)
def test_a_live_setting_has_the_bounds_of_the_one_at_the_start(name: str) -> None:
    """Each is read by one deployment, and what is out of bounds there is so here."""
    assert [deployment for deployment, names in READ_BY.items() if name in names] != []
    assert LiveSettings.model_fields[name].annotation == Settings.model_fields[name].annotation
    for value in (-1, 0, 1, 101, 4000, float("inf"), None, "x", True):
        assert is_taken(Settings, name, value) == is_taken(LiveSettings, name, value), value


def is_taken(model: type[Any], name: str, value: Any) -> bool:
    try:
        model(**{name: value})
    except ValidationError:
        return False
    return True


def test_after_a_refused_user_config_the_former_one_holds_and_it_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = load_settings()
    four_steps = InForce(at_start(settings)).after({"default_steps": 4}, settings, "PromptEnhancer")
    with caplog.at_level(logging.ERROR):
        refused = four_steps.after({"default_stps": 5}, settings, "PromptEnhancer")
    assert refused.live == four_steps.live
    assert "did you mean default_steps?" in refused.refusal
    assert "did you mean default_steps?" in caplog.text
    assert refused.after({}, settings, "PromptEnhancer") == InForce(at_start(settings))


def test_other_bounds_hold_for_newcomers_and_nobody_who_waits_is_sent_away() -> None:
    queue = FairQueue(places=5)
    waiting = [queue.enter(name, 1.0) for name in "abcdef"]
    queue.set_bounds(1, None)
    assert [ticket.refusal for ticket in waiting] == [None] * 6
    with pytest.raises(QueueFull):
        queue.enter("g", 1.0)
    queue.set_bounds(9, None)
    queue.enter("g", 1.0)


async def test_defaults_reach_pictures_and_the_model_card_and_what_a_caller_names_goes_before(
    client: httpx.AsyncClient, service: ImageService
) -> None:
    settings = {"default_steps": 3, "default_guidance_scale": 1.5, "default_enhance": False}
    service.use(InForce(at_start(load_settings(**settings))))
    card = (await client.get("/v1/models")).json()["data"][0]
    assert (card["default_steps"], card["default_guidance"]) == (3, 1.5)
    (by_default,) = (await client.post("/v1/images/generations", json=FIELDS)).json()["data"]
    assert (by_default["steps"], by_default["guidance"]) == (3, 1.5)
    assert by_default["revised_prompt"] == FIELDS["prompt"], "prompts are drawn as they stand"
    named = {"num_inference_steps": 2, "guidance_scale": 1.0, "enhance": True}
    (chosen,) = (await client.post("/v1/images/generations", json=FIELDS | named)).json()["data"]
    assert (chosen["steps"], chosen["guidance"]) == (2, 1.0)
    assert chosen["revised_prompt"] != FIELDS["prompt"]


async def test_readyz_tells_of_a_refused_user_config_without_its_values(
    client: httpx.AsyncClient, service: ImageService
) -> None:
    assert (await client.get("/readyz")).json() == {"status": "ready"}
    service.use(replace(service.in_force, refusal="there is no live setting secret-thing"))
    answer = await client.get("/readyz")
    assert answer.status_code == 200
    assert "user_config cannot be used" in answer.json()["settings"]
    assert "secret-thing" not in answer.text


async def test_a_worker_keeps_the_picture_that_it_draws_and_bounds_the_next(settings: Settings) -> None:
    worker = await loaded_worker(settings)
    request, png = GenerationRequest("a red circle", num_inference_steps=40, n=4), ImageEncoding("png")
    drawing = asyncio.create_task(worker.generate(request, png))
    while not worker._turn.locked():
        await asyncio.sleep(0.001)
    await worker.reconfigure({"drawing_seconds": 0.001})
    assert len((await drawing).pictures) == 4
    with pytest.raises(DeadlineExceeded):
        await worker.generate(request, png)
    await worker.reconfigure({})
    assert len((await worker.generate(replace(request, n=1), png)).pictures) == 1


def test_serve_passes_a_user_config_to_a_worker(settings: Settings) -> None:
    deployment = serve.deployment(ImageWorker, name="Reconfigured", user_config={"drawing_seconds": 0.001})
    handle = serve.run(deployment.bind(settings), name="reconfigured", _local_testing_mode=True)
    with pytest.raises(DeadlineExceeded):
        handle.generate.remote(GenerationRequest("a red circle"), ImageEncoding("png")).result()


async def test_readyz_tells_of_a_user_config_that_a_worker_refused(settings: Settings) -> None:
    deployment = serve.deployment(ImageWorker, name="Refusing", user_config={"secret-thing": 1})
    handle = serve.run(deployment.bind(settings), name="refusing", _local_testing_mode=True)
    service = ImageService(handle, ServerMetrics("test"), settings)
    async with client_of(build_asgi_app(service, settings)) as client:
        answer = await client.get("/readyz")
    assert answer.status_code == 200
    assert "user_config cannot be used" in answer.json()["settings"]
    assert "secret-thing" not in answer.text
