"""Run by Ray in place of HAProxy: mends the configuration that Ray wrote, then becomes HAProxy.

    python haproxy_guard.py /path/to/haproxy /path/to/secret -db -f /path/to/haproxy.cfg ...

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

#: Where callers are shared out by address, one ingress more or less moves few of them to another.
BY_ADDRESS = re.compile(r"^(?P<balance>\s*balance source)\s*$", re.MULTILINE)

#: How long the headers of a request may take; without a bound, idle callers hold connections for ever.
HEADER_SECONDS = 20

#: Serve's own control headers are not for callers (`serve_app.gates` says why).
STRIPPED_HEADERS = ("x-request-timeout-seconds", "x-request-disconnect-disabled")

#: In it the replicas are shown the secret, and know that it was HAProxy who added the last address
#: (`serve_app.forwarded`). It takes the place of what a caller sent under this name.
SECRET_HEADER = "x-zimage-proxy"

#: An id that is no plain text breaks the request in Ray's replica; in place of such a one, of a very long one
#: and of two, Ray makes one of its own.
WRONG_ID = (
    "{ req.hdr_cnt(x-request-id) gt 1 } || "
    "{ req.hdr_cnt(x-request-id) gt 0 } !{ req.fhdr(x-request-id) -m reg ^[!-~]{1,200}$ }"
)

#: Ray answers 500 in plain text where no replica answers, and 404 where there is no application (yet).
ERROR_FILE = re.compile(r"^(?P<indent>\s*)errorfile (?P<status>502|503|504) .*$", re.MULTILINE)
NO_APPLICATION = re.compile(
    r"^(?P<indent>\s*)http-request return status 404 .*Ping http://.*/-/routes.*$", re.MULTILINE
)
#: The same as our own answers: OpenAI's body, and when to come again.
UNANSWERED = (
    'content-type application/json string "{\\"error\\":{\\"message\\":\\"The server did not answer: it is '
    "being started, or a part of it has just died and is being replaced. Send the request again in a few "
    "seconds."
    '\\",\\"type\\":\\"server_error\\",\\"param\\":null,\\"code\\":\\"server_unavailable\\"}}" '
    "hdr Retry-After 5"
)


def mended(configuration: str, secret: str) -> str:
    """The configuration with open ports on the loopback, Serve's headers stripped, hang-ups passed on, a
    bound for how long headers take, word to the replicas of whom HAProxy heard, and answers in our form
    where no replica gives one.

    A frontend that listens on every interface because its person chose so is left alone.
    """
    configuration = SPLICED_REQUESTS.sub("", configuration)
    configuration = ERROR_FILE.sub(
        lambda found: f"{found['indent']}http-error status {found['status']} {UNANSWERED}", configuration
    )
    configuration = NO_APPLICATION.sub(
        lambda found: f"{found['indent']}http-request return status 503 {UNANSWERED}", configuration
    )
    configuration = BY_ADDRESS.sub(r"\g<balance>\n    hash-type consistent\n", configuration)
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
    ours += "    http-request add-header x-forwarded-for %[src]\n"
    ours += f"    http-request set-header {SECRET_HEADER} {secret}\n"
    ours += f"    http-request del-header x-request-id if {WRONG_ID}\n"
    return _on_loopback(before) + own + ours + _on_loopback(after)


def _on_loopback(section: str) -> str:
    return OPEN_BIND.sub(r"\g<bind>127.0.0.1:\g<port>", section)


def end_with_parent() -> None:
    """Ask Linux to stop this process, whatever it becomes, when its parent dies."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    # HAProxy would end at once on SIGTERM too, but not while it starts: one that came then was lost.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("haproxy_guard: the parent is gone already")


def main() -> None:
    haproxy, secret, *arguments = sys.argv[1:]
    configuration = Path(arguments[arguments.index("-f") + 1])
    text = configuration.read_text(encoding="utf-8")
    text = mended(text, Path(secret).read_text(encoding="ascii"))
    # It holds the secret now.
    configuration.chmod(0o600)
    configuration.write_text(text, encoding="utf-8")
    end_with_parent()
    os.execv(haproxy, [haproxy, *arguments])


if __name__ == "__main__":
    main()
