"""The guard around HAProxy, on configurations that Ray's own template renders."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import uvicorn
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from serve_app import haproxy
from serve_app.haproxy_guard import mended
from tests.ports import free_ports

SECRET = "0f" * 32

needs_haproxy = pytest.mark.skipif(haproxy.binary() is None, reason="no HAProxy for this platform")


def rendered(
    folder: Path,
    host: str,
    ports: tuple[int, int, int] = (7999, 8404, 9101),
    behind: int = 30000,
    is_deployed: bool = True,
) -> str:
    """What Ray writes for one application behind a front at `host`, or for none yet."""
    config = HAProxyConfig(
        http_options=HTTPOptions(host=host, port=ports[0]),
        stats_port=ports[1],
        metrics_port=ports[2],
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        metrics_socket_path=str(folder / "metrics.sock"),
    )
    backend = BackendConfig(
        name="app", path_prefix="/", app_name="app", servers=[ServerConfig("replica", "127.0.0.1", behind)]
    )
    file = folder / "haproxy.cfg"
    backends = {"app": backend} if is_deployed else {}
    api = HAProxyApi(cfg=config, backend_configs=backends, config_file_path=str(file))
    api._generate_config_file_internal()
    return file.read_text(encoding="utf-8")


def binds(configuration: str) -> list[str]:
    return re.findall(r"^\s*bind\s+(\S+)", configuration, re.MULTILINE)


def test_ray_opens_two_ports_to_everyone_and_the_guard_closes_them(tmp_path: Path) -> None:
    before = rendered(tmp_path, "127.0.0.1")
    assert sorted(binds(before)) == ["*:8404", "127.0.0.1:7999", ":9101"]
    assert sorted(binds(mended(before, SECRET))) == ["127.0.0.1:7999", "127.0.0.1:8404", "127.0.0.1:9101"]


def test_the_front_stays_open_where_its_person_opened_it(tmp_path: Path) -> None:
    assert sorted(binds(mended(rendered(tmp_path, "0.0.0.0"), SECRET))) == [
        "*:7999",
        "127.0.0.1:8404",
        "127.0.0.1:9101",
    ]


def test_serves_own_headers_are_stripped_at_the_front_and_slow_ones_given_up(tmp_path: Path) -> None:
    lines = mended(rendered(tmp_path, "127.0.0.1"), SECRET).splitlines()
    front = lines.index("frontend http_frontend")
    assert [line.strip().partition(" if ")[0] for line in lines[front + 2 : front + 8]] == [
        "http-request del-header x-request-timeout-seconds",
        "http-request del-header x-request-disconnect-disabled",
        "timeout http-request 20s",
        "http-request add-header x-forwarded-for %[src]",
        f"http-request set-header x-zimage-proxy {SECRET}",
        "http-request del-header x-request-id",
    ]


def test_requests_are_not_spliced(tmp_path: Path) -> None:
    before = rendered(tmp_path, "127.0.0.1")
    assert "option splice-request" in before
    assert "option splice-request" not in mended(before, SECRET)


def test_a_template_that_has_changed_is_not_passed_on() -> None:
    with pytest.raises(SystemExit, match="template has changed"):
        mended("frontend other\n    bind :80\n", SECRET)


@needs_haproxy
def test_a_caller_that_hangs_up_is_noticed_behind_haproxy(tmp_path: Path) -> None:
    """Ray's own configuration fails this: see `haproxy_guard.SPLICED_REQUESTS`."""
    front, statistics, metrics, behind = free_ports(4)
    hung_up = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET":
            await PlainTextResponse("fine")(scope, receive, send)
            return
        while (await receive())["type"] != "http.disconnect":
            pass
        hung_up.set()

    config = mended(rendered(tmp_path, "127.0.0.1", (front, statistics, metrics), behind), SECRET)
    (tmp_path / "haproxy.cfg").write_text(config, encoding="utf-8")
    server = uvicorn.Server(uvicorn.Config(app, port=behind, log_level="critical", lifespan="off"))
    threading.Thread(target=server.run, daemon=True).start()
    process = subprocess.Popen([str(haproxy.binary()), "-db", "-f", str(tmp_path / "haproxy.cfg")])
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{front}", timeout=30) as patient:
            _until(lambda: _answers(patient))
            # The connection behind is now used a second time, by somebody else.
            url = str(patient.base_url)
            with httpx.Client(timeout=1) as impatient, pytest.raises(httpx.ReadTimeout):
                impatient.post(url, json={"prompt": "a red circle"})
            assert hung_up.wait(20)
    finally:
        process.kill()
        server.should_exit = True


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/").status_code == 200
    except httpx.HTTPError:
        return False


