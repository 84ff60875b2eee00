"""One test, or a table of them, for each class of weakness that servers of this kind have had.

What is tested elsewhere: keys, scopes and the file of keys in test_keys.py, sizes of bodies and Serve's own
headers in test_gates.py, HAProxy's open ports in test_haproxy.py, and pickles among the files of a model in
tests/zimage_engine/checkpoint and tests/zimage_engine/loading.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import pickle
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image
from ray import serve
from ray.serve.context import _RequestContext, _serve_request_context

from serve_app.gates import EXPOSED_HEADERS, BodyLimit, audit
from serve_app.image_codec import read_parameters
from serve_app.ingress import build_asgi_app
from serve_app.local_cluster import LocalCluster
from serve_app.logs import JsonLines, PlainLines
from serve_app.metrics import ServerMetrics
from serve_app.service import ImageService
from serve_app.settings import Settings, SettingsError, load_settings
from serve_app.ui import markup
from tests.serve_app.conftest import client_of
from tests.serve_app.test_app import QUICK, URL, image_of
from tests.serve_app.test_gates import guarded

HERE, EVIL = "http://localhost", "https://evil.example"
#: What a page may try on a server that its visitor can reach: drawing, Gradio's queue and uploads, reading.
ACTIONS = (
    ("POST", URL),
    ("POST", "/gradio_api/queue/join"),
    ("POST", "/gradio_api/upload"),
    ("POST", "/gradio_api/cancel"),
    ("GET", "/v1/models"),
    ("GET", "/config"),
    ("GET", "/gradio_api/queue/data?session_hash=a"),
    ("GET", "/metrics"),
    ("DELETE", "/v1/models"),
    ("POST", "/-/settings"),
)


@pytest.fixture(scope="module")
def with_page(worker_handle: serve.handle.DeploymentHandle, settings: Settings) -> Callable[..., FastAPI]:
    """Makes everything that answers HTTP, the page too, over a real worker, with the settings given."""

    def made(**chosen: Any) -> FastAPI:
        service = ImageService(worker_handle, ServerMetrics("test"), settings)
        return build_asgi_app(service, load_settings(**chosen))

    return made


@pytest.fixture(scope="module")
def page(with_page: Callable[..., FastAPI]) -> FastAPI:
    return with_page()


@pytest.fixture
async def page_client(page: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(page) as client:
        yield client


# Unauthenticated administration


@pytest.mark.parametrize("keyless", [True, False])
async def test_nothing_changes_the_server_without_a_key(keyless: bool) -> None:
    app = guarded(load_settings() if keyless else load_settings(api_key="sesame"))
    reached = []

    @app.api_route("/-/settings", methods=["POST", "PUT", "DELETE", "PATCH"])
    async def change() -> None:
        reached.append(True)

    async with client_of(app) as client:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            for headers in ({}, {"authorization": "Bearer none"}, {"authorization": "Basic Og=="}):
                answer = await client.request(method, "/-/settings", headers=headers)
                assert answer.status_code == 401, (method, headers)
        assert reached == []
        admin = await client.post("/-/settings", headers={"authorization": "Bearer sesame"})
        assert admin.status_code == (401 if keyless else 200)


# Path traversal


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v1/models//etc/passwd",
        "/v1/models/..%5c..%5cetc%5cpasswd",
        "/v1/models/%00",
        "/v1/../etc/passwd",
        "/v1/images/../../../etc/passwd",
        "/docs/../../etc/passwd",
    ],
)
async def test_no_path_of_the_api_leads_to_a_file(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(httpx.URL(f"{HERE}{path}"))
    assert answer.status_code == 404, answer.text
    assert "root:" not in answer.text


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x"]
)
async def test_a_models_name_is_compared_and_never_opened(client: httpx.AsyncClient, name: str) -> None:
    answer = await client.post(URL, json={"prompt": "a red circle", "model": name} | QUICK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


FILES = (
    "/etc/passwd",
    "//etc/passwd",
    "/proc/self/environ",
    "../../../../etc/passwd",
    f"{tempfile.gettempdir()}/../etc/passwd",
    "%2fetc%2fpasswd",
    "C:/Windows/win.ini",
    "http://127.0.0.1:1/",
    "https://evil.example/",
    "HTTP://evil.example/",
    "//evil.example/x",
    "\\\\evil.example\\x",
)


@pytest.mark.parametrize("file", [*FILES, str(Path(__file__)), str(Path("serve_app/settings.py").resolve())])
@pytest.mark.parametrize(
    "route", ["/gradio_api/file=", "/gradio_api/file/", "/file=", "/file/", "/static/", "/assets/"]
)
async def test_gradios_file_routes_give_nothing_out_and_lead_nowhere(
    page_client: httpx.AsyncClient, route: str, file: str
) -> None:
    answer = await page_client.get(httpx.URL(f"{HERE}{route}{file}"))
    assert answer.status_code in (403, 404), (answer.status_code, answer.headers.get("location"))
    assert "root:" not in answer.text and "location" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/proxy=http://127.0.0.1:1/"),
        ("HEAD", "/gradio_api/proxy=https://evil.example/"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/vibe-edit/"),
        ("POST", "/gradio_api/call/on_draw"),
        ("POST", "/gradio_api/run/on_draw"),
        ("POST", "/gradio_api/api/on_draw"),
        ("GET", "/gradio_api/dev/reload"),
        ("GET", "/gradio_api/token"),
        ("GET", "/gradio_api/run-history/records"),
        ("GET", "/gradio_api/custom_component/a/b/c/..%2f..%2fetc%2fpasswd"),
        ("GET", "/gradio_api/upload_progress?upload_id=a"),
        ("GET", "/gradio_api/deep_link"),
    ],
)
async def test_what_the_page_does_not_need_of_gradio_is_not_there(
    page_client: httpx.AsyncClient, method: str, path: str
) -> None:
    assert (await page_client.request(method, path, json={} if method == "POST" else None)).status_code == 404


async def test_no_folder_is_allowed_to_gradio(page: FastAPI) -> None:
    blocks = page.routes[-1].app.get_blocks()  # type: ignore[attr-defined]
    assert blocks.allowed_paths == []
    assert blocks.show_error is False
    assert blocks.max_file_size == 1


async def test_a_file_in_place_of_words_is_not_opened(page_client: httpx.AsyncClient, page: FastAPI) -> None:
    """Gradio takes some dictionaries in its requests for files that it has stored; ours are words alone."""
    blocks = page.routes[-1].app.get_blocks()  # type: ignore[attr-defined]
    (draws,) = [number for number, function in blocks.fns.items() if function.name == "on_draw"]
    for stolen in ("/etc/passwd", "http://127.0.0.1:1/x"):
        file = {"path": stolen, "url": stolen, "meta": {"_type": "gradio.FileData"}}
        asked = {
            "fn_index": draws,
            "session_hash": "thief",
            "data": [file, "", True, True, "256x256", 8, 1.8, "", "en"],
        }
        answer = await page_client.post("/gradio_api/queue/join", json=asked)
        assert answer.status_code in (200, 400, 403, 422)
        assert "root:" not in answer.text


# Names of uploaded files


@pytest.mark.parametrize(
    "name", ["../../evil.py", "/etc/cron.d/evil", "a\r\nX-Evil: 1", "evil\0.png", "x" * 5000]
)
async def test_there_is_no_upload_whatever_the_files_name(
    page_client: httpx.AsyncClient, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("/gradio_api/upload", "/upload", "/gradio_api/upload/", URL):
        answer = await page_client.post(path, files={"files": (name, b"evil", "image/png")})
        assert answer.status_code in (404, 405, 415), (path, answer.text)
    assert list(tmp_path.iterdir()) == []


# Decompression bombs


async def test_a_compressed_body_is_not_unpacked(client: httpx.AsyncClient) -> None:
    for coding in ("gzip", "deflate", "br", "zstd"):
        answer = await client.post(URL, content=b"\x1f\x8b" + b"\0" * 100, headers={
            "content-type": "application/json", "content-encoding": coding})  # fmt: skip
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_a_picture_that_unpacks_to_gigabytes_is_refused_before_it_does() -> None:
    """No route takes pictures; the one reader that there is leaves Pillow's limit of pixels in force."""
    header = io.BytesIO()
    Image.new("1", (1, 1)).save(header, "png")
    bomb = bytearray(header.getvalue())
    bomb[16:24] = (60_000).to_bytes(4) + (60_000).to_bytes(4)
    import zlib

    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4)
    with pytest.raises(Image.DecompressionBombError):
        read_parameters(bytes(bomb))


