"""Server, Prometheus and Grafana as compose.yaml brings them up, but as processes of this machine.

`make up` runs it. All three listen on the loopback alone, with everything in monitoring/ provisioned;
Ctrl-C or SIGTERM ends them in order. Grafana is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "monitoring"
LOOPBACK = "127.0.0.1"
#: Debian puts servers into sbin, which is not in everybody's PATH.
PLACES = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
GRAFANA_HOME = Path("/usr/share/grafana")


class CannotStart(Exception):
    """The message says what is missing and what to do."""


@dataclass(frozen=True)
class Ports:
    """Where the three listen."""

    server: int
    prometheus: int
    grafana: int


@dataclass(frozen=True)
class Program:
    """One of the three: how it is started, when it is ready, and how long it may take to stop.

    Without a `log` it writes to the terminal.
    """

    name: str
    command: tuple[str, ...]
    page: str
    ready: str
    stop_seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=7860, help="of the server")
    parser.add_argument("--prometheus-port", type=int, default=9090)
    parser.add_argument("--grafana-port", type=int, default=3000)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "up", help="what is kept, and logs")
    parser.add_argument("launch", nargs="*", metavar="OPTION", help="after --: for zimage-turbo launch")
    chosen = parser.parse_args()
    ports = Ports(chosen.port, chosen.prometheus_port, chosen.grafana_port)
    try:
        programs = prepared(chosen.folder.resolve(), ports, tuple(chosen.launch))
        check_ports(programs)
        raise SystemExit(run(programs))
    except CannotStart as reason:
        say(str(reason))
        raise SystemExit(2) from None


def prepared(folder: Path, ports: Ports, launch_options: tuple[str, ...] = ()) -> list[Program]:
    """The programs in the order in which they start, with their files written below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    programs = [prometheus(folder, ports)]
    if (grafana_command := find_grafana()) is None:
        say("Grafana is not installed, so there are no dashboards: https://grafana.com/grafana/download")
    else:
        programs.append(grafana(folder, ports, grafana_command))
    server = (
        sys.executable,
        "-m",
        "serve_app.cli",
        "launch",
        "--host",
        LOOPBACK,
        "--port",
        str(ports.server),
    )
    address = f"http://{LOOPBACK}:{ports.server}"
    # A picture that is being drawn ends before its worker does.
    programs.append(Program("zimage-turbo", (*server, *launch_options), address, f"{address}/readyz", 310.0))
    return programs


