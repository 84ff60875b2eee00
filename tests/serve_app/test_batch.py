"""A file of prompts becomes a folder of pictures, each once, however often it is ended on the way."""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from filelock import FileLock
from ray import serve
from typer.testing import CliRunner

from serve_app import cli, remote_drawing
from serve_app.batch import MANIFEST, BatchStopped, Manifest, Outcome, Task, plan_tasks, read_lines, run
from serve_app.error_mapping import RequestRefused
from serve_app.image_codec import read_receipt
from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.remote_drawing import RemoteServer, ServerGivenUp
from serve_app.service import ImageService
from serve_app.settings import Settings
from tests.chaos.batch import batch_killed
from tests.ports import free_ports
from zimage_engine.errors import InvalidRequest

SMALL = {"size": "64x64", "num_inference_steps": 1}


def text_of(*lines: dict[str, Any]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def told(task: Task) -> bytes:
    """What stands in for a picture where only the folder is looked at."""
    return f"{task.wire.prompt} {task.seed}".encode()


def drawn_into(folder: Path, text: str, draw: Callable[[Task], bytes] = told, **options: Any) -> Outcome:
    folder.mkdir(exist_ok=True)
    manifest = Manifest(folder)
    return run(plan_tasks(read_lines(text), manifest), folder, manifest, draw, **options)


def pictures_in(folder: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".png", ".jpg", ".webp")
    }


def test_each_line_becomes_its_pictures_and_the_manifest_tells_of_them(tmp_path: Path) -> None:
    text = text_of(
        {"prompt": "one", "seed": 5, "id": "first"},
        {"prompt": "two", "n": 2, "seed": 7, "output_format": "webp"},
        {"prompt": "three", "output_format": "jpeg"},
    )
    assert drawn_into(tmp_path, text) == Outcome(drawn=4)
    names = sorted(pictures_in(tmp_path))
    assert [name[:6] for name in names] == ["00001-", "00002-", "00002-", "00003-"]
    assert [name.rpartition("-")[2] for name in names[1:3]] == ["1.webp", "2.webp"]
    noted = Manifest(tmp_path).latest
    assert [noted[name]["seed"] for name in names[:3]] == [5, 7, 8]
    assert (noted[names[0]]["id"], noted[names[0]]["line"]) == ("first", 1)
    assert {record["state"] for record in noted.values()} == {"drawn"}


def test_a_second_run_draws_nothing_and_an_added_line_alone(tmp_path: Path) -> None:
    text = text_of({"prompt": "one"}, {"prompt": "two"})
    drawn_into(tmp_path, text)
    before, noted = pictures_in(tmp_path), (tmp_path / MANIFEST).read_bytes()

    def never(task: Task) -> bytes:
        raise AssertionError(f"{task.file} was drawn twice")

    assert drawn_into(tmp_path, text, never) == Outcome(found=2)
    assert (pictures_in(tmp_path), (tmp_path / MANIFEST).read_bytes()) == (before, noted)
    assert drawn_into(tmp_path, text + text_of({"prompt": "three"})) == Outcome(found=2, drawn=1)
    assert pictures_in(tmp_path).items() > before.items()


def test_seeds_are_noted_before_they_are_used(tmp_path: Path) -> None:
    text = text_of(*({"prompt": f"picture {number}"} for number in range(5)))
    seeds: dict[str, int] = {}

    def stopped(task: Task) -> bytes:
        seeds.update({file: record["seed"] for file, record in Manifest(tmp_path).latest.items()})
        raise BatchStopped("the power went off")

    with pytest.raises(BatchStopped):
        drawn_into(tmp_path, text, stopped)
    assert len(seeds) == 5
    drawn_into(tmp_path, text)
    assert {name: int(content.split()[-1]) for name, content in pictures_in(tmp_path).items()} == seeds