def test_deep_or_long_json_is_refused_and_does_not_end_the_process() -> None:
    from serve_app.error_mapping import RequestRefused
    from serve_app.openai_schema import read_json

    for bomb in (b"[" * 500_000, b'{"a":' * 100_000, b'{"seed": ' + b"9" * 900_000 + b"}"):
        with pytest.raises(RequestRefused) as refused:
            read_json(bomb)
        assert refused.value.code == "invalid_json"


# Pickles


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch pickled",)


@pytest.mark.parametrize("kind", ["application/octet-stream", "application/x-pickle", "application/json"])
async def test_a_pickle_is_a_body_like_any_other(
    page_client: httpx.AsyncClient, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (URL, "/gradio_api/queue/join", "/", "/v1/models"):
        answer = await page_client.post(path, content=pickle.dumps(_Evil()), headers={"content-type": kind})
        assert 400 <= answer.status_code < 500, (path, answer.text)
    assert not (tmp_path / "pickled").exists()


# HTML and headers through prompts

MARKUP = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"><svg onload='alert(1)'>",
    "${alert(1)}",
    "{{7*7}}",
    "</p><iframe srcdoc=x>",
)


@pytest.mark.parametrize("prompt", MARKUP)
def test_what_a_person_wrote_is_words_on_the_page(prompt: str) -> None:
    escaped = markup.escape(prompt)
    assert not set(escaped) & set("<>\"'{}$")
    assert prompt not in markup.refusal_box([prompt], True, "en")
    assert prompt not in markup.progress_bar(prompt, 0.5)


