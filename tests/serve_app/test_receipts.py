"""What a picture tells of how it was made is enough to draw it again, and to say why it is another."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from ray import serve
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from serve_app import cli, reproduction_schema
from serve_app.image_codec import FileFormat, ImageEncoding, encode, facts_of, read_receipt
from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.picture_input import UNPACKED_AT_ONCE
from serve_app.receipt import differences, receipt_of, request_of
from serve_app.reproduction import Reproduction, compare, read_given
from serve_app.service import ImageService
from serve_app.settings import load_settings
from serve_app.worker import ImageWorker
from tests.serve_app.conftest import client_of
from tests.zimage_engine.sampling.overflowing_models import BFLOAT16, write_overflowing
from tests.zimage_engine.tiny_models.lora import write_lora
from zimage_engine import Engine
from zimage_engine.errors import InvalidRequest
from zimage_engine.loading.lora_weight import LoraWeight
from zimage_engine.speed.levers import size_bucket
from zimage_engine.types import GenerationRequest, SourcePicture

REQUEST = GenerationRequest("a red circle", width=64, height=64, num_inference_steps=2, seed=11)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine.load(tiny_model, "cpu", threads=1)


def drawn(engine: Engine, request: GenerationRequest, format: FileFormat = "png", index: int = 0) -> bytes:
    """The file of one of the pictures, as the worker packs it."""
    result = engine.generate(request)
    return encode(result.images[index], ImageEncoding(format), facts_of(result.report, index))


def drawn_again(engine: Engine, picture: bytes, source: SourcePicture | None = None) -> Reproduction:
    given = read_given(picture)
    return compare(given, drawn(engine, given.request(source)))


def names_of(came_of_it: Reproduction) -> list[str]:
    return [each.name for each in came_of_it.differences]


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_picture_of_each_format_is_drawn_again_as_it_was(engine: Engine, format: FileFormat) -> None:
    came_of_it = drawn_again(engine, drawn(engine, REQUEST, format))
    assert (came_of_it.identical, came_of_it.differences) == (True, ()), came_of_it.sentence
    assert came_of_it.sentence.startswith("identical")


@pytest.mark.parametrize(
    ("request_", "index"),
    [
        (replace(REQUEST, n=3), 2),
        (replace(REQUEST, enhance=False, guidance_scale=1.0), 0),
        (replace(REQUEST, refine=True, negative_prompt="blurry"), 0),
        (replace(REQUEST, prompt="一只红色的圆形 \U0001f534"), 0),
    ],
    ids=["third of three", "neither enhanced nor guided", "refined", "Chinese"],
)
def test_pictures_of_every_plan_are(engine: Engine, request_: GenerationRequest, index: int) -> None:
    assert drawn_again(engine, drawn(engine, request_, "png", index)).identical


def test_a_picture_with_a_lora_is_with_it_and_without_it_the_lora_is_named(
    tiny_model: Path, engine: Engine, tmp_path: Path
) -> None:
    lora = LoraWeight(write_lora(tiny_model, tmp_path / "style.safetensors"), 0.8)
    picture = drawn(Engine.load(tiny_model, "cpu", loras=[lora], threads=1), REQUEST)
    receipt = read_receipt(picture)
    assert receipt is not None
    assert receipt["loras"][0].keys() == {"name", "weight", "digest"}
    assert drawn_again(Engine.load(tiny_model, "cpu", loras=[lora], threads=1), picture).identical
    without = drawn_again(engine, picture)
    assert (without.identical, names_of(without)) == (False, ["loras"])
    other = LoraWeight(write_lora(tiny_model, tmp_path / "other" / "style.safetensors", seed=1), 0.8)
    of_the_same_name = drawn_again(Engine.load(tiny_model, "cpu", loras=[other], threads=1), picture)
    assert (of_the_same_name.identical, names_of(of_the_same_name)) == (False, ["loras"])


def test_a_picture_that_the_guard_recovered_is_and_tells_of_it(tmp_path: Path) -> None:
    folder = write_overflowing(BFLOAT16, tmp_path / "overflowing")
    engine = Engine.load(folder, "cpu", dtype="bfloat16", threads=1)
    picture = drawn(engine, replace(REQUEST, width=128, height=128))
    receipt = read_receipt(picture)
    assert receipt is not None
    assert receipt["guard"]["trips"][0]["recovered_by"] is not None
    assert drawn_again(engine, picture).identical


@pytest.mark.parametrize("mask", [None, bytes([0, 255]) * (64 * 32)], ids=["whole", "masked"])
def test_an_edited_picture_is_and_another_source_is_named(engine: Engine, mask: bytes | None) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 64 * 64 * 3, dtype=np.uint8).tobytes()
    source = SourcePicture(64, 64, noise, mask)
    picture = drawn(engine, replace(REQUEST, image=source, strength=0.6))
    assert drawn_again(engine, picture, source).identical
    other = drawn_again(engine, picture, replace(source, rgb=noise[::-1]))
    assert (other.identical, names_of(other)) == (False, ["edit"])


def test_another_dtype_is_named(tiny_model: Path, engine: Engine) -> None:
    other = Engine.load(tiny_model, "cpu", dtype="float32", threads=1)
    came_of_it = drawn_again(other, drawn(engine, REQUEST))
    assert (came_of_it.identical, names_of(came_of_it)) == (False, ["dtype"])
    assert came_of_it.changed_pixels and "dtype: 'bfloat16' then, 'float32' now" in came_of_it.sentence


def test_what_made_a_picture_quicker_acts_again_and_where_it_cannot_is_named(
    tiny_model: Path, engine: Engine
) -> None:
    quicker = Engine.load(tiny_model, "cpu", threads=1)
    quicker.accelerate({size_bucket(64, 64): ("channels_last_vae",)})
    picture = drawn(quicker, REQUEST)
    receipt = read_receipt(picture)
    assert receipt is not None and receipt["accelerated_by"] == ["channels_last_vae"]
    assert drawn_again(quicker, picture).identical
    without = drawn_again(engine, picture)
    assert names_of(without) == ["accelerated_by"]
    assert str(without.differences[0]) == "accelerated_by: ['channels_last_vae'] then, nothing now"


def test_a_picture_of_the_plain_path_is_drawn_so_where_others_are_drawn_quicker(
    tiny_model: Path, engine: Engine
) -> None:
    quicker = Engine.load(tiny_model, "cpu", threads=1)
    quicker.accelerate({size_bucket(64, 64): ("channels_last_vae",)})
    for picture in (drawn(engine, REQUEST), drawn(quicker, replace(REQUEST, exact=True))):
        came_of_it = drawn_again(quicker, picture)
        assert (came_of_it.identical, came_of_it.differences) == (True, ())


def test_other_weights_under_the_same_name_are_named(
    tiny_model: Path, engine: Engine, tmp_path: Path
) -> None:
    folder = tmp_path / tiny_model.name
    shutil.copytree(tiny_model, folder)
    (file,) = (folder / "vae").glob("*.safetensors")
    save_file({name: weight * 0.9 for name, weight in load_file(file).items()}, file, {"format": "pt"})
    came_of_it = drawn_again(Engine.load(folder, "cpu", threads=1), drawn(engine, REQUEST))
    assert (came_of_it.identical, names_of(came_of_it)) == (False, ["model.digest"])


def test_the_same_files_elsewhere_are_the_same_model(
    tiny_model: Path, engine: Engine, tmp_path: Path
) -> None:
    folder = tmp_path / "another-name"
    shutil.copytree(tiny_model, folder)
    for file in folder.rglob("*.*"):
        os.utime(file, (0, 0))
    (folder / "README.md").write_text("its card is no part of it")
    came_of_it = drawn_again(Engine.load(folder, "cpu", threads=1), drawn(engine, REQUEST))
    assert (came_of_it.identical, came_of_it.differences) == (True, ())


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"versions": {"torch": "1.0"}}, "versions.torch"),
        ({"device": "cuda", "device_name": "NVIDIA H200"}, "device"),
        ({"threads": 64}, "threads"),
        ({"offload": "stream"}, "offload"),
        ({"quantize": "int8"}, "quantize"),
        ({"guard": {"trips": [], "clipped_values": 9, "final_guidance_scale": 1.0}}, "guard"),
        ({"scheduler": "EulerDiscreteScheduler"}, "scheduler"),
    ],
)
def test_each_thing_that_differs_is_named(engine: Engine, changed: dict[str, Any], name: str) -> None:
    now = receipt_of(engine.generate(REQUEST).report, 0)
    assert differences(now, now) == ()
    then = {**now, **changed, "versions": {**now["versions"], **changed.get("versions", {})}}
    assert name in [each.name for each in differences(then, now)]


def test_a_picture_that_was_painted_over_is_told(engine: Engine) -> None:
    picture = drawn(engine, REQUEST)
    receipt = read_receipt(picture)
    from PIL.PngImagePlugin import PngInfo

    with Image.open(io.BytesIO(picture)) as image:
        pixels = np.array(image)
    pixels[:8, :8] ^= 255
    info, file = PngInfo(), io.BytesIO()
    info.add_text("zimage-turbo", json.dumps(receipt))
    Image.fromarray(pixels).save(file, "png", pnginfo=info)
    came_of_it = drawn_again(engine, file.getvalue())
    assert (came_of_it.identical, came_of_it.changed_pixels, names_of(came_of_it)) == (False, 64, ["picture"])


def _without_receipt(picture: bytes) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(picture)).save(file, "png")
    return file.getvalue()


def _scaled(picture: bytes) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    info.add_text("zimage-turbo", json.dumps(read_receipt(picture)))
    Image.open(io.BytesIO(picture)).resize((32, 32)).save(file, "png", pnginfo=info)
    return file.getvalue()


def _as_gif(picture: bytes) -> bytes:
    """With its receipt, in a format that none is ever drawn in."""
    file = io.BytesIO()
    Image.open(io.BytesIO(picture)).save(file, "gif", comment=json.dumps(read_receipt(picture)).encode())
    return file.getvalue()


def test_a_png_is_not_unpacked_to_look_for_its_receipt(engine: Engine) -> None:
    picture = _without_receipt(drawn(engine, REQUEST))
    assert read_receipt(picture[: len(picture) // 2]) is None


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda picture: b"", "no picture"),
        (lambda picture: b"GIF89a, but not really", "no picture"),
        (lambda picture: picture[: len(picture) // 2], "damaged or cut short"),
        (_without_receipt, "no receipt"),
        (_scaled, "cut or scaled"),
        (_as_gif, "no picture"),
    ],
)
def test_what_is_no_picture_of_ours_is_refused(
    engine: Engine, spoil: Callable[[bytes], bytes], told: str
) -> None:
    with pytest.raises(InvalidRequest, match=told):
        read_given(spoil(drawn(engine, REQUEST)))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"receipt": 2}, "newer version"),
        ({"prompt": 7}, "prompt must be text"),
        ({"seed": True}, "seed must be a whole number"),
        ({"steps": "8"}, "steps must be a whole number"),
        ({"guidance_scale": None}, "guidance_scale must be a number"),
        ({"refined": 1}, "refined must be true or false"),
        ({"cut": True}, "too long for the file"),
        ({"edit": {"strength": 0.5}}, "drawn from another picture"),
        ({"edit": 7}, "edit must be an object"),
        ({"threads": float("nan")}, "not finite"),
        ({"guard": {"final_guidance_scale": float("inf")}}, "not finite"),
        ({"scheduler": "half \ud800"}, "half a character"),
        ({"versions": {"half \ud800": "1"}}, "half a character"),
    ],
)
def test_a_receipt_that_nothing_can_be_drawn_from_is_refused(
    engine: Engine, changed: dict[str, Any], told: str
) -> None:
    receipt = receipt_of(engine.generate(REQUEST).report, 0)
    assert request_of(receipt).seed == 11
    with pytest.raises(InvalidRequest, match=told):
        request_of({**receipt, **changed})


def test_a_jpeg_whose_prompt_has_no_room_keeps_the_rest_of_its_receipt(engine: Engine) -> None:
    result = engine.generate(REQUEST)
    report = replace(result.report, prompt="圆" * 32_000)
    file = encode(result.images[0], ImageEncoding("jpeg"), facts_of(report, 0))
    receipt = read_receipt(file)
    assert receipt is not None
    assert (receipt["prompt"], receipt["cut"], receipt["seed"]) == (None, True, 11)


# --- by the server


async def _drawn_by(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    asked = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 2, "receipt": True, **fields}
    answer = await client.post("/v1/images/generations", json=asked)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()["data"][-1]
    return told


@pytest.mark.parametrize(("format", "n"), [("png", 1), ("jpeg", 1), ("webp", 2)])
async def test_the_server_draws_its_pictures_again_from_file_and_from_receipt(
    client: httpx.AsyncClient, format: str, n: int
) -> None:
    told = await _drawn_by(client, output_format=format, n=n)
    file = base64.b64decode(told["b64_json"])
    assert told["receipt"] == read_receipt(file)
    for answer in (
        await client.post("/v1/images/reproduce", content=file, headers={"content-type": f"image/{format}"}),
        await client.post("/v1/images/reproduce", json={"image": told["b64_json"]}),
        await client.post("/v1/images/reproduce", json={"receipt": told["receipt"]}),
    ):
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert (body["identical"], body["differences"]) == (True, []), body["message"]
        assert body["receipt"]["pixels"] == told["receipt"]["pixels"]


def _picture_file() -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "png")
    return file.getvalue()


async def test_the_server_draws_its_edits_again_from_their_source(client: httpx.AsyncClient) -> None:
    source = _picture_file()
    edited = await client.post(
        "/v1/images/edits",
        data={"prompt": "a red circle", "num_inference_steps": "4", "strength": "0.6", "receipt": "true"},
        files={"image": ("source.png", source, "image/png")},
    )
    assert edited.status_code == 200, edited.text
    picture = {"image": edited.json()["data"][0]["b64_json"]}
    without = await client.post("/v1/images/reproduce", json=picture)
    assert (without.status_code, without.json()["error"]["param"]) == (400, "source")
    picture["source"] = base64.b64encode(source).decode()
    answer = await client.post("/v1/images/reproduce", json=picture)
    assert answer.json()["identical"] is True, answer.text


async def test_the_server_draws_its_masked_edits_again(client: httpx.AsyncClient) -> None:
    source, mask = io.BytesIO(), io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(source, "png")
    hole = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (0, 0, 32, 64))
    hole.save(mask, "png")
    files = {"image": source.getvalue(), "mask": mask.getvalue()}
    edited = await client.post(
        "/v1/images/edits", data={"prompt": "a red circle", "num_inference_steps": "4"}, files=files
    )
    assert edited.status_code == 200, edited.text
    asked = {
        "image": edited.json()["data"][0]["b64_json"],
        "source": base64.b64encode(files["image"]).decode(),
        "mask": base64.b64encode(files["mask"]).decode(),
    }
    body = (await client.post("/v1/images/reproduce", json=asked)).json()
    assert (body["identical"], body["differences"]) == (True, []), body["message"]
    without_mask = (await client.post("/v1/images/reproduce", json={**asked, "mask": asked["source"]})).json()
    assert "no transparency" in without_mask["error"]["message"]


def _server(name: str, **changed: Any) -> FastAPI:
    """A server with a worker of its own, in this process."""
    chosen = load_settings(device="cpu", cpu_threads=1, ui=False, **changed)
    deployment = serve.deployment(ImageWorker, name=f"Worker-{name}").bind(chosen)
    handle = serve.run(deployment, name=name, route_prefix=f"/{name}", _local_testing_mode=True)
    return build_asgi_app(ImageService(handle, ServerMetrics("test"), chosen), chosen)


async def test_a_server_with_a_lora_draws_its_pictures_again_and_one_without_names_it(
    client: httpx.AsyncClient, tiny_model: Path, tmp_path: Path
) -> None:
    lora = write_lora(tiny_model, tmp_path / "style.safetensors")
    async with client_of(_server("with-lora", model=str(tiny_model), loras=[f"{lora}=0.8"])) as with_lora:
        picture = {"image": (await _drawn_by(with_lora))["b64_json"]}
        same = (await with_lora.post("/v1/images/reproduce", json=picture)).json()
    other = (await client.post("/v1/images/reproduce", json=picture)).json()
    assert (same["identical"], same["differences"]) == (True, []), same["message"]
    assert (other["identical"], [each["name"] for each in other["differences"]]) == (False, ["loras"])
    assert other["changed_pixels"] > 0 and "style.safetensors" in other["message"]


async def test_a_server_whose_guard_recovered_a_picture_draws_it_again(tmp_path: Path) -> None:
    folder = write_overflowing(BFLOAT16, tmp_path / "overflowing")
    async with client_of(_server("overflowing", model=str(folder), dtype="bfloat16")) as recovering:
        told = await _drawn_by(recovering, size="128x128")
        assert told["receipt"]["guard"]["trips"][0]["recovered_by"] is not None
        answer = await recovering.post("/v1/images/reproduce", json={"image": told["b64_json"]})
    assert (answer.json()["identical"], answer.json()["differences"]) == (True, []), answer.text


async def test_the_server_draws_again_what_a_batch_has_drawn(
    client: httpx.AsyncClient, tiny_model: Path, tmp_path: Path
) -> None:
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "pictures"
    prompts.write_text('{"prompt": "a red circle", "size": "64x64", "num_inference_steps": 2, "n": 2}\n')
    options = ["--model", str(tiny_model), "--device", "cpu", "--threads", "1"]
    done = CliRunner().invoke(cli.app, ["batch", str(prompts), "-o", str(folder), *options])
    assert done.exit_code == 0, done.output
    files = sorted(folder.glob("*.png"))
    for file in files:
        answer = await client.post(
            "/v1/images/reproduce", content=file.read_bytes(), headers={"content-type": "image/png"}
        )
        assert (answer.json()["identical"], answer.json()["differences"]) == (True, []), answer.text
    assert len(files) == 2


async def test_the_server_names_other_weights_and_another_dtype(
    client: httpx.AsyncClient, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / tiny_model.name
    shutil.copytree(tiny_model, folder)
    (file,) = (folder / "vae").glob("*.safetensors")
    weights = {name: weight * 0.9 for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    for model, dtype, cause in ((folder, None, "model.digest"), (tiny_model, "float32", "dtype")):
        picture = drawn(Engine.load(model, "cpu", dtype=dtype, threads=1), REQUEST)
        answer = await client.post(
            "/v1/images/reproduce", content=picture, headers={"content-type": "image/png"}
        )
        body = answer.json()
        assert (body["identical"], [each["name"] for each in body["differences"]]) == (False, [cause])
        assert cause in body["message"] and body["changed_pixels"] > 0


@pytest.mark.parametrize(
    ("changed", "causes"),
    [
        ({"versions": {"torch": "1.0"}}, ["versions.torch"]),
        ({"versions": {"zimage-turbo": "0.0.1"}}, ["versions.zimage-turbo"]),
        ({"device": "cuda:0", "device_name": "NVIDIA H200"}, ["device", "device_name"]),
        ({"threads": 64}, ["threads"]),
    ],
    ids=["torch", "this program", "device", "threads"],
)
async def test_the_server_names_another_version_and_another_device(
    client: httpx.AsyncClient, changed: dict[str, Any], causes: list[str]
) -> None:
    receipt = (await _drawn_by(client))["receipt"]
    versions = {**receipt["versions"], **changed.get("versions", {})}
    then = {**receipt, **changed, "versions": versions, "pixels": "0" * 16}
    body = (await client.post("/v1/images/reproduce", json={"receipt": then})).json()
    assert (body["identical"], [each["name"] for each in body["differences"]]) == (False, causes)


async def test_sources_are_unpacked_a_few_at_a_time(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def noting(*_: Any, **__: Any) -> SourcePicture:
        threads.append(threading.current_thread().name)
        raise InvalidRequest("it is not looked at", "source")

    monkeypatch.setattr(reproduction_schema, "source_picture", noting)
    receipt = (await _drawn_by(client))["receipt"] | {"edit": {"strength": 0.5}}
    body = {"receipt": receipt, "source": ""}
    answers = await asyncio.gather(*(client.post("/v1/images/reproduce", json=body) for _ in range(12)))
    assert {answer.status_code for answer in answers} == {400}
    assert len(threads) == 12 and len(set(threads)) <= UNPACKED_AT_ONCE
    assert {name.rpartition("_")[0] for name in threads} == {"unpack"}, "the threads of edits"


async def test_a_receipt_that_no_answer_could_tell_of_is_refused_before_it_is_drawn(
    client: httpx.AsyncClient,
) -> None:
    receipt = (await _drawn_by(client))["receipt"]
    source = {"source": base64.b64encode(_picture_file()).decode()}
    for changed, more in (
        ({"threads": "INFINITE"}, {}),
        ({"guard": {"final_guidance_scale": "INFINITE"}}, {}),
        ({"scheduler": "half \ud800"}, {}),
        ({"guidance_scale": 10**400}, {}),
        ({"edit": {"strength": 10**400}}, source),
        ({"edit": {"strength": -(10**12)}}, source),
    ):
        body = json.dumps({"receipt": {**receipt, **changed}, **more}).replace('"INFINITE"', "1e999")
        answer = await client.post(
            "/v1/images/reproduce", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400, (changed, answer.text)


async def test_a_receipt_is_told_only_where_it_is_asked_for(client: httpx.AsyncClient) -> None:
    assert "receipt" not in await _drawn_by(client, receipt=None)


async def test_the_server_names_what_differs(client: httpx.AsyncClient) -> None:
    receipt = (await _drawn_by(client))["receipt"]
    receipt |= {"pixels": "0" * 16, "model": {**receipt["model"], "digest": "0" * 32}}
    body = (await client.post("/v1/images/reproduce", json={"receipt": receipt})).json()
    assert (body["identical"], [each["name"] for each in body["differences"]]) == (False, ["model.digest"])


@pytest.mark.parametrize(
    ("content", "media_type", "status"),
    [
        (b"{}", "application/json", 400),
        (b'{"receipt": []}', "application/json", 400),
        (b'{"receipt": {}}', "application/json", 400),
        (b'{"receipt": {}, "image": ""}', "application/json", 400),
        (b'{"image": 7}', "application/json", 400),
        (b'{"image": "no base64!"}', "application/json", 400),
        (b"no picture", "image/png", 400),
        (b"prompt=x", "application/x-www-form-urlencoded", 415),
    ],
)
async def test_the_server_refuses_what_nothing_can_be_drawn_from(
    client: httpx.AsyncClient, content: bytes, media_type: str, status: int
) -> None:
    answer = await client.post("/v1/images/reproduce", content=content, headers={"content-type": media_type})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


# --- by the command line


def test_the_command_says_identical_different_or_why_it_cannot(
    tiny_model: Path, engine: Engine, tmp_path: Path
) -> None:
    def reproduce(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, ["reproduce", *arguments])
        return done.exit_code, done.output

    picture, new = tmp_path / "picture.png", tmp_path / "new.png"
    picture.write_bytes(drawn(engine, REQUEST))
    with_model = (str(picture), "--model", str(tiny_model), "--threads", "1")
    code, output = reproduce(*with_model, "-o", str(new))
    assert (code, "identical" in output) == (0, True), output
    assert new.read_bytes() == picture.read_bytes()
    code, output = reproduce(*with_model, "--dtype", "float32", "--json")
    told = json.loads(output[output.index("{") :])
    assert (code, told["identical"], [each["name"] for each in told["differences"]]) == (1, False, ["dtype"])
    code, output = reproduce(str(picture))
    assert (code, "say with --model where it is" in output) == (2, True), output
    (tmp_path / "notes.png").write_text("no picture")
    assert reproduce(str(tmp_path / "notes.png"))[0] == 2
    assert reproduce(str(tmp_path / "nothing.png"))[0] == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{model}", "say with --model where it is"),
        ("owner/name", "say with --model where it is"),
        ("../owner/name", "say with --model where it is"),
        ("~/owner/name", "say with --model where it is"),
        ("owner/another", "fetch it first: zimage-turbo download"),
    ],
)
def test_a_picture_chooses_no_folder_and_downloads_nothing(
    tiny_model: Path,
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    said: str,
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    result = engine.generate(REQUEST)
    of_its_own = replace(result.report, model=name.format(model=tiny_model))
    Path("picture.png").write_bytes(encode(result.images[0], ImageEncoding("png"), facts_of(of_its_own, 0)))
    done = CliRunner().invoke(cli.app, ["reproduce", "picture.png", "--threads", "1"])
    assert (done.exit_code, said in done.output) == (2, True), done.output
