"""What a supervisor does when its server dies: with a stand-in program, and with a real server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from serve_app import haproxy
from serve_app.local_cluster import LaunchFailed
from serve_app.supervision import GivenUp, Patience, supervise
from tests.ports import free_ports
from tests.running_server import ROOT, RunningServer, running_server

STAND_IN = [sys.executable, "-m", "tests.serve_app.stand_in_server"]
#: Short, so that a test is; the silence is longer than the other figures, as it is in earnest.
HASTY = Patience(
    look_seconds=0.05,
    probe_seconds=0.05,
    answer_seconds=1.0,
    silent_seconds=0.5,
    steady_seconds=60.0,
    first_pause_seconds=0.01,
    longest_pause_seconds=0.02,
    tries=2,
    end_seconds=5.0,
    stop_seconds=2.0,
)


@dataclass
class Supervised:
    """A stand-in under a supervisor in this process; `act` is what happens once it is ready, N times."""

    folder: Path
    fates: dict[int, str] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def run(self, *acts: Callable[[], object]) -> None:
        """Returns, or raises, what the supervisor does; after the last act it is told to stop."""
        for start, fate in self.fates.items():
            (self.folder / f"fate-{start}").write_text(fate, encoding="utf-8")
        (port,) = free_ports(1)
        left = [*acts, lambda: os.kill(os.getpid(), signal.SIGINT)]

        def tell(sentence: str) -> None:
            self.told.append(sentence)
            if " is ready" in sentence:
                threading.Timer(0.2, left.pop(0)).start()

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            supervise(STAND_IN, (self.folder, port), f"http://127.0.0.1:{port}", tell, HASTY)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def starts(self) -> list[tuple[int, Path]]:
        """The process that each stand-in started, and the folder that it was given."""
        lines = [file.read_text(encoding="utf-8") for file in sorted(self.folder.glob("start-*"))]
        return [(int(child), Path(folder)) for child, folder in (line.split(" ", 1) for line in lines)]

    def kill(self) -> None:
        (server,) = [
            process for process in psutil.Process().children() if STAND_IN[-1] in " ".join(process.cmdline())
        ]
        server.kill()

    @property
    def leaves(self) -> list[object]:
        """What should be gone: processes and folders."""
        alive: list[object] = [child for child, _ in self.starts if _is_alive(child)]
        return alive + [folder for _, folder in self.starts if folder.exists()]


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervised:
    monkeypatch.chdir(ROOT)
    return Supervised(tmp_path)


def test_a_server_that_runs_is_left_alone_and_ended_whole(supervised: Supervised) -> None:
    with pytest.raises(KeyboardInterrupt):
        supervised.run()
    assert len(supervised.told) == 1 and supervised.told[0].startswith("zimage-turbo is ready: http://")
    assert (supervised.folder / "ended-0").exists(), "it was asked to end before it was made to"
    assert supervised.leaves == []


def test_a_killed_server_comes_back_and_nothing_of_the_old_one_stays(supervised: Supervised) -> None:
    with pytest.raises(KeyboardInterrupt):
        supervised.run(supervised.kill, supervised.kill)
    ready, died, again, *_ = supervised.told
    assert died == "zimage-turbo: the server's process was ended by SIGKILL; starting again"
    assert again.startswith(ready.replace("is ready", "is ready again") + " (after ")
    assert len(supervised.starts) == 3 and supervised.leaves == []


def test_what_keeps_the_first_start_from_being_is_raised_at_once(supervised: Supervised) -> None:
    supervised.fates = {0: "refuse"}
    with pytest.raises(LaunchFailed, match="the port is taken"):
        supervised.run()
    assert supervised.told == [] and len(supervised.starts) == 1 and supervised.leaves == []


def test_a_later_start_is_tried_again_and_in_the_end_given_up(supervised: Supervised) -> None:
    supervised.fates = {1: "refuse", 2: "die"}
    with pytest.raises(GivenUp, match=r"in 2 tries, .* because the server's process ended with code 7"):
        supervised.run(supervised.kill)
    assert "zimage-turbo could not start again: the port is taken" in supervised.told
    assert len(supervised.starts) == 1 + HASTY.tries and supervised.leaves == []


def test_a_server_that_dies_whenever_it_is_ready_is_given_up_too(supervised: Supervised) -> None:
    with pytest.raises(GivenUp):
        supervised.run(*[supervised.kill] * (1 + HASTY.tries))
    assert len(supervised.starts) == 1 + HASTY.tries


def test_a_server_that_answers_nothing_for_long_is_started_again(supervised: Supervised) -> None:
    supervised.fates = {0: "deaf"}
    with pytest.raises(KeyboardInterrupt):
        supervised.run(lambda: None)
    _, silent, lost, again = supervised.told
    assert "no answer at http://" in silent
    assert lost == "zimage-turbo: the server has not answered for 0.5 s; starting again"
    assert " is ready again: " in again


def test_a_killed_supervisor_leaves_no_server_behind(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    program = (
        "from pathlib import Path; from serve_app.supervision import supervise;"
        f"supervise({STAND_IN!r}, (Path({str(tmp_path)!r}), {port}), 'http://127.0.0.1:{port}', print)"
    )
    with subprocess.Popen([sys.executable, "-uc", program], cwd=ROOT, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        assert b"is ready" in supervisor.stdout.readline()
        below = psutil.Process(supervisor.pid).children(recursive=True)
        assert len(below) == 2
        supervisor.kill()
    _, alive = psutil.wait_procs(below, timeout=20)
    assert alive == []


# --- a real server ---------------------------------------------------------------------------------------


def draw(running: RunningServer) -> str:
    asked = {"prompt": "a red circle", "seed": 3, "num_inference_steps": 1, "size": "32x32"}
    answer = httpx.post(f"{running.base_url}/v1/images/generations", json=asked, timeout=120)
    return str(answer.raise_for_status().json()["data"][0]["b64_json"])


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.2)


def is_drawn(running: RunningServer, picture: str) -> bool:
    try:
        return draw(running) == picture
    except httpx.HTTPError:
        return False


@pytest.mark.server
def test_ray_and_serve_come_back_whatever_dies(tmp_path: Path) -> None:
    """One server, and after each death the same seed draws the same picture at the same address."""
    from tests.zimage_engine.tiny_models import write_tiny_z_image

    model = write_tiny_z_image(tmp_path / "tiny-z-image")
    with running_server("--model", str(model), "--no-ui", environment={"ZIMAGE_CPU_THREADS": "1"}) as running:
        picture = draw(running)

        def kill(name: str) -> None:
            (victim, *_) = [each for each in running.processes() if each.name().startswith(name)]
            running.output.clear()
            victim.kill()

        kill("ray::ServeController")
        assert is_drawn(running, picture), "Ray starts it again, and nobody needs it meanwhile"
        until(lambda: any("Serve's controller has died" in line for line in running.output))
        if haproxy.binary() is not None:
            kill("haproxy")
            until(lambda: is_drawn(running, picture))
            until(lambda: any(line.startswith("zimage-turbo is ready again") for line in running.output))
        for daemon in ("raylet", "gcs_server"):
            kill(daemon)
            until(lambda: any(line.startswith("zimage-turbo is ready again") for line in running.output))
            assert f"zimage-turbo: Ray's {daemon} has died; starting again\n" in running.output
            assert draw(running) == picture
        processes = running.processes()
        assert running.stop() == 0
        assert [process for process in processes if process.is_running()] == []