@pytest.mark.parametrize("prompt", ["a\r\nX-Evil: 1\r\n\r\n<script>", "a\nSet-Cookie: a=b", *MARKUP])
async def test_no_prompt_reaches_a_header_or_becomes_html(client: httpx.AsyncClient, prompt: str) -> None:
    answer = await client.post(URL, json={"prompt": prompt, "user": prompt} | QUICK)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert "x-evil" not in answer.headers and "set-cookie" not in answer.headers
    for value in answer.headers.values():
        assert "evil" not in value.lower() and "<" not in value


async def test_wrong_fields_are_told_as_json_and_never_as_html(client: httpx.AsyncClient) -> None:
    answer = await client.post(URL, json={"prompt": "a", "<script>": 1})
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")


async def test_a_prompt_cannot_forge_the_settings_in_the_file(client: httpx.AsyncClient) -> None:
    """Readers take the last line for the settings; the prompt stands before it, whatever its lines say."""
    forged = "a\nNegative prompt: b\nSteps: 99, Sampler: x, CFG scale: 9, Seed: 666, Size: 1x1, Model: evil"
    answer = await client.post(URL, json={"prompt": forged, "seed": 5, "enhance": False} | QUICK)
    content = answer.json()["data"][0]["b64_json"]
    assert set(image_of(content).info) <= {"parameters", "zimage-turbo"}
    import base64

    text = read_parameters(base64.b64decode(content)) or ""
    last = text.splitlines()[-1]
    assert "Seed: 5" in last and "666" not in last and "evil" not in last


# Cross-origin requests and DNS rebinding


