"""`/v1/history` as programs and the page see it."""

from __future__ import annotations

import io
import re

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

from serve_app.history.history import History
from serve_app.image_codec import ImageEncoding, encode, read_parameters, read_receipt
from serve_app.ingress import build_asgi_app
from serve_app.keys import DRAW, add_key
from serve_app.service import ImageService
from serve_app.settings import Settings
from serve_app.ui.texts import refusal_in_chinese
from tests.serve_app.conftest import client_of
from tests.serve_app.history.conftest import ASKED, picture
from tests.serve_app.test_picture_parameters import facts


async def test_a_kept_picture_is_listed_shown_and_removed(
    history_app: FastAPI, history_client: httpx.AsyncClient
) -> None:
    kept: History = history_app.state.history
    png = picture()
    id = await kept.keep(png, ASKED, "")
    (told,) = (await history_client.get("/v1/history")).json()["data"]
    assert told == {
        "id": id,
        "object": "history.picture",
        "created": told["created"],
        "width": 64,
        "height": 48,
        "parameters": ASKED,
        "revised_prompt": "a red circle, sharp",
        "url": f"/v1/history/{id}/picture",
        "thumbnail_url": f"/v1/history/{id}/thumbnail",
    }
    assert (await history_client.get(f"/v1/history/{id}")).json() == told
    answer = await history_client.get(told["url"])
    assert answer.content == png and answer.headers["content-type"] == "image/png"
    small = await history_client.get(told["thumbnail_url"])
    with Image.open(io.BytesIO(small.content)) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("WEBP", (64, 48))
    assert (await history_client.delete(f"/v1/history/{id}")).status_code == 204
    assert (await history_client.get("/v1/history")).json() == {
        "object": "list",
        "data": [],
        "has_more": False,
    }
    for path in (f"/v1/history/{id}", told["url"], told["thumbnail_url"]):
        gone = await history_client.get(path)
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "history_picture_not_found")
    assert (await history_client.delete(f"/v1/history/{id}")).status_code == 404


@pytest.mark.parametrize("file_format", ["webp", "jpeg"])
async def test_another_format_tells_the_same_of_how_it_was_drawn(
    history_app: FastAPI, history_client: httpx.AsyncClient, file_format: str
) -> None:
    png = picture()
    id = await history_app.state.history.keep(png, ASKED, "")
    answer = await history_client.get(
        f"/v1/history/{id}/picture", params={"format": file_format, "quality": 80, "download": 1}
    )
    assert answer.headers["content-type"] == f"image/{file_format}"
    assert answer.headers["content-disposition"].startswith('attachment; filename="zimage-')
    assert answer.headers["content-disposition"].endswith(f'-7.{file_format}"')
    assert read_parameters(answer.content) == read_parameters(png)
    assert read_receipt(answer.content) == read_receipt(png)


async def test_a_lora_and_a_prompt_of_several_lines_are_told_in_another_format_too(
    history_app: FastAPI, history_client: httpx.AsyncClient
) -> None:
    png = encode(Image.new("RGB", (72, 40)), ImageEncoding("png"), facts())
    id = await history_app.state.history.keep(png, ASKED, "")
    answer = await history_client.get(f"/v1/history/{id}/picture?format=webp")
    assert "<lora:ink:0.5>, 3 modules" in (read_parameters(png) or "")
    assert read_parameters(answer.content) == read_parameters(png)


async def test_pages_and_words_are_asked_for_in_the_address(
    history_app: FastAPI, history_client: httpx.AsyncClient
) -> None:
    for number in range(3):
        await history_app.state.history.keep(picture(f"fox {number}, sharp"), {"prompt": f"fox {number}"}, "")
    page = (await history_client.get("/v1/history", params={"limit": 2})).json()
    assert [each["parameters"]["prompt"] for each in page["data"]] == ["fox 2", "fox 1"] and page["has_more"]
    before = {"before": page["data"][-1]["id"]}
    page = (await history_client.get("/v1/history", params=before)).json()
    assert [each["parameters"]["prompt"] for each in page["data"]] == ["fox 0"] and not page["has_more"]
    for query, number in {"FOX 1": 1, "fox": 3, "wolf": 0, " ": 3, "sharp 2": 1}.items():
        found = (await history_client.get("/v1/history", params={"q": query})).json()
        assert len(found["data"]) == number, query
    assert (await history_client.delete("/v1/history")).status_code == 204
    assert (await history_client.get("/v1/history")).json()["data"] == []


