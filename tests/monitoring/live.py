"""The real application under a real Prometheus, and a client that counts what it is answered.

Two ingresses, two workers, and the demo model in its overflowing form, whose pictures trip the guard by
themselves. One worker is killed while it draws. A second target tells what a worker with a GPU would, by the
same table: its figures are made up, and it is told apart by its `application`.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from monitoring.generate import RULES
from monitoring.panels import Panel
from serve_app.metrics import MemoryFigures, WorkerMetrics
from tests.ports import free_ports
from tests.running_server import ROOT, START_SECONDS
from tests.zimage_engine.sampling.overflowing_models import BFLOAT16, write_overflowing
from zimage_engine.types import DeviceStatus, ModelDescription

APPLICATION, CONSTRUCTED = "zimage-turbo", "constructed"
LOG_NAME = "serve.log"
#: Where Ray says at which ports its own metrics are, below its folder.
RAYS_TARGETS = Path("ray", "prom_metrics_service_discovery.json")
#: The id of one request, which its client chose.
TRACED = "a-client-chose-this"
URL = "/v1/images/generations"
SIDE_PX = 64
#: The third step is drawn in float32 at once: the first two trips tell the ladder to stay there.
QUICK = {"prompt": "a red circle", "num_inference_steps": 3, "size": f"{SIDE_PX}x{SIDE_PX}", "seed": 1}
#: Seconds of work.
LONG = QUICK | {"num_inference_steps": 30, "size": "128x128"}
#: Far more than anybody waits for.
ENDLESS = QUICK | {"num_inference_steps": 100, "n": 10, "size": "256x256"}
REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"prompt": "a red circle", "size": "100x100"}, "invalid_value"),
    ({"prompt": "a red circle", "sice": "64x64"}, "unknown_parameter"),
    ({}, "missing_required_parameter"),
    ({"prompt": "a red circle", "model": "someone/else"}, "model_not_found"),
)


@dataclass
class Counted:
    """What the client was answered; for many threads."""

    outcomes: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    pictures: int = 0
    pixels: int = 0
    refined: int = 0
    trips: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def take(self, answer: httpx.Response) -> None:
        body = answer.json()
        with self._lock:
            if answer.status_code != 200:
                self.outcomes[body["error"]["code"]] += 1
                return
            self.outcomes["ok"] += 1
            self.pictures += len(body["data"])
            width, height = map(int, body["size"].split("x"))
            self.pixels += len(body["data"]) * width * height
            for number, picture in enumerate(body["data"]):
                self.refined += picture["refined"]
                for warning in picture["warnings"]:
                    # What concerns the request stands with each of its pictures, and is one warning.
                    if number == 0 or not warning["code"].endswith("_outside_range"):
                        self.warnings[warning["code"]] += 1
                    if warning["code"] == "guard_recovered":
                        (steps,) = re.findall(r"at steps? ([\d, ]+) was", warning["message"])
                        self.trips += len(steps.split(","))

    def left(self) -> None:
        with self._lock:
            self.outcomes["cancelled"] += 1


@dataclass(frozen=True)
class Observed:
    """What is there when the load is over; `killed` is the killed worker's name in the label `replica`.

    `log` is the file with everything that the application writes to the terminal, `process` what started it.
    """

    prometheus: httpx.Client
    application: httpx.Client
    counted: Counted
    killed: str
    began: float
    ended: float
    log: Path
    process: psutil.Process

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What an instant query gives now."""
        answer = self.prometheus.get("/api/v1/query", params={"query": expression})
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return result

    def over_time(self, expression: str) -> list[dict[str, Any]]:
        """What a panel would show of the whole run, a point a second."""
        span: dict[str, Any] = {"query": expression, "start": self.began, "end": self.ended, "step": 1}
        answer = self.prometheus.get("/api/v1/query_range", params=span)
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return result

    def exemplars(self, expression: str) -> list[dict[str, Any]]:
        """The exemplars that a panel with this expression would show of the whole run."""
        span: dict[str, Any] = {"query": expression, "start": self.began, "end": self.ended}
        answer = self.prometheus.get("/api/v1/query_exemplars", params=span)
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        return [each for series in answer.json()["data"] for each in series["exemplars"]]

    def by(self, label: str, expression: str) -> dict[str, float]:
        """The values of a query by one of its labels."""
        return {each["metric"].get(label, ""): float(each["value"][1]) for each in self.query(expression)}