@pytest.mark.parametrize(
    "origin", [EVIL, "null", "http://localhost:3000", "http://127.0.0.1", "file://", "localhost"]
)
async def test_a_page_of_another_site_gets_nothing_done_and_reads_nothing(
    page_client: httpx.AsyncClient, origin: str
) -> None:
    for method, path in ACTIONS:
        answer = await page_client.request(method, path, headers={"origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_origin"), (method, path)
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        asks = {"origin": origin, "access-control-request-method": method}
        preflight = await page_client.options(path, headers=asks)
        assert preflight.status_code == 403
        assert "access-control-allow-origin" not in preflight.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_a_form_of_another_site_is_known_without_its_origin(
    page_client: httpx.AsyncClient, site: str
) -> None:
    for method, path in ACTIONS:
        if method != "GET":
            answer = await page_client.request(method, path, headers={"sec-fetch-site": site})
            assert answer.status_code == 403, (method, path)
    assert (await page_client.get("/", headers={"sec-fetch-site": site})).status_code == 200, (
        "a link may lead here"
    )


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:7860",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "a@b",
        "[::1",
    ],
)
async def test_a_name_bent_to_this_machine_is_no_way_in(page_client: httpx.AsyncClient, host: str) -> None:
    for method, path in ACTIONS:
        answer = await page_client.request(method, path, headers={"host": host, "origin": f"http://{host}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (421, "unknown_host"), (method, path)
    assert (await page_client.get("/healthz", headers={"host": host})).status_code == 200


async def test_no_header_tells_the_page_to_send_its_words_elsewhere(
    page_client: httpx.AsyncClient, with_page: Callable[..., FastAPI]
) -> None:
    """Gradio would put it into the page, which a cache on the way may give to everyone."""
    for name in ("x-forwarded-host", "x-gradio-server", "forwarded", "x-forwarded-prefix"):
        for path in ("/", "/config"):
            answer = await page_client.get(path, headers={name: "evil.example", "x-forwarded-proto": "https"})
            assert answer.status_code == 200 and "evil.example" not in answer.text, (name, path)
    behind_a_proxy = with_page(trusted_proxies="127.0.0.1")
    async with client_of(behind_a_proxy) as client:
        named = {"x-forwarded-host": "images.example.org", "x-forwarded-proto": "https"}
        assert (await client.get("/config", headers=named)).json()["root"] == "https://images.example.org"


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:7860", "127.0.0.1:7860", "[::1]:7860", "app.localhost", "LOCALHOST"]
)
async def test_the_page_itself_goes_on_under_each_of_this_machines_names(
    page_client: httpx.AsyncClient, host: str
) -> None:
    own = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
    answer = await page_client.get("/config", headers=own)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


async def test_the_person_names_the_hosts_and_the_sites_that_are_right(
    with_page: Callable[..., FastAPI],
) -> None:
    app = with_page(allowed_hosts="images.example.org", cors_origins="https://app.example.org")
    async with client_of(app) as client:
        behind_proxy = {"host": "images.example.org", "origin": "https://images.example.org"}
        assert (await client.get("/v1/models", headers=behind_proxy)).status_code == 200
        rewritten = {"host": "127.0.0.1:7860", "origin": "https://images.example.org"}
        assert (await client.get("/v1/models", headers=rewritten)).status_code == 200
        site = {"origin": "https://app.example.org"}
        answer = await client.get("/v1/models", headers=site)
        assert answer.headers["access-control-allow-origin"] == "https://app.example.org"
        assert answer.headers["access-control-expose-headers"] == EXPOSED_HEADERS
        assert "access-control-allow-credentials" not in answer.headers
        asks = site | {"access-control-request-method": "POST"}
        preflight = await client.options(URL, headers=asks)
        assert (preflight.status_code, preflight.headers["access-control-allow-methods"]) == (
            204,
            "DELETE, GET, POST",
        )
        assert (await client.get("/v1/models", headers={"origin": EVIL})).status_code == 403
        assert (await client.get("/v1/models", headers={"host": "evil.example"})).status_code == 421


async def test_with_keys_any_name_will_do_and_another_site_still_will_not(
    with_page: Callable[..., FastAPI],
) -> None:
    async with client_of(with_page(api_key="sesame")) as client:
        key = {"authorization": "Bearer sesame", "host": "images.example.org"}
        assert (await client.get("/v1/models", headers=key)).status_code == 200
        assert (await client.get("/v1/models", headers=key | {"origin": EVIL})).status_code == 403
        rebound = {"host": "evil.example", "origin": "http://evil.example"}
        assert (await client.get("/v1/models", headers=rebound)).status_code == 401


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("cors_origins", "*"),
        ("cors_origins", "https://*.example.org"),
        ("cors_origins", "https://a.example/path"),
        ("cors_origins", "null"),
        ("allowed_hosts", "*"),
        ("allowed_hosts", "https://a.example"),
        ("allowed_hosts", "a.example/path"),
    ],
)
def test_a_setting_that_would_open_to_all_is_refused(setting: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"setting {setting} must be"):
        load_settings(**{setting: value})


