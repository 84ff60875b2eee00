"""Keeps a server running: starts it in a process of its own, watches that, and starts it again when it dies.

    supervise([sys.executable, "-m", "serve_app.supervised"], settings, url, tell)

Knows neither Ray nor Serve but for the names of Ray's two daemons, and imports neither: what kills those must
not kill the one who brings them back. The server's process tells over `Line` when it is ready or why it
cannot be, and ends when the line breaks, so that no server is left behind however its supervisor ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

#: So many probes in a row without an answer, beside the time that they took, are a silence.
UNANSWERED = 3
#: After so many it is told that something is wrong.
UNANSWERED_AND_TOLD = 2
#: Ray ends a minute or more after one of these is gone; nothing works in that time.
DAEMONS = {"gcs_server": "Ray's gcs_server", "raylet": "Ray's raylet"}
#: Ray starts it again by itself, and pictures are drawn meanwhile; how its name begins.
CONTROLLER = "ray::ServeController"


class GivenUp(Exception):
    """The server was ready once and could not be brought back; the message says how often it was tried."""


@dataclass(frozen=True)
class Patience:
    """Seconds and counts by which the supervisor judges.

    A machine under load answers late, and that is no death: `silent_seconds` without one answer to any probe
    is. What Serve mends by itself takes a fraction of that. A server that dies within `steady_seconds` of
    being ready counts as one that was not brought back.
    """

    look_seconds: float = 2.0
    probe_seconds: float = 2.0
    answer_seconds: float = 30.0
    silent_seconds: float = 120.0
    steady_seconds: float = 60.0
    first_pause_seconds: float = 1.0
    longest_pause_seconds: float = 30.0
    tries: int = 5
    #: What the server's own process is given to end all of its own, and what is left of it after that.
    end_seconds: float = 20.0
    #: And before that for the requests that are under way.
    finish_seconds: float = 0.0
    stop_seconds: float = 5.0


@dataclass(frozen=True)
class Ready:
    """The server answers."""


def supervise(
    command: Sequence[str],
    given: Any,
    url: str,
    tell: Callable[[str], None],
    patience: Patience = Patience(),
) -> None:
    """Run `command` until Ctrl-C or SIGTERM, and again whenever the server that it is dies.

    It gets a descriptor of a `Line` as its last argument, and over that `given` and a folder of its own. What
    it answers with in place of Ready at its first start is raised here. Raises GivenUp where it was ready
    once and could not be brought back; KeyboardInterrupt, with every process of it ended, where it is to
    stop.
    """
    stop_on_signals()
    server = _Server(command, given, patience)
    try:
        server.start()
        tell(f"zimage-turbo is ready: {url}")
        _keep(server, url, tell, patience)
    finally:
        at_once = False
        try:
            server.end()
        except KeyboardInterrupt:  # whoever asks twice does not want to wait for what is under way
            at_once = True
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        server.end(at_once)


def _keep(server: _Server, url: str, tell: Callable[[str], None], patience: Patience) -> None:
    """Watch a server that is ready, and bring it back; returns never."""
    failed = 0
    while True:
        ready_at = time.monotonic()
        lost = server.until_lost(url, tell)
        if time.monotonic() - ready_at >= patience.steady_seconds:
            failed = 0
        died_at = time.monotonic()
        tell(f"zimage-turbo: {lost}; starting again")
        while True:
            server.end()
            if failed >= patience.tries:
                raise GivenUp(
                    f"the server could not be brought back in {failed} tries, the last time because {lost}; "
                    "start it again when that is mended"
                )
            time.sleep(min(patience.longest_pause_seconds, patience.first_pause_seconds * 2**failed))
            failed += 1
            try:
                server.start()
            except Exception as error:  # whatever it was: the server was ready once, and is tried again
                lost = str(error)
                tell(f"zimage-turbo could not start again: {lost}")
                continue
            break
        tell(f"zimage-turbo is ready again: {url} (after {time.monotonic() - died_at:.0f} s)")


class NotStarted(Exception):
    """The server's process ended before it was ready, and said nothing; the message says how."""


