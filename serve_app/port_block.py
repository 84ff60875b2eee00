"""A run of ports that no other server of ours on this machine uses, for as long as it is held.

Ray gives the replicas of each cluster the same ports, from 30000 on, and opens them in a way that lets
another process open them too. Of two servers on one machine each then gets a part of the other's requests.
"""

from __future__ import annotations

import socket

#: Above those that Ray gives its workers (10002 to 19999), and below those that systems give to outgoing
#: connections, which begin at 32768 on Linux.
FIRST_PORT, END_PORT = 24000, 32000
BLOCK_PORTS = 100


class NoPortsLeft(OSError):
    """Every block is taken; the message says what to do."""


class PortBlock:
    """At most one block of ports at a time. Its first port is held open, by this process alone: that is the
    claim, which ends with the process however it ends."""

    def __init__(self) -> None:
        self._claim: socket.socket | None = None

    def claim(self) -> range:
        """The other ports of the first block that is free whole, until `release`. Raises NoPortsLeft."""
        self.release()
        for first in range(FIRST_PORT, END_PORT, BLOCK_PORTS):
            ports = range(first + 1, first + BLOCK_PORTS)
            claim = _bound(first)
            if claim is None:
                continue
            if all(_is_free(port) for port in ports):
                self._claim = claim
                return ports
            claim.close()
        raise NoPortsLeft(
            f"no {BLOCK_PORTS} ports in a row are free between {FIRST_PORT} and {END_PORT}; "
            "end other servers, or set haproxy to false, which needs none"
        )

    def release(self) -> None:
        """Give the block back; without one nothing happens."""
        if self._claim is not None:
            self._claim.close()
            self._claim = None


def _is_free(port: int) -> bool:
    probe = _bound(port)
    if probe is not None:
        probe.close()
    return probe is not None


def _bound(port: int) -> socket.socket | None:
    """A socket that has the port of every interface to itself; None where another process has it."""
    found = socket.socket()
    try:
        found.bind(("", port))
    except OSError:
        found.close()
        return None
    return found