# Bodies that are too large or never end


@pytest.mark.parametrize("path", [URL, "/gradio_api/queue/join", "/gradio_api/upload", "/", "/nothing"])
async def test_no_route_takes_a_body_above_the_limit(page_client: httpx.AsyncClient, path: str) -> None:
    headers = {"content-type": "application/json"}
    answer = await page_client.post(path, content=b"a" * (2**20 + 1), headers=headers)
    assert answer.status_code == (404 if path.endswith("upload") else 413), path


async def test_a_body_that_trickles_in_is_given_up() -> None:
    app = guarded(load_settings(body_seconds=0.3))

    async def trickle() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"a"
            await asyncio.sleep(0.05)

    async with client_of(app) as client:
        began = asyncio.get_running_loop().time()
        answer = await client.post("/v1/echo", content=trickle())
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "body_too_slow")
        assert asyncio.get_running_loop().time() - began < 10
        assert (await client.post("/v1/echo", content=b"whole")).json()["bytes"] == 5


async def test_who_listens_behind_a_whole_body_is_not_cut_off() -> None:
    """As every stream does, to notice that its caller has gone."""
    heard: list[str] = []
    arriving = iter([{"type": "http.request", "body": b"a", "more_body": False}])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        heard.append((await receive())["type"])

    async def receive() -> Any:
        for message in arriving:
            return message
        await asyncio.sleep(0.5)
        heard.append("half a second later")
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(f"nothing was to be answered, got {message}")

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await BodyLimit(app, limit_bytes=1000, seconds=0.1)(scope, receive, send)
    assert heard == ["half a second later", "http.disconnect"]


# Lines in the log that are not ours

FORGED = "a\n2026-01-01 00:00:00,000 INFO serve_app: all is well\r\x1b[2J\x85\u2028\x9b31m\u202e"


@pytest.fixture
def of_a_request() -> Iterator[None]:
    token = _serve_request_context.set(_RequestContext(request_id=FORGED))
    yield
    _serve_request_context.reset(token)


@pytest.mark.parametrize("formatter", [PlainLines(), JsonLines("here")])
def test_what_comes_from_outside_cannot_begin_a_line(
    of_a_request: None, formatter: logging.Formatter
) -> None:
    record = logging.makeLogRecord(
        {"name": "serve_app", "levelname": "INFO", "msg": "path %s", "args": (FORGED,)}
    )
    line = formatter.format(record)
    assert len(line.splitlines()) == 1
    assert line.isprintable(), line
    if isinstance(formatter, JsonLines):
        assert json.loads(line)["message"] == f"path {FORGED}"


def test_a_trace_in_the_log_is_set_in_so_that_none_of_its_lines_looks_like_one_of_ours() -> None:
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.makeLogRecord(
        {"name": "serve_app", "levelname": "ERROR", "msg": "failed", "exc_info": info}
    )
    first, *rest = PlainLines().format(record).split("\n")
    assert first.endswith("serve_app: failed") and rest
    assert all(line.startswith("  ") for line in rest)
    assert all(line.isprintable() for line in rest)


