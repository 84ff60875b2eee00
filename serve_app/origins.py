"""Which names of this server are its own, and which web pages may call it: decisions without effects.

A page on any site can make its visitor's browser send requests here, and can let its own name resolve to this
machine (DNS rebinding). What such requests cannot do is lie in `Host`, `Origin` and `Sec-Fetch-Site`, which
browsers write themselves. Programs send no `Origin` and are not concerned.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from serve_app.settings import Settings, is_loopback

DEFAULT_PORTS = {"http": 80, "https": 443}
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


@dataclass(frozen=True)
class Address:
    """A host and a port as headers name them; `port` None: not named."""

    name: str
    port: int | None

    def at(self, scheme: str) -> tuple[str, int | None]:
        """With the port that the scheme has by itself."""
        return self.name, self.port if self.port is not None else DEFAULT_PORTS.get(scheme)


@dataclass(frozen=True)
class Sites:
    """What is known of the sites around this server.

    `bound` is the name of the address that the server listens on; `own` are the names that a person has
    listed; `any_host` tells that requests may come under other names too; `foreign` are the origins elsewhere
    that may call.
    """

    bound: str
    own: frozenset[Address]
    any_host: bool
    foreign: frozenset[str]

    def is_host(self, host: str) -> bool:
        """Whether a request under this `Host` is meant for this server."""
        if self.any_host:
            return True
        address = address_of(host)
        if address is None:
            return False
        name = address.name
        is_here = name == self.bound or is_loopback(name) or name.endswith(".localhost")
        return is_here or self._is_listed(address)

    def is_foreign(self, origin: str) -> bool:
        """Whether it is a page elsewhere that may call."""
        return origin.lower() in self.foreign

    def is_own(self, origin: str, host: str) -> bool:
        """Whether a page of this origin came from this server, which was asked under `host`."""
        scheme, separator, netloc = origin.lower().partition("://")
        page, asked = address_of(netloc), address_of(host)
        if not separator or page is None:
            return False
        return (asked is not None and page.at(scheme) == asked.at(scheme)) or self._is_listed(page)

    def _is_listed(self, address: Address) -> bool:
        return address in self.own or Address(address.name, None) in self.own


def sites_of(settings: Settings, has_keys: bool) -> Sites:
    """The sites around a server with these settings.

    Where callers carry keys, a name that was bent to this machine is no way in: the browser has no key for
    it. So any name will do there, unless the person has listed those that are right.
    """
    own = {address for each in settings.allowed_hosts if (address := address_of(each)) is not None}
    return Sites(
        bound=settings.host.lower(),
        own=frozenset(own),
        any_host=has_keys and not settings.allowed_hosts,
        foreign=frozenset(origin.lower() for origin in settings.cors_origins),
    )


def address_of(netloc: str) -> Address | None:
    """`name`, `name:port` or `[::1]:port` taken apart; None where it is none of these."""
    try:
        parts = urlsplit(f"//{netloc}")
        name, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not name or parts.netloc != netloc or "@" in netloc:
        return None
    return Address(name.rstrip("."), port)
