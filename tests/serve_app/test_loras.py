"""LoRAs by name over HTTP: generations, edits, variations, jobs and streams; the list; reproduction."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image
from ray import serve

from serve_app.app import _check_files, _with_absolute_paths
from serve_app.image_codec import read_parameters, read_receipt
from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.service import ImageService
from serve_app.settings import Settings, load_settings
from serve_app.worker import ImageWorker
from tests.serve_app.conftest import client_of
from tests.zimage_engine.tiny_models.lora import write_lora
from zimage_engine.errors import InvalidRequest
from zimage_engine.loading.lora_weight import LoraWeight

DRAW, REPRODUCE = "/v1/images/generations", "/v1/images/reproduce"
PNG = {"content-type": "image/png"}
SMALL: dict[str, Any] = {
    "prompt": "a red circle",
    "size": "64x64",
    "num_inference_steps": 2,
    "seed": 5,
    "enhance": False,
}


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offered")
    write_lora(tiny_model, folder / "style.safetensors", seed=1)
    write_lora(tiny_model, folder / "水彩.safetensors", seed=2)
    (folder / "broken.safetensors").write_bytes(b"\0" * 100)
    return folder


@pytest.fixture(scope="module")
def lora_settings(
    settings: Settings, tiny_model: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Settings:
    started = write_lora(tiny_model, tmp_path_factory.mktemp("started") / "started.safetensors", seed=3)
    data = tmp_path_factory.mktemp("data")
    return settings.model_copy(
        update={"loras": (LoraWeight(started, 0.5),), "lora_folder": folder, "data_dir": data}
    )


@pytest.fixture(scope="module")
def lora_worker(lora_settings: Settings) -> Iterator[serve.handle.DeploymentHandle]:
    deployment = serve.deployment(ImageWorker, name="LoraWorker").bind(lora_settings)
    yield serve.run(deployment, name="loras", route_prefix="/loras", _local_testing_mode=True)


@pytest.fixture
def app(lora_worker: serve.handle.DeploymentHandle, lora_settings: Settings) -> FastAPI:
    return build_asgi_app(ImageService(lora_worker, ServerMetrics("test"), lora_settings), lora_settings)


async def drawn(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(DRAW, json={**SMALL, **fields})
    assert answer.status_code == 200, answer.text
    picture: dict[str, Any] = answer.json()["data"][0]
    return picture


def pixels(picture: dict[str, Any]) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))).tobytes()


def loras_of(picture: dict[str, Any]) -> list[tuple[str, float]]:
    return [(lora["name"], lora["weight"]) for lora in picture["loras"]]


STARTED = [("started.safetensors", 0.5)]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, STARTED),
        ({"loras": None}, STARTED),
        ({"loras": []}, []),
        ({"loras": ["style"]}, [("style.safetensors", 1.0)]),
        ({"loras": ["style=0.8"]}, [("style.safetensors", 0.8)]),
        ({"loras": [{"name": "style", "weight": -1}]}, [("style.safetensors", -1.0)]),
        (
            {"loras": [{"name": "水彩"}, "started=0.2"]},
            [("水彩.safetensors", 1.0), ("started.safetensors", 0.2)],
        ),
        ({"prompt": "a red circle <lora:style:0.8>"}, [("style.safetensors", 0.8)]),
        (
            {"prompt": "<lora:水彩> a red circle", "loras": ["style"]},
            [("style.safetensors", 1.0), ("水彩.safetensors", 1.0)],
        ),
    ],
)
async def test_a_request_says_which_loras_it_is_drawn_with(
    client: httpx.AsyncClient, fields: dict[str, Any], told: list[tuple[str, float]]
) -> None:
    picture = await drawn(client, **fields)
    assert loras_of(picture) == told
    assert picture["revised_prompt"] == "a red circle"
    assert all(len(lora["digest"]) == 32 for lora in picture["loras"])
    parameters = read_parameters(base64.b64decode(picture["b64_json"]))
    assert parameters is not None
    assert parameters.count("<lora:") == len(told)


async def test_what_one_request_had_the_next_has_not(client: httpx.AsyncClient) -> None:
    """Also where they come at the same time: one is drawn after the other."""
    asked: list[dict[str, Any]] = [
        {"loras": []},
        {"loras": ["style=0.8"]},
        {},
        {"loras": ["水彩", "style=0.3"]},
    ]
    alone = [pixels(await drawn(client, **fields)) for fields in asked]
    assert len(set(alone)) == len(asked)
    together = await asyncio.gather(*(drawn(client, **fields) for fields in asked * 3))
    assert [pixels(picture) for picture in together] == alone * 3


@pytest.mark.parametrize(
    ("loras", "words"),
    [
        ("style", "loras must be a list"),
        ([1], "loras must be a list"),
        ([{"weight": 1}], "loras must be a list"),
        ([{"name": "style", "strength": 1}], "loras must be a list"),
        ([{"name": "style", "weight": 11}], "from -10 to 10"),
        ([{"name": "style", "weight": "1"}], "from -10 to 10"),
        (["style=1e9"], "from -10 to 10"),
        (["style=nan"], "from -10 to 10"),
        ([""], "loras must be a list"),
        (["style"] * 9, "up to 8"),
        (["style", "style=0.5"], "named twice"),
        (["styel"], "did you mean 'style'?"),
        (["../style"], "there is no LoRA"),
        (["/style"], "there is no LoRA"),
        (["broken"], "'broken' cannot be used with this model"),
    ],
)
async def test_wrong_loras_are_refused_with_a_sentence(
    client: httpx.AsyncClient, folder: Path, loras: Any, words: str
) -> None:
    answer = await client.post(DRAW, json={**SMALL, "loras": loras})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "loras"), error
    assert words in error["message"]
    assert str(folder) not in answer.text and "Traceback" not in answer.text


async def test_a_tag_for_what_is_not_there_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post(DRAW, json={**SMALL, "prompt": "a cat <lora:styel:1>"})
    assert answer.status_code == 400
    assert "did you mean 'style'?" in answer.json()["error"]["message"]


async def test_without_a_folder_a_prompt_is_left_alone_and_names_are_refused(
    service: ImageService, settings: Settings
) -> None:
    async with client_of(build_asgi_app(service, settings)) as client:
        picture = await drawn(client, prompt="a cat <lora:style:1>", loras=[])
        assert picture["revised_prompt"] == "a cat <lora:style:1>"
        answer = await client.post(DRAW, json={**SMALL, "loras": ["style"]})
        assert answer.status_code == 400
        assert "none is offered here" in answer.json()["error"]["message"]
        assert (await client.get("/v1/loras")).json() == {"object": "list", "data": []}


async def test_the_list_tells_what_there_is_now(
    client: httpx.AsyncClient, folder: Path, tiny_model: Path
) -> None:
    async def listed() -> dict[str, Any]:
        answer = await client.get("/v1/loras")
        assert str(folder) not in answer.text
        return {card["name"]: card for card in answer.json()["data"]}

    cards = await listed()
    assert list(cards) == ["broken", "started", "style", "水彩"]
    assert cards["style"]["fits"] and cards["style"]["families"] == ["z-image-turbo"]
    assert not cards["broken"]["fits"] and cards["broken"]["reason"] and not cards["broken"]["families"]
    write_lora(tiny_model, folder / "later.safetensors", seed=9)
    try:
        assert "later" in await listed()
        assert loras_of(await drawn(client, loras=["later"])) == [("later.safetensors", 1.0)]
    finally:
        (folder / "later.safetensors").unlink()
    assert "later" not in await listed()
    assert (await client.get("/v1/loras?model=nothing")).status_code == 404


async def test_edits_and_variations_take_them_as_json(client: httpx.AsyncClient) -> None:
    source = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(source, "PNG")
    texts = {"num_inference_steps": "2", "seed": "5"}
    for path, more in (("/v1/images/edits", {"prompt": "a red circle"}), ("/v1/images/variations", {})):
        files = {"image": ("a.png", source.getvalue())}
        form = {**texts, **more, "loras": '["style=0.5", {"name": "水彩"}]'}
        answer = await client.post(path, data=form, files=files)
        assert answer.status_code == 200, answer.text
        told = [("style.safetensors", 0.5), ("水彩.safetensors", 1.0)]
        assert loras_of(answer.json()["data"][0]) == told
        for wrong in ("style", "{}", "[" * 50_000, '["nothing"]'):
            refused = await client.post(path, data={**form, "loras": wrong}, files=files)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "loras"), wrong[:20]


async def test_a_stream_takes_them(client: httpx.AsyncClient) -> None:
    streamed = await client.post(DRAW, json={**SMALL, "loras": ["style=0.8"], "stream": True})
    last = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")][-1]
    assert loras_of(last) == [("style.safetensors", 0.8)]
    assert pixels(last) == pixels(await drawn(client, loras=["style=0.8"]))


async def test_jobs_take_them(app: FastAPI, client: httpx.AsyncClient) -> None:
    async with app.router.lifespan_context(app):
        plain = pixels(await drawn(client, loras=["style=0.8"]))
        refused = await client.post("/v1/images/jobs", json={**SMALL, "loras": ["styel"]})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "loras")
        job = (await client.post("/v1/images/jobs", json={**SMALL, "loras": ["style=0.8"]})).json()
        for _ in range(300):
            job = (await client.get(f"/v1/images/jobs/{job['id']}")).json()
            if job["status"] not in ("queued", "running"):
                break
            await asyncio.sleep(0.1)
        assert job["status"] == "done", job
        assert pixels(job["result"]["data"][0]) == plain


async def test_a_picture_is_reproduced_with_its_loras_whatever_the_default(
    client: httpx.AsyncClient, folder: Path, tiny_model: Path
) -> None:
    for loras in (["style=0.8"], [], ["水彩", "started=0.1"], None):
        picture = base64.b64decode((await drawn(client, loras=loras))["b64_json"])
        answer = await client.post(REPRODUCE, content=picture, headers=PNG)
        assert answer.json()["identical"] is True, answer.text
    write_lora(tiny_model, folder / "short.safetensors", seed=8)
    picture = base64.b64decode((await drawn(client, loras=["short"]))["b64_json"])
    receipt = read_receipt(picture)
    assert receipt is not None and receipt["loras"][0]["name"] == "short.safetensors"
    (folder / "short.safetensors").unlink()
    answer = await client.post(REPRODUCE, content=picture, headers=PNG)
    assert answer.json()["identical"] is False
    assert [each["name"] for each in answer.json()["differences"]] == ["loras"]


def test_the_folder_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(lora_folder="").lora_folder is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    chosen = load_settings(lora_folder="mine")
    assert _with_absolute_paths(chosen).lora_folder == tmp_path / "mine"
    _check_files(chosen)
    with pytest.raises(InvalidRequest, match="lora_folder must be a folder"):
        _check_files(load_settings(lora_folder="nothing"))


@pytest.mark.parametrize("loras", [["水彩=0.7", "style=-0.4"], [], None])
async def test_the_parameters_of_a_picture_draw_it_again_with_its_loras(
    client: httpx.AsyncClient, loras: list[str] | None
) -> None:
    picture = await drawn(client, loras=loras)
    file = base64.b64decode(picture["b64_json"])
    answer = await client.post("/v1/images/parameters", files={"image": file})
    told = answer.json()
    assert [(lora["name"], lora["weight"]) for lora in told["parameters"]["loras"]] == loras_of(picture)
    assert told["ignored"] == []
    again = await drawn(client, **told["parameters"])
    assert pixels(again) == pixels(picture) and loras_of(again) == loras_of(picture)