def test_what_was_killed_between_picture_and_note_is_noted_and_not_drawn_again(tmp_path: Path) -> None:
    text = text_of({"prompt": "one"}, {"prompt": "two"})
    drawn_into(tmp_path, text)
    manifest = tmp_path / MANIFEST
    records = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(records[:-1]) + records[-1][:9])  # the last note is half written
    (tmp_path / ".00002-half.png.part").write_bytes(b"half")
    assert drawn_into(tmp_path, text) == Outcome(found=2)
    assert [record["state"] for record in Manifest(tmp_path).latest.values()] == ["drawn", "drawn"]
    assert list(tmp_path.glob(".*.part")) == []


@pytest.mark.parametrize(
    ("skip", "outcome"), [(False, Outcome(drawn=1, failed=1)), (True, Outcome(drawn=2, failed=1))]
)
def test_a_picture_that_cannot_be_drawn_stops_or_is_skipped_and_is_tried_again(
    tmp_path: Path, skip: bool, outcome: Outcome
) -> None:
    text = text_of({"prompt": "one"}, {"prompt": "bad"}, {"prompt": "three"})

    def refusing(task: Task) -> bytes:
        if task.wire.prompt == "bad":
            raise RequestRefused("it is bad")
        return told(task)

    assert drawn_into(tmp_path, text, refusing, skip_errors=skip) == outcome
    errors = [record.get("error") for record in Manifest(tmp_path).latest.values()]
    assert "it is bad" in errors
    assert drawn_into(tmp_path, text) == Outcome(found=outcome.drawn, drawn=3 - outcome.drawn)
    assert {record["error"] for record in Manifest(tmp_path).latest.values()} <= {None}


def test_several_at_once_are_each_drawn_once(tmp_path: Path) -> None:
    counted, busy, most, lock = Counter[str](), 0, 0, threading.Lock()
    together = threading.Barrier(4)

    def draw(task: Task) -> bytes:
        nonlocal busy, most
        with lock:
            counted[task.file] += 1
            busy += 1
            most = max(most, busy)
        together.wait(10)
        with lock:
            busy -= 1
        return told(task)

    text = text_of(*({"prompt": f"picture {number}"} for number in range(40)))
    assert drawn_into(tmp_path, text, draw, at_once=4) == Outcome(drawn=40)
    assert (set(counted.values()), most) == ({1}, 4)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no prompts"),
        ("\n\n", "no prompts"),
        ('{"prompt": "good"}\n{"prompt": ""}\n', "^line 2: prompt is empty"),
        ("\n\nnot JSON\n", "^line 3: It is not valid JSON"),
        ('["a list"]', "^line 1: It must be a JSON object"),
        ('{"prompt": "x", "promt": "y"}', "^line 1: There is no field 'promt'"),
        ('{"prompt": "x", "stream": true}', "^line 1: stream is of no use here"),
        ('{"prompt": "x", "response_format": "url"}', "^line 1: response_format is of no use here"),
        ('{"prompt": "x", "id": [1]}', "^line 1: id must be text"),
        ('{"prompt": ""}\n' * 12, "and 2 more$"),
    ],
)
def test_wrong_lines_are_told_by_their_numbers(text: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        read_lines(text)


# --- by the command line


def batch(*arguments: str, **environment: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["batch", *arguments], env=environment)
    return done.exit_code, done.output


def test_the_command_draws_with_an_engine_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "pictures"
    prompts.write_text(
        text_of({"prompt": "a red circle", "seed": 3, **SMALL}, {"prompt": "一颗蓝色的星", **SMALL})
    )
    options = (
        str(prompts),
        "-o",
        str(folder),
        "--model",
        str(tiny_model),
        "--device",
        "cpu",
        "--threads",
        "1",
    )
    code, output = batch(*options)
    assert (code, "2 drawn, 0 were there, 0 failed" in output) == (0, True), output
    noted = Manifest(folder).latest
    for name, picture in pictures_in(folder).items():
        receipt = read_receipt(picture)
        assert receipt is not None and receipt["seed"] == noted[name]["seed"]
    (folder / MANIFEST).unlink()
    code, output = batch(*options)
    assert (code, "0 drawn, 2 were there" in output) == (0, True), output
    assert {name: record["seed"] for name, record in Manifest(folder).latest.items()} == {
        name: record["seed"] for name, record in noted.items()
    }


def test_the_command_tells_what_its_model_cannot_draw_before_it_draws(
    tiny_model: Path, tmp_path: Path
) -> None:
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "pictures"
    lines = ({"prompt": "x", **SMALL}, {"prompt": "x", "size": "63x64"}, {"prompt": "x", "model": "another"})
    prompts.write_text(text_of(*lines))
    code, output = batch(str(prompts), "-o", str(folder), "--model", str(tiny_model), "--threads", "1")
    assert (code, pictures_in(folder)) == (2, {})
    assert "line 2:" in output and "line 3: There is no model 'another'" in output, output


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: None, "cannot be read: No such file"),
        (
            lambda folder: (folder / "prompts.jsonl").write_bytes(b'{"prompt": "\xff"}'),
            "not UTF-8 at byte 12",
        ),
        (
            lambda folder: (folder / "prompts.jsonl").write_text('{"prompt": 7}'),
            "line 1: prompt must be text",
        ),
    ],
)
def test_the_command_refuses_what_is_no_file_of_prompts(
    tmp_path: Path, make: Callable[[Path], object], told: str
) -> None:
    make(tmp_path)
    code, output = batch(str(tmp_path / "prompts.jsonl"), "-o", str(tmp_path / "pictures"))
    assert (code, told in output) == (2, True), output
    assert not (tmp_path / "pictures").exists()


