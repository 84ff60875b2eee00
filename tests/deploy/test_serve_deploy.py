"""The serveConfigV2 of every overlay, deployed to a Ray on this machine by `serve deploy`, draws.

Only what this machine lacks is put in its place: the model, the GPUs, the port and the interface. The
same Ray then gets a new version of the application while pictures are asked for without a pause.
"""

from __future__ import annotations

import copy
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.manifests import NO_KUSTOMIZER, OVERLAYS, kustomizer, ray_cluster, serve_config
from tests.ports import free_ports
from tests.running_server import START_SECONDS
from tests.serve_app.test_ways_to_start import COMMANDS, running

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(kustomizer() is None, reason=NO_KUSTOMIZER),
]

API_KEY = "of-the-test"
#: Bounds on the upgrade under load, whatever the machine does meanwhile.
UPGRADE_SECONDS = 120.0
CLIENTS = 3
#: The names under which /v1/models tells the old and the new version.
MODELS = ("version-one", "version-two")


@dataclass(frozen=True)
class LocalRay:
    """A Ray with the environment of the manifests' pods, and the ports that they name."""

    environment: dict[str, str]
    serve_port: int
    dashboard: str
    agent: str
    folder: Path

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.serve_port}"

    def deploy(self, config: dict[str, Any]) -> None:
        file = self.folder / "serve-config.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        done = subprocess.run(
            [str(COMMANDS / "serve"), "deploy", "--address", self.dashboard, str(file)],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def wait_until_running(self, seconds: float = START_SECONDS) -> None:
        """Returns when Serve has done all of the last `deploy`, and a worker has its model."""
        # What `serve status` reads, without a new Python for each look.
        address = f"{self.dashboard}/api/serve/applications/"
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            applications = httpx.get(address, headers=headers, timeout=30).json()["applications"]
            states = {name: each["status"] for name, each in applications.items()}
            assert "DEPLOY_FAILED" not in states.values(), applications
            if states == {"zimage-turbo": "RUNNING"} and self.is_ready():
                return
            time.sleep(0.5)
        pytest.fail(f"not running after {seconds:g} s: {applications}")

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.base_url}/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same tiny model under two names: the old version and the new."""
    from tests.zimage_engine.tiny_models import write_tiny_z_image

    folder = tmp_path_factory.mktemp("models")
    one, two = (write_tiny_z_image(folder / name) for name in MODELS)
    return one, two


@pytest.fixture(scope="module")
def local_ray() -> Iterator[LocalRay]:
    serve_port, gcs_port, dashboard_port, agent_port, metrics_port = free_ports(5)
    # A short name: Ray's sockets live below, and their paths may have about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="zit-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("ZIMAGE_", "RAY_"))},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": name,
            "RAY_USAGE_STATS_ENABLED": "0",
            # A pod has its CPUs for itself; here Ray's workers would yield to everything else.
            "RAY_worker_niceness": "0",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
            # What the image and the Secret say in a pod.
            "ZIMAGE_HOST": "0.0.0.0",
            "ZIMAGE_API_KEY": API_KEY,
        }
        head = [
            *(str(COMMANDS / "ray"), "start", "--head", "--block", "--num-cpus=2"),
            *("--node-ip-address=127.0.0.1", f"--port={gcs_port}", f"--temp-dir={name}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
            *(f"--dashboard-agent-listen-port={agent_port}", f"--metrics-export-port={metrics_port}"),
            "--object-store-memory=536870912",
        ]
        log = folder / "ray.log"
        ray = LocalRay(
            environment,
            serve_port,
            f"http://127.0.0.1:{dashboard_port}",
            f"http://127.0.0.1:{agent_port}",
            folder,
        )
        with running(head, environment, log) as process:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(f"{ray.agent}/api/local_raylet_healthz"):
                assert process.poll() is None, log.read_text(encoding="utf-8")
                assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
                time.sleep(0.5)
            yield ray


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def for_this_machine(overlay: str, ray: LocalRay, model: Path) -> dict[str, Any]:
    """The overlay's own configuration, with the resources that there are here."""
    config = copy.deepcopy(serve_config(overlay))
    config["http_options"] |= {"host": "127.0.0.1", "port": ray.serve_port}
    arguments = config["applications"][0]["args"]
    arguments |= {"num_gpus": 0, "device": "cpu", "worker_cpus": 1, "cpu_threads": 1}
    if "model" in arguments:
        arguments["model"] = str(model)
    return config


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_configuration_of_every_overlay_draws(
    overlay: str, local_ray: LocalRay, models: tuple[Path, Path]
) -> None:
    config = for_this_machine(overlay, local_ray, models[0])
    local_ray.deploy(config)
    local_ray.wait_until_running()
    fields = {"prompt": "a red circle", "num_inference_steps": 2, "size": "64x64", "seed": 1}
    with httpx.Client(base_url=local_ray.base_url, timeout=300) as client:
        assert client.post("/v1/images/generations", json=fields).status_code == 401
        client.headers["Authorization"] = f"Bearer {API_KEY}"
        answer = client.post("/v1/images/generations", json=fields)
        assert answer.status_code == 200, answer.text
        served = client.get("/v1/models").json()["data"][0]["id"]
    assert (served == MODELS[0]) == ("model" in config["applications"][0]["args"])


