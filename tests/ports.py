"""Ports for servers that tests start some seconds later, or in another process."""

from __future__ import annotations

import random
import socket

#: Ray gives its workers ports from 10002 to 19999, our own servers take theirs from 24000 on, and systems
#: give outgoing connections those from 32768 on (Linux): one from here is still free when it is needed.
PORTS = range(20_000, 24_000)


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens on now, each another."""
    found = (port for port in random.sample(PORTS, len(PORTS)) if _is_free(port))
    return [next(found) for _ in range(count)]


def free_run(length: int) -> range:
    """So many in a row."""
    starts = random.sample(PORTS, len(PORTS))
    runs = (range(start, start + length) for start in starts if start + length <= PORTS.stop)
    return next(run for run in runs if all(_is_free(port) for port in run))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