def test_two_commands_do_not_work_in_one_folder(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(text_of({"prompt": "x", **SMALL}))
    with FileLock(tmp_path / ".batch.lock"):
        code, output = batch(str(prompts), "-o", str(tmp_path))
    assert (code, "another batch is at work" in output) == (2, True), output


# --- by a server


class Server(BaseHTTPRequestHandler):
    """Answers with what its rows say, one a request, then with a picture; it remembers what it was asked."""

    rows: list[tuple[int, dict[str, str]]]
    asked: list[tuple[dict[str, Any], dict[str, str]]]

    def do_POST(self) -> None:
        fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((fields, dict(self.headers)))
        status, headers = self.rows.pop(0) if self.rows else (200, {})
        picture = base64.b64encode(f"{fields['prompt']} {fields['seed']}".encode()).decode()
        answer: dict[str, Any] = {"data": [{"b64_json": picture}]}
        if status != 200:
            answer = {"error": {"message": f"told {status}", "code": headers.get("X-Code")}}
        body = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


@contextmanager
def server_with(*rows: tuple[int, dict[str, str]]) -> Iterator[tuple[str, type[Server]]]:
    handler = type("Handler", (Server,), {"rows": list(rows), "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


FIELDS = {"prompt": "x", "seed": 1}


def test_a_busy_server_is_asked_again_when_it_says_and_by_the_same_key() -> None:
    slept: list[float] = []
    with server_with((429, {"Retry-After": "7"}), (503, {"Retry-After": "1"}), (502, {})) as (url, server):
        assert RemoteServer(url, "secret", slept.append).draw(FIELDS, "a/1.png") == b"x 1"
    assert slept == [7.0, 1.0, remote_drawing.RETRY_SECONDS]
    assert len({headers["Idempotency-Key"] for _, headers in server.asked}) == 1
    assert {headers["Authorization"] for _, headers in server.asked} == {"Bearer secret"}


@pytest.mark.parametrize(
    ("row", "raised", "said"),
    [
        ((400, {}), RequestRefused, "told 400"),
        ((500, {}), RequestRefused, "told 500"),
        ((401, {}), ServerGivenUp, "told 401"),
        ((403, {}), ServerGivenUp, "told 403"),
        ((302, {"Location": "http://127.0.0.1:1/"}), ServerGivenUp, "302"),
    ],
)
def test_what_a_server_refuses_is_not_asked_again(
    row: tuple[int, dict[str, str]], raised: type[Exception], said: str
) -> None:
    with server_with(row) as (url, server):
        with pytest.raises(raised, match=said):
            RemoteServer(url).draw(FIELDS, "a/1.png")
        assert len(server.asked) == 1


def test_what_did_not_wait_for_the_server_is_asked_again_and_its_own_deadline_is_not() -> None:
    slept: list[float] = []
    with server_with((504, {}), (408, {})) as (url, server):
        assert RemoteServer(url, None, slept.append).draw(FIELDS, "a/1.png") == b"x 1"
    assert len(server.asked) == 3
    assert len({headers["Idempotency-Key"] for _, headers in server.asked}) == 1
    with server_with((504, {"X-Code": "deadline_exceeded"})) as (url, server):
        with pytest.raises(RequestRefused, match="told 504"):
            RemoteServer(url, None, slept.append).draw(FIELDS, "a/1.png")
        assert len(server.asked) == 1


def test_a_folder_asks_by_the_same_keys_and_another_folder_by_others(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(text_of({"prompt": "x", "seed": 1}, {"prompt": "x", "seed": 1}))
    keys = []
    for folder in ("one", "one", "two"):
        with server_with() as (url, server):
            code, output = batch(str(prompts), "-o", str(tmp_path / folder), "--server", url)
        assert code == 0, output
        keys.append({headers["Idempotency-Key"] for _, headers in server.asked})
        for picture in (tmp_path / folder).glob("*.png"):
            picture.unlink()
    assert keys[0] == keys[1] and len(keys[0]) == 2, "each picture has a key of its own, and keeps it"
    assert not keys[0] & keys[2]


def test_what_a_server_has_drawn_and_thrown_away_is_asked_for_anew_once() -> None:
    with server_with((410, {})) as (url, server):
        assert RemoteServer(url).draw(FIELDS, "a/1.png") == b"x 1"
    assert len({headers["Idempotency-Key"] for _, headers in server.asked}) == 2
    with server_with((410, {}), (410, {})) as (url, server), pytest.raises(RequestRefused, match="told 410"):
        RemoteServer(url).draw(FIELDS, "a/1.png")


def test_a_server_that_is_not_there_is_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_drawing, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(remote_drawing, "RETRY_SECONDS", 0.05)
    (port,) = free_ports(1)
    with pytest.raises(ServerGivenUp, match="does not answer"):
        RemoteServer(f"http://127.0.0.1:{port}").draw(FIELDS, "a/1.png")
    with pytest.raises(InvalidRequest, match="--server must be an address"):
        RemoteServer("127.0.0.1:7860")


def test_the_command_draws_with_a_server(tmp_path: Path) -> None:
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "pictures"
    prompts.write_text(
        text_of(*({"prompt": f"p{number}", "seed": number, "id": number} for number in range(12)))
    )
    with server_with((429, {"Retry-After": "0"})) as (url, server):
        code, output = batch(str(prompts), "-o", str(folder), "--server", url, ZIMAGE_API_KEY="secret")
    assert (code, "12 drawn" in output) == (0, True), output
    assert sorted(pictures_in(folder).values()) == sorted(f"p{n} {n}".encode() for n in range(12))
    assert len(server.asked) == 13
    assert all(fields["n"] == 1 and "id" not in fields for fields, _ in server.asked)


# --- by the real application


@pytest.fixture
def address(
    worker_handle: serve.handle.DeploymentHandle, settings: Settings, tmp_path: Path
) -> Iterator[Callable[..., AbstractContextManager[str]]]:
    """The application on a port of this machine, with settings of its own."""

    @contextmanager
    def serving(**changed: Any) -> Iterator[str]:
        chosen = Settings.model_validate({**settings.model_dump(), "data_dir": tmp_path / "data", **changed})
        app = build_asgi_app(ImageService(worker_handle, ServerMetrics("test"), chosen), chosen)
        (port,) = free_ports(1)
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(60)

    yield serving


def drawn_by(url: str) -> int:
    """How many pictures the server has drawn in all."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    return int(sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if COUNTED.match(line)))


COUNTED = re.compile(r"zimage_pictures_total(\{| )")


def test_the_real_server_draws_what_an_engine_of_ones_own_draws(
    address: Callable[..., AbstractContextManager[str]], tiny_model: Path, tmp_path: Path
) -> None:
    prompts, ours, theirs = tmp_path / "prompts.jsonl", tmp_path / "ours", tmp_path / "theirs"
    prompts.write_text(text_of(*({"prompt": f"p{number}", "seed": number, **SMALL} for number in range(4))))
    code, output = batch(str(prompts), "-o", str(ours), "--model", str(tiny_model), "--threads", "1")
    assert code == 0, output
    with address() as url:
        code, output = batch(str(prompts), "-o", str(theirs), "--server", url)
        assert (code, drawn_by(url)) == (0, 4), output
        # Another folder asks for pictures of its own: the server may draw otherwise by now.
        code, output = batch(str(prompts), "-o", str(tmp_path / "again"), "--server", url)
        assert (code, drawn_by(url)) == (0, 8), output
    assert pictures_in(theirs) == pictures_in(ours) == pictures_in(tmp_path / "again")


def test_the_real_servers_limit_is_waited_for(
    address: Callable[..., AbstractContextManager[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = Counter[int]()
    waits = remote_drawing._wait_of

    def counting(answer: urllib.error.HTTPError) -> float | None:
        refused[answer.code] += 1
        wait = waits(answer)
        return None if wait is None else min(wait, 0.2)

    monkeypatch.setattr(remote_drawing, "_wait_of", counting)
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "pictures"
    prompts.write_text(text_of(*({"prompt": f"p{number}", "seed": number, **SMALL} for number in range(12))))
    with address(max_jobs_of_caller=1) as url:
        code, output = batch(str(prompts), "-o", str(folder), "--server", url, "--at-once", "6")
        assert (code, drawn_by(url)) == (0, 12), output
    assert refused.keys() == {429} and refused[429] > 0
    assert len(pictures_in(folder)) == 12


def test_killed_while_the_real_server_draws_nothing_is_drawn_twice(
    address: Callable[..., AbstractContextManager[str]], tmp_path: Path
) -> None:
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "pictures"
    # Without seeds: those that the killed one noted are used again.
    prompts.write_text(text_of(*({"prompt": f"p{number}", **SMALL} for number in range(30))))
    with address() as url:
        command = [sys.executable, "-m", "serve_app.cli", "batch", str(prompts), "-o", str(folder)]
        killed = subprocess.Popen([*command, "--server", url], stdout=subprocess.DEVNULL)
        while killed.poll() is None and len(list(folder.glob("*.png"))) < 5:
            time.sleep(0.005)
        killed.kill()
        assert killed.wait() == -signal.SIGKILL
        there = pictures_in(folder)
        assert 5 <= len(there) < 30
        code, output = batch(str(prompts), "-o", str(folder), "--server", url)
        assert code == 0, output
        assert drawn_by(url) == 30
    pictures = pictures_in(folder)
    assert len(pictures) == 30 and there.items() <= pictures.items()
    for name, picture in pictures.items():
        receipt = read_receipt(picture)
        assert receipt is not None and receipt["seed"] == Manifest(folder).latest[name]["seed"]


def test_what_the_real_servers_model_refuses_is_told_by_line_before_anything_is_drawn(
    address: Callable[..., AbstractContextManager[str]], tmp_path: Path
) -> None:
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "pictures"
    wrong = (
        {"size": "63x64"},
        {"num_inference_steps": 500},
        {"size": "65536x64"},
        {"model": "another"},
        {"model": "zimage-turbo"},
    )
    prompts.write_text(
        text_of({"prompt": "x", **SMALL}, *({"prompt": "x", **SMALL, **each} for each in wrong))
    )
    with address() as url:
        code, output = batch(str(prompts), "-o", str(folder), "--server", url)
        assert (code, drawn_by(url), pictures_in(folder)) == (2, 0, {})
    told = [line.partition(" ")[2] for line in output.splitlines() if "line " in line]
    assert [line.split(":")[0].split()[-1] for line in told] == ["2", "3", "4", "5"], output
    assert "nearest are 32 and 64" in output and "from 1 to" in output


@pytest.mark.slow
def test_killed_five_times_all_pictures_are_there_once_and_as_in_an_undisturbed_run(
    tiny_model: Path, tmp_path: Path
) -> None:
    came_of_it = batch_killed(tiny_model, tmp_path, pictures=40, kills=5, seed=0)
    assert came_of_it.wrong == ()
    assert (came_of_it.kills, came_of_it.pictures) == (5, 40)
