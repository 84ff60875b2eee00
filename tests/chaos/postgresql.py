"""A PostgreSQL of our own for a test: a cluster in a temporary folder, gone with it.

Needs Debian's `postgresql-15`, or another version of it, installed; nothing of it need run.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.ports import free_ports

PROGRAMS = Path("/usr/lib/postgresql")
START_SECONDS = 60.0
STOP_SECONDS = 30.0


class NotInstalled(Exception):
    """There is no PostgreSQL here; the message says how it is installed."""


@contextmanager
def postgresql() -> Iterator[str]:
    """The address of an empty database on this machine, which ends with the context."""
    programs = _programs()
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        as_user = _unprivileged()
        if as_user:
            shutil.chown(folder, as_user["user"], as_user["group"])
        data = f"{folder}/data"
        made = subprocess.run(
            [programs / "initdb", "-D", data, "-A", "trust", "-U", "zimage", "-E", "UTF8", "--no-sync"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            **as_user,
        )
        if made.returncode:
            raise RuntimeError(f"initdb failed: {made.stderr}")
        server = subprocess.Popen(
            [programs / "postgres", "-D", data, "-k", folder, "-h", "127.0.0.1", "-p", str(port)],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **as_user,
        )
        try:
            _wait_until_ready(programs, port, server)
            yield f"postgresql://zimage@127.0.0.1:{port}/postgres"
        finally:
            # Connections that are open are ended, and not waited for.
            server.send_signal(signal.SIGINT)
            server.wait(STOP_SECONDS)


def _programs() -> Path:
    found = sorted(PROGRAMS.glob("*/bin/initdb"))
    if not found:
        raise NotInstalled(f"No PostgreSQL in {PROGRAMS}: apt-get install postgresql-15")
    return found[-1].parent


def _unprivileged() -> dict[str, Any]:
    """Whom it runs as: PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return {}
    someone = pwd.getpwnam("nobody")
    return {"user": someone.pw_uid, "group": someone.pw_gid, "extra_groups": []}


def _wait_until_ready(programs: Path, port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"PostgreSQL ended with code {server.returncode}")
        asked = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        if subprocess.run(asked, check=False).returncode == 0:
            return
        time.sleep(0.2)
    raise RuntimeError(f"PostgreSQL was not ready after {START_SECONDS:g} s")
