"""The page's own scripts: where they are, how long they are kept, and what stands in the document's head."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from serve_app.gates import add_gates
from serve_app.settings import Settings
from serve_app.ui import assets, mount_page
from serve_app.ui.assets import read_assets
from serve_app.ui.texts import SCRIPT_TEXTS
from tests.serve_app.ui.painting_service import PaintingService


@pytest.fixture(scope="module")
def page() -> Iterator[TestClient]:
    app = FastAPI()
    add_gates(app, Settings(api_key="open sesame"))
    client = TestClient(mount_page(app, PaintingService(), Settings()), base_url="http://127.0.0.1")
    client.headers["authorization"] = "Bearer open sesame"
    yield client


def test_the_document_names_every_script_before_gradios_own(page: TestClient) -> None:
    text = page.get("/").text
    names = re.findall(r'(?:src|href)="(/page/[^"]+)"', text)
    assert len(names) == len(assets.assets().files) >= 6
    assert names[0].endswith("/first.js")
    assert text.index(names[-1]) < text.index("window.gradio_config")
    for name in names:
        file = page.get(name)
        kind = "text/javascript" if name.endswith(".js") else "text/css"
        assert file.status_code == 200 and file.headers["content-type"].startswith(kind)
        assert "immutable" in file.headers["cache-control"]
        assert file.headers["x-content-type-options"] == "nosniff"
    assert page.head("/").status_code == 200


def test_the_head_has_the_words_of_both_languages(page: TestClient) -> None:
    (words,) = re.findall(
        r'<script type="application/json" id="page-texts">(.*?)</script>', page.get("/").text
    )
    told = json.loads(words)
    assert told == {key: {"en": text.en, "zh": text.zh} for key, text in SCRIPT_TEXTS.items()}


def test_every_key_that_a_script_names_has_words() -> None:
    for name, content in assets.assets().files.items():
        for key in re.findall(r'\bsay\("([a-z0-9_]+)"', content.decode()):
            assert key in SCRIPT_TEXTS, f"{name} says {key}"


def test_files_need_the_key_as_the_page_does(page: TestClient) -> None:
    address = assets.assets().address("words.js")
    assert page.get(address, headers={"authorization": ""}).status_code == 401
    assert page.get("/page/status", headers={"authorization": ""}).status_code == 401


def test_a_page_of_before_an_update_gets_the_file_of_now_and_keeps_it_not(page: TestClient) -> None:
    file = page.get("/page/0000000000000000/words.js")
    assert file.status_code == 200 and file.headers["cache-control"] == "no-cache"
    assert page.get("/page/0000000000000000/../page.py").status_code == 404
    assert page.get("/page/0000000000000000/none.js").status_code == 404


def test_the_address_changes_with_any_content(tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text("1")
    first = read_assets(tmp_path)
    (tmp_path / "b.css").write_text("x")
    second = read_assets(tmp_path)
    (tmp_path / "a.js").write_text("2")
    assert len({first.digest, second.digest, read_assets(tmp_path).digest}) == 3
    (tmp_path / "notes.txt").write_text("not for the page")
    assert set(read_assets(tmp_path).files) == {"a.js", "b.css"}
