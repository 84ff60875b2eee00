"""`make up`: server and Prometheus as processes of this machine, seen to work and seen to end."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.deploy.manifests import ROOT
from tests.ports import free_ports
from tests.running_server import START_SECONDS, STOP_SECONDS
from tests.serve_app.test_ways_to_start import running

SCRIPT = ROOT / "docker" / "up.py"
# By its path: a package named docker may be installed.
_spec = importlib.util.spec_from_file_location("up_without_docker", SCRIPT)
assert _spec is not None and _spec.loader is not None
up: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = up
_spec.loader.exec_module(up)

API_KEY = "of-the-test"
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus", path=up.PLACES) is None, reason="no prometheus: apt-get install prometheus"
)


@dataclass(frozen=True)
class Up:
    """What `make up` started."""

    process: subprocess.Popen[bytes]
    ports: Any
    log: Path

    def at(self, port: int) -> httpx.Client:
        headers = {"Authorization": f"Bearer {API_KEY}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, headers=headers)


@contextmanager
def brought_up(folder: Path) -> Iterator[Up]:
    ports = up.Ports(*free_ports(3))
    command = [
        *(sys.executable, str(SCRIPT), f"--folder={folder / 'kept'}", f"--port={ports.server}"),
        *(f"--prometheus-port={ports.prometheus}", f"--grafana-port={ports.grafana}"),
        *("--", "--device", "cpu", "--no-ui"),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ZIMAGE_")}
    with running(command, environment | {"ZIMAGE_API_KEY": API_KEY}, folder / "up.log") as process:
        log = folder / "up.log"
        until(lambda: "All are ready" in log.read_text(encoding="utf-8") or process.poll() is not None)
        assert process.poll() is None, log.read_text(encoding="utf-8")
        yield Up(process, ports, log)


def until(condition: Callable[[], object], seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.5)


@pytest.mark.server
@needs_prometheus
def test_it_draws_is_watched_and_leaves_nothing_behind() -> None:
    # A short name, for Ray's sockets.
    with (
        tempfile.TemporaryDirectory(prefix="zit-", ignore_cleanup_errors=True) as name,
        brought_up(Path(name)) as found,
    ):
        with found.at(found.ports.server) as server:
            fields = {"prompt": "a red circle", "num_inference_steps": 2, "size": "64x64", "seed": 1}
            answer = server.post("/v1/images/generations", json=fields)
            assert answer.status_code == 200, answer.text
            assert len(answer.json()["data"]) == 1
        with found.at(found.ports.prometheus) as prometheus:
            until(lambda: value(prometheus, "sum(zimage_pictures_total)") == 1)
            assert value(prometheus, "sum(up)") == 1
            until(lambda: value(prometheus, "count(zimage_worker_up)") == 1)
            groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
        assert {rule["type"] for group in groups for rule in group["rules"]} == {"alerting", "recording"}
        assert listens_on_the_loopback_alone(found.ports.server)
        assert listens_on_the_loopback_alone(found.ports.prometheus)
        started = psutil.Process(found.process.pid).children(recursive=True)
        assert {"prometheus"} <= {each.name() for each in started}
        found.process.send_signal(signal.SIGINT)
        assert found.process.wait(STOP_SECONDS) == 0
        _, alive = psutil.wait_procs(started, timeout=5)
        assert alive == []
        said = found.log.read_text(encoding="utf-8")
        assert said.index("zimage-turbo has stopped") < said.index("Prometheus has stopped")


def value(prometheus: httpx.Client, query: str) -> float | None:
    result = prometheus.get("/api/v1/query", params={"query": query}).json()["data"]["result"]
    return float(result[0]["value"][1]) if result else None


def listens_on_the_loopback_alone(port: int) -> bool:
    addresses = {
        each.laddr.ip
        for each in psutil.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port == port
    }
    return addresses == {"127.0.0.1"}


def test_without_prometheus_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "PLACES", str(tmp_path))
    with pytest.raises(up.CannotStart, match="apt-get install prometheus"):
        up.prepared(tmp_path, up.Ports(1, 2, 3))


@needs_prometheus
def test_a_taken_port_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, str(SCRIPT), f"--folder={tmp_path}", f"--port={port}"]
        command += [f"--prometheus-port={free_ports(1)[0]}", f"--grafana-port={free_ports(1)[0]}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert f"zimage-turbo needs port {port}" in done.stdout
    assert "is ready" not in done.stdout


def test_grafana_gets_our_dashboards_and_our_prometheus(tmp_path: Path) -> None:
    """No Grafana runs here: what it would be given is looked at."""
    program = up.grafana(tmp_path, up.Ports(1, 2, 3), ("grafana", "server"))
    settings = program.environment
    assert (settings["GF_SERVER_HTTP_ADDR"], settings["GF_SERVER_HTTP_PORT"]) == ("127.0.0.1", "3")
    assert settings["PROMETHEUS_URL"] == "http://127.0.0.1:2"
    folder = Path(settings["GF_PATHS_PROVISIONING"])
    (provider,) = yaml.safe_load((folder / "dashboards" / "zimage.yml").read_bytes())["providers"]
    dashboards: Any = list(Path(provider["options"]["path"]).glob("*.json"))
    assert len(dashboards) == 4
    assert "PROMETHEUS_URL" in (folder / "datasources" / "prometheus.yml").read_text(encoding="utf-8")
    password = tmp_path / "grafana-password"
    assert stat.S_IMODE(password.stat().st_mode) == 0o600
    again = up.grafana(tmp_path, up.Ports(1, 2, 3), ("grafana", "server"))
    assert again.environment["GF_SECURITY_ADMIN_PASSWORD"] == settings["GF_SECURITY_ADMIN_PASSWORD"]
