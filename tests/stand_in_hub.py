"""A model hub on loopback: what huggingface_hub asks of the public one, and the ways it can fail.

    with StandInHub() as hub:
        hub.publish("owner/name", folder)
        download_model("owner/name", endpoint=hub.endpoint, ...)
        hub.requests   # what was asked, and how many bytes went out

Large files (`*.safetensors` and tokenizer.json) are announced by sha256 as the public hub does for
those in large-file storage, the rest by git's sha1.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_FILES = re.compile(r".*\.safetensors|(.*/)?tokenizer\.json")


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Asked:
    """One request as the hub saw it; `sent_bytes` is how much of a file went out."""

    method: str
    path: str
    byte_range: str | None
    authorization: str | None
    status: int
    sent_bytes: int


@dataclass
class Faults:
    """What goes wrong. Keys are paths of files inside a model; counts go down with each use."""

    #: (after how many bytes, how many more times) the connection is cut.
    break_off: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: One byte of the file is altered on the way, this many more times.
    corrupt: dict[str, int] = field(default_factory=dict)
    #: Announced, but answered with 404.
    missing: set[str] = field(default_factory=set)
    #: Answer with this status, this many more times.
    refuse: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: The server ignores Range and sends the whole file.
    no_ranges: bool = False
    #: Seconds between blocks of a file.
    pause_seconds: float = 0.0


@dataclass
class Model:
    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False


class StandInHub:
    """A hub that serves what `publish` gave it until the `with` block ends.

    With `storage`, another hub's endpoint, large files are answered with a redirect to it, as the
    public hub sends them to its storage on another host.
    """

    def __init__(self, port: int = 0, storage: str | None = None) -> None:
        self.models: dict[str, Model] = {}
        self.requests: list[Asked] = []
        self.faults = Faults()
        self.storage = storage
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def publish(
        self,
        model_id: str,
        files: Path | Mapping[str, bytes],
        revision: str = "main",
        token: str | None = None,
        gated: bool = False,
    ) -> str:
        """Put a folder, or contents by path, up as a revision of a model; returns its commit."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes()
                for path in sorted(files.rglob("*"))
                if path.is_file()
            }
        model = self.models.setdefault(model_id, Model())
        model.token, model.gated = token, gated
        content = repr(sorted((path, git_sha1(body)) for path, body in files.items()))
        commit = hashlib.sha1(content.encode()).hexdigest()
        model.commits[commit] = dict(files)
        model.revisions[revision] = commit
        return commit

    def fetched(self, path: str) -> list[Asked]:
        """The GET requests for one file of a model."""
        return [asked for asked in self.requests if asked.method == "GET" and asked.path.endswith("/" + path)]

    @property
    def sent_bytes(self) -> int:
        return sum(asked.sent_bytes for asked in self.requests)

    def __enter__(self) -> StandInHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are kept in `hub.requests` instead of being printed."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    @property
    def hub(self) -> StandInHub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            self._describe(api[1], api[2], api[3])
        elif file:
            self._resolve(file[1], file[2], file[3])
        else:
            self._send(404, b"Not Found")

    def _model(self, model_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        model = self.hub.models.get(model_id)
        authorization = self.headers.get("Authorization")
        if model is not None and model.token is not None and authorization != f"Bearer {model.token}":
            if model.gated:
                self._send(403 if authorization else 401, b"", {"X-Error-Code": "GatedRepo"})
            elif authorization:
                self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
            else:
                self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        if model is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = model.revisions.get(revision, revision)
        if commit not in model.commits:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, model.commits[commit]

    def _describe(self, model_id: str, what: str, revision: str) -> None:
        if self._refused(what):
            return
        found = self._model(model_id, revision)
        if found is None:
            return
        commit, files = found
        entries = [_tree_entry(path, content) for path, content in files.items()]
        if what == "tree":
            answer: Any = entries
        else:
            siblings = [
                {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
                for entry in entries
            ]
            answer = {"id": model_id, "modelId": model_id, "sha": commit, "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _resolve(self, model_id: str, revision: str, path: str) -> None:
        found = self._model(model_id, revision)
        if found is None:
            return
        commit, files = found
        if path not in files or path in self.hub.faults.missing:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        if self.command == "GET" and self._refused(path):
            return
        content = files[path]
        large = LARGE_FILES.fullmatch(path) is not None
        name = hashlib.sha256(content).hexdigest() if large else git_sha1(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{name}"', "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{name}"', "X-Linked-Size": str(len(content))}
        if large and self.hub.storage is not None:
            self._send(302, b"", {**headers, "Location": self.hub.storage + self.path})
            return
        self._send_file(path, content, headers)

    def _refused(self, path: str) -> bool:
        with self.hub.lock:
            status, times = self.hub.faults.refuse.get(path, (0, 0))
            if times:
                self.hub.faults.refuse[path] = (status, times - 1)
        if times:
            self._send(status, b"", {"Retry-After": "0"})
        return bool(times)

    def _send_file(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        faults = self.hub.faults
        asked_range = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(asked_range[1]) if asked_range and not faults.no_ranges else 0
        if begin >= len(content) and begin:
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        status = 206 if begin else 200
        if begin:
            headers = {**headers, "Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        cut_after: int | None = None
        if self.command == "GET":
            with self.hub.lock:
                after, times = faults.break_off.get(path, (0, 0))
                if times:
                    faults.break_off[path] = (after, times - 1)
                    cut_after = after
                if faults.corrupt.get(path, 0):
                    faults.corrupt[path] -= 1
                    content = content[:-1] + bytes([content[-1] ^ 1])
        self._send(status, content[begin:], headers, cut_after)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        cut_after: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent_bytes = 0
        try:
            if self.command == "GET":
                to_send = body if cut_after is None else body[:cut_after]
                for begin in range(0, len(to_send), 64 * 1024):
                    block = to_send[begin : begin + 64 * 1024]
                    self.wfile.write(block)
                    sent_bytes += len(block)
                    if self.hub.faults.pause_seconds:
                        time.sleep(self.hub.faults.pause_seconds)
        except OSError:
            cut_after = sent_bytes
        finally:
            is_file = "/resolve/" in self.path and status in (200, 206)
            self.hub.requests.append(
                Asked(
                    self.command,
                    unquote(urlsplit(self.path).path),
                    self.headers.get("Range"),
                    self.headers.get("Authorization"),
                    status,
                    sent_bytes if is_file else 0,
                )
            )
        if cut_after is not None:
            self.close_connection = True


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": git_sha1(content),
    }
    if LARGE_FILES.fullmatch(path):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return entry