def test_every_probe_of_the_manifests_is_answered_without_the_token(local_ray: LocalRay) -> None:
    addresses = {"dashboard": local_ray.dashboard, "agent": local_ray.agent, "serve": local_ray.base_url}
    cluster = ray_cluster("single-gpu")
    templates = [cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]]
    probes = [
        container[kind]["httpGet"]
        for template in templates
        for container in template["spec"]["containers"]
        for kind in ("startupProbe", "readinessProbe", "livenessProbe")
    ]
    assert len(probes) == 6
    for probe in probes:
        answer = httpx.get(addresses[probe["port"]] + probe["path"], timeout=10)
        assert answer.status_code == 200, (probe, answer.text)
        assert "success" in answer.text


@dataclass
class Load:
    """Clients that ask for one picture after another; what came of each is kept."""

    base_url: str
    stopping: threading.Event = field(default_factory=threading.Event)
    outcomes: Counter[str] = field(default_factory=Counter)
    longest_seconds: float = 0.0

    def ask_until_stopped(self, number: int) -> None:
        headers = {"Authorization": f"Bearer {API_KEY}"}
        with httpx.Client(base_url=self.base_url, timeout=300, headers=headers) as client:
            while not self.stopping.is_set():
                began = time.monotonic()
                fields = {"prompt": "a red circle", "num_inference_steps": 4, "size": "64x64", "seed": number}
                try:
                    answer = client.post("/v1/images/generations", json=fields)
                    whole = len(answer.json().get("data", ())) == 1
                    outcome = "drawn" if answer.status_code == 200 and whole else answer.text[:500]
                except httpx.HTTPError as lost:
                    outcome = repr(lost)
                self.outcomes[outcome] += 1
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)


def test_a_new_version_under_load_drops_nothing(
    local_ray: LocalRay, models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = for_this_machine("single-gpu", local_ray, models[0])
    local_ray.deploy(config)
    local_ray.wait_until_running()
    load = Load(local_ray.base_url)
    clients = [threading.Thread(target=load.ask_until_stopped, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        time.sleep(3)
        before = load.outcomes.total()
        config["applications"][0]["args"]["model"] = str(models[1])
        began = time.monotonic()
        local_ray.deploy(config)
        local_ray.wait_until_running(UPGRADE_SECONDS)
        upgrade_seconds = time.monotonic() - began
        during = load.outcomes.total() - before
        time.sleep(3)
    finally:
        load.stopping.set()
        for client in clients:
            client.join(UPGRADE_SECONDS)
    headers = {"Authorization": f"Bearer {API_KEY}"}
    served = httpx.get(f"{local_ray.base_url}/v1/models", headers=headers, timeout=30).json()["data"][0]["id"]
    with capsys.disabled():
        sys.stdout.write(
            f"\nupgrade in {upgrade_seconds:.1f} s under {CLIENTS} clients: {load.outcomes.total()} pictures "
            f"asked for ({during} during it), {load.outcomes['drawn']} drawn, "
            f"longest wait {load.longest_seconds:.1f} s\n"
        )
    assert served == MODELS[1]
    assert before > 0
    assert set(load.outcomes) == {"drawn"}