@contextmanager
def observed_application() -> Iterator[Observed]:
    """All of it, started, loaded and still running."""
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="zit-", ignore_cleanup_errors=True))
        )
        port, prometheus_port, figures_port = free_ports(3)
        application = stack.enter_context(_application(folder, port))
        stack.enter_context(_constructed_worker(figures_port))
        targets = {APPLICATION: port, CONSTRUCTED: figures_port}
        prometheus = stack.enter_context(
            prometheus_over(folder / "prometheus", prometheus_port, targets, folder / RAYS_TARGETS)
        )
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_SECONDS))
        began = time.time()
        until(lambda: "zimage_build_info" in prometheus.get("/api/v1/label/__name__/values").text)
        counted = Counted()
        killed = _load(client, counted, application)
        settled_at = time.time()
        # A round of scrapes and one of rules after the last change; Ray hands its own on every ten seconds.
        until(lambda: time.time() > settled_at + 15)
        yield Observed(
            prometheus, client, counted, killed, began, time.time(), folder / LOG_NAME, application
        )


def application_of(panel: Panel) -> str:
    """Whose figures a panel is to be looked at with."""
    return CONSTRUCTED if panel.needs_gpu else APPLICATION


# --- the load --------------------------------------------------------------------------------------------


def _load(client: httpx.Client, counted: Counted, application: psutil.Process) -> str:
    """Everything that can happen to a request, each counted as it is answered; the killed worker's name."""

    def draw(body: dict[str, Any], request_id: str | None = None) -> httpx.Response:
        headers = {} if request_id is None else {"x-request-id": request_id}
        answer = client.post(URL, json=body, headers=headers)
        counted.take(answer)
        return answer

    with ThreadPoolExecutor(16) as senders:
        list(senders.map(draw, [QUICK | {"n": 2}, QUICK, QUICK | {"seed": 2}]))
        for body, code in REFUSED:
            before = counted.outcomes[code]
            draw(body)
            assert counted.outcomes[code] == before + 1, (code, counted)
        with contextlib.suppress(httpx.ReadTimeout):
            client.post(URL, json=ENDLESS, timeout=2)
            raise AssertionError("a picture that nobody can wait for was drawn")
        counted.left()
        until(lambda: _busy(client) == [])
        # More than two workers and two queues of one hold.
        list(senders.map(draw, [LONG] * 14))
        assert counted.outcomes["queue_full"] > 0, counted
        # One alone, whose worker dies under it.
        until(lambda: _busy(client) == [])
        sent = senders.submit(draw, LONG | {"n": 5})
        until(lambda: len(_busy(client)) == 1)
        (killed,) = _busy(client)
        _drawing_process(application).kill()
        sent.result()
        until(lambda: len(_workers(client)) == 2 and killed not in _workers(client))
        list(senders.map(draw, [QUICK] * 4))
    assert draw(QUICK, TRACED).headers["x-request-id"] == TRACED
    return killed


def _values(client: httpx.Client, name: str) -> dict[str, float]:
    found = re.findall(rf'^{name}{{replica="([^"]+)"}} (\S+)$', client.get("/metrics").text, re.MULTILINE)
    return {replica: float(value) for replica, value in found}


def _busy(client: httpx.Client) -> list[str]:
    return [replica for replica, value in _values(client, "zimage_worker_busy").items() if value]


def _workers(client: httpx.Client) -> list[str]:
    return list(_values(client, "zimage_worker_up"))