async def test_a_picture_is_sent_once_and_never_as_anything_else(
    history_app: FastAPI, history_client: httpx.AsyncClient
) -> None:
    id = await history_app.state.history.keep(picture(), ASKED, "")
    for path in ("picture", "picture?format=jpeg&quality=70", "thumbnail"):
        answer = await history_client.get(f"/v1/history/{id}/{path}")
        assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in answer.headers["content-security-policy"]
        again = await history_client.get(
            f"/v1/history/{id}/{path}", headers={"if-none-match": f'"other", W/{answer.headers["etag"]}'}
        )
        assert (again.status_code, again.content) == (304, b"")
    tags = {
        (await history_client.get(f"/v1/history/{id}/{path}")).headers["etag"]
        for path in ("picture", "thumbnail")
    }
    assert len(tags) == 2


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?limit=0", "limit"),
        ("?limit=201", "limit"),
        ("?limit=-1", "limit"),
        ("?limit=ten", "limit"),
        ("?before=x", "before"),
        (f"?q={'x' * 201}", "q"),
        ("/{id}/picture?format=gif", "format"),
        ("/{id}/picture?format=jpeg&quality=101", "quality"),
        ("/{id}/picture?format=jpeg&quality=1e1", "quality"),
        ("/{id}/picture?download=yes", "download"),
    ],
)
async def test_a_wrong_field_is_refused_with_a_sentence(
    history_app: FastAPI, history_client: httpx.AsyncClient, path: str, param: str
) -> None:
    id = await history_app.state.history.keep(picture(), ASKED, "")
    answer = await history_client.get("/v1/history" + path.format(id=id))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_each_key_has_a_history_of_its_own(
    history_service: ImageService, history_settings: Settings
) -> None:
    keys = history_settings.data_dir / "keys"
    ann, bob = (add_key(keys, name, {DRAW}) for name in ("ann", "bob"))
    app = build_asgi_app(history_service, history_settings.model_copy(update={"api_keys_file": keys}))
    history: History = app.state.history
    id = await history.keep(picture("ann's, sharp"), {"prompt": "ann's"}, "ann")
    async with client_of(app) as client:
        mine = {"authorization": f"Bearer {ann}"}
        theirs = {"authorization": f"Bearer {bob}"}
        assert len((await client.get("/v1/history", headers=mine)).json()["data"]) == 1
        assert (await client.get("/v1/history", headers=theirs)).json()["data"] == []
        for method, path in (
            ("GET", f"/v1/history/{id}"),
            ("GET", f"/v1/history/{id}/picture"),
            ("GET", f"/v1/history/{id}/thumbnail"),
            ("DELETE", f"/v1/history/{id}"),
        ):
            answer = await client.request(method, path, headers=theirs)
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "history_picture_not_found"
            assert (await client.request(method, path)).status_code == 401
        assert (await client.delete("/v1/history", headers=theirs)).status_code == 204
        assert (await client.get(f"/v1/history/{id}/picture", headers=mine)).status_code == 200
    await history.close()


async def test_what_the_api_draws_is_not_kept(history_client: httpx.AsyncClient) -> None:
    asked = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 1}
    assert (await history_client.post("/v1/images/generations", json=asked)).status_code == 200
    assert (await history_client.get("/v1/history")).json()["data"] == []


async def test_where_the_history_is_off_it_is_said_and_nothing_is_opened(
    history_service: ImageService, history_settings: Settings
) -> None:
    app = build_asgi_app(history_service, history_settings.model_copy(update={"history": False}))
    async with app.router.lifespan_context(app), client_of(app) as client:
        for path in ("", "/x", "/x/picture", "/x/thumbnail"):
            answer = await client.get(f"/v1/history{path}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "history_off")
    assert not (history_settings.data_dir / "history.sqlite3").exists()


async def test_where_it_cannot_be_read_it_is_said_and_what_is_not_kept_is_counted(
    history_service: ImageService, history_settings: Settings
) -> None:
    (history_settings.data_dir / "history.sqlite3").mkdir()
    app = build_asgi_app(history_service, history_settings)
    assert await app.state.history.keep(picture(), ASKED, "") is None
    async with client_of(app) as client:
        answer = await client.get("/v1/history")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "history_unavailable")
        assert answer.headers["retry-after"] and str(history_settings.data_dir) not in answer.text
        metrics = (await client.get("/metrics")).text
    assert re.search(r'zimage_warnings_total\{[^}]*code="history_not_kept"[^}]*\} 1\.0', metrics)


@pytest.mark.parametrize(
    "code", ["history_off", "history_unavailable", "history_picture_not_found", "no_parameters"]
)
def test_the_refusals_have_chinese_words(code: str) -> None:
    assert refusal_in_chinese(code)
