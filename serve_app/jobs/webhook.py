"""Tells another server that a job has ended: signed, retried, and never an address of the own network.

The signature is that of Standard Webhooks (https://www.standardwebhooks.com): who has the secret can check
that it came from here, and knows by `webhook-id` what was sent twice. A name is resolved once, and the
connection goes to the address that was looked at; redirects are not followed. Knows nothing of jobs.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import socket
import time
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import urlsplit

import httpx

from serve_app.error_mapping import RequestRefused
from serve_app.settings import is_webhook_secret

LONGEST_URL = 2000
#: After a try that failed; when none is left it is given up. In all, a bit more than a day.
BACKOFF_SECONDS = (5.0, 30.0, 120.0, 600.0, 3600.0, 4 * 3600.0, 8 * 3600.0, 12 * 3600.0)
#: For resolving, connecting and the answer's head, in all; of the answer no more is read.
TRY_SECONDS = 15.0

#: An IPv4 address in an IPv6 one, as a translator of the network makes it.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
#: All of IPv6 that has been given out for everybody (IANA); what lies outside is somebody's own.
_GIVEN_OUT = ipaddress.ip_network("2000::/3")
#: Where nobody else's server is, whatever the tables of this Python say.
_NOBODYS = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # of each machine in Azure, its host
        "192.0.0.0/24",  # protocols' own; of each machine in Oracle's cloud, its host
        "192.88.99.0/24",  # relays of 6to4
        "2001::/23",  # protocols' own, Teredo among them
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation (RFC 9637)
    )
)

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class AddressRefused(Exception):
    """The name leads into the own network, where a webhook may not go."""


@dataclass(frozen=True)
class Target:
    """Where webhooks go; `secret` is the whole text with its prefix, None: unsigned."""

    url: str
    secret: str | None = None


def parse_target(given: object, private_allowed: bool) -> Target:
    """The checked field `webhook`; raises RequestRefused with a sentence."""
    if not isinstance(given, dict) or not isinstance(given.get("url"), str):
        _refuse('webhook must be an object such as {"url": "https://example.org/done"}.')
    if unknown := sorted(set(given) - {"url", "secret"}):
        _refuse(f"webhook takes url and secret, got {unknown[0][:40]!r}; take it out.")
    return Target(
        check_url(given["url"], private_allowed),
        None if given.get("secret") is None else check_secret(given["secret"]),
    )


def check_url(url: str, private_allowed: bool) -> str:
    """The address, as far as it can be judged without resolving its name."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    is_plain = url.isascii() and url.isprintable() and " " not in url and len(url) <= LONGEST_URL
    if not host or parts.scheme not in ("http", "https") or not is_plain:
        _refuse(
            f"webhook.url must be an address such as https://example.org/done, of at most {LONGEST_URL} "
            "characters."
        )
    if parts.username is not None or parts.password is not None:
        _refuse("webhook.url must hold no user and password; sign with webhook.secret.")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return url
    if not private_allowed and not is_public(address):
        _refuse("webhook.url is an address of the server's own network, where this server sends none.")
    return url


def check_secret(secret: object) -> str:
    """The secret, in the form of Standard Webhooks."""
    if not isinstance(secret, str) or not is_webhook_secret(secret):
        _refuse("webhook.secret must be whsec_ and then 24 to 64 bytes in base64.")
    return secret


def _refuse(message: str) -> NoReturn:
    raise RequestRefused(message, "webhook")


def is_public(address: _Address) -> bool:
    """Whether anybody may be sent there: no loopback, private, link-local or otherwise special address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.scope_id is not None or address not in _GIVEN_OUT:
            return False
    is_somebodys = not any(address in network for network in _NOBODYS)
    return is_somebodys and address.is_global and not address.is_multicast


def signature(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """Standard Webhooks' `webhook-signature`."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = hmac.new(key, f"{id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(signed).decode("ascii")


async def send(target: Target, id: str, body: bytes, private_allowed: bool) -> None:
    """One try. Raises AddressRefused, OSError, TimeoutError or httpx.HTTPError where it was not taken."""
    async with asyncio.timeout(TRY_SECONDS):
        parts = urlsplit(target.url)
        assert parts.hostname is not None
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        address = await _resolved(parts.hostname, port, private_allowed)
        timestamp = int(time.time())
        headers = {
            "host": parts.netloc,
            "content-type": "application/json",
            "user-agent": "zimage-turbo",
            "webhook-id": id,
            "webhook-timestamp": str(timestamp),
        }
        if target.secret is not None:
            headers["webhook-signature"] = signature(target.secret, id, timestamp, body)
        pinned = httpx.URL(target.url).copy_with(host=str(address), port=port)
        # The environment's proxies would resolve the name once more, and elsewhere; its certificates
        # (SSL_CERT_FILE) are those of whoever runs this.
        async with (
            httpx.AsyncClient(
                verify=httpx.create_ssl_context(),
                trust_env=False,
                follow_redirects=False,
                timeout=TRY_SECONDS,
            ) as client,
            client.stream(
                "POST",
                pinned,
                content=body,
                headers=headers,
                extensions={"sni_hostname": parts.hostname},
            ) as answer,
        ):
            if not answer.is_success:
                raise httpx.HTTPStatusError(
                    f"answered with {answer.status_code}", request=answer.request, response=answer
                )


async def _resolved(host: str, port: int, private_allowed: bool) -> _Address:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(each[4][0]) for each in found]
    if not private_allowed and not all(is_public(address) for address in addresses):
        raise AddressRefused("the name leads to an address of the server's own network")
    return addresses[0]
