"""Whom the server takes a caller for: proxies that are believed, others, and what callers make up."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request

from serve_app import haproxy
from serve_app.forwarded import ForwardedFor, address_of
from serve_app.gates import add_gates
from serve_app.haproxy_guard import mended
from serve_app.routes.answers import asked_by
from serve_app.settings import PROXY_SECRET_VARIABLE, Settings, SettingsError, load_settings, proxy_secret
from tests.ports import free_ports
from tests.serve_app.test_haproxy import SECRET, needs_haproxy, rendered

PROXIES = [ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "believed", "address"),
    [
        # Nobody is believed: the address of the connection, whatever is said.
        ("203.0.113.9", [], False, "203.0.113.9"),
        ("203.0.113.9", ["198.51.100.1"], False, "203.0.113.9"),
        ("127.0.0.1", ["198.51.100.1"], False, "127.0.0.1"),
        # A named proxy is, for the one that it heard; what stands before is that one's own word.
        ("10.1.2.3", ["198.51.100.1"], False, "198.51.100.1"),
        ("10.1.2.3", ["192.0.2.7, 198.51.100.1"], False, "198.51.100.1"),
        ("10.1.2.3", ["192.0.2.7", "198.51.100.1"], False, "198.51.100.1"),
        ("10.1.2.3", ["198.51.100.1, 10.9.9.9"], False, "198.51.100.1"),
        ("10.1.2.3", ["10.5.5.5"], False, "10.5.5.5"),
        ("10.1.2.3", [], False, "10.1.2.3"),
        # Our own, which anyone's address may be.
        ("127.0.0.1", ["198.51.100.1"], True, "198.51.100.1"),
        ("127.0.0.1", ["192.0.2.7", "198.51.100.1"], True, "198.51.100.1"),
        ("127.0.0.1", ["198.51.100.1", "10.1.2.3"], True, "198.51.100.1"),
        # As proxies write it, and as they do not.
        ("10.1.2.3", ["198.51.100.1:4711"], False, "198.51.100.1"),
        ("10.1.2.3", ["[2001:DB9::1]:4711"], False, "2001:db9::1"),
        ("10.1.2.3", ["2001:db9:0::1"], False, "2001:db9::1"),
        ("2001:db8::5", ["198.51.100.1"], False, "198.51.100.1"),
        ("::ffff:10.1.2.3", ["::ffff:198.51.100.1"], False, "198.51.100.1"),
        ("10.1.2.3", ["198.51.100.1, unknown"], False, "10.1.2.3"),
        ("10.1.2.3", ["198.51.100.1, "], False, "10.1.2.3"),
        ("10.1.2.3", ["alice\nforged"], False, "10.1.2.3"),
        ("", ["198.51.100.1"], True, ""),
        ("testclient", ["198.51.100.1"], True, "testclient"),
    ],
)
def test_the_nearest_address_that_is_no_named_proxy_counts(
    peer: str, forwarded: list[str], believed: bool, address: str
) -> None:
    assert address_of(peer, forwarded, PROXIES, believed) == address


def told(settings: Settings) -> FastAPI:
    """An app behind the gates that tells whom it takes the caller for."""
    app = FastAPI()

    @app.get("/who")
    async def who(request: Request) -> dict[str, object]:
        return {
            "caller": asked_by(request.scope),
            "scheme": request.url.scheme,
            "secret": "x-zimage-proxy" in request.headers,
        }

    @app.get("/healthz")
    async def healthz() -> str:
        return "fine"

    add_gates(app, settings)
    return app


async def asked(app: FastAPI, peer: str, headers: Mapping[str, str]) -> dict[str, object]:
    transport = httpx.ASGITransport(app, client=(peer, 4711))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer: dict[str, object] = (await client.get("/who", headers=headers)).json()
        return answer


FORGED = {"x-forwarded-for": "198.51.100.1", "x-forwarded-proto": "https"}


async def test_without_a_named_proxy_nobody_chooses_an_address() -> None:
    app = told(load_settings())
    for peer in ("203.0.113.9", "127.0.0.1", "::1"):
        for shown in ({}, {"x-zimage-proxy": ""}, {"x-zimage-proxy": SECRET}):
            answer = await asked(app, peer, FORGED | shown)
            assert answer == {"caller": peer, "scheme": "http", "secret": False}


async def test_a_named_proxy_is_believed_and_others_are_not() -> None:
    app = told(load_settings(trusted_proxies="10.0.0.0/8, 127.0.0.1"))
    for peer in ("10.7.7.7", "127.0.0.1"):
        assert await asked(app, peer, FORGED) == {
            "caller": "198.51.100.1",
            "scheme": "https",
            "secret": False,
        }
    assert (await asked(app, "203.0.113.9", FORGED))["caller"] == "203.0.113.9"


async def test_who_shows_the_secret_is_our_own_proxy_and_the_secret_goes_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = haproxy.environment(tmp_path / "files", "/bin/true", range(24001, 24100))
    monkeypatch.setenv(PROXY_SECRET_VARIABLE, ours[PROXY_SECRET_VARIABLE])
    secret = proxy_secret()
    assert secret is not None and len(secret) == 64
    file = Path(ours[PROXY_SECRET_VARIABLE])
    assert file.stat().st_mode & 0o777 == 0o600
    assert secret.decode() not in Path(ours["RAY_SERVE_HAPROXY_BINARY_PATH"]).read_text()
    app = told(load_settings())
    right = {"x-zimage-proxy": secret.decode()}
    # Our HAProxy tells of addresses alone: what it passes on of the scheme is its caller's word.
    assert await asked(app, "127.0.0.1", FORGED | right) == {
        "caller": "198.51.100.1",
        "scheme": "http",
        "secret": False,
    }
    wrong = {"x-zimage-proxy": secret.decode()[:-1] + "x"}
    assert (await asked(app, "127.0.0.1", FORGED | wrong))["caller"] == "127.0.0.1"
    file.unlink()
    assert proxy_secret() is None


async def test_a_proxy_before_our_own_is_believed_where_it_is_named() -> None:
    async def app(scope, receive, send):  # type: ignore[no-untyped-def]
        seen.append((scope["client"], scope["scheme"]))

    seen: list[object] = []
    gate = ForwardedFor(app, ("10.1.2.3",), SECRET.encode())
    headers = [
        (b"x-forwarded-for", b"198.51.100.1"),
        (b"x-forwarded-proto", b"https"),
        (b"x-forwarded-for", b"10.1.2.3"),
        (b"x-zimage-proxy", SECRET.encode()),
    ]
    scope = {"type": "http", "scheme": "http", "client": ("127.0.0.1", 5), "headers": headers}
    await gate(scope, None, None)  # type: ignore[arg-type]
    assert seen == [(("198.51.100.1", 0), "https")]


@pytest.mark.parametrize("value", ["*", "0.0.0.0/0", "::/0", "proxy.example.org", "10.1.2.3/8", "10.1.2.3,"])
def test_what_would_believe_everyone_is_refused(value: str) -> None:
    if value == "10.1.2.3,":
        assert load_settings(trusted_proxies=value).trusted_proxies == ("10.1.2.3",)
        return
    with pytest.raises(SettingsError, match="trusted_proxies must be addresses or networks"):
        load_settings(trusted_proxies=value)


@contextmanager
def serving(app: FastAPI, port: int) -> Iterator[None]:
    """As Ray serves a replica's app, told by the environment of `launch` to believe nobody by itself."""
    server = uvicorn.Server(
        uvicorn.Config(app, port=port, log_level="critical", lifespan="off", forwarded_allow_ips="none")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


@needs_haproxy
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")
def test_behind_our_haproxy_two_addresses_are_two_callers_and_nobody_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front, statistics, metrics, behind = free_ports(4)
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    monkeypatch.setenv(PROXY_SECRET_VARIABLE, str(secret))
    config = mended(rendered(tmp_path, "127.0.0.1", (front, statistics, metrics), behind), SECRET)
    # HAProxy asks without naming a host, and Ray answers that before the app does.
    config = config.replace("/-/healthz", "/healthz")
    (tmp_path / "haproxy.cfg").write_text(config, encoding="utf-8")
    forged = FORGED | {"x-zimage-proxy": SECRET[::-1]}
    with serving(told(load_settings()), behind):
        process = subprocess.Popen([str(haproxy.binary()), "-db", "-f", str(tmp_path / "haproxy.cfg")])
        try:
            for address in ("127.0.0.1", "127.0.0.2"):
                transport = httpx.HTTPTransport(local_address=address, retries=20)
                with httpx.Client(transport=transport, base_url=f"http://127.0.0.1:{front}") as client:
                    _until_served(client)
                    for headers in ({}, forged):
                        answer = client.get("/who", headers=headers).json()
                        assert answer == {"caller": address, "scheme": "http", "secret": False}
            # Past HAProxy, at the replica's own port, nobody is believed.
            direct = httpx.get(f"http://127.0.0.1:{behind}/who", headers=forged).json()
            assert direct["caller"] == "127.0.0.1"
        finally:
            process.kill()
            process.wait()


def _until_served(client: httpx.Client) -> None:
    deadline = time.monotonic() + 30
    while client.get("/who").status_code != 200:
        assert time.monotonic() < deadline, "HAProxy does not find the app"
        time.sleep(0.1)