def replicas_of(application: psutil.Process, deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas."""
    return [each for each in application.children(recursive=True) if deployment in "".join(each.cmdline())]


def _drawing_process(application: psutil.Process) -> psutil.Process:
    """The worker that computes; its process does not tell its replica's name."""
    workers = replicas_of(application, "ImageWorker")
    assert len(workers) == 2, workers
    before = [sum(each.cpu_times()[:2]) for each in workers]
    time.sleep(0.5)
    spent = [sum(each.cpu_times()[:2]) - earlier for each, earlier in zip(workers, before, strict=True)]
    return workers[spent.index(max(spent))]


def until(condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.2)


# --- the programs ----------------------------------------------------------------------------------------


@contextmanager
def _application(folder: Path, port: int) -> Iterator[psutil.Process]:
    model = write_overflowing(BFLOAT16, folder / "overflowing")
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "serve_app:build",
                "args": {
                    "model": str(model),
                    "device": "cpu",
                    "num_replicas": 2,
                    "worker_cpus": 0.5,
                    "cpu_threads": 1,
                    "max_queued_requests": 1,
                    "log_format": "json",
                    "ui": False,
                },
                "deployments": [{"name": "PromptEnhancer", "num_replicas": 2}],
            }
        ],
    }
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ZIMAGE_")} | {
        "RAY_TMPDIR": str(folder),
        "RAY_ADDRESS": "local",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_worker_niceness": "0",
    }
    command = [str(Path(sys.executable).parent / "serve"), "run", str(file)]
    with _running(command, folder / LOG_NAME, environment) as process:
        until(lambda: process.poll() is not None or _answers(f"http://127.0.0.1:{port}/readyz"))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            until(lambda: process.poll() is not None or len(_workers(client)) == 2)
        assert process.poll() is None, (folder / LOG_NAME).read_text(encoding="utf-8")
        yield psutil.Process(process.pid)


@contextmanager
def prometheus_over(
    folder: Path, port: int, targets: dict[str, int], rays_targets: Path | None = None
) -> Iterator[httpx.Client]:
    """Debian's Prometheus with our rules and our scrape configuration, but looking every few seconds.

    With the file of Ray's targets the job that stands there as a comment is there too.
    """
    folder.mkdir()
    text = (RULES.parent / "prometheus.yml").read_text(encoding="utf-8")
    if rays_targets is not None:
        before, commented = text.split("  # - job_name: ray\n")
        job_of_ray = "  - job_name: ray\n" + re.sub("^  # ", "  ", commented.split("\n\n")[0], flags=re.M)
        text = before + job_of_ray.replace(
            "RAY_FOLDER/prom_metrics_service_discovery.json", str(rays_targets)
        )
    config = yaml.safe_load(text)
    # A scrape that is late would leave holes: while it draws, a small machine answers after a second or two.
    config["global"] = {"scrape_interval": "4s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES / "*.yml")]
    job = next(each for each in config["scrape_configs"] if each["job_name"] == "zimage-turbo")
    job["scrape_timeout"] = "4s"
    job["static_configs"] = [
        {"targets": [f"127.0.0.1:{at}"], "labels": {"namespace": "test", "application": application}}
        for application, at in targets.items()
    ]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'series'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
        "--log.level=warn",
    ]
    with _running(command, folder / "log") as process:
        address = f"http://127.0.0.1:{port}"
        until(lambda: process.poll() is not None or _answers(f"{address}/-/ready"))
        assert process.poll() is None, (folder / "log").read_text(encoding="utf-8")
        with httpx.Client(base_url=address, timeout=30) as client:
            yield client


@contextmanager
def _constructed_worker(port: int) -> Iterator[None]:
    """What a worker with a GPU tells; the figures are made up."""
    model = ModelDescription(
        "constructed", "z-image-turbo", "cuda:0", "bfloat16", 1024, 1024, 16, 8, 1.0, 512
    )
    metrics = WorkerMetrics("constructed", model, load_seconds=31.0, repairs=2)
    began = time.monotonic()

    def text() -> bytes:
        seconds = time.monotonic() - began
        allocated = int(14e9 + 3e9 * (seconds % 8 < 5))
        figures = MemoryFigures(
            bytes_by_kind={"allocated": allocated, "reserved": int(19e9), "peak": int(17.4e9)},
            fragmentation_ratio=min(0.3, seconds / 200),
            offload_mode="model" if seconds < 30 else "stream",
            defrags={"empty_cache": int(seconds / 12)},
            defrag_seconds=0.02 * int(seconds / 12),
            ooms={("decode", "tiled"): int(seconds > 30)},
        )
        status = DeviceStatus("cuda:0", "made up", total_bytes=int(24e9), used_bytes=int(20e9))
        return metrics.text(status, figures).encode()

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = text()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Answers)
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.1), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def _running(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
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


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