async def test_the_audit_tells_who_did_what_and_never_a_prompt_or_a_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from serve_app.keys import add_key

    key = add_key(tmp_path / "keys", "alice", ["draw"])
    app = guarded(load_settings(api_keys_file=tmp_path / "keys"))
    headers = {"authorization": f"Bearer {key}"}
    caplog.set_level("INFO", logger=audit.name)
    async with client_of(app) as client:
        await client.post("/v1/echo?secret=prompt", json={"prompt": "a secret prompt"}, headers=headers)
        await client.get("/events", headers=headers)
        await client.get("/metrics", headers=headers)
        await client.post("/v1/echo", headers={"authorization": "Bearer wrong-key"})
        await client.post("/-/settings%0aforged", headers=headers)
        await client.post("/v1/echo", headers=headers | {"origin": EVIL})
    lines = [record.getMessage() for record in caplog.records if record.name == audit.name]
    assert lines == [
        "alice from 127.0.0.1: POST /v1/echo -> 200",
        "alice from 127.0.0.1: GET /metrics -> 403",
        "no key from 127.0.0.1: POST /v1/echo -> 401",
        "alice from 127.0.0.1: POST /-/settings\nforged -> 403",
        "no key from 127.0.0.1: POST /v1/echo -> 403",
    ]
    written = [JsonLines("here").format(record) for record in caplog.records if record.name == audit.name]
    fields = json.loads(written[0])
    assert (fields["caller"], fields["route"], fields["status"]) == ("alice", "POST /v1/echo", 200)
    assert not [line for line in written if "secret" in line or key in line or "wrong-key" in line]


@pytest.mark.parametrize(("chosen", "written"), [({}, 0), ({"audit_log": True}, 1), ({"api_key": "a"}, 1),
    ({"api_key": "a", "audit_log": False}, 0)])  # fmt: skip
async def test_the_audit_is_kept_where_callers_carry_keys_or_a_person_wants_it(
    chosen: dict[str, Any], written: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger=audit.name)
    async with client_of(guarded(load_settings(**chosen))) as client:
        await client.post("/v1/echo")
    assert len([record for record in caplog.records if record.name == audit.name]) == written


# Ray's own ports


def test_ray_runs_without_a_dashboard_and_asks_for_a_token_that_only_we_can_read() -> None:
    cluster = LocalCluster(load_settings(haproxy=False))
    environment = cluster._environment()
    token = Path(environment["RAY_AUTH_TOKEN_PATH"])
    try:
        assert environment["RAY_AUTH_MODE"] == "token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
        assert len(token.read_text()) == 64
        assert environment["RAY_enable_metrics_collection"] == "0"
    finally:
        token.unlink()
        token.parent.rmdir()


def test_ray_itself_is_started_on_the_loopback_without_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    started: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **given: started.update(given))
    cluster = LocalCluster(load_settings())
    cluster._start_ray()
    cluster._folder.rmdir()
    assert started["include_dashboard"] is False
    assert started["_node_ip_address"] == "127.0.0.1"


def test_every_serve_file_of_ours_names_its_host() -> None:
    import yaml

    root = Path(__file__).parents[2]
    found = []
    for file in (
        *root.glob("serve_app/config/*.yaml"),
        *root.glob("k8s/**/*.yaml"),
        *root.glob("docker/**/*.yaml"),
    ):
        for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
            inner = document.get("spec", {}).get("serveConfigV2") if isinstance(document, dict) else None
            served = yaml.safe_load(inner) if inner else document
            if isinstance(served, dict) and "applications" in served:
                found.append(file.name)
                assert served["http_options"]["host"], file
    assert "local.yaml" in found and len(found) >= 2


# Failures tell nothing of the machine


async def test_a_failure_tells_no_path_and_no_code(app: FastAPI, service: ImageService) -> None:
    async def broken() -> None:
        raise RuntimeError("/srv/models/secret.safetensors: line 12")

    service.model_states = broken  # type: ignore[method-assign, assignment]
    async with client_of(app) as client:
        answer = await client.get("/v1/models")
    assert answer.status_code == 500
    assert "secret" not in answer.text and "incident" in answer.text and "Traceback" not in answer.text