def prometheus(folder: Path, ports: Ports) -> Program:
    """Prometheus with the configuration for one box, at these ports and with the server's key."""
    command = shutil.which("prometheus", path=PLACES)
    if command is None:
        raise CannotStart("prometheus is not installed; apt-get install prometheus, then `make up` again")
    config = yaml.safe_load((MONITORING / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    config["rule_files"] = [str(MONITORING / "prometheus" / pattern) for pattern in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"][0]["targets"] = [f"{LOOPBACK}:{ports.server}"]
    if key := os.environ.get("ZIMAGE_API_KEY"):
        job["authorization"] = {"credentials_file": str(written_secret(folder / "api-key", key))}
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    address = f"http://{LOOPBACK}:{ports.prometheus}"
    options = (
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        "--storage.tsdb.retention.time=15d",
        f"--web.listen-address={LOOPBACK}:{ports.prometheus}",
    )
    return Program(
        "Prometheus", (command, *options), address, f"{address}/-/ready", 30.0, log=folder / "prometheus.log"
    )


def find_grafana() -> tuple[str, ...] | None:
    """Grafana's server, under its name before version 10 or since."""
    for name, arguments in (("grafana", ("server",)), ("grafana-server", ())):
        if command := shutil.which(name, path=PLACES):
            return command, *arguments
    return None


def grafana(folder: Path, ports: Ports, command: tuple[str, ...]) -> Program:
    """Grafana with our data source and dashboards; its administrator's password is kept in the folder."""
    data = folder / "grafana"
    data.mkdir(exist_ok=True)
    kept = folder / "grafana-password"
    if given := os.environ.get("GRAFANA_PASSWORD"):
        written_secret(kept, given)
    elif not kept.exists():
        written_secret(kept, secrets.token_hex(16))
    address = f"http://{LOOPBACK}:{ports.grafana}"
    settings = {
        "GF_SERVER_HTTP_ADDR": LOOPBACK,
        "GF_SERVER_HTTP_PORT": str(ports.grafana),
        "GF_PATHS_DATA": str(data),
        "GF_PATHS_LOGS": str(data / "log"),
        "GF_PATHS_PLUGINS": str(data / "plugins"),
        "GF_PATHS_PROVISIONING": str(provisioning(folder)),
        "GF_SECURITY_ADMIN_PASSWORD": kept.read_text(encoding="utf-8"),
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "PROMETHEUS_URL": f"http://{LOOPBACK}:{ports.prometheus}",
    }
    say(f"Grafana's user is admin, the password is in {kept}")
    home = ("--homepath", str(GRAFANA_HOME)) if GRAFANA_HOME.is_dir() else ()
    return Program(
        "Grafana", (*command, *home), address, f"{address}/api/health", 30.0, settings, folder / "grafana.log"
    )


def provisioning(folder: Path) -> Path:
    """A copy of Grafana's provisioning in which the dashboards are found where they are here."""
    copy = folder / "provisioning"
    shutil.copytree(MONITORING / "grafana" / "provisioning", copy, dirs_exist_ok=True)
    for file in (copy / "dashboards").glob("*.yml"):
        config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        for provider in config["providers"]:
            provider["options"]["path"] = str(MONITORING / "grafana" / "dashboards")
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return copy


def written_secret(file: Path, secret: str) -> Path:
    """The secret in a file that only its owner reads, also while it is being written."""
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as output:
        output.write(secret)
    return file


def check_ports(programs: list[Program]) -> None:
    """Raises CannotStart where another program listens, as the Prometheus that Debian starts by itself."""
    for program in programs:
        port = int(program.page.rpartition(":")[2])
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError as taken:
                raise CannotStart(
                    f"{program.name} needs port {port}, and it cannot be had: {taken.strerror}. "
                    f"End what listens there, or choose another port: {sys.argv[0]} --help"
                ) from None


def run(programs: list[Program]) -> int:
    """All of them until a signal comes, or until one of them ends by itself; returns the exit code."""
    with signals_raise(), all_started(programs) as processes:
        waiting = list(programs)
        try:
            while True:
                for program in programs:
                    if (code := processes[program.name].poll()) is not None:
                        say(f"{program.name} ended with code {code}{last_words(program)}")
                        return 1
                for program in [each for each in waiting if answers(each.ready)]:
                    waiting.remove(program)
                    say(f"{program.name} is ready: {program.page}")
                    if not waiting:
                        say("All are ready; Ctrl-C ends them.")
                time.sleep(0.5)
        except KeyboardInterrupt:
            return 0


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within, SIGTERM and a closed terminal end us as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    kept = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextmanager
def all_started(programs: list[Program]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The programs' processes by name; the last to start is the first to be ended."""
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for program in programs:
            processes[program.name] = started(program)
        yield processes
    finally:
        # A second Ctrl-C would leave processes behind.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for program in reversed(programs):
            if program.name in processes:
                stop(processes[program.name], program.stop_seconds)
                say(f"{program.name} has stopped")


def started(program: Program) -> subprocess.Popen[bytes]:
    """Its process, in a session of its own: the terminal's Ctrl-C reaches us alone, who end it in order."""
    output = None if program.log is None else program.log.open("ab")
    try:
        return subprocess.Popen(
            program.command,
            cwd=ROOT,
            env={**os.environ, **program.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=True,
        )
    finally:
        if output is not None:
            output.close()


def stop(process: subprocess.Popen[bytes], seconds: float) -> None:
    """End it in order, or after so many seconds with everything in its session."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(address: str) -> bool:
    # Not through a proxy that the environment may name.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=5):
            return True
    except OSError:
        return False


def last_words(program: Program) -> str:
    if program.log is None:
        return ""
    return f"; the end of {program.log}:\n{program.log.read_text(encoding='utf-8', errors='replace')[-2000:]}"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
