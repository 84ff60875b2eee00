"""A server of our own for tests: started by the command that people use, ended as they end it."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.ports import free_ports

ROOT = Path(__file__).parents[1]
#: Generous: a test machine may be busy with other things.
START_SECONDS = 400.0
STOP_SECONDS = 60.0
READY = re.compile(r"^zimage-turbo is ready: (http://\S+)$")


@dataclass
class RunningServer:
    """One `zimage-turbo launch`, ready. `output` grows while it runs."""

    base_url: str
    process: subprocess.Popen[str]
    seconds_to_ready: float
    output: list[str] = field(repr=False)

    def processes(self) -> list[psutil.Process]:
        """The launcher and everything that runs below it."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it with a signal; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)


@contextmanager
def running_server(*options: str, environment: Mapping[str, str] | None = None) -> Iterator[RunningServer]:
    """`zimage-turbo launch` with these options on a free port, as a context."""
    (port,) = free_ports(1)
    process = subprocess.Popen(
        [sys.executable, "-m", "serve_app.cli", "launch", "--port", str(port), *options],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output: list[str] = []
    began = time.monotonic()
    try:
        base_url = _wait_until_ready(process, output)
        yield RunningServer(base_url, process, time.monotonic() - began, output)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def _wait_until_ready(process: subprocess.Popen[str], output: list[str]) -> str:
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + START_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=left)
        except queue.Empty:
            break
        if line is None:
            raise RuntimeError(f"the server ended with code {process.wait()}:\n{''.join(output)}")
        if found := READY.match(line):
            return found[1]
    raise RuntimeError(f"the server was not ready after {START_SECONDS:g} s:\n{''.join(output)}")
