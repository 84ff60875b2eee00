"""Webhooks: what the receiver gets, and what is never sent."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from serve_app.error_mapping import RequestRefused
from serve_app.jobs.courier import Courier
from serve_app.jobs.store import JobStore, Limits, NewJob
from serve_app.jobs.webhook import AddressRefused, Target, check_url, is_public, send
from tests.serve_app.jobs.conftest import SMALL

KEY = b"k" * 32
SECRET = "whsec_" + base64.b64encode(KEY).decode()


@dataclass
class Receiver:
    """A server of somebody else's: answers with each of `statuses`, then 200, and keeps what came."""

    port: int = 0
    statuses: list[int] = field(default_factory=list)
    location: str = ""
    came: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.came.append((headers, body))
        status = self.statuses.pop(0) if self.statuses else 200
        more = f"Location: {self.location}\r\n" if self.location else ""
        writer.write(f"HTTP/1.1 {status} So\r\n{more}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}/done?of=jobs"


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    server = await asyncio.start_server(receiver.answer, "127.0.0.1", 0)
    receiver.port = server.sockets[0].getsockname()[1]
    async with server:
        yield receiver


async def until(is_so: object, seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not is_so():  # type: ignore[operator]
            await asyncio.sleep(0.05)


async def test_the_end_of_a_job_is_told_once_and_signed(
    jobs_client: httpx.AsyncClient, receiver: Receiver
) -> None:
    webhook = {"url": f"http://127.0.0.1:{receiver.port}/done", "secret": SECRET}
    accepted = await jobs_client.post("/v1/images/jobs", json=SMALL | {"webhook": webhook})
    job = accepted.json()
    assert job["webhook"] == {"url": webhook["url"]}
    await until(lambda: receiver.came)
    (headers, body) = receiver.came[0]
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert json.loads(body)["type"] == "job.done"
    assert json.loads(body)["data"] == {"id": job["id"], "status": "done"}
    await asyncio.sleep(1.5)
    assert len(receiver.came) == 1


async def test_a_receiver_that_fails_is_told_again_also_after_a_restart(
    store: JobStore, receiver: Receiver
) -> None:
    receiver.statuses = [500, 503]
    id = finished(store, f"http://127.0.0.1:{receiver.port}")
    for wanted in (1, 3):
        courier = Courier(store, asyncio.to_thread, private_allowed=True, backoff=(0.1, 0.1, 0.1))
        running = asyncio.create_task(courier.run())
        await until(lambda wanted=wanted: len(receiver.came) >= wanted)
        await asyncio.sleep(0.2)
        running.cancel()
        await asyncio.wait([running])
    assert len({headers["webhook-id"] for headers, _ in receiver.came}) == 1
    assert {json.loads(body)["data"]["id"] for _, body in receiver.came} == {id}


async def test_a_receiver_that_always_fails_is_given_up(store: JobStore, receiver: Receiver) -> None:
    receiver.statuses = [500] * 100
    finished(store, f"http://127.0.0.1:{receiver.port}")
    told: list[str] = []
    courier = Courier(store, asyncio.to_thread, private_allowed=True, backoff=(0.0,), tell=told.append)
    running = asyncio.create_task(courier.run())
    await until(lambda: len(receiver.came) == 2)
    await asyncio.sleep(1.5)
    running.cancel()
    await asyncio.wait([running])
    assert (len(receiver.came), told) == (2, ["again", "given_up"])


async def test_a_redirect_is_not_followed(receiver: Receiver) -> None:
    receiver.statuses, receiver.location = [307], f"http://127.0.0.1:{receiver.port}/elsewhere"
    with pytest.raises(httpx.HTTPStatusError, match="307"):
        await send(Target(receiver.url), "msg-1", b"{}", private_allowed=True)
    assert len(receiver.came) == 1


async def test_the_name_stays_in_the_request_that_goes_to_the_address(receiver: Receiver) -> None:
    await send(Target(receiver.url), "msg-1", b"{}", private_allowed=True)
    headers, body = receiver.came[0]
    assert (headers["host"], body) == (f"localhost:{receiver.port}", b"{}")
    assert "webhook-signature" not in headers


def certificate_of(name: str, folder: Path) -> tuple[Path, Path]:
    """The files of a key and of its own certificate, which is for that name alone."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "of a test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    key_file, certificate_file = folder / "key.pem", folder / "certificate.pem"
    certificate_file.write_bytes(certificate.public_bytes(Encoding.PEM))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key_file, certificate_file


@pytest.mark.parametrize(
    ("name", "is_trusted", "is_taken"),
    [("localhost", True, True), ("example.org", True, False), ("localhost", False, False)],
    ids=("its own", "another's", "nobody's"),
)
async def test_over_https_the_certificate_is_that_of_the_name_and_not_of_the_address(
    name: str, is_trusted: bool, is_taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file, certificate_file = certificate_of(name, tmp_path)
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate_file))
    asked_for: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file, key_file)
    context.sni_callback = lambda _socket, server_name, _context: asked_for.append(server_name)
    receiver = Receiver()
    server = await asyncio.start_server(receiver.answer, "127.0.0.1", 0, ssl=context)
    receiver.port = server.sockets[0].getsockname()[1]
    target = Target(receiver.url.replace("http://", "https://"))
    async with server:
        if is_taken:
            await send(target, "msg-1", b"{}", private_allowed=True)
        else:
            with pytest.raises(httpx.ConnectError, match="certificate"):
                await send(target, "msg-1", b"{}", private_allowed=True)
    assert asked_for == ["localhost"], "the name goes to the address that was looked at"
    assert [headers["host"] for headers, _ in receiver.came] == [f"localhost:{receiver.port}"] * is_taken


async def test_a_name_of_the_own_network_is_refused(receiver: Receiver) -> None:
    with pytest.raises(AddressRefused):
        await send(Target(receiver.url), "msg-1", b"{}", private_allowed=False)
    assert receiver.came == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("1.1.1.1", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:1.1.1.1", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("ff02::1", False),
        ("fec0::1", False),
        ("64:ff9b::101:101", True),
        ("64:ff9b:1::1", False),
        ("::127.0.0.1", False),
        ("::ffff:0:127.0.0.1", False),
        ("5f00::1", False),
        ("3fff::1", False),
        ("2001::1", False),
        ("2001:db8::1", False),
        ("168.63.129.16", False),
        ("64:ff9b::168.63.129.16", False),
        ("192.0.0.192", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize("url", ["http://127.0.0.1", "http://[::1]:80", "http://169.254.169.254/latest"])
def test_an_address_of_the_own_network_is_refused_when_it_is_asked_for(url: str) -> None:
    with pytest.raises(RequestRefused, match="own network"):
        check_url(url, private_allowed=False)
    assert check_url(url, private_allowed=True) == url


def finished(store: JobStore, url: str) -> str:
    new = NewJob(owner="", asked_by="", model="m", request="{}", work=1.0, webhook_url=url)
    job, _ = store.accept(new, Limits(10, 10))
    (job,) = store.claim("owner", "m", 1, {})
    assert store.finish(job.id, job.attempt, "{}")
    return job.id


def test_a_secret_is_kept_in_a_file_for_its_owner(store: JobStore, tmp_path: Path) -> None:
    finished(store, "https://example.org")
    assert (tmp_path / "jobs.sqlite3").stat().st_mode & 0o077 == 0