@needs_haproxy
@pytest.mark.parametrize("is_deployed", [True, False], ids=["no replica answers", "no application yet"])
def test_where_nobody_answers_callers_hear_it_in_our_form(tmp_path: Path, is_deployed: bool) -> None:
    """Ray's own configuration says 500 and 404 here, in plain text: clients take that for their own fault."""
    front, statistics, metrics, behind = free_ports(4)
    config = rendered(tmp_path, "127.0.0.1", (front, statistics, metrics), behind, is_deployed)
    (tmp_path / "haproxy.cfg").write_text(mended(config, SECRET), encoding="utf-8")
    process = subprocess.Popen([str(haproxy.binary()), "-db", "-f", str(tmp_path / "haproxy.cfg")])
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{front}", timeout=30) as client:
            _until(lambda: _listening(psutil.Process(process.pid)))
            answer = client.post("/v1/images/generations", json={"prompt": "a red circle"})
    finally:
        process.kill()
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["error"]["code"] == "server_unavailable"
    assert "again in a few seconds" in answer.json()["error"]["message"]


@needs_haproxy
def test_haproxy_takes_the_mended_configuration(tmp_path: Path) -> None:
    file = tmp_path / "mended.cfg"
    file.write_text(mended(rendered(tmp_path, "127.0.0.1"), SECRET), encoding="utf-8")
    checked = subprocess.run(
        [str(haproxy.binary()), "-c", "-f", str(file)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


@needs_haproxy
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_haproxy_listens_on_the_loopback_only_and_ends_with_its_parent(tmp_path: Path) -> None:
    ports = free_ports(3)
    rendered(tmp_path, "127.0.0.1", (ports[0], ports[1], ports[2]))
    environment = haproxy.environment(tmp_path / "files", str(haproxy.binary()), range(24001, 24100))
    guarded = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert os.access(guarded, os.X_OK)
    # A parent of its own, which can die without a word.
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(600)",
            guarded,
            "-db",
            "-f",
            str(tmp_path / "haproxy.cfg"),
        ]
    )
    try:
        process = _until(lambda: _listening_child(parent.pid, 3))
        assert {connection.laddr.ip for connection in _listening(process)} == {"127.0.0.1"}
        assert {connection.laddr.port for connection in _listening(process)} == set(ports)
        parent.kill()
        parent.wait()
        assert _until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    finally:
        parent.kill()


def _listening(process: psutil.Process) -> list[psutil._common.pconn]:
    return [c for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]


def _listening_child(pid: int, count: int) -> psutil.Process | None:
    for child in psutil.Process(pid).children(recursive=True):
        if len(_listening(child)) >= count:
            return child
    return None


def _until(condition, seconds: float = 60):  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    pytest.fail("it did not come to pass")


def test_callers_shared_out_by_address_keep_their_ingress_when_one_comes(tmp_path: Path) -> None:
    before = rendered(tmp_path, "127.0.0.1")
    assert "hash-type" not in mended(before, SECRET)
    by_address = mended(re.sub(r"balance \w+", "balance source", before), SECRET)
    assert re.search(r"balance source\n\s+hash-type consistent\n", by_address)
    chosen = [
        haproxy.environment(tmp_path / "files", "/bin/true", range(24001, 24100), by_address)
        for by_address in (False, True)
    ]
    assert [each["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"] for each in chosen] == ["leastconn", "source"]
