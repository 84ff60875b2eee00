"""In the server's place below a supervisor: it answers /healthz, starts a process, and dies as told.

    python -m tests.serve_app.stand_in_server DESCRIPTOR

It is given a folder in which files say what it is to do: `fate-N` for its Nth start, and it writes there what
it has done. Fates: none, it serves; "refuse", a LaunchFailed; "die", an end before it is ready; "deaf", it
serves and answers nothing.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from serve_app.local_cluster import LaunchFailed
from serve_app.supervision import Line, Ready, stop_on_signals

#: What the stand-in starts: it goes on when its parent is killed, as Ray's processes may.
CHILD = "import time; time.sleep(600)"


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return


def main() -> None:
    stop_on_signals()
    line = Line(int(sys.argv[1]))
    (told, port), own_folder = line.receive()
    starts = len(list(told.glob("start-*")))
    child = subprocess.Popen([sys.executable, "-c", CHILD])
    (told / f"start-{starts}").write_text(f"{child.pid} {own_folder}", encoding="utf-8")
    fate = told / f"fate-{starts}"
    chosen = fate.read_text(encoding="utf-8") if fate.exists() else ""
    if chosen == "refuse":
        line.tell(LaunchFailed("the port is taken"))
        return
    if chosen == "die":
        sys.exit(7)
    server = None if chosen == "deaf" else ThreadingHTTPServer(("127.0.0.1", port), Healthy)
    if server is not None:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    line.tell(Ready())
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        Path(told / f"ended-{starts}").touch()
        child.terminate()


if __name__ == "__main__":
    main()
