"""Draws a file of prompts into a folder, so that it can be ended at any moment and goes on from there.

A picture's name follows from its line, its seed is noted in the folder's manifest before it is drawn, and
it comes under its name whole or not at all: whatever is there is done, and what is drawn later is what would
have been drawn then. Knows neither the engine nor HTTP: who draws is a function.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve_app import openai_schema as schema
from serve_app.error_mapping import RequestRefused
from serve_app.image_codec import read_receipt
from zimage_engine.errors import EngineError, InvalidRequest
from zimage_engine.sampling.plan import MAX_SEED

MANIFEST = "manifest.jsonl"
#: How many of the wrong lines are told at once.
MOST_TOLD = 10

_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
#: What a line may call itself by; it comes back in the manifest.
_NAMES = ("id", "name")
#: Fields of the API that say how an answer travels, which a file of prompts has no use for.
_OF_ANSWERS = ("stream", "partial_images", "response_format", "receipt", "user")


class BatchStopped(Exception):
    """No picture can be drawn at all any more; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the file: its number from 1, the name it gave itself, and what it asks for."""

    number: int
    name: str | None
    fields: dict[str, Any]
    wire: schema.ImageGenerationRequest


@dataclass(frozen=True, slots=True)
class Task:
    """One picture: the name of its file, its line, and the seed that it alone is asked for with."""

    file: str
    line: Line
    seed: int

    @property
    def fields(self) -> dict[str, Any]:
        """As the API takes them."""
        return {**self.line.fields, "n": 1, "seed": self.seed}

    @property
    def wire(self) -> schema.ImageGenerationRequest:
        """The same as a checked request."""
        return self.line.wire.model_copy(update={"n": 1, "seed": self.seed})


#: Draws the picture of a task and returns its file. Raises RequestRefused or EngineError where this one
#: cannot be drawn, BatchStopped where none can.
Draw = Callable[[Task], bytes]


@dataclass(frozen=True, slots=True)
class Progress:
    """A task has ended: number `done` of `total`. `error` is why it failed, None where it was drawn."""

    done: int
    total: int
    task: Task
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to: pictures that were there already, were drawn now, and failed."""

    found: int = 0
    drawn: int = 0
    failed: int = 0


def read_lines(text: str) -> list[Line]:
    """The lines of a JSON Lines file, without the empty ones.

    Raises InvalidRequest that tells each wrong line by its number, up to MOST_TOLD.
    """
    lines, wrong = [], []
    for number, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            lines.append(_read_line(number, content))
        except RequestRefused as refused:
            wrong.append((number, str(refused).replace("The body", "It")))
    if wrong:
        raise InvalidRequest(told_by_line(wrong))
    if not lines:
        raise InvalidRequest(
            'the file has no prompts; each line is a JSON object such as {"prompt": "a red circle"}'
        )
    return lines


def told_by_line(wrong: Sequence[tuple[int, str]]) -> str:
    """Wrong lines as text, one a line, the first of them if they are many."""
    told = [f"line {number}: {why}" for number, why in wrong[:MOST_TOLD]]
    more = [f"and {len(wrong) - MOST_TOLD} more"] if len(wrong) > MOST_TOLD else []
    return "\n".join((*told, *more))


def _read_line(number: int, content: str) -> Line:
    fields = schema.read_json(content.encode("utf-8", "surrogatepass"))
    names = [fields.pop(name) for name in _NAMES if name in fields]
    if any(not isinstance(name, (str, int)) for name in names):
        raise RequestRefused(f"id must be text or a number, got {names[0]!r}", "id")
    for name in _OF_ANSWERS:
        if fields.get(name) is not None:
            raise RequestRefused(
                f"{name} is of no use here, where each picture becomes a file; leave it out", name
            )
        fields.pop(name, None)
    return Line(number, str(names[0]) if names else None, fields, schema.parse(fields))


class Manifest:
    """The folder's record: a line of JSON for each thing that happened, only ever added to."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / MANIFEST
        #: The last that is known of each picture, by its file's name.
        self.latest: dict[str, dict[str, Any]] = {}
        self._batch: str | None = None
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # the last writer was killed within a line
            os.truncate(self._path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                if "file" not in record and "batch" in record:
                    self._batch = str(record["batch"])
                    continue
                self.latest[record["file"]] = {**self.latest.get(record["file"], {}), **record}
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidRequest(
                    f"{self._path} cannot be read at line {number}; take that line out, or choose "
                    f"another folder"
                ) from error

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Write them whole, on the disk when this returns."""
        added = list(records)
        if not added:
            return
        self._append(added)
        for record in added:
            self.latest[record["file"]] = {**self.latest.get(record["file"], {}), **record}

    def batch_id(self) -> str:
        """What tells this folder's pictures from those of the same prompts elsewhere; noted here at first."""
        if self._batch is None:
            batch = secrets.token_hex(16)
            self._append([{"batch": batch}])
            self._batch = batch
        return self._batch

    def _append(self, added: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in added)
        with self._path.open("ab", buffering=0) as file:
            file.write(text.encode("utf-8", "replace"))
            os.fsync(file.fileno())


