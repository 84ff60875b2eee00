"""Asks a server for one picture at a time, as patiently as it wishes; knows nothing of batches and files."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from serve_app.error_mapping import RequestRefused
from zimage_engine.errors import InvalidRequest

#: Drawing one picture may take long on a CPU, and there is the queue before it.
ANSWER_SECONDS = 3600.0
#: What it tells of itself is at hand, or of no use.
TOLD_SECONDS = 10.0
#: How long a server that is not there, or takes nothing, is asked again before it is given up.
PATIENCE_SECONDS = 600.0
#: Between two attempts where the server names no time.
RETRY_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 60.0

#: The server is there and busy, or about to be there, or something before it has not waited for it.
_LATER = (408, 429, 502, 503, 504)
#: What the server itself calls a picture that took longer than any may: so it would once more.
_FINAL = ("deadline_exceeded",)
#: It had drawn it under the same key, and keeps it no more.
_EXPIRED = 410
#: It will never take any request of ours.
_NEVER = (401, 403, 421)


class ServerGivenUp(Exception):
    """The server takes none of our requests; the message says why."""


class RemoteServer:
    """A server that draws, by its address, such as http://127.0.0.1:7860."""

    def __init__(self, url: str, key: str | None = None, sleep: Callable[[float], None] = time.sleep) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InvalidRequest(
                f"--server must be an address such as http://127.0.0.1:7860, got {url!r}", "server"
            )
        base = url.rstrip("/").removesuffix("/v1")
        self._models_url = f"{base}/v1/models"
        self._url = f"{base}/v1/images/generations"
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._sleep = sleep
        # A redirect would take the key to another server.
        self._opener = urllib.request.build_opener(_NoRedirect)

    def models(self) -> list[dict[str, Any]]:
        """What the server tells of its models; nothing where it does not answer at once."""
        try:
            request = urllib.request.Request(self._models_url, headers=self._headers)
            with self._opener.open(request, timeout=TOLD_SECONDS) as answer:
                told = json.load(answer)["data"]
        except (OSError, HTTPException, ValueError, KeyError, TypeError):
            return []
        return [card for card in told if isinstance(card, dict)] if isinstance(told, list) else []

    def draw(self, fields: Mapping[str, Any], name: str) -> bytes:
        """The file of the one picture that `fields` ask for, in the API's own names.

        `name` is the picture's own: asked for under another one, the same fields are drawn anew.

        What was not answered is asked again with the same Idempotency-Key, so that a server that keeps
        them draws it once; what it had drawn and thrown away since is drawn anew.
        Raises RequestRefused where this picture is refused, ServerGivenUp where all are.
        """
        body = json.dumps(fields).encode()
        key = first_key = hashlib.sha256(name.encode() + b"\0" + body).hexdigest()
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            headers = {**self._headers, "Idempotency-Key": key}
            request = urllib.request.Request(self._url, body, headers)
            try:
                with self._opener.open(request, timeout=ANSWER_SECONDS) as answer:
                    return base64.b64decode(json.load(answer)["data"][0]["b64_json"])
            except urllib.error.HTTPError as refused:
                wait, why = _wait_of(refused), _refusal_of(refused)
                if why.code in _FINAL:
                    wait = None
            except (OSError, HTTPException) as lost:
                wait, why = RETRY_SECONDS, RequestRefused(f"{self._url} does not answer ({_reason(lost)})")
            except (ValueError, KeyError, IndexError, TypeError) as odd:
                raise ServerGivenUp(f"{self._url} answers, but not as a server for pictures does") from odd
            if why.status == _EXPIRED and key == first_key:
                key = secrets.token_hex(32)
                continue
            if why.status in _NEVER or 300 <= why.status < 400:
                raise ServerGivenUp(f"{self._url}: {why}")
            if wait is None:
                raise why
            if time.monotonic() + wait > give_up_at:
                raise ServerGivenUp(f"{self._url}: given up after {PATIENCE_SECONDS:.0f} seconds: {why}")
            self._sleep(wait)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _wait_of(refused: urllib.error.HTTPError) -> float | None:
    """How long to wait before it is asked again; None where that would not help."""
    if refused.code not in _LATER:
        return None
    told = refused.headers.get("Retry-After", "")
    seconds = float(told) if told.isascii() and told.isdigit() else RETRY_SECONDS
    return min(max(seconds, 0.1), LONGEST_WAIT_SECONDS)


def _refusal_of(refused: urllib.error.HTTPError) -> RequestRefused:
    try:
        with refused:
            error = json.load(refused)["error"]
            code = str(error.get("code") or "")
            return RequestRefused(str(error["message"]), code=code, status=refused.code)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, HTTPException):
        return RequestRefused(f"HTTP {refused.code} {refused.reason}", code="", status=refused.code)


def _reason(lost: Exception) -> str:
    reason = getattr(lost, "reason", None) or lost
    return str(getattr(reason, "strerror", None) or reason or type(reason).__name__)
