"""Several models behind one address: the list, the pool of a worker, and what callers see."""

from __future__ import annotations

import asyncio
import gc
import random
import shutil
import threading
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from ray import serve

from serve_app import model_pool
from serve_app.app import _check_files
from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.model_list import ListedModel, ModelLoadFailed, ModelState, merged_states, read_models
from serve_app.model_pool import ModelPool
from serve_app.service import ImageService
from serve_app.settings import Settings, SettingsError, load_settings
from serve_app.worker import ImageWorker
from tests.chaos.models import body_for, parameter_bytes, pixels_of_fresh_engines, run, write_models
from tests.serve_app.conftest import client_of
from zimage_engine import Engine
from zimage_engine.errors import CheckpointError, InvalidRequest
from zimage_engine.types import GenerationRequest
from zimage_engine.unloading import can_stay, unload, weight_bytes

ANY = GenerationRequest(
    prompt="a blue star", width=64, height=64, num_inference_steps=1, seed=3, enhance=False
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def weights(paths: dict[str, Path]) -> list[int]:
    """The size of each model's weights, the largest first."""
    return sorted(
        (weight_bytes(Engine.load(path, "cpu", threads=1)) for path in paths.values()), reverse=True
    )


@dataclass(frozen=True)
class Server:
    app: FastAPI
    #: What lived in this process before its worker was started.
    before_bytes: int


def started(settings: Settings) -> Server:
    before_bytes = parameter_bytes()
    bound = serve.deployment(ImageWorker, name="ImageWorker").bind(settings)
    handle = serve.run(bound, _local_testing_mode=True)
    return Server(
        build_asgi_app(ImageService(handle, ServerMetrics("test"), settings), settings), before_bytes
    )


@pytest.fixture(scope="module")
def settings(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    broken = tmp_path_factory.mktemp("broken") / "broken"
    shutil.copytree(paths["sketch"], broken)
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    return load_settings(
        model=str(paths["tiny-z-image"]),
        models={
            "sketch": {"path": str(paths["sketch"]), "aliases": ["fast", "art/sketch"]},
            "paint": str(paths["paint"]),
            "broken": str(broken),
        },
        max_loaded_models=2,
        device="cpu",
        cpu_threads=1,
        ui=False,
        data_dir=str(tmp_path_factory.mktemp("data")),
    )


@pytest.fixture(scope="module")
def server(settings: Settings) -> Iterator[Server]:
    yield started(settings)


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(server.app) as client:
        yield client


async def metric(client: httpx.AsyncClient, start: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


async def cards(client: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    return {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}


# --- callers ---------------------------------------------------------------------------------------------


async def test_sixty_requests_at_random_get_the_right_model_and_two_at_most_are_in_memory(
    server: Server, client: httpx.AsyncClient, paths: dict[str, Path], weights: list[int]
) -> None:
    expected = await asyncio.to_thread(pixels_of_fresh_engines, paths)
    before_unloads = await metric(client, "zimage_model_unloads_total")

    outcome = await run(client, expected, 60, random.Random(7))

    assert not outcome.wrong
    assert sum(outcome.drawn.values()) == 60 and set(outcome.drawn) == set(paths)
    assert outcome.most_ready <= 2
    assert outcome.most_parameter_bytes - server.before_bytes <= weights[0] + weights[1]
    assert await metric(client, "zimage_model_unloads_total") > before_unloads
    assert await metric(client, "zimage_models_in_memory") <= 2


@pytest.mark.parametrize(
    ("name", "drawn_by"),
    [
        (None, "tiny-z-image"),
        ("default", "tiny-z-image"),
        ("tiny-z-image", "tiny-z-image"),
        ("fast", "sketch"),
        ("art/sketch", "sketch"),
    ],
)
async def test_a_request_names_its_model_by_any_of_its_names(
    client: httpx.AsyncClient, name: str | None, drawn_by: str
) -> None:
    answer = await client.post("/v1/images/generations", json={**body_for(name, 1), "receipt": True})

    assert answer.json()["model"] == drawn_by
    assert answer.json()["data"][0]["receipt"]["model"]["id"] == drawn_by
    if name is not None:
        assert (await client.get(f"/v1/models/{name}")).json()["id"] == drawn_by


async def test_a_name_that_is_none_is_refused_with_those_that_are(client: httpx.AsyncClient) -> None:
    for answer in (
        await client.post("/v1/images/generations", json=body_for("gpt-image-1", 1)),
        await client.get("/v1/models/gpt-image-1"),
    ):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "model_not_found")
        assert all(name in error["message"] for name in ("tiny-z-image", "sketch", "paint"))


async def test_a_size_is_checked_against_the_model_that_is_named(client: httpx.AsyncClient) -> None:
    of_sketch = {**body_for("sketch", 1), "size": "72x72"}

    drawn = await client.post("/v1/images/generations", json=of_sketch)
    refused = await client.post("/v1/images/generations", json={**of_sketch, "model": None})

    assert drawn.status_code == 200 and drawn.json()["size"] == "72x72"
    assert refused.status_code == 400 and "multiple of 32" in refused.json()["error"]["message"]


async def test_the_list_tells_of_each_model_what_is_known(
    client: httpx.AsyncClient, paths: dict[str, Path]
) -> None:
    await client.post("/v1/images/generations", json=body_for("sketch", 1))
    listed = await cards(client)

    assert list(listed) == ["tiny-z-image", "sketch", "paint", "broken"]
    sketch = listed["sketch"]
    assert (sketch["state"], sketch["family"], sketch["dtype"]) == ("ready", "sdxl", "bfloat16")
    assert sketch["aliases"] == ["fast", "art/sketch"] and sketch["native_size"] == "64x64"
    assert len(sketch["digest"]) == 32 and sketch["revision"] is None
    assert str(paths["sketch"].parent) not in str(listed)
    loaded = 'zimage_worker_model_info{device="cpu",dtype="bfloat16",family="sdxl",model="sketch"'
    assert await metric(client, loaded) == 1


async def test_a_model_that_cannot_be_loaded_is_told_and_not_tried_at_every_request(
    client: httpx.AsyncClient, settings: Settings
) -> None:
    first = await client.post("/v1/images/generations", json=body_for("broken", 1))
    again = await client.post("/v1/images/generations", json=body_for("broken", 1))
    other = await client.post("/v1/images/generations", json=body_for(None, 1))

    for answer in (first, again):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_load_failed")
        assert "damaged" in answer.json()["error"]["message"] and int(answer.headers["retry-after"]) <= 10
        assert "/" not in answer.json()["error"]["message"]
    assert other.status_code == 200
    assert await metric(client, 'zimage_model_loads_total{outcome="failed"') == 1
    card = (await cards(client))["broken"]
    assert card["state"] == "failed" and "damaged" in card["reason"] and card["retry_seconds"] > 0


async def test_a_stream_and_a_job_are_drawn_by_the_model_that_they_name(client: httpx.AsyncClient) -> None:
    plain = await client.post("/v1/images/generations", json=body_for("paint", 2))
    stream = await client.post("/v1/images/generations", json={**body_for("fast", 2), "stream": True})
    async with client._transport.app.router.lifespan_context(client._transport.app):  # type: ignore[attr-defined]
        job = (await client.post("/v1/images/jobs", json=body_for("paint", 2))).json()
        async with asyncio.timeout(60):
            while (told := (await client.get(f"/v1/images/jobs/{job['id']}")).json())["status"] != "done":
                assert told["status"] in ("queued", "running"), told
                await asyncio.sleep(0.05)

    assert '"model":"sketch"' in stream.text.replace('": "', '":"')
    assert told["model"] == "paint"
    assert told["result"]["data"][0]["b64_json"] == plain.json()["data"][0]["b64_json"]


async def test_a_picture_is_drawn_again_by_the_model_of_its_receipt(client: httpx.AsyncClient) -> None:
    drawn = await client.post("/v1/images/generations", json=body_for("paint", 4))
    content = b64decode(drawn.json()["data"][0]["b64_json"])

    again = await client.post("/v1/images/reproduce", content=content, headers={"content-type": "image/png"})

    assert again.json()["identical"] is True and again.json()["differences"] == []


# --- the pool --------------------------------------------------------------------------------------------


class HeldLoad:
    """Loads as a worker does, once it may."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.may_go.set()
        self.began = threading.Event()
        self.paths: list[str] = []

    def __call__(self, model: ListedModel) -> Engine:
        self.paths.append(model.path)
        self.began.set()
        assert self.may_go.wait(60)
        return Engine.load(model.path or None, "cpu", threads=1)


@dataclass
class Pooled:
    pool: ModelPool
    load: HeldLoad
    turn: asyncio.Lock
    device: ThreadPoolExecutor

    async def drawn(self, name: str | None) -> str:
        async with self.pool.leased(name) as engine, self.turn:
            loop = asyncio.get_running_loop()
            return (await loop.run_in_executor(self.device, engine.generate, ANY)).report.family

    def state(self, name: str) -> ModelState:
        return next(state for state in self.pool.states() if state.id == name)


@pytest.fixture
async def make_pool(paths: dict[str, Path]) -> Any:
    def make(most: int | None) -> Pooled:
        load, turn, device = HeldLoad(), asyncio.Lock(), ThreadPoolExecutor(1)
        default = Engine.load(None, "cpu", threads=1)
        listed = [ListedModel(name, str(paths[name])) for name in ("sketch", "paint")]
        return Pooled(ModelPool(default, listed, load, turn, device, most=most), load, turn, device)

    return make


async def test_while_a_model_is_fetched_and_read_others_are_drawn(
    make_pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled: Pooled = make_pool(2)
    prepare, may_go = model_pool._prepare, threading.Event()

    def slow(slot: Any) -> int:
        slot.progress = 0.5
        assert may_go.wait(60)
        return prepare(slot)

    monkeypatch.setattr(model_pool, "_prepare", slow)
    waiting = asyncio.create_task(pooled.drawn("sketch"))
    await asyncio.sleep(0)

    assert await pooled.drawn(None) == "z-image-turbo"
    assert (pooled.state("sketch").state, pooled.state("sketch").progress) == ("loading", 0.5)
    may_go.set()
    assert await waiting == "sdxl"


async def test_who_goes_away_while_a_model_is_loaded_leaves_nothing_behind(make_pool: Any) -> None:
    pooled: Pooled = make_pool(1)
    pooled.load.may_go.clear()
    waiting = asyncio.create_task(pooled.drawn("sketch"))
    await asyncio.to_thread(pooled.load.began.wait, 60)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    pooled.load.may_go.set()

    # It was loaded all the same; were its lease still held, no other could come in.
    assert await pooled.drawn("paint") == "pixart-alpha-512"
    assert await pooled.drawn("sketch") == "sdxl"
    assert pooled.pool.figures.unloads == 3


async def test_with_one_model_in_memory_at_most_all_that_ask_are_served(make_pool: Any) -> None:
    pooled: Pooled = make_pool(1)
    names = ["sketch", "paint", None] * 3

    async with asyncio.timeout(120):
        drawn = await asyncio.gather(*(pooled.drawn(name) for name in names))

    assert drawn == ["sdxl", "pixart-alpha-512", "z-image-turbo"] * 3
    assert len(pooled.pool.engines) == 1


async def test_the_least_recently_used_goes_first(make_pool: Any) -> None:
    pooled: Pooled = make_pool(2)
    for name in (None, "sketch", None, "paint"):
        await pooled.drawn(name)

    assert [pooled.state(name).state for name in ("sketch", "paint")] == ["not_loaded", "ready"]
    assert pooled.state(pooled.pool.default_id).state == "ready"


async def test_a_model_that_failed_is_tried_again_later_and_then_after_longer(
    make_pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled: Pooled = make_pool(2)
    now = [1000.0]
    monkeypatch.setattr(model_pool.time, "monotonic", lambda: now[0])

    def failing(slot: Any) -> int:
        raise MemoryError("as by a small machine")

    with monkeypatch.context() as patched:
        patched.setattr(model_pool, "_prepare", failing)
        for wait in (10, 20, 40):
            with pytest.raises(ModelLoadFailed, match="does not fit into the memory"):
                await pooled.drawn("sketch")
            assert pooled.state("sketch").retry_seconds == wait
            now[0] += wait
    assert await pooled.drawn("sketch") == "sdxl"
    assert pooled.state("sketch").reason == ""
    assert pooled.pool.figures.loads == {"failed": 3, "ok": 1}


async def test_the_list_may_not_have_the_name_of_the_default_model(paths: dict[str, Path]) -> None:
    engine = Engine.load(None, "cpu", threads=1)
    listed = [ListedModel(engine.description.id, str(paths["sketch"]))]

    with pytest.raises(InvalidRequest, match=f"'{engine.description.id}'.*the default model is called so"):
        ModelPool(engine, listed, HeldLoad(), asyncio.Lock(), ThreadPoolExecutor(1))


def test_what_is_unloaded_is_gone_whoever_still_holds_the_engine(paths: dict[str, Path]) -> None:
    before = parameter_bytes()
    engine = Engine.load(paths["sketch"], "cpu", threads=1)
    engine.generate(ANY)
    assert parameter_bytes() > before

    unload(engine)

    assert parameter_bytes() == before


def test_what_was_frozen_when_the_server_had_started_is_unloaded_too(paths: dict[str, Path]) -> None:
    before = parameter_bytes()
    engine = Engine.load(paths["sketch"], "cpu", threads=1)
    gc.collect()
    gc.freeze()
    try:
        unload(engine)
        assert gc.get_freeze_count() > 0
        assert parameter_bytes() == before
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    ("loaded", "wanted", "free", "stay"),
    [
        ([10, 20], 40, 100, 2),
        ([10, 20], 40, 45, 1),
        ([10, 20], 40, 30, 0),
        ([10, 20], 40, 5, 0),
        ([], 40, 5, 0),
    ],
)
def test_as_many_stay_as_leave_room_for_the_new_one(
    loaded: list[int], wanted: int, free: int, stay: int
) -> None:
    assert can_stay(loaded, wanted, free) == stay


# --- the list --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        "sketch=a/b, paint = /models/x",
        '{"sketch": "a/b", "paint": {"path": "/models/x"}}',
        {"sketch": "a/b", "paint": {"path": "/models/x"}},
        ["sketch=a/b", "paint=/models/x"],
    ],
    ids=["text", "json", "mapping", "options"],
)
def test_the_list_is_read_from_each_of_its_forms(given: Any) -> None:
    assert load_settings(models=given).models == (
        ListedModel("sketch", "a/b"),
        ListedModel("paint", "/models/x"),
    )


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("models/x", "NAME=PATH"),
        ("a b=models/x", "'a b'"),
        ("default=models/x", "'default'.*the default model"),
        ("a=x,a=y", "'a'"),
        ({"a": {"path": "x", "aliases": ["b"]}, "b": "y"}, "'b'"),
        ({"a": {"aliases": ["b"]}}, "'a' a path"),
        ({"a": {"path": "x", "colour": 1}}, "colour"),
        ({"a": {"path": "x", "dtype": "int4"}}, "int4"),
        ("{", "no JSON"),
        ("a=", "no path for 'a'"),
        (7, "mapping of names"),
    ],
    ids=str,
)
def test_a_wrong_entry_is_refused_by_name(given: Any, complaint: str) -> None:
    with pytest.raises(SettingsError, match=f"setting models .*{complaint}"):
        load_settings(models=given)


def test_the_list_comes_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_MODELS", "sketch=a/b")
    monkeypatch.setenv("ZIMAGE_MAX_LOADED_MODELS", "")

    settings = load_settings()

    assert settings.models == (ListedModel("sketch", "a/b"),) and settings.max_loaded_models is None


def test_a_start_names_the_entry_whose_files_are_wrong(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="setting models, broken: "):
        _check_files(settings)
    gone = settings.model_copy(update={"models": read_models({"gone": str(tmp_path / "nothing")})})
    with pytest.raises(CheckpointError, match="setting models, gone: "):
        _check_files(gone)


def test_of_several_workers_the_best_state_is_told() -> None:
    states = [
        ModelState("a", (), "not_loaded", "1"),
        ModelState("b", (), "failed", "1", reason="x"),
        ModelState("a", (), "loading", "2"),
        ModelState("b", (), "ready", "2"),
    ]
    assert [(state.id, state.state, state.worker) for state in merged_states(states)] == [
        ("a", "loading", "2"),
        ("b", "ready", "2"),
    ]
