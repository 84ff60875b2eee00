"""Run by Ray in place of HAProxy: mends the configuration that Ray wrote, then becomes HAProxy.

    python haproxy_guard.py /path/to/haproxy -db -f /path/to/haproxy.cfg ...

Runs without site-packages (`python -IS`), so it imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1

#: A port alone, or behind a star, is every interface: Ray's statistics and metrics ports. The
#: frontend that people reach has its host before the port and stays as it is.
OPEN_BIND = re.compile(r"^(?P<bind>\s*bind\s+)\*?:(?P<port>\d+)\s*$", re.MULTILINE)
FRONTEND = re.compile(r"^frontend http_frontend\n\s*bind .*\n", re.MULTILINE)

#: With it HAProxy 2.8 does not notice that a caller has hung up, once the connection behind has been used
#: before: the worker draws on for nobody, and a thread of HAProxy spins (seen in 12 of 12 trials).
SPLICED_REQUESTS = re.compile(r"^\s*option splice-request\n", re.MULTILINE)

#: How long the headers of a request may take; without a bound, idle callers hold connections for ever.
HEADER_SECONDS = 20

#: Serve's own control headers are not for callers (`serve_app.gates` says why).
STRIPPED_HEADERS = ("x-request-timeout-seconds", "x-request-disconnect-disabled")


def mended(configuration: str) -> str:
    """The configuration with open ports on the loopback, Serve's headers stripped, hang-ups passed on, and a
    bound for how long headers take.

    A frontend that listens on every interface because its person chose so is left alone.
    """
    configuration = SPLICED_REQUESTS.sub("", configuration)
    frontend = FRONTEND.search(configuration)
    if frontend is None:
        raise SystemExit("haproxy_guard: no frontend in the configuration; Ray's template has changed")
    before, own, after = (
        configuration[: frontend.start()],
        configuration[frontend.start() : frontend.end()],
        configuration[frontend.end() :],
    )
    ours = "".join(f"    http-request del-header {name}\n" for name in STRIPPED_HEADERS)
    ours += f"    timeout http-request {HEADER_SECONDS}s\n"
    return _on_loopback(before) + own + ours + _on_loopback(after)


def _on_loopback(section: str) -> str:
    return OPEN_BIND.sub(r"\g<bind>127.0.0.1:\g<port>", section)


def end_with_parent() -> None:
    """Ask Linux to stop this process, whatever it becomes, when its parent dies."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit("haproxy_guard: the parent is gone already")


def main() -> None:
    haproxy, *arguments = sys.argv[1:]
    configuration = Path(arguments[arguments.index("-f") + 1])
    text = configuration.read_text(encoding="utf-8")
    configuration.write_text(mended(text), encoding="utf-8")
    end_with_parent()
    os.execv(haproxy, [haproxy, *arguments])


if __name__ == "__main__":
    main()
