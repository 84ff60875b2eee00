"""Serve's own commands start the same graph as `zimage-turbo launch`."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.ports import free_ports
from tests.running_server import ROOT, START_SECONDS

pytestmark = pytest.mark.server

CONFIG_FILE = ROOT / "serve_app" / "config" / "local.yaml"
#: `serve run` with an import path takes no port.
SERVE_RUN_PORT = 8000
COMMANDS = Path(sys.executable).parent


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """A private Ray: its own folder (with a short name, for its sockets) and token, and no other cluster."""
    with tempfile.TemporaryDirectory(prefix="zit-", ignore_cleanup_errors=True) as folder:
        token = Path(folder) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        yield {
            **{name: value for name, value in os.environ.items() if not name.startswith("ZIMAGE_")},
            "RAY_TMPDIR": folder,
            "RAY_ADDRESS": "local",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.zimage_engine.tiny_models import write_tiny_z_image

    return write_tiny_z_image(tmp_path_factory.mktemp("models") / "tiny-z-image")


@pytest.fixture(scope="module")
def lora(model: Path) -> Path:
    from tests.zimage_engine.tiny_models.lora import write_lora

    return write_lora(model, model.parent / "style.safetensors")


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command with all that it starts, as a context; what it writes goes to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in started:
            if child.is_running():
                child.kill()


def until_ready(base_url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        try:
            if httpx.get(f"{base_url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    pytest.fail(log.read_text(encoding="utf-8"))


def assert_it_draws(base_url: str, loras: tuple[tuple[str, float], ...] = ()) -> None:
    with httpx.Client(base_url=base_url, timeout=300) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny-z-image"
        fields = {"prompt": "a red circle", "num_inference_steps": 2, "size": "64x64"}
        answer = client.post("/v1/images/generations", json=fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["size"] == "64x64"
        told = answer.json()["data"][0]["loras"]
        assert tuple((lora["name"], lora["weight"]) for lora in told) == loras


Start = Callable[[Path, Path, dict[str, str]], list[str]]


def app_with_environment(model: Path, lora: Path, environment: dict[str, str]) -> list[str]:
    environment |= {"ZIMAGE_MODEL": str(model), "ZIMAGE_UI": "false", "ZIMAGE_LORAS": f"{lora}=0.5"}
    return ["serve_app:app"]


def build_with_arguments(model: Path, lora: Path, environment: dict[str, str]) -> list[str]:
    return ["serve_app:build", f"model={model}", "ui=false", f"vae={model}/vae", f"loras={lora}=0.5"]


@pytest.mark.parametrize("start", [app_with_environment, build_with_arguments])
def test_serve_run(
    start: Start, model: Path, lora: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    _skip_where_taken(SERVE_RUN_PORT)
    command = [str(COMMANDS / "serve"), "run", *start(model, lora, environment)]
    log = tmp_path / "serve.log"
    with running(command, environment, log) as process:
        until_ready(f"http://127.0.0.1:{SERVE_RUN_PORT}", process, log)
        assert_it_draws(f"http://127.0.0.1:{SERVE_RUN_PORT}", ((lora.name, 0.5),))


def _skip_where_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip(f"`serve run` has port {port} only, and something on this machine holds it")


def test_serve_deploy(model: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """The shipped file, with a port and a model of this test's own."""
    http_port, gcs_port, dashboard_port = free_ports(3)
    config = yaml.safe_load(CONFIG_FILE.read_text(encoding="utf-8"))
    config["http_options"]["port"] = http_port
    config["applications"][0]["args"] |= {"model": str(model)}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    head = [
        *(str(COMMANDS / "ray"), "start", "--head", "--block"),
        *("--node-ip-address=127.0.0.1", f"--port={gcs_port}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
        f"--temp-dir={environment['RAY_TMPDIR']}",
    ]
    dashboard = f"http://127.0.0.1:{dashboard_port}"
    log = tmp_path / "ray.log"
    del environment["RAY_ADDRESS"]
    with running(head, environment, log) as process:
        deadline = time.monotonic() + START_SECONDS
        while True:
            deployed = subprocess.run(
                [str(COMMANDS / "serve"), "deploy", "--address", dashboard, str(file)],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if deployed.returncode == 0:
                break
            assert time.monotonic() < deadline, deployed.stderr + log.read_text(encoding="utf-8")
            time.sleep(1)
        until_ready(f"http://127.0.0.1:{http_port}", process, log)
        assert_it_draws(f"http://127.0.0.1:{http_port}")


def test_the_shipped_file_stays_on_this_machine_and_names_known_settings() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve_app.settings import Settings

    config = yaml.safe_load(CONFIG_FILE.read_text(encoding="utf-8"))
    schema = ServeDeploySchema.model_validate(config)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == "serve_app:build"
    Settings.model_validate(application.args)
    # Serve takes unknown keys in silence.
    assert set(config) <= set(ServeDeploySchema.model_fields)
    assert set(config["applications"][0]) <= set(type(application).model_fields)
