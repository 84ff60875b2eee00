"""An S3 server in this process, for tests: one bucket in memory that checks every request's signature.

It knows what a store of files asks for (PUT, GET, HEAD, DELETE of one and of many, lists in pages), and can
be told to fail or to be slow. Signatures are those of AWS Signature Version 4, reckoned here from Amazon's
document and not by the library under test.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

BUCKET, KEY_ID, SECRET, REGION = "pictures", "key-id", "a/secret+key", "eu-test-1"
#: So few, that lists of the tests have several.
KEYS_A_PAGE = 5


@dataclass
class ObjectStoreServer:
    """What is in the bucket, what was asked, and how the next answers fail."""

    objects: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    #: Method and key of each request whose signature was right.
    asked: list[tuple[str, str]] = field(default_factory=list)
    refused: int = 0
    #: This many of the next requests are answered with 500; -1: all.
    failures: int = 0
    #: How long it waits before it answers.
    seconds: float = 0.0
    port: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """What tells a program of it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": REGION,
        }


@contextmanager
def object_store() -> Iterator[ObjectStoreServer]:
    """A server with an empty bucket."""
    store = ObjectStoreServer()
    handler = type("Handler", (_Handler,), {"store": store})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        store.port = server.server_port
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield store
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: ObjectStoreServer

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        store = self.store
        if not _is_signed(self.command, self.path, self.headers, body) or bucket != BUCKET:
            store.refused += 1
            self._answer(403, b"<Error><Code>SignatureDoesNotMatch</Code></Error>")
            return
        store.asked.append((self.command, key))
        time.sleep(store.seconds)
        if store.failures:
            store.failures -= 1
            self._answer(500, b"<Error><Code>InternalError</Code></Error>")
        elif self.command == "PUT":
            store.objects[key] = (body, time.time())
            self._answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')
        elif self.command == "POST" and "delete" in query:
            elements = ElementTree.fromstring(body).iter()
            keys = [element.text or "" for element in elements if element.tag.endswith("Key")]
            for each in keys:
                store.objects.pop(each, None)
            told = "".join(f"<Deleted><Key>{escape(each)}</Key></Deleted>" for each in keys)
            self._answer(200, f"<DeleteResult>{told}</DeleteResult>".encode(), Content_Type="application/xml")
        elif self.command == "DELETE":
            store.objects.pop(key, None)
            self._answer(204)
        elif "list-type" in query:
            self._answer(200, _page(store, query), Content_Type="application/xml")
        elif key in store.objects:
            content, written_at = store.objects[key]
            self._answer(
                200, content, Last_Modified=formatdate(written_at, usegmt=True), ETag=f'"{len(content)}"'
            )
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


def _page(store: ObjectStoreServer, query: dict[str, str]) -> bytes:
    after, prefix = query.get("continuation-token", ""), query.get("prefix", "")
    keys = sorted(key for key in store.objects if key.startswith(prefix) and key > after)
    told = []
    for key in keys[:KEYS_A_PAGE]:
        content, written_at = store.objects[key]
        moment = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(written_at))
        told.append(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(content)}</Size>"
            f"<LastModified>{moment}</LastModified></Contents>"
        )
    more = len(keys) > KEYS_A_PAGE
    token = f"<NextContinuationToken>{escape(keys[KEYS_A_PAGE - 1])}</NextContinuationToken>" if more else ""
    return (
        f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(told)}"
        "</ListBucketResult>"
    ).encode()


def _is_signed(method: str, path: str, headers: Any, body: bytes) -> bool:
    """Whether the Authorization is that of the secret for this very request."""
    scheme, _, rest = headers.get("Authorization", "").partition(" ")
    parts = dict(part.strip().partition("=")[::2] for part in rest.split(","))
    if scheme != "AWS4-HMAC-SHA256" or parts.keys() != {"Credential", "SignedHeaders", "Signature"}:
        return False
    key_id, _, scope = parts["Credential"].partition("/")
    signed, told_hash = parts["SignedHeaders"].split(";"), headers.get("x-amz-content-sha256", "")
    if key_id != KEY_ID or told_hash not in (hashlib.sha256(body).hexdigest(), "UNSIGNED-PAYLOAD"):
        return False
    url = urlsplit(path)
    pairs = sorted(parse_qsl(url.query, keep_blank_values=True))
    request = "\n".join(
        [
            method,
            url.path,
            "&".join(f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}" for name, value in pairs),
            *(f"{name}:{' '.join(headers.get(name, '').split())}" for name in signed),
            "",
            ";".join(signed),
            told_hash,
        ]
    )
    text = "\n".join(
        [scheme, headers.get("x-amz-date", ""), scope, hashlib.sha256(request.encode()).hexdigest()]
    )
    key = f"AWS4{SECRET}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.compare_digest(hmac.new(key, text.encode(), "sha256").hexdigest(), parts["Signature"])
