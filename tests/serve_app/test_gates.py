"""What stands before every route: the key, the size of the body, Serve's own headers."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from serve_app.gates import add_gates, key_in
from serve_app.settings import Settings, load_settings
from tests.serve_app.conftest import client_of

KEY = "clé-secrète-密"
BEARER = f"Bearer {KEY}"


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def guarded(settings: Settings) -> FastAPI:
    """An app with the gates before it that tells what came through."""
    app = FastAPI()

    @app.post("/v1/echo")
    async def echo(request: Request) -> dict[str, object]:
        return {"bytes": len(await request.body()), "headers": sorted(request.headers)}

    @app.get("/healthz")
    @app.get("/readyz")
    @app.get("/")
    @app.get("/metrics")
    async def fine() -> str:
        return "fine"

    @app.get("/events")
    async def events() -> StreamingResponse:
        return StreamingResponse(iter([b"one", b"two"]))

    add_gates(app, settings)
    return app


@pytest.fixture
def over_a_socket() -> Iterator[int]:
    """The port of a real HTTP server with the gates before its app, and room for 2 KiB."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(guarded(load_settings(max_body_bytes=2048)), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()


def test_an_early_refusal_leaves_the_connection_whole(over_a_socket: int) -> None:
    """Ten refused bodies, each followed by a request on the same connection."""
    with httpx.Client(base_url=f"http://127.0.0.1:{over_a_socket}") as client:
        for _ in range(10):
            refused = client.post("/v1/echo", content=b"a" * 5_000_000)
            assert (refused.status_code, refused.headers.get("connection")) == (413, None)
            assert client.get("/").json() == "fine"


def test_who_waits_for_leave_to_send_is_refused_at_once(over_a_socket: int) -> None:
    request = (
        b"POST /v1/echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\nExpect: 100-continue\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", over_a_socket), timeout=3) as connection:
        connection.sendall(request)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()


def guarded_by_a_key() -> FastAPI:
    return guarded(load_settings(host="0.0.0.0", api_key=KEY, max_body_bytes=2048))


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("", 401),
        (BEARER, 200),
        (BEARER.replace("Bearer", "bearer"), 200),
        (BEARER + "x", 401),
        (BEARER[:-1], 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        (KEY, 401),
        (basic("anyone", KEY), 200),
        (basic("", KEY), 200),
        (basic(KEY, ""), 401),
        (basic("anyone", "wrong"), 401),
        ("Basic !!!", 401),
        ("Basic " + base64.b64encode(KEY.encode()).decode(), 401),
        ("Digest " + KEY, 401),
    ],
)
async def test_only_the_key_opens(authorization: str | None, status: int) -> None:
    headers = {} if authorization is None else {"authorization": authorization.encode()}
    async with client_of(guarded_by_a_key()) as client:
        assert (await client.get("/metrics", headers=headers)).status_code == status  # type: ignore[arg-type]


async def test_without_the_key_only_health_is_answered() -> None:
    async with client_of(guarded_by_a_key()) as client:
        for path, status in {
            "/healthz": 200,
            "/readyz": 200,
            "/": 401,
            "/metrics": 401,
            "/nothing": 401,
        }.items():
            assert (await client.get(path)).status_code == status, path


async def test_the_refusal_has_openais_body_and_asks_in_the_right_way() -> None:
    async with client_of(guarded_by_a_key()) as client:
        api = await client.post("/v1/echo", content=b"{}")
        assert (api.status_code, api.headers["www-authenticate"]) == (401, "Bearer")
        assert api.json()["error"]["code"] == "invalid_api_key"
        assert "Authorization: Bearer KEY" in api.json()["error"]["message"]
        page = await client.get("/")
        assert page.headers["www-authenticate"].startswith("Basic realm=")


async def test_without_a_key_in_the_settings_nothing_is_asked() -> None:
    async with client_of(guarded(load_settings())) as client:
        assert (await client.get("/metrics")).status_code == 200


@pytest.mark.parametrize(("size", "status"), [(0, 200), (2048, 200), (2049, 413), (1_000_000, 413)])
async def test_a_body_may_have_so_many_bytes(size: int, status: int) -> None:
    async with client_of(guarded(load_settings(max_body_bytes=2048))) as client:
        assert (await client.post("/v1/echo", content=b"a" * size)).status_code == status


async def test_serves_own_headers_do_not_get_through() -> None:
    sent = {"X-Request-Timeout-Seconds": "0.01", "x-request-disconnect-disabled": "?1", "x-other": "kept"}
    async with client_of(guarded(load_settings())) as client:
        received = (await client.post("/v1/echo", content=b"{}", headers=sent)).json()["headers"]
    assert "x-other" in received
    assert not [name for name in received if name.startswith("x-request-")]


async def test_streams_pass_as_they_are() -> None:
    async with client_of(guarded(load_settings())) as client, client.stream("GET", "/events") as response:
        assert b"".join([chunk async for chunk in response.aiter_bytes()]) == b"onetwo"


def test_a_key_is_read_from_two_kinds_of_header() -> None:
    assert key_in("Bearer abc") == b"abc"
    assert key_in(basic("me", "a:b")) == b"a:b"
    assert key_in("Token abc") is None
