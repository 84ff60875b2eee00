"""Where a request comes from when proxies stand between: X-Forwarded-For, where they are believed.

A proxy is believed for its address, which the settings name, or for the secret that `launch` gave to its own
HAProxy: that one stands on this machine, where anyone may connect from the same address. What every gate,
queue and log line behind this gate reads is `scope["client"]`.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Iterable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

#: In it our own HAProxy shows its secret; it never gets past this gate.
SECRET_HEADER = "x-zimage-proxy"
FORWARDED_HEADER = "x-forwarded-for"
SCHEME_HEADER = "x-forwarded-proto"
#: From these Gradio takes where its page sends what people type, and a cache would give that page to others.
HOST_HEADERS = ("x-forwarded-host", "x-gradio-server")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ForwardedFor:
    """Puts the address of whoever asked in the place of the last proxy's, where that proxy is believed."""

    def __init__(self, app: ASGIApp, trusted: Iterable[str] = (), secret: bytes | None = None) -> None:
        """`trusted` are addresses and networks; `secret` is our own HAProxy's, None where there is none."""
        self._app = app
        self._trusted = [ipaddress.ip_network(each) for each in trusted]
        self._secret = secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        shown = headers.getlist(SECRET_HEADER)
        peer = (scope.get("client") or ("",))[0]
        forwarded = headers.getlist(FORWARDED_HEADER)
        is_ours = self._is_ours(shown)
        address = address_of(peer, forwarded, self._trusted, is_ours)
        if address != peer:
            scope = {**scope, "client": (address, 0)}
        # Our own HAProxy says nothing of the rest: what it passes on is the word of who is connected to it.
        connected = _read(address_of(peer, forwarded, (), is_ours))
        is_named = connected is not None and _is_among(connected, self._trusted)
        scheme = headers.get(SCHEME_HEADER, "")
        if is_named and scheme in ("http", "https"):
            scope = {**scope, "scheme": scheme}
        dropped = {SECRET_HEADER, *(() if is_named else HOST_HEADERS)}
        kept = [(name, value) for name, value in scope["headers"] if name.decode("latin-1") not in dropped]
        await self._app({**scope, "headers": kept}, receive, send)

    def _is_ours(self, shown: Sequence[str]) -> bool:
        if self._secret is None or len(shown) != 1:
            return False
        return secrets.compare_digest(shown[0].encode("latin-1"), self._secret)


def address_of(
    peer: str, forwarded: Sequence[str], trusted: Sequence[Network], is_believed: bool = False
) -> str:
    """The nearest address, seen from here, of which nobody says that it is a proxy to be believed.

    Each proxy adds at the end whom it heard, so what stands before the first that is not believed is that
    one's own word. `peer` is who is connected; it `is_believed` whatever its address is, or by `trusted`. An
    entry that is no address ends the search at the proxy that wrote it.
    """
    hops = [hop.strip() for value in forwarded for hop in value.split(",")]
    address = _read(peer)
    if address is None:
        return peer
    is_believed = is_believed or _is_among(address, trusted)
    while is_believed and hops and (hop := _read(hops.pop())) is not None:
        address = hop
        is_believed = _is_among(address, trusted)
    return str(address)


def _is_among(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


def _read(hop: str) -> Address | None:
    """An address with or without a port, as proxies write it; None for anything else."""
    host = hop[1:].partition("]")[0] if hop.startswith("[") else hop
    if host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    # As a socket for both kinds tells an IPv4 caller, who is the same one.
    return getattr(address, "ipv4_mapped", None) or address
