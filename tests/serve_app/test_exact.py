"""What was found to be quicker acts in the server and the command line, is told, and left out on demand."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve
from typer.testing import CliRunner

from serve_app.cli import app as cli
from serve_app.cli_names import OPTION_OF_SETTING
from serve_app.edit_schema import edit_to_engine, parse_edit, parse_variation, variation_to_engine
from serve_app.image_codec import read_receipt
from serve_app.ingress import build_asgi_app
from serve_app.local_engine import load_engine
from serve_app.metrics import ServerMetrics
from serve_app.multipart import Form
from serve_app.openai_schema import parse, to_engine
from serve_app.service import ImageService
from serve_app.settings import Settings, load_settings
from serve_app.worker import ImageWorker
from tests.serve_app.conftest import client_of
from tests.serve_app.test_openai_schema import MODEL
from zimage_engine.speed.levers import size_bucket
from zimage_engine.speed.remembered import key_of_choice, remembered_choices
from zimage_engine.types import GenerationRequest, SourcePicture

QUICKER = "channels_last_vae"
DRAW = "/v1/images/generations"
BODY = {"prompt": "a circle", "size": "64x64", "num_inference_steps": 2, "seed": 3, "receipt": True}
SOURCE = SourcePicture(16, 16, bytes(3 * 16 * 16))


@pytest.fixture(scope="module")
def tuned(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """On this machine a layout was found to be quicker for the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        facts = load_engine(settings.model_copy(update={"exact": True})).lever_facts
        bucket = size_bucket(64, 64)
        assert remembered_choices().remember(key_of_choice(facts), facts, bucket, (QUICKER,), {})
        yield settings


@pytest.fixture(scope="module")
def tuned_worker(tuned: Settings) -> serve.handle.DeploymentHandle:
    deployment = serve.deployment(ImageWorker, name="TunedWorker").bind(tuned)
    return serve.run(deployment, name="tuned", route_prefix="/tuned", _local_testing_mode=True)


@pytest.fixture
async def client(
    tuned_worker: serve.handle.DeploymentHandle, tuned: Settings
) -> AsyncIterator[httpx.AsyncClient]:
    service = ImageService(tuned_worker, ServerMetrics("test"), tuned)
    async with client_of(build_asgi_app(service, tuned)) as client:
        yield client


async def drawn(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(DRAW, json={**BODY, **fields})
    picture: dict[str, Any] = answer.raise_for_status().json()["data"][0]
    return picture


async def test_an_answer_tells_what_acted_and_exact_leaves_it_out(client: httpx.AsyncClient) -> None:
    quicker, plain = await drawn(client), await drawn(client, exact=True)
    assert (quicker["accelerated_by"], plain["accelerated_by"]) == ([QUICKER], [])
    assert quicker["receipt"]["accelerated_by"] == [QUICKER]
    assert "accelerated_by" not in plain["receipt"]
    counted = (await client.get("/metrics")).text
    assert f'zimage_pictures_accelerated_total{{lever="{QUICKER}",replica="local"}} 1.0' in counted
    assert "zimage_pictures_total" in counted


async def test_the_last_event_of_a_stream_tells_it_too(client: httpx.AsyncClient) -> None:
    for exact, acted in ((None, [QUICKER]), (True, [])):
        fields = {**BODY, "stream": True, "exact": exact}
        answer = await client.post(DRAW, json=fields)
        (last,) = [line for line in answer.text.splitlines() if ".completed" in line and line[:5] == "data:"]
        assert json.loads(last[5:])["accelerated_by"] == acted


async def test_pictures_of_both_kinds_are_reproduced_and_read_as_they_were_drawn(
    client: httpx.AsyncClient,
) -> None:
    for exact, asked in ((None, None), (True, True)):
        file = base64.b64decode((await drawn(client, exact=exact))["b64_json"])
        again = await client.post("/v1/images/reproduce", content=file, headers={"content-type": "image/png"})
        assert again.json()["identical"] is True and again.json()["differences"] == []
        told = await client.post("/v1/images/parameters", files={"image": file})
        assert told.json()["parameters"].get("exact") is asked


async def test_exact_is_true_or_false(client: httpx.AsyncClient) -> None:
    refused = await client.post(DRAW, json={**BODY, "exact": "yes"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "exact"


def test_every_way_to_ask_takes_the_wish() -> None:
    asked = {"exact": "true", "seed": "3"}
    files = {"image": [b"picture"]}
    edit = parse_edit(Form({**asked, "prompt": "a circle", "guidance_until": "0.5"}, files)).wire
    variation = parse_variation(Form(asked, files)).wire
    requests: list[GenerationRequest] = [
        to_engine(parse({"prompt": "a circle", "exact": True})),
        edit_to_engine(edit, SOURCE, True),
        variation_to_engine(variation, SOURCE, MODEL),
    ]
    assert [each.exact for each in requests] == [True] * 3
    assert requests[1].guidance_until == 0.5
    assert to_engine(parse({"prompt": "a circle"})).exact is False


def test_the_setting_leaves_it_out_for_all(tuned: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_EXACT", "true")
    chosen = load_settings(model=tuned.model, device="cpu", cpu_threads=1)
    assert chosen.exact and OPTION_OF_SETTING["exact"] == "--exact"
    request = GenerationRequest("a circle", width=64, height=64, num_inference_steps=2, seed=3)
    assert load_engine(chosen).generate(request).report.accelerated_by == ()
    assert load_engine(tuned).generate(request).report.accelerated_by == (QUICKER,)


@pytest.mark.parametrize(
    ("options", "acted"), [((), [QUICKER]), (("--exact",), [])], ids=["as found", "exact"]
)
def test_the_command_line_draws_both_ways(
    tuned: Settings, tmp_path: Path, options: tuple[str, ...], acted: list[str]
) -> None:
    model = ("--model", str(tuned.model), "--device", "cpu", "--threads", "1")
    file = tmp_path / "circle.png"
    generate = ("generate", "a circle", "-o", str(file), "--size", "64x64", "--steps", "2", "--seed", "3")
    ran = CliRunner().invoke(cli, [*generate, *model, "--json", *options])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["accelerated_by"] == acted
    assert CliRunner().invoke(cli, ["reproduce", str(file), *model]).exit_code == 0
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({name: BODY[name] for name in BODY if name != "receipt"}) + "\n")
    ran = CliRunner().invoke(cli, ["batch", str(lines), "-o", str(tmp_path / "all"), *model, *options])
    assert ran.exit_code == 0, ran.output
    (of_batch,) = (tmp_path / "all").glob("*.png")
    receipt = read_receipt(of_batch.read_bytes())
    assert receipt is not None and receipt.get("accelerated_by", []) == acted