def plan_tasks(lines: Sequence[Line], manifest: Manifest) -> list[Task]:
    """A task for each picture of each line; seeds are those of the lines, else of the manifest, else new
    ones."""
    return [task for line in lines for task in _tasks_of(line, manifest)]


def _tasks_of(line: Line, manifest: Manifest) -> Iterator[Task]:
    text = json.dumps(line.fields, sort_keys=True)
    stem = f"{line.number:05d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    n = line.wire.n or 1
    first = secrets.randbelow(MAX_SEED - n + 2) if line.wire.seed is None else line.wire.seed
    for index in range(n):
        count = f"-{index + 1}" if n > 1 else ""
        file = f"{stem}{count}{_SUFFIXES[line.wire.output_format or 'png']}"
        noted = manifest.latest.get(file, {}).get("seed") if line.wire.seed is None else None
        yield Task(file, line, first + index if noted is None else noted)


def run(
    tasks: Sequence[Task],
    folder: Path,
    manifest: Manifest,
    draw: Draw,
    *,
    at_once: int = 1,
    skip_errors: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Draw what is not there yet, `at_once` at a time; it alone may be at work in `folder`.

    Without `skip_errors` the first failure ends it, with what is drawn by then. Raises what `draw` raises of
    BatchStopped, and OSError where the folder can take no more.
    """
    for unfinished in folder.glob(".*.part"):
        unfinished.unlink()
    there = [task for task in tasks if (folder / task.file).exists()]
    left = [task for task in tasks if not (folder / task.file).exists()]
    manifest.add(
        _record(task, "planned", _seed_in(folder / task.file, task.seed))
        for task in tasks
        if "seed" not in manifest.latest.get(task.file, {})
    )
    # Killed between the two, the picture was there and not yet noted.
    manifest.add(
        {"file": task.file, "state": "drawn"}
        for task in there
        if manifest.latest[task.file].get("state") != "drawn"
    )
    outcome = Outcome(found=len(there))
    for ended in _drawn(left, draw, at_once):
        if isinstance(ended.result, BaseException):
            error = str(ended.result)
            manifest.add([{"file": ended.task.file, "state": "failed", "error": error}])
            outcome = replace(outcome, failed=outcome.failed + 1)
        else:
            error = None
            _write(folder / ended.task.file, ended.result)
            seconds = round(ended.seconds, 3)
            manifest.add([{"file": ended.task.file, "state": "drawn", "seconds": seconds, "error": None}])
            outcome = replace(outcome, drawn=outcome.drawn + 1)
        done = outcome.found + outcome.drawn + outcome.failed
        on_progress(Progress(done, len(tasks), ended.task, ended.seconds, error))
        if error is not None and not skip_errors:
            break
    return outcome


@dataclass(frozen=True, slots=True)
class _Ended:
    task: Task
    result: bytes | Exception
    seconds: float


def _drawn(tasks: Sequence[Task], draw: Draw, at_once: int) -> Iterator[_Ended]:
    """Each task when it has ended. One at a time is drawn in this thread, which the engine wants.

    Others are drawn by threads that end with the process: nothing waits for them when it is stopped.
    """
    if at_once == 1:
        yield from (_attempt(task, draw) for task in tasks)
        return
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    ended: queue.SimpleQueue[_Ended | Exception] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            try:
                ended.put(_attempt(waiting.get_nowait(), draw))
            except queue.Empty:
                return
            except Exception as error:
                ended.put(error)
                return

    for _ in range(min(at_once, len(tasks))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in tasks:
            each = ended.get()
            if isinstance(each, Exception):
                raise each
            yield each
    finally:
        is_over.set()


def _attempt(task: Task, draw: Draw) -> _Ended:
    began = time.monotonic()
    try:
        result: bytes | Exception = draw(task)
    except (RequestRefused, EngineError) as error:
        result = error
    return _Ended(task, result, time.monotonic() - began)


def _record(task: Task, state: str, seed: int) -> dict[str, Any]:
    named = {} if task.line.name is None else {"id": task.line.name}
    return {"file": task.file, "line": task.line.number, **named, "seed": seed, "state": state}


def _seed_in(file: Path, otherwise: int) -> int:
    """The seed that a picture tells itself, where it is there and its manifest was lost."""
    try:
        receipt = read_receipt(file.read_bytes())
    except OSError:  # which is also Pillow's for what is no picture
        return otherwise
    seed = (receipt or {}).get("seed")
    return seed if isinstance(seed, int) else otherwise


def _write(file: Path, content: bytes) -> None:
    """Under its name whole or not at all, and on the disk before anything else is noted of it."""
    unfinished = file.with_name(f".{file.name}.part")
    with unfinished.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    unfinished.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