class _Server:
    """The server's process and all that it started, one after another."""

    def __init__(self, command: Sequence[str], given: Any, patience: Patience) -> None:
        self._command = tuple(command)
        self._given = given
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None
        self._folder: Path | None = None
        #: All that was ever seen below it: what loses its parent is no child of anybody here any more.
        self._seen: set[psutil.Process] = set()
        self._daemons: dict[psutil.Process, str] = {}
        self._controller: psutil.Process | None = None

    def start(self) -> None:
        """Start it and wait until it is ready; raises what it answers instead, or NotStarted."""
        self._folder = Path(tempfile.mkdtemp(prefix="zit-"))
        ours, theirs = Pipe()
        self._line = ours
        self._process = subprocess.Popen(
            [*self._command, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            # Ctrl-C on a terminal goes to every process of a group; this one passes it on, once.
            start_new_session=True,
        )
        theirs.close()
        try:
            ours.send((self._given, self._folder))
            while not ours.poll(self._patience.look_seconds):
                self._look()
                dead = self._dead_daemon()
                # A server that cannot start ends Ray itself, and then says why.
                if dead is not None and not ours.poll(self._patience.end_seconds):
                    raise NotStarted(f"{dead} has died while it started")
            answer = ours.recv()
        except (EOFError, OSError):
            raise NotStarted(self._how_it_ended()) from None
        if isinstance(answer, BaseException):
            raise answer
        self._look()

    def until_lost(self, url: str, tell: Callable[[str], None]) -> str:
        """Waits until it is lost, and says in a sentence's beginning what has happened.

        What Serve mends by itself is told, and waited for.
        """
        with _Answers(url, tell, self._patience) as answers:
            return self._until_lost(answers, tell)

    def _until_lost(self, answers: _Answers, tell: Callable[[str], None]) -> str:
        assert self._process is not None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._patience.look_seconds)
                return self._how_it_ended()
            if self._controller is not None and not _is_alive(self._controller):
                self._controller = None
                tell("zimage-turbo: Serve's controller has died; Ray starts it again, pictures go on")
            self._look()
            dead = self._dead_daemon()
            if dead is not None:
                return f"{dead} has died"
            if answers.have_ended:
                return f"the server has not answered for {self._patience.silent_seconds:g} s"

    def end(self, at_once: bool = False) -> None:
        """End all of it: as it does by itself where it still can, and else each process. Twice is once.

        `at_once`: what is under way is not waited for.
        """
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            self._look_below(process.pid)
        if process.poll() is None and self._dead_daemon() is None and not at_once:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._patience.finish_seconds + self._patience.end_seconds)
        self._seen |= _of_session(process.pid)
        end_processes([seen for seen in self._seen if _is_alive(seen)], self._patience.stop_seconds)
        process.wait()
        # Not before: the server would take that for a second wish to end, in the midst of the first.
        if self._line is not None:
            self._line.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process, self._seen, self._daemons, self._controller = None, set(), {}, None

    def _look(self) -> None:
        if self._process is not None:
            self._look_below(self._process.pid)

    def _look_below(self, pid: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                self._seen.add(process)
                with contextlib.suppress(psutil.NoSuchProcess):
                    name = process.name()  # which Ray's processes take on after they have started
                    if name in DAEMONS:
                        self._daemons[process] = DAEMONS[name]
                    elif name.startswith(CONTROLLER):
                        self._controller = process

    def _dead_daemon(self) -> str | None:
        return next((name for process, name in self._daemons.items() if not _is_alive(process)), None)

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(self._patience.stop_seconds)
        except subprocess.TimeoutExpired:
            return "the server's process says nothing more"
        if code < 0:
            return f"the server's process was ended by {signal.Signals(-code).name}"
        return f"the server's process ended with code {code}"


class _Answers:
    """Asks again and again, in a thread, whether the server answers."""

    def __init__(self, url: str, tell: Callable[[str], None], patience: Patience) -> None:
        self._url = url
        self._tell = tell
        self._patience = patience
        self._last = time.monotonic()
        self._unanswered = 0
        self._is_over = threading.Event()
        # Not by a proxy that the environment names.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> _Answers:
        threading.Thread(target=self._ask, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()

    @property
    def have_ended(self) -> bool:
        """Whether nothing came for long; not where this program itself was stopped, and asked nothing."""
        is_long = time.monotonic() - self._last > self._patience.silent_seconds
        return is_long and self._unanswered >= UNANSWERED

    def _ask(self) -> None:
        while not self._is_over.wait(self._patience.probe_seconds):
            if not self._answers():
                self._unanswered += 1
                if self._unanswered == UNANSWERED_AND_TOLD and not self._is_over.is_set():
                    self._tell(f"zimage-turbo: no answer at {self._url}; Serve is given time to mend that")
                continue
            if self._unanswered >= UNANSWERED_AND_TOLD:
                seconds = time.monotonic() - self._last
                self._tell(f"zimage-turbo is ready again: {self._url} (after {seconds:.0f} s)")
            self._last, self._unanswered = time.monotonic(), 0

    def _answers(self) -> bool:
        try:
            with self._opener.open(f"{self._url}/healthz", timeout=self._patience.answer_seconds):
                return True
        except urllib.error.HTTPError as refusal:
            return refusal.code < 500  # it is there, whatever it wants of us
        except (OSError, HTTPException):
            return False


class Line:
    """The server's end of the line to its supervisor."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._connection = Connection(descriptor)

    def receive(self) -> Any:
        """What the supervisor gave; then this process is told to end when the supervisor is gone."""
        given = self._connection.recv()
        threading.Thread(target=self._end_with_it, daemon=True).start()
        return given

    def tell(self, answer: Ready | BaseException) -> None:
        """Tell whether the server is ready. A supervisor that is gone hears nothing, and has no need to."""
        with contextlib.suppress(OSError):
            self._connection.send(answer)

    def _end_with_it(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self._connection.recv()
        os.kill(os.getpid(), signal.SIGTERM)


def end_processes(processes: Sequence[psutil.Process], stop_seconds: float) -> None:
    """Ask each to stop, wait, and kill what is left."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=stop_seconds)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=stop_seconds)


def _of_session(leader: int) -> set[psutil.Process]:
    """Who is left of a process' session, also where that has ended: it has lost its parent, not that."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                found.add(process)
    return found


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def stop_on_signals() -> None:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt wherever the main thread is."""
    for number in STOP_SIGNALS:
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
