"""Pictures by url: what is answered, how they are fetched, and what is not to be had."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI
from ray import serve

from serve_app.image_codec import read_parameters
from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.results import ResultStore
from serve_app.service import ImageService
from serve_app.settings import Settings
from tests.serve_app.conftest import client_of
from tests.serve_app.object_store import BUCKET, object_store

ASKED = {
    "prompt": "a red circle",
    "size": "64x64",
    "num_inference_steps": 1,
    "seed": 7,
    "response_format": "url",
}
KEY = {"authorization": "Bearer secret"}


@pytest.fixture
def app_of(worker_handle: serve.handle.DeploymentHandle, settings: Settings, tmp_path: Path) -> object:
    """An app with other settings, and a data folder of its own."""

    def make(**changed: object) -> FastAPI:
        chosen = Settings.model_validate({**settings.model_dump(), "data_dir": tmp_path, **changed})
        return build_asgi_app(ImageService(worker_handle, ServerMetrics("test"), chosen), chosen)

    return make


@pytest.fixture
async def caller(app_of) -> AsyncIterator[httpx.AsyncClient]:  # type: ignore[no-untyped-def]
    async with client_of(app_of()) as client:
        yield client


async def test_a_picture_is_told_by_its_url_and_fetched_from_there(caller: httpx.AsyncClient) -> None:
    answer = await caller.post("/v1/images/generations", json=ASKED | {"n": 2})
    assert answer.status_code == 200, answer.text
    pictures = answer.json()["data"]
    drawn = await caller.post("/v1/images/generations", json=ASKED | {"n": 2, "response_format": "b64_json"})
    for told, plain in zip(pictures, drawn.json()["data"], strict=True):
        assert "b64_json" not in told and "url" not in plain
        assert told["url"].startswith("http://localhost/v1/files/")
        assert time.time() < told["expires_at"] <= time.time() + 24 * 3600
        file = await caller.get(told["url"])
        assert file.content == base64.b64decode(plain["b64_json"])


async def test_a_file_is_given_out_so_that_no_browser_makes_more_of_it(caller: httpx.AsyncClient) -> None:
    answer = await caller.post("/v1/images/generations", json=ASKED | {"output_format": "webp"})
    url = answer.json()["data"][0]["url"]
    file = await caller.get(url)
    assert file.headers["content-type"] == "image/webp"
    assert file.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in file.headers["content-security-policy"]
    assert file.headers["cache-control"].startswith("private, max-age=")
    assert file.headers["content-disposition"] == 'inline; filename="picture.webp"'
    head = await caller.head(url)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(file.content)))
    again = await caller.get(url, headers={"if-none-match": file.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_the_url_is_the_one_that_the_caller_can_reach(app_of) -> None:  # type: ignore[no-untyped-def]
    told = {"x-forwarded-proto": "https", "host": "localhost:8443"}
    for proxies, begins in (("127.0.0.1", "https://localhost:8443"), ("", "http://localhost:8443")):
        async with client_of(app_of(trusted_proxies=proxies)) as client:
            answer = await client.post("/v1/images/generations", json=ASKED, headers=told)
        assert answer.json()["data"][0]["url"].startswith(f"{begins}/v1/files/")


async def test_openais_client_gets_a_url_and_downloads_it(app_of) -> None:  # type: ignore[no-untyped-def]
    app = app_of()
    client = AsyncOpenAI(api_key="none", base_url="http://localhost/v1", http_client=client_of(app))
    answer = await client.images.generate(
        prompt="a red circle", response_format="url", extra_body={"num_inference_steps": 1}, size="64x64"
    )
    assert answer.data is not None and answer.data[0].url is not None
    async with client_of(app) as browser:
        file = await browser.get(answer.data[0].url)
    assert "a red circle" in (read_parameters(file.content) or "")


async def test_with_keys_drawing_needs_one_and_fetching_by_the_unguessable_id_none(app_of) -> None:  # type: ignore[no-untyped-def]
    async with client_of(app_of(api_key="secret")) as client:
        assert (await client.post("/v1/images/generations", json=ASKED)).status_code == 401
        answer = await client.post("/v1/images/generations", json=ASKED, headers=KEY)
        url = answer.json()["data"][0]["url"]
        assert (await client.get(url)).status_code == 200
        assert (await client.get("/v1/files")).status_code == 401
        assert (await client.get("/v1/files/")).status_code == 404
        assert (await client.post(url)).status_code == 401
        assert (await client.post(url, headers=KEY)).status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/",
        "/v1/files/unknown",
        "/v1/files/..%2f..%2fsecret.png",
        "/v1/files/%2e%2e/%2e%2e/secret.png",
        "/v1/files/f23456789-AAAAAAAAAAAAAAAAAAAAAAAA.png",
        "/v1/files/000000001-AAAAAAAAAAAAAAAAAAAAAAAA.png",
        "/v1/files/f23456789-AAAAAAAAAAAAAAAAAAAAAAAA.png%00",
    ],
)
async def test_what_was_never_given_is_not_there(
    caller: httpx.AsyncClient, tmp_path: Path, path: str
) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    answer = await caller.get(path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")
    assert b"secret" not in answer.content.replace(b"secret.png", b"")


async def test_what_has_expired_is_told_as_gone(app_of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    app = app_of()
    async with client_of(app) as client:
        url = (await client.post("/v1/images/generations", json=ASKED)).json()["data"][0]["url"]
        app.state.results = ResultStore(tmp_path / "results", 60, 2**20, lambda: time.time() + 25 * 3600)
        answer = await client.get(url)
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "file_expired")


async def test_a_picture_that_cannot_be_kept_is_in_the_answer_with_a_warning(app_of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "results").write_text("a file where the folder should be")
    async with client_of(app_of()) as client:
        answer = await client.post("/v1/images/generations", json=ASKED | {"n": 2})
        metrics = (await client.get("/metrics")).text
    pictures = answer.json()["data"]
    assert (answer.status_code, len(pictures)) == (200, 2)
    for picture in pictures:
        assert "url" not in picture
        assert read_parameters(base64.b64decode(picture["b64_json"]))
        assert picture["warnings"][-1]["code"] == "result_not_kept"
    assert str(tmp_path) not in answer.text
    assert re.search(r'zimage_warnings_total\{[^}]*code="result_not_kept"[^}]*\} 2\.0', metrics)


async def test_pictures_in_an_object_store_are_fetched_through_the_server(
    app_of, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    with object_store() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        async with client_of(app_of(results_url=f"s3://{BUCKET}/files")) as client:
            answer = await client.post("/v1/images/generations", json=ASKED | {"n": 2})
            urls = [picture["url"] for picture in answer.json()["data"]]
            files = [(await client.get(url)).content for url in urls]
            assert files == [bucket.objects[f"files/{url.rpartition('/')[2]}"][0] for url in urls]
            bucket.failures = -1
            silent = await client.get(urls[0])
            drawn = await client.post("/v1/images/generations", json=ASKED)
    assert (silent.status_code, silent.json()["error"]["code"]) == (503, "files_unavailable")
    assert silent.headers["retry-after"] == "10"
    (picture,) = drawn.json()["data"]
    assert base64.b64decode(picture["b64_json"]) == files[0]
    assert [warning["code"] for warning in picture["warnings"]][-1] == "result_not_kept"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"results_url": "nowhere://bucket"}, "such as s3://"),
        ({"results_url": "pictures"}, "s3://bucket/prefix"),
        ({"result_bytes": "1MiB"}, "result_bytes"),
        ({"result_bytes": "much"}, "result_bytes"),
        ({"result_seconds": 0}, "result_seconds"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict[str, object], told: str) -> None:
    from serve_app.settings import SettingsError, load_settings

    with pytest.raises(SettingsError, match=told):
        load_settings(**changed)


def test_a_place_by_url_and_sizes_as_text_are_taken() -> None:
    from serve_app.settings import load_settings

    chosen = load_settings(results_url="s3://pictures/x", result_bytes="1GiB", data_dir="/srv/pictures")
    assert (chosen.results_place, chosen.result_bytes) == ("s3://pictures/x", 2**30)
    assert load_settings(data_dir="/srv/pictures").results_place == Path("/srv/pictures/results")
    assert load_settings(data_dir="").data_dir == load_settings().data_dir
