"""A real Serve: settings change in place, and the workers follow the queue."""

from __future__ import annotations

import copy
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ports import free_ports
from tests.running_server import START_SECONDS
from tests.serve_app.test_ways_to_start import COMMANDS, running

pytestmark = pytest.mark.server

APPLICATION = "zimage-turbo"
#: Requests that are still drawn, and wait, when the settings change; at the tiny model's default steps.
LONG_REQUEST = {"prompt": "a red circle", "size": "128x128", "n": 10, "seed": 1}
LONG_REQUESTS = 10
SHORT_REQUEST = {"prompt": "a red circle", "size": "64x64", "seed": 1}
#: What is asked for at once, so that one worker is too few.
CALLERS = 12


@dataclass(frozen=True)
class LiveServe:
    """A Serve that takes configurations, as `serve deploy` sends them."""

    dashboard: str
    token: str
    base_url: str

    def put(self, config: dict[str, Any]) -> None:
        answer = httpx.put(self._applications, json=config, headers=self._headers, timeout=60)
        assert answer.status_code == 200, answer.text

    def application(self) -> dict[str, Any]:
        answer = httpx.get(self._applications, headers=self._headers, timeout=60)
        none: dict[str, Any] = {"status": "", "deployments": {}}
        found: dict[str, Any] = answer.json()["applications"].get(APPLICATION, none)
        return found

    def pids(self, deployment: str) -> set[int]:
        """Of the replicas that run."""
        replicas = self.application()["deployments"].get(deployment, {"replicas": ()})["replicas"]
        return {replica["pid"] for replica in replicas if replica["state"] == "RUNNING"}

    def default_steps(self) -> int:
        card = httpx.get(f"{self.base_url}/v1/models", timeout=60).json()["data"][0]
        steps: int = card["default_steps"]
        return steps

    def told_by_readyz(self) -> str:
        sentence: str = httpx.get(f"{self.base_url}/readyz", timeout=60).json().get("settings", "")
        return sentence

    def draw(self, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.base_url}/v1/images/generations", json=fields, timeout=600)

    @property
    def _applications(self) -> str:
        return f"{self.dashboard}/api/serve/applications/"

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


def until(condition: Callable[[], object], seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (httpx.HTTPError, KeyError, ValueError) as not_yet:
            last = repr(not_yet)
        else:
            last = "false"
        assert time.monotonic() < deadline, last
        time.sleep(0.3)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from tests.zimage_engine.tiny_models import write_tiny_z_image

    model = write_tiny_z_image(tmp_path_factory.mktemp("models") / "tiny-z-image")
    (port,) = free_ports(1)
    return {
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
                    "worker_cpus": 0.2,
                    "cpu_threads": 1,
                    "ui": False,
                    "max_replicas": 2,
                    "upscale_seconds": 1,
                    "downscale_seconds": 3,
                },
            }
        ],
    }


@pytest.fixture(scope="module")
def live(config: dict[str, Any]) -> Iterator[LiveServe]:
    gcs_port, dashboard_port = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="zit-", ignore_cleanup_errors=True) as folder:
        token = secrets.token_hex(32)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("ZIMAGE_", "RAY_"))},
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        }
        head = [
            *(str(COMMANDS / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}"),
            *("--node-ip-address=127.0.0.1", f"--port={gcs_port}", "--object-store-memory=268435456"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
        ]
        port = config["http_options"]["port"]
        serve = LiveServe(f"http://127.0.0.1:{dashboard_port}", token, f"http://127.0.0.1:{port}")
        log = Path(folder) / "ray.log"
        with running(head, environment, log):
            until(lambda: serve.application() is not None)
            serve.put(config)
            until(lambda: serve.application()["status"] == "RUNNING" and serve.default_steps() > 0)
            yield serve


def with_user_config(config: dict[str, Any], user_config: dict[str, Any], **args: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    (application,) = changed["applications"]
    application["deployments"] = [{"name": "PromptEnhancer", "user_config": user_config}]
    application["args"] |= args
    return changed


def test_live_settings_hold_for_the_next_request_in_the_same_processes(
    live: LiveServe, config: dict[str, Any]
) -> None:
    ingresses, at_start = live.pids("PromptEnhancer"), live.default_steps()
    assert len(ingresses) == 1 and at_start > 3
    with ThreadPoolExecutor(LONG_REQUESTS) as callers:
        under_way = [callers.submit(live.draw, **LONG_REQUEST) for _ in range(LONG_REQUESTS)]
        time.sleep(1)  # all of them have reached the queue
        live.put(with_user_config(config, {"default_steps": 3}))
        until(lambda: live.default_steps() == 3)
        assert not all(each.done() for each in under_way), "those that were to be disturbed have ended before"
        answers = [each.result() for each in under_way]
    assert {answer.status_code for answer in answers} == {200}
    steps = {picture["steps"] for answer in answers for picture in answer.json()["data"]}
    assert steps == {at_start}, "a request keeps what it began with"
    drawn = [live.draw(**SHORT_REQUEST), live.draw(**SHORT_REQUEST, num_inference_steps=5)]
    assert [each.json()["data"][0]["steps"] for each in drawn] == [3, 5], "what a caller names goes before"

    live.put(with_user_config(config, {"default_stps": 9}))
    until(live.told_by_readyz)
    assert live.default_steps() == 3, "the former settings stay"
    live.put(config)
    until(lambda: live.default_steps() == at_start and not live.told_by_readyz())
    assert live.pids("PromptEnhancer") == ingresses


def test_workers_follow_the_queue_up_and_down_and_lose_nothing(live: LiveServe) -> None:
    until(lambda: len(live.pids("ImageWorker")) == 1)
    stopping = threading.Event()

    def ask_until_stopped(number: int) -> list[int]:
        statuses = []
        while not stopping.is_set():
            statuses.append(live.draw(**SHORT_REQUEST | {"seed": number}).status_code)
        return statuses

    with ThreadPoolExecutor(CALLERS) as callers:
        asking = [callers.submit(ask_until_stopped, number) for number in range(CALLERS)]
        try:
            until(lambda: len(live.pids("ImageWorker")) == 2)
        finally:
            stopping.set()
        statuses = {status for each in asking for status in each.result()}
    assert statuses == {200}
    until(lambda: len(live.pids("ImageWorker")) == 1)
    assert live.draw(**SHORT_REQUEST).status_code == 200


def test_a_new_version_with_an_unknown_live_setting_is_refused_by_name(
    live: LiveServe, config: dict[str, Any]
) -> None:
    live.put(with_user_config(config, {"default_stps": 9}, max_queued_requests=9))
    until(lambda: live.application()["status"] == "DEPLOY_FAILED")
    assert "default_stps; did you mean default_steps?" in live.application()["message"]
    assert live.draw(**SHORT_REQUEST).status_code == 200, "the version before serves on"
